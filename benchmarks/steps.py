"""What a step costs: time, and the bytes that the state and the step take, beside other libraries.

    python -m benchmarks.steps                                        everything that a CPU does in minutes
    python -m benchmarks.steps --only second-order --sets gpt2        a larger model, with fewer rows
    python -m benchmarks.steps --only second-order roots --device cuda

A figure is the median over rounds, and in a round every optimizer takes one step, so that all of them meet the same
load of the machine; compare within one run only. The main figure is CPU time of the whole process on a CPU, and wall
time between synchronizations on CUDA. Parameters have fixed gradients. A library that is not installed is left out.
OpenMP's threads wait asleep (``OMP_WAIT_POLICY=passive``, unless it is set): awake they would count as CPU time.

Sections:

* first-order: AdamW.
* second-order: single steps. "ordinary": without statistics and roots. "statistics": with statistics, where they come
  apart from roots; "root": with statistics and roots of all blocks at once. "amortised T1/T2" is ordinary +
  (statistics - ordinary) / T1 + (root - statistics) / T2. Where statistics come in every step it is ordinary +
  (root - ordinary) / T2. Shampoo and CASPR in their default form have one period, T: ordinary + (root - ordinary) / T,
  with T = 100 beside 100/500 and T = 10 beside 1/10. "its matmuls": left @ gradient @ right in float32 on the blocks of
  the same limit. Peaks are bytes beyond the state. Steps that take longer than the budget are timed once, while their
  memory is watched, others until they have used it: see "updates timed".
* worst: all steps of one period of 100, after the first, of Shampoo with 4 bits on the first set of parameters.
* roots: the update step of Shampoo with 4 bits beside one ``torch.linalg.eigh`` for each of its factors.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from rich.progress import track
from torch.optim import AdamW, Optimizer

import lowbit_optim
from benchmarks import methods, report, timing
from benchmarks.methods import (
    ABSENT,
    FLOOR,
    FULL,
    SETS,
    EighLoop,
    Method,
    Run,
    adamw,
    force_ours,
    gradients_of,
    second_order,
    shampoo,
)
from benchmarks.timing import Time, Turn, amortised, extra_bytes, middle, state_bytes, take_turns, timed, unit

Rows = list[dict[str, Any]]
Tables = Iterator[tuple[str, Rows]]
# T1 and T2, and T of an optimizer with one period.
PERIODS = {"100/500": ((100, 500), 100), "1/10": ((1, 10), 10)}


def runs_of(rows: list[Method], shapes: list[tuple[int, ...]], args: argparse.Namespace) -> dict[str, Run]:
    """An optimizer of each method, without those that are not installed."""
    gradients = gradients_of(shapes, getattr(torch, args.dtype), torch.device(args.device))
    runs = {}
    for method in rows:
        try:
            runs[method.name] = Run(method, gradients)
        except ImportError as error:
            print(f"{method.name} is left out: {error}")
    return runs


# ---- first order -----------------------------------------------------------------------------------------------------


def first_order(args: argparse.Namespace) -> Tables:
    """AdamW on the parameters of a GPT."""
    makers = {
        "torch fused": partial(AdamW, lr=1e-3, fused=True),
        "torch foreach": partial(AdamW, lr=1e-3, foreach=True),
        "lowbit-optim, 8 bits": partial(lowbit_optim.AdamW, lr=1e-3, bits=8),
        "lowbit-optim, 4 bits": partial(lowbit_optim.AdamW, lr=1e-3, bits=4),
        "bitsandbytes AdamW8bit": _bitsandbytes,
        "torchao AdamW8bit": partial(_torchao, name="AdamW8bit"),
        "torchao AdamW4bit": partial(_torchao, name="AdamW4bit"),
    }
    device = torch.device(args.device)
    runs = runs_of([Method(label, None, make) for label, make in makers.items()], SETS["gpt"](), args)
    turns = {name: Turn(run.prepare, run.optimizer.step) for name, run in runs.items()}
    rows: Rows = []
    for name, times in take_turns(turns, device, args.rounds, args.warm_up).items():
        time, size = middle(times), state_bytes(runs[name].optimizer)
        row = {"optimizer": name, unit(device): time.main, "/ torch fused": 1.0, "wall ms": time.wall}
        row["/ torch fused"] = time.main / (rows[0] if rows else row)[unit(device)]
        numel = sum(p.numel() for p in runs[name].parameters)
        rows.append(row | {"state MB": size / 1e6, "bytes per parameter": size / numel})
    report.show(f"AdamW on the parameters of a GPT, {args.dtype}, {torch.get_num_threads()} threads", rows)
    yield f"first-order, {args.dtype}{on(args)}", rows


def _bitsandbytes(parameters: list[Any]) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)


def _torchao(parameters: list[Any], name: str) -> Optimizer:
    import torchao.optim

    return getattr(torchao.optim, name)(parameters, lr=1e-3)


# ---- second order ----------------------------------------------------------------------------------------------------


def measure(runs: dict[str, Run], args: argparse.Namespace) -> Rows:
    """A row for each run; the first is the one that the others are compared with, beside the matmuls of their limit."""
    device, budget = torch.device(args.device), args.budget
    peaks: dict[tuple[str, str], int] = {}
    watched: dict[tuple[str, str], Time] = {}
    for name, run in track(list(runs.items()), transient=True):  # which also warms everything up
        try:
            run.prepare("ordinary")
            run.optimizer.step()
            for kind in reversed(run.method.kinds):  # from the root on: before it an ordinary step does less
                run.prepare(kind)
                watched[name, kind] = timed(lambda: peaks.update({(name, kind): _peak(run)}), device)  # noqa: B023
        except RuntimeError as error:
            if run.method.ours:
                raise
            print(f"{name} is left out: its step failed: {error}")
            del runs[name]
    times: dict[tuple[str, str], list[Time]] = {}
    for kind, rounds in (("ordinary", args.rounds), ("statistics", args.updates), ("root", args.updates)):
        long = {key: [own] for key, own in watched.items() if key[1] == kind and own.wall > 1e3 * budget}
        turns = {
            name: Turn(partial(run.prepare, kind), run.optimizer.step)  # type: ignore[arg-type]
            for name, run in runs.items()
            if kind in run.method.kinds and (name, kind) not in long
        }
        taken = take_turns(turns, device, rounds, budget=budget)
        times |= long | {(name, kind): own for name, own in taken.items()}
    medians = {key: middle(own) for key, own in times.items()}
    limits = {run.method.limit: name for name, run in runs.items() if run.method.label == FLOOR}
    return [
        row_of(
            run,
            {kind: medians[name, kind] for kind in run.method.kinds},
            medians[next(iter(runs)), "ordinary"].main,
            medians[limits[run.method.limit], "ordinary"].main if run.method.limit in limits else None,
            len(times[name, run.method.kinds[-1]]),
            {kind: peaks[name, kind] for kind in run.method.kinds if run.method.label != FLOOR},
        )
        for name, run in runs.items()
    ]


def _peak(run: Run) -> int:
    return extra_bytes(run.optimizer, run.apart)


def row_of(
    run: Run, times: dict[str, Time], first: float, floor: float | None, updates: int, peaks: dict[str, int]
) -> dict[str, Any]:
    """A row of the table from the medians of single steps."""
    method, at = run.method, unit(run.parameters[0].device)
    size = 0 if method.label == FLOOR else state_bytes(run.optimizer, run.apart)
    ordinary, statistics, root = (times.get(kind) for kind in ("ordinary", "statistics", "root"))
    assert ordinary is not None
    row = {"optimizer": method.label, "blocks": method.limit or "whole", "ours": method.ours}
    row |= {f"ordinary, {at}": ordinary.main, f"/ {FLOOR}": floor and ordinary.main / floor}
    row |= {"/ AdamW": ordinary.main / first, "ordinary, wall ms": ordinary.wall}
    for kind, time in (("statistics", statistics), ("root", root)):
        row |= {f"{kind}, {at}": time and time.main, f"{kind}, wall ms": time and time.wall}
    row["updates timed"] = updates if root else None
    for title, (two, one) in PERIODS.items():
        periods = (one, one) if method.schedule == "one period" else two
        mean = amortised(ordinary.main, statistics and statistics.main, root.main, periods) if root else ordinary.main
        row[f"amortised {title}, {at}"] = mean
    row |= {"state MB": size / 1e6, "bytes per parameter": size / sum(p.numel() for p in run.parameters)}
    for title, kind in (("ordinary", "ordinary"), ("update", "root")):
        row[f"peak {title}, MB"] = peaks[kind] / 1e6 if kind in peaks else None
    return row


def second_order_section(args: argparse.Namespace) -> Tables:
    """Single steps on each parameter set."""
    for name in args.sets:
        runs = runs_of(second_order(args.limits, few=args.few or name not in FULL), SETS[name](), args)
        rows = measure(runs, args)
        hidden = {"ours", "statistics, wall ms", "root, wall ms"} | (
            {"ordinary, wall ms"} if args.device == "cuda" else set()
        )
        title = f"second-order steps on the parameters of {name}, {args.dtype}, {place(args)}"
        shown = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
        report.show(title, shown, f"On no package registry, so without a row: {', '.join(ABSENT)}.")
        yield f"second-order, {name}{on(args)}", rows


def worst(args: argparse.Namespace) -> Tables:
    """Every step of the second period."""
    device, at, period, parameters = (
        torch.device(args.device),
        unit(torch.device(args.device)),
        args.period,
        args.sets[0],
    )
    switched = []
    for stagger in (True, False):
        make = partial(lowbit_optim.Shampoo, lr=1e-3, bits=4, stagger=stagger, fused=True)
        switched.append(Method(f"4 bits, stagger={stagger}", None, make, force_ours, "one period", True))
    runs = runs_of(switched, SETS[parameters](), args)
    for run in runs.values():
        run.prepare("root")
        run.optimizer.step()
        for group in run.optimizer.param_groups:
            group["statistics_frequency"] = period
        for own in run.optimizer.state.values():
            own["step"].fill_(2 * period)
    turns = {name: Turn(partial(_fresh, run), run.optimizer.step) for name, run in runs.items()}
    rows: Rows = []
    for name, times in take_turns(turns, device, period).items():
        median, row = middle(times), {"Shampoo": name, "steps": period}
        for label, j in ((at, 0), ("wall ms", 1)):
            largest = max(time[j] for time in times)
            row |= {f"median, {label}": median[j], f"worst, {label}": largest, f"ratio, {label}": largest / median[j]}
        rows.append(row)
    report.show(f"the worst of {period} steps on the parameters of {parameters}, {place(args)}", rows)
    yield f"worst, {parameters}{on(args)}", rows


def _fresh(run: Run) -> None:
    """New gradients, and no step of a kind that is forced."""
    for parameter, gradient in zip(run.parameters, run.gradients, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(gradient)


def roots(args: argparse.Namespace) -> Tables:
    """The update step beside a loop of eigh over its factors."""
    device, at = torch.device(args.device), unit(torch.device(args.device))
    rows: Rows = []
    for name in args.sets:
        limit = max(args.limits)
        runs = runs_of([adamw(), shampoo(4, limit)], SETS[name](), args)
        first, run = runs.values()
        for warm, kind in ((first, "ordinary"), (run, "root"), (run, "root"), (run, "ordinary")):
            warm.prepare(kind)  # type: ignore[arg-type]
            warm.optimizer.step()
        loop = EighLoop(run.parameters, limit)
        torch.linalg.eigh(loop.factors[0])
        turns = {
            "AdamW": Turn(first.prepare, first.optimizer.step),
            "ordinary": Turn(partial(run.prepare, "ordinary"), run.optimizer.step),
            "update": Turn(partial(run.prepare, "root"), run.optimizer.step),
            "eigh": Turn(lambda: None, loop.step),
        }
        medians = {key: middle(own).main for key, own in take_turns(turns, device, 5, budget=args.budget).items()}
        row: dict[str, Any] = {"parameters": name, "factors": len(loop.factors)}
        row |= {f"AdamW, {at}": medians["AdamW"], f"ordinary, {at}": medians["ordinary"]}
        row |= {"ordinary / AdamW": medians["ordinary"] / medians["AdamW"], f"update, {at}": medians["update"]}
        row |= {f"eigh alone, {at}": medians["eigh"], "eigh / update": medians["eigh"] / medians["update"]}
        rows.append(row)
    report.show(f"the update step of Shampoo, 4 bits, and one eigh for each of its factors, {place(args)}", rows)
    yield f"roots{on(args)}", rows


SECTIONS: dict[str, Callable[[argparse.Namespace], Tables]] = {
    "first-order": first_order,
    "second-order": second_order_section,
    "worst": worst,
    "roots": roots,
}


def place(args: argparse.Namespace) -> str:
    """Where it was measured, for a title."""
    return torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"


def on(args: argparse.Namespace) -> str:
    """The end of a table's name: figures of a GPU do not take the place of those of a CPU."""
    return f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=["first-order", "second-order", "worst"], choices=list(SECTIONS), help="sections")
    add(
        "--sets",
        nargs="+",
        default=["gpt"],
        choices=list(SETS),
        help="parameters, but of first-order; worst: the first (default gpt)",
    )
    add("--limits", nargs="+", type=int, default=[1200, 512], help="of blocks' sides (default 1200 512)")
    add("--few", action="store_true", help="fewer optimizers, as for the larger sets")
    add("--rounds", type=int, default=15, help="ordinary steps of each optimizer that are timed (default 15)")
    add("--warm-up", type=int, default=3, help="first-order steps before them (default 3)")
    add("--updates", type=int, default=5, help="update steps that are timed (default 5)")
    add("--budget", type=float, default=3.0, help="seconds for timed steps of one kind of an optimizer (default 3)")
    add("--period", type=int, default=100, help="of the section worst (default 100)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads (default torch's choice)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the parameters (default float32)")
    add("--device", default=os.environ.get("LOWBIT_DEVICE", "cpu"), choices=["cpu", "cuda"], help="(default cpu)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    code = report.code_hash(__file__, methods.__file__, timing.__file__)
    for section in args.only:
        how = {"environment": report.environment(), "code": code} | vars(args)
        how["wait policy"] = os.environ["OMP_WAIT_POLICY"]
        for name, rows in SECTIONS[section](args):
            report.add("steps", {name: rows}, how)
            if name == f"second-order, gpt{on(args)}":
                from benchmarks import figures  # matplotlib is not needed to measure

                figures.draw(f"steps{'-cuda' * (args.device == 'cuda')}.png")


if __name__ == "__main__":
    main()
