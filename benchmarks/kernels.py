"""How fast numbers become codes and codes numbers, beside ``copy_`` and other libraries.

A rate is that of the side that is not coded, counted as float32, in 1e9 bytes a second: bytes of it over the time.
"/ copy_" is the rate over that at which ``copy_`` moves as many float32 numbers, in the same run: 1 is as fast as a
copy. Times are medians over rounds, and in a round everything runs once, so that all of it meets the same load of the
machine; compare within one run only. What is decoded is written into a tensor that is kept, as far as a library can. A
library that is not installed is left out. The reference and torchao, which are slow, take a sixteenth of the numbers on
the CPU, where caches hold them. OpenMP's threads wait asleep (``OMP_WAIT_POLICY=passive``, unless set): awake they
would take the cores from whoever comes next.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --device cuda --numbers 268435456
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import isqrt
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from rich.progress import track
from torch import Tensor

import lowbit_optim
from benchmarks import report
from lowbit_optim import kernels
from lowbit_optim.kernels import reference
from lowbit_optim.storage.codebooks import table

ORDER = 1024  # of matrices
ROW = 4096
PEER_BLOCK = 64
TABLES = {2: "nf", 3: "nf", 4: "nf", 6: "linear", 8: "linear"}
BITS = (8, 4, 2)  # of the variants
Work = tuple[int, Callable[[], Any]]  # numbers, and what is done with them


def works(numbers: int, device: torch.device, block_size: int) -> Iterator[tuple[dict[str, Any], Work]]:
    """Everything that is measured: its columns, and the work."""
    x = torch.randn(numbers // ROW, ROW, device=device)
    kept = torch.empty_like(x)
    yield row("copy_", "copy", None, "", "rows", torch.float32), (x.numel(), partial(kept.copy_, x))
    fast = kernels.backend("codec", device, torch.float32)
    name = {"cpu_codec": "numba", "gpu_codec": "triton"}.get(fast.__name__.rpartition(".")[2], "reference")
    for bits in TABLES:
        for scale in ("absmax", "fitted"):
            yield from of_rows(name, kernels, x, kept, bits, scale, block_size)
    for bits in BITS:
        for layout in ("triangle", "square"):
            yield from of_matrices(name, kernels, x, kept, bits, layout, block_size)
        low, low_kept = x.bfloat16(), kept.bfloat16()
        yield from of_rows(name, kernels, low, low_kept, bits, "absmax", block_size)
        yield from of_matrices(name, kernels, low, low_kept, bits, "triangle", block_size)
    few, few_kept = x[: len(x) // 16], kept[: len(x) // 16]
    for bits in BITS:
        yield from of_rows("reference", reference, few, few_kept, bits, "absmax", block_size)
        yield from of_matrices("reference", reference, few, few_kept, bits, "triangle", block_size)
    yield from of_rows("reference", reference, few, few_kept, 4, "fitted", block_size)
    for peer in (bitsandbytes_works, torchao_works):
        try:
            yield from peer(x, kept)
        except ImportError as error:
            print(f"{peer.__name__.removesuffix('_works')} is left out: {error}")


def row(library: str, work: str, bits: int | None, codes: str, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """The columns that say what is measured."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {"library": library, "work": work, "bits": bits, "codes": codes, "layout": layout, "dtype": dtype_name}


def of_rows(
    name: str, module: Any, x: Tensor, kept: Tensor, bits: int, scale: str, block_size: int
) -> Iterator[tuple[dict[str, Any], Work]]:
    """Our codec on rows; ``module`` has the functions of ``lowbit_optim.kernels``."""
    tables = table(TABLES[bits], bits, torch.float32, x.device)
    described = bits, f"{TABLES[bits]}, {scale}", "rows", x.dtype
    quantize = partial(module.quantize_blockwise, x, *tables, bits, block_size, scale == "fitted", True)
    yield row(name, "quantize", *described), (x.numel(), quantize)
    if scale == "absmax":  # decoding is the same for both
        how = tables.values, bits, block_size, x.shape[-1], x.dtype, kept
        yield row(name, "dequantize", *described), (x.numel(), partial(module.dequantize_blockwise, *quantize(), *how))


def of_matrices(
    name: str, module: Any, x: Tensor, kept: Tensor, bits: int, layout: str, block_size: int
) -> Iterator[tuple[dict[str, Any], Work]]:
    """Our codec on symmetric matrices, of which every number counts."""
    order = min(ORDER, isqrt(x.numel()))
    count = x.numel() // order**2
    x, kept = (tensor.view(-1)[: count * order**2].view(count, order, order) for tensor in (x, kept))
    tables = table(TABLES[bits], bits, torch.float32, x.device)
    described = bits, f"{TABLES[bits]}, absmax", layout, x.dtype
    quantize = partial(module.quantize_symmetric, x, *tables, bits, block_size, False, True, layout)
    yield row(name, "quantize", *described), (x.numel(), quantize)
    diagonal = torch.ones(x.shape[:2], device=x.device)
    how = diagonal, tables.values, bits, block_size, layout, x.dtype, kept
    yield row(name, "dequantize", *described), (x.numel(), partial(module.dequantize_symmetric, *quantize(), *how))


def bitsandbytes_works(x: Tensor, kept: Tensor) -> Iterator[tuple[dict[str, Any], Work]]:
    """Block-wise codes of bitsandbytes."""
    from bitsandbytes import functional

    described = "rows", torch.float32
    quantize = partial(functional.quantize_4bit, x, blocksize=PEER_BLOCK, quant_type="nf4")
    codes, state = quantize()
    yield row("bitsandbytes", "quantize", 4, "nf", *described), (x.numel(), quantize)
    out = {"out": kept} if x.is_cuda else {}  # which it has not on the CPU
    decode = partial(functional.dequantize_4bit, codes, state, **out)
    yield row("bitsandbytes", "dequantize", 4, "nf", *described), (x.numel(), decode)
    quantize = partial(functional.quantize_blockwise, x, blocksize=PEER_BLOCK)
    codes, state = quantize()
    yield row("bitsandbytes", "quantize", 8, "dynamic", *described), (x.numel(), quantize)
    decode = partial(functional.dequantize_blockwise, codes, state, **out)
    yield row("bitsandbytes", "dequantize", 8, "dynamic", *described), (x.numel(), decode)


def torchao_works(x: Tensor, kept: Tensor) -> Iterator[tuple[dict[str, Any], Work]]:
    """Block-wise codes of torchao's optimizers, eager."""
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    few, few_kept = (x, kept) if x.is_cuda else (x[: len(x) // 16], kept[: len(x) // 16])
    for bits, kind in ((4, OptimState4bit), (8, OptimState8bit)):
        state = kind.zeros(few.shape, True, PEER_BLOCK, device=x.device)
        described = bits, "dynamic", "rows", torch.float32
        yield row("torchao, eager", "quantize", *described), (few.numel(), partial(state.copy_, few))
        yield row("torchao, eager", "dequantize", *described), (few.numel(), partial(_torchao_decode, state, few_kept))


def _torchao_decode(state: Any, kept: Tensor) -> None:
    kept.copy_(state.dequantize())


def measure(everything: list[tuple[dict[str, Any], Work]], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each; the first is what the others are compared with."""
    seconds: list[list[float]] = [[] for _ in everything]
    for r in track(range(rounds + 1), transient=True):  # the first warms up
        for (_, (_, work)), times in zip(everything, seconds, strict=True):
            start = _now(device)
            work()
            if r:
                times.append(_now(device) - start)
    rates = [4e-9 * work[0] / median(times) for (_, work), times in zip(everything, seconds, strict=True)]
    return [
        described | {"GB/s": rate, "/ copy_": rate / rates[0]}
        for (described, _), rate in zip(everything, rates, strict=True)
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def code_hash() -> str:
    """Of the kernels and of this file."""
    folder = Path(kernels.__file__).parent
    storage = Path(lowbit_optim.__file__).parent / "storage"
    return report.source_hash([*folder.glob("*.py"), storage / "codebooks.py", Path(__file__)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--numbers", type=int, default=16_000_000, help="how many numbers (default 16000000)")
    add("--block-size", type=int, default=64, help="numbers that share a scale (default 64)")
    add("--rounds", type=int, default=9, help="how often everything is timed (default 9)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads (default torch's choice)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    rows = measure(list(works(args.numbers, device, args.block_size)), args.rounds, device)
    report.show(f"Codes, {args.numbers:.3g} numbers, {args.device}, {args.threads} threads", rows)
    name = "kernels" if device.type == "cpu" else f"kernels-{device.type}"
    report.keep(name, {"kernels": rows}, vars(args) | {"code": code_hash()})


if __name__ == "__main__":
    main()
