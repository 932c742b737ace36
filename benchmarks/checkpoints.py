"""Bytes on disk and seconds of an optimizer's checkpoint, beside ``torch.save`` of the same optimizer in 32 bits.

The optimizer is Shampoo over AdamW on the shapes of a model: in 32 bits with statistics and roots as full squares, and
with few bits over moments of 4. Its state is that after one step, in which the base runs alone: what it holds does not
change what it takes. In a round everything is saved and loaded once, in turn; a figure is the median over rounds.
``save_checkpoint`` waits until the disk has everything (fsync) and hashes it, ``load_checkpoint`` checks the hashes and
loads into a live optimizer; ``torch.save`` does none of it, and ``torch.load`` only reads. Files were just written, so
they are read from memory.

    python -m benchmarks.checkpoints
"""

import argparse
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import nn

from benchmarks.report import code_hash, keep, show
from lowbit_optim import Shampoo, load_checkpoint, save_checkpoint
from lowbit_optim.shapes import MODELS

FULL = "torch.save, 32 bits"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    FULL: {"bits": 32, "storage": "dense"},
    "32 bits": {"bits": 32, "storage": "dense"},
    "32 bits, moments of 4": {"bits": 32, "storage": "dense", "base_bits": 4},
    **{f"{bits} bit{'s' * (bits > 1)}, moments of 4": {"bits": bits, "base_bits": 4} for bits in (4, 2, 1)},
}


def stepped(model: str, **options: Any) -> Shampoo:
    """The optimizer of a model's shapes, after a step of its base."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in MODELS[model]().values()]
    optimizer = Shampoo(parameters, lr=1e-3, start_preconditioning_step=2, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def seconds(work: Callable[[], Any]) -> float:
    """Of wall time."""
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def save_torch(optimizer: Shampoo, file: Path) -> None:
    """What trainers do."""
    torch.save(optimizer.state_dict(), file)


def measure(model: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each of ``OPTIMIZERS``."""
    optimizers = {label: stepped(model, **options) for label, options in OPTIMIZERS.items() if label != FULL}
    optimizers = {FULL: optimizers["32 bits"]} | optimizers
    saving: dict[str, list[float]] = {label: [] for label in optimizers}
    loading: dict[str, list[float]] = {label: [] for label in optimizers}
    sizes = {}
    for _ in track(range(rounds), transient=True):
        for label, optimizer in optimizers.items():
            path = folder / "checkpoint"
            path.mkdir()
            if label == FULL:
                file = path / "optimizer-0.pt"
                save, load = partial(save_torch, optimizer, file), partial(torch.load, file, weights_only=True)
            else:
                save, load = (partial(work, path, optimizer=optimizer) for work in (save_checkpoint, load_checkpoint))
            saving[label].append(seconds(save))
            loading[label].append(seconds(load))
            sizes[label] = sum(file.stat().st_size for file in path.glob("optimizer-*"))
            shutil.rmtree(path)
    rows = []
    for label in optimizers:
        row: dict[str, Any] = {"Shampoo": label, "MB": sizes[label] / 1e6, "/ torch.save": sizes[label] / sizes[FULL]}
        for name, spent in (("save", saving), ("load", loading)):
            row |= {f"{name}, s": median(spent[label]), f"{name} / torch": median(spent[label]) / median(spent[FULL])}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="gpt2", choices=list(MODELS), help="whose shapes (default gpt2, 124 million)")
    add("--rounds", type=int, default=1, help="how often everything is timed (default 1: minutes)")
    add("--folder", type=Path, help="where to write, temporarily (default the system's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(args.model, args.rounds, Path(folder))
    show(f"The optimizer's checkpoint, shapes of {args.model}", rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    keep("checkpoints", {"checkpoints": rows}, settings | {"code": code_hash(__file__)})


if __name__ == "__main__":
    main()
