"""What a step costs: CPU and wall time, and the bytes that the state takes, beside other libraries.

CPU time is that of the whole process, every thread of it. A figure is the median over rounds, and in a round every
optimizer takes one step, so that all of them meet the same load of the machine; compare within one run only. The
parameters are the matrices and layer norms of a GPT of 6 layers and width 384, 10.6 million, with fixed gradients. A
library that is not installed is left out. OpenMP's threads wait asleep (``OMP_WAIT_POLICY=passive``, unless it is
set): awake they would count as CPU time.

    python -m benchmarks.steps --only first-order
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from rich.progress import track
from torch import Tensor
from torch.optim import AdamW, Optimizer

import lowbit_optim
from benchmarks import report

LAYERS, WIDTH = 6, 384
SHAPES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,)] * LAYERS
Make = Callable[[list[Tensor]], Optimizer]


def gpt(dtype: torch.dtype) -> list[Tensor]:
    """Parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in SHAPES:
        parameters.append(torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        parameters[-1].grad = (torch.randn(shape, generator=generator) * 1e-2).to(dtype)
    return parameters


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of all tensors of the state, those that parameters share counted once."""
    storages = {}
    for tensor in _tensors(list(optimizer.state.values())):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(x: Any) -> Iterable[Tensor]:
    """The plain tensors of a state, also those inside of tensor subclasses."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, Tensor) and hasattr(x, "__tensor_flatten__"):
        yield from _tensors([getattr(x, name) for name in x.__tensor_flatten__()[0]])
    elif isinstance(x, Tensor):
        yield x


def measure(makers: dict[str, Make], dtype: torch.dtype, warm_up: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each optimizer; the first is what the others are compared with."""
    optimizers: dict[str, Optimizer] = {}
    for name, make in makers.items():
        try:
            optimizers[name] = make(gpt(dtype))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for r in track(range(warm_up + rounds), transient=True):
        for name, optimizer in optimizers.items():
            cpu, wall = time.process_time(), time.perf_counter()
            optimizer.step()
            if r >= warm_up:
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows: list[dict[str, Any]] = []
    for name, optimizer in optimizers.items():
        cpu, wall = (1e3 * median(column) for column in zip(*seconds[name], strict=True))
        size, numel = state_bytes(optimizer), sum(p.numel() for p in optimizer.param_groups[0]["params"])
        first = rows[0]["CPU ms"] if rows else cpu
        row = {"optimizer": name, "CPU ms": cpu, f"/ {next(iter(optimizers))}": cpu / first, "wall ms": wall}
        rows.append(row | {"state MB": size / 1e6, "bytes per parameter": size / numel})
    return rows


# ---- sections --------------------------------------------------------------------------------------------------------


def first_order(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """AdamW."""
    makers = {
        "torch fused": partial(AdamW, lr=1e-3, fused=True),
        "torch foreach": partial(AdamW, lr=1e-3, foreach=True),
        "lowbit-optim, 8 bits": partial(_ours, bits=8),
        "lowbit-optim, 4 bits": partial(_ours, bits=4),
        "bitsandbytes AdamW8bit": _bitsandbytes,
        "torchao AdamW8bit": partial(_torchao, name="AdamW8bit"),
        "torchao AdamW4bit": partial(_torchao, name="AdamW4bit"),
    }
    rows = measure(makers, getattr(torch, args.dtype), args.warm_up, args.rounds)
    report.show(f"AdamW on the parameters of a GPT, {args.dtype}, {torch.get_num_threads()} threads", rows)
    return {f"first-order, {args.dtype}": rows}


def _ours(parameters: list[Tensor], bits: int) -> Optimizer:
    return lowbit_optim.AdamW(parameters, lr=1e-3, bits=bits)


def _bitsandbytes(parameters: list[Tensor]) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)


def _torchao(parameters: list[Tensor], name: str) -> Optimizer:
    import torchao.optim

    return getattr(torchao.optim, name)(parameters, lr=1e-3)


SECTIONS = {"first-order": first_order}


def code_hash() -> str:
    """Of the library and of this file."""
    package = Path(lowbit_optim.__file__).parent
    kernels = Path(lowbit_optim.kernels.__file__).parent.glob("*.py")
    files = {file.resolve() for file in (*package.rglob("*.py"), *kernels)}
    return report.source_hash([*files, Path(__file__)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), help="sections (default all)")
    add("--rounds", type=int, default=15, help="steps of each optimizer that are timed (default 15)")
    add("--warm-up", type=int, default=3, help="steps before them (default 3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads (default torch's choice)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the parameters (default float32)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = report.RESULTS / "steps.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tables": {}, "settings": {}}
    for section in args.only:
        how = {"environment": report.environment(), "code": code_hash()} | vars(args)
        how["wait policy"] = os.environ["OMP_WAIT_POLICY"]
        for name, rows in SECTIONS[section](args).items():
            kept["tables"][name], kept["settings"][name] = rows, how
    report.keep("steps", kept["tables"], kept["settings"])


if __name__ == "__main__":
    main()
