"""What becomes of a run of 32-bit Shampoo that goes on at few bits after `lowbit-optim convert`.

For every seed: a run of 32 bits throughout, one of few bits from the start, and one of 32 bits for the first half,
which is saved, converted and loaded by a new optimizer. All have the same first weights, batches and schedule, so that
what differs by seed is taken out by the difference to the run of few bits.

    python -m benchmarks.conversion
"""

import argparse
import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.report import keep, mean_and_error, show
from benchmarks.tasks import TASKS, batches, default_folder, load, loss_of, schedule, validate
from lowbit_optim import Shampoo, cli, load_checkpoint, save_checkpoint


def losses(
    task: str, seed: int, steps: int, first: float, then: float, settings: dict[str, Any], folder: Path
) -> float:
    """The validation loss of a run of `first` bits whose second half has `then`."""
    chosen = TASKS[task]
    data = load(chosen.data, folder)
    inputs, targets = data.train
    torch.manual_seed(seed)
    model = chosen.model()
    optimizer = Shampoo(model.parameters(), bits=first, **settings)
    scheduler = LambdaLR(optimizer, partial(schedule, steps))
    for step, rows in enumerate(batches(len(inputs), chosen.batch, steps, seed)):
        if step == steps // 2 and then != first:
            optimizer = Shampoo(model.parameters(), bits=then, **settings)
            scheduler = _through_a_folder(model, optimizer, scheduler, steps, then)
        loss = loss_of(model, inputs[rows], targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return validate(model, *data.validation)


def _through_a_folder(model: Any, optimizer: Shampoo, scheduler: LambdaLR, steps: int, bits: float) -> LambdaLR:
    """Save, convert, load into the new optimizer; its scheduler."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        before, after = f"{folder}/before", f"{folder}/after"
        save_checkpoint(before, model=model, optimizer=scheduler.optimizer, scheduler=scheduler)
        if cli.main(["convert", before, after, "--bits", str(bits)]):
            raise RuntimeError("the conversion failed")
        following = LambdaLR(optimizer, partial(schedule, steps))
        load_checkpoint(after, model=model, optimizer=optimizer, scheduler=following)
    return following


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="digits-mlp", choices=TASKS, help="default digits-mlp")
    add("--bits", type=float, nargs="+", default=[4, 2], help="after the conversion (default 4 2)")
    add("--seeds", type=int, default=8, help="runs of each kind (default 8)")
    add("--steps", type=int, default=300, help="of each run (default 300)")
    add("--lr", type=float, default=3e-3, help="default 3e-3")
    add("--data", type=Path, default=default_folder(), help="folder of the data sets")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"lr": args.lr, "statistics_frequency": 10, "min_quant_size": 1024}
    plans = [(32, 32), *((b, b) for b in args.bits), *((32, b) for b in args.bits)]
    runs = [(first, then, seed) for first, then in plans for seed in range(args.seeds)]
    found: dict[tuple[float, float], list[float]] = {plan: [] for plan in plans}
    for first, then, seed in track(runs, transient=True):
        found[first, then].append(losses(args.task, seed, args.steps, first, then, settings, args.data))
    rows = []
    for first, then in plans:
        mean, error = mean_and_error(found[first, then])
        row: dict[str, Any] = {"bits": f"{first:g}" if first == then else f"{first:g}, then {then:g}"}
        row |= {"validation loss": mean, "+-": error}
        apart, spread = mean_and_error([a - b for a, b in zip(found[first, then], found[then, then], strict=True)])
        same = first == then
        row |= {"less that of few bits": None if same else apart, "+- ": None if same else spread}
        rows.append(row | {"each": [round(x, 5) for x in found[first, then]]})
    shown = [{k: "-" if v is None else v for k, v in row.items() if k != "each"} for row in rows]
    show(f"{TASKS[args.task].title}: 32-bit Shampoo, converted in the middle of {args.steps} steps", shown)
    keep("conversion", {"losses": rows}, {**vars(args), "data": None, **settings})


if __name__ == "__main__":
    main()
