"""How fast a low-bit average should forget: training with other decays of the statistics.

Each update of a factor rounds the whole average again, and what that leaves stays in it for 1 / (1 - beta) updates,
whereas a faster decay averages fewer statistics. Losses are those of benchmarks.convergence, at the rate that is tuned
there for 32-bit Shampoo with beta 0.95, with seeds that the comparison there does not use. Runs that are in
results/decays.jsonl are not repeated.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.optim import Optimizer

from benchmarks import report, tasks
from benchmarks.convergence import COMMON, EVERY_10, FAMILIES, ROOT, Plan, key
from benchmarks.tasks import TASKS
from lowbit_optim import Shampoo

DECAYS = (0.95, 0.9, 0.8, 0.6)
FORMS: dict[str, dict[str, Any]] = {
    "32": {**ROOT, "bits": 32, **EVERY_10},
    "root 2": {**ROOT, "bits": 2},
    "root 1.5": {**ROOT, "bits": 1.5},
    "root 1": {**ROOT, "bits": 1},
    "logarithm 2": {**ROOT, "bits": 2, "storage": "logarithm"},
    "logarithm 1": {**ROOT, "bits": 1, "storage": "logarithm"},
}
SEEDS = {"digits-mlp": 20, "fashion-convnet": 3, "fashion-vit": 3, "shakespeare-gpt": 3}
KEPT = report.RESULTS / "decays.jsonl"


def make(keywords: dict[str, Any], model: nn.Module) -> Optimizer:
    return Shampoo(model.parameters(), **keywords)


def work(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train once, in a worker."""
    torch.set_num_threads(1)
    keywords = {**run["keywords"], "lr": run["lr"]}
    return tasks.train(TASKS[run["task"]], partial(make, keywords), seed=run["seed"], steps=run["steps"], folder=folder)


def wanted(names: list[str], forms: list[str], decays: list[float], seeds: int) -> list[dict[str, Any]]:
    """The runs, seed by seed."""
    known = {key(record): record for record in report.read_lines(report.RESULTS / "convergence.jsonl")}
    plan = Plan(names, FAMILIES["shampoo"], ["shampoo-32"])
    runs: list[dict[str, Any]] = []
    for seed, task in product(range(seeds), names):
        rate = plan.rate(known, task, "shampoo-32")
        if rate is None:
            raise SystemExit(f"{task}: the rate of shampoo-32 is not tuned yet: run benchmarks.convergence first")
        for form, decay in product(forms, decays) if seed < SEEDS[task] else ():
            keywords = {name: report.plain(value) for name, value in sorted({**COMMON, **FORMS[form]}.items())}
            run = {"task": task, "method": form, "keywords": {**keywords, "shampoo_beta": decay}, "lr": rate}
            runs.append({**run, "seed": seed, "steps": TASKS[task].steps})
    return runs


def show(records: list[dict[str, Any]]) -> None:
    """Mean loss, minus that of 32 bits at beta 0.95 with the same seed, and twice its standard error."""
    losses = {(r["task"], r["method"], r["keywords"]["shampoo_beta"], r["seed"]): r["validation_loss"] for r in records}
    for task in dict.fromkeys(r["task"] for r in records):
        rows = []
        for form in FORMS:
            row: dict[str, Any] = {"form": form}
            for decay in DECAYS:
                seeds = [
                    s for s in range(SEEDS[task]) if {(task, form, decay, s), (task, "32", 0.95, s)} <= losses.keys()
                ]
                found = [losses[task, form, decay, s] - losses[task, "32", 0.95, s] for s in seeds]
                spread = f" ± {2 * stdev(found) / len(found) ** 0.5:.4f}" if len(found) > 1 else ""
                row[f"beta {decay}"] = f"{fmean(found):+.4f}{spread} ({len(found)})" if found else "-"
            rows.append(row)
        report.show(f"{task}: loss minus that of 32 bits at beta 0.95 (seeds)", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=tasks.default_folder(), help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--decays", nargs="+", type=float, choices=DECAYS, default=list(DECAYS))
    parser.add_argument("--seeds", type=int, default=max(SEEDS.values()), help="at most so many (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    records = report.read_lines(KEPT)
    done = {key(record) for record in records}
    runs = [] if args.summary else wanted(args.tasks, args.forms, args.decays, args.seeds)
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(work, run, args.data): run for run in runs if key(run) not in done}
        for future in track(as_completed(futures), "runs", total=len(futures), disable=not futures):
            records.append({**futures[future], **future.result(), **report.environment()})
            report.append_line(KEPT, records[-1])
    show(records)


if __name__ == "__main__":
    main()
