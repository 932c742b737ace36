"""Do the low-bit forms of an optimizer train as its 32-bit self does? Four real tasks, several forms, many seeds.

The learning rate is tuned for AdamW and for the 32-bit optimizer, with seed 0, on a grid that grows where its best rate
lies on an edge, and that is refined beside the best; every other form takes the 32-bit one's. Then all train with the
same seeds, 100 and up, and each is compared with the 32-bit one seed by seed. A run that has ended is a line in
results/convergence.jsonl, and is not run again.

    python -m benchmarks.convergence --data DIR --jobs 2     # Shampoo; can be stopped and started again at any time
    python -m benchmarks.convergence --summary               # the tables and the plot
    python -m benchmarks.convergence --family kfac --tasks digits-mlp shakespeare-gpt --data DIR    # another optimizer
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import lowbit_optim
from benchmarks import report, tasks
from benchmarks.tasks import TASKS, MissingData
from lowbit_optim import CASPR, EKFAC, KFAC, SOAP, AdaBK, Quantization, Shampoo
from lowbit_optim.presets import WANG2024

EVERY_10 = {"statistics_frequency": 10, "precondition_frequency": 10}
ROOT = {"storage": "root", "statistics_frequency": 10, "matrix_eps": 1e-6}
NEAREST = {"quantization": Quantization(4, "nf", 64, double=True, scale="fitted")}  # at 2 bits
NAIVE = {"storage": "direct", "quantization": Quantization(4, "linear-2"), "layout": "square"}

BASELINE, PAPER = "adamw", "wang2024"

# What moments of few bits are made of, and more seeds where few would not tell a loss from the spread.
MOMENTS = ("optimizers/first_order.py", "optimizers/adamw.py")
MORE_SEEDS = {"digits-mlp": 20, "fashion-convnet": 12, "fashion-vit": 12, "shakespeare-gpt": 8}

LAYERS = {"statistics_frequency": 10}
LAYERS_32 = {"bits": 32, **EVERY_10}
LAYERS_2 = {"bits": 2, **LAYERS, **NEAREST}


@dataclass(frozen=True)
class Family:
    """An optimizer, and the keywords of each method; the first is the reference. Another form is another line.

    Where the question is moments of few bits, the reference is the same optimizer with moments of 32, and what is lost
    is compared with the spread of AdamW's losses between seeds instead of a gain over AdamW.
    """

    optimizer: Any
    sources: tuple[str, ...]  # beside SOURCES
    methods: dict[str, dict[str, Any]]
    reference: str = ""  # another method
    rates: str = ""  # the method whose best rates all take, if not the reference
    seeds: dict[str, int] | None = None  # instead of SEEDS

    @property
    def of_moments(self) -> bool:
        return self.seeds is not None


SHAMPOO: dict[str, dict[str, Any]] = {
    "shampoo-32": {"bits": 32, "matrix_eps": 1e-6, **EVERY_10},
    "wang2024": {**WANG2024, **EVERY_10},
    "naive-4": {**NAIVE, "initial_scale": 1e-6, "statistic_limit": math.inf, "matrix_eps": 1e-6, **EVERY_10},
    "root-4": {"bits": 4, **ROOT},
    "root-2": {"bits": 2, **ROOT},
    "root-1.5": {"bits": 1.5, **ROOT},
    "root-1": {"bits": 1, **ROOT},
    "root-1-slow": {"bits": 1, **ROOT, "shampoo_beta": 0.95},
    "root-2-nearest": {"bits": 2, **ROOT, **NEAREST},
    "logarithm-2": {"bits": 2, **ROOT, "storage": "logarithm"},
    "logarithm-1": {"bits": 1, **ROOT, "storage": "logarithm"},
    "spiked-2": {"bits": 2, **ROOT, "storage": "spiked"},
    "spiked-1": {"bits": 1, **ROOT, "storage": "spiked"},
}
CASPRS: dict[str, dict[str, Any]] = {
    "caspr-32": {"bits": 32, "matrix_eps": 1e-6, **EVERY_10},
    "caspr-4": {"bits": 4, **ROOT},
    "caspr-2-nearest": {"bits": 2, **ROOT, **NEAREST},
}
FAMILIES = {
    "shampoo": Family(Shampoo, (), SHAMPOO),
    "caspr": Family(CASPR, ("optimizers/caspr.py",), CASPRS),
    "kfac": Family(
        KFAC,
        ("optimizers/kfac.py", "preconditioners/layers.py"),
        {"kfac-32": LAYERS_32, "kfac-4": {"bits": 4, **LAYERS}, "kfac-2-nearest": LAYERS_2},
    ),
    "adabk": Family(
        AdaBK,
        ("optimizers/adabk.py", "optimizers/kfac.py", "preconditioners/layers.py"),
        {"adabk-32": LAYERS_32, "adabk-4": {"bits": 4, **LAYERS}, "adabk-2-nearest": LAYERS_2},
    ),
    "ekfac": Family(
        EKFAC,
        (
            "optimizers/ekfac.py",
            "optimizers/kfac.py",
            "preconditioners/layers.py",
            "preconditioners/eigenbases.py",
        ),
        {"ekfac-32": LAYERS_32, "ekfac-4": {"bits": 4, **LAYERS}},
    ),
    "soap": Family(
        SOAP,
        ("optimizers/soap.py", "preconditioners/eigenbases.py"),
        {"soap-32": {"bits": 32}, "soap-4": {"bits": 4}},
    ),
    "soap10": Family(
        SOAP,
        ("optimizers/soap.py", "preconditioners/eigenbases.py"),
        {
            "soap10-32": {"bits": 32, "statistics_frequency": 10},
            "soap10-4": {"bits": 4, "statistics_frequency": 10},
        },
    ),
    "adamw": Family(
        lowbit_optim.AdamW, MOMENTS, {"adamw-4": {"bits": 4}}, reference=BASELINE, rates=BASELINE, seeds=MORE_SEEDS
    ),
    "moments": Family(
        Shampoo,
        MOMENTS,
        {
            "root-2-nearest": SHAMPOO["root-2-nearest"],
            "root-2-moments-4-nearest": {**SHAMPOO["root-2-nearest"], "base_bits": 4},
        },
        rates="shampoo-32",
        seeds=MORE_SEEDS,
    ),
}
FAMILY_OF = {method: family for family in reversed(FAMILIES.values()) for method in family.methods}
COMMON: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.01}

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
GRID = slice(2, 6)  # the rates that are always tried; those beside them, where the best lies on an edge
BETWEEN = 1.8  # the best of them times and through this are tried too
TUNING_SEED, FIRST_SEED = 0, 100
VERSION = 2  # of the records
# More where Shampoo's gain over AdamW is small beside the spread between seeds; as many as two cores do in two hours.
SEEDS = {"digits-mlp": 20, "fashion-convnet": 12, "fashion-vit": 5, "shakespeare-gpt": 5}
# More for what the default is chosen by, fixed before any of the runs that they add.
DECISIVE = {BASELINE, "shampoo-32", PAPER, "root-2"}
DECISIVE_SEEDS = {"digits-mlp": 40, "fashion-convnet": 36, "fashion-vit": 5, "shakespeare-gpt": 8}

# What a run of Shampoo is made of, beside the kernels. (Presets are not: they are keywords, which records hold.)
SOURCES = (
    "linalg.py",
    "blocking.py",
    "storage/*.py",
    "preconditioners/kronecker.py",
    "optimizers/settings.py",
    "optimizers/second_order.py",
    "optimizers/state.py",
    "optimizers/shampoo.py",
)

Records = dict[str, dict[str, Any]]


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run. Its learning rate is None while others that decide it have not ended."""

    task: str
    method: str
    lr: float | None
    seed: int
    steps: int

    @property
    def keywords(self) -> dict[str, Any]:
        return {**COMMON, **(FAMILY_OF[self.method].methods[self.method] if self.method != BASELINE else {})}

    def describe(self) -> dict[str, Any]:
        """What tells it from every other run, as plain JSON."""
        keywords = {name: report.plain(value) for name, value in sorted(self.keywords.items())}
        return {**asdict(self), "keywords": keywords}

    @cached_property
    def key(self) -> str:
        return key(self.describe())

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        optimizer: Any = AdamW if self.method == BASELINE else FAMILY_OF[self.method].optimizer
        of_model = {"model": model} if issubclass(optimizer, KFAC) else {}
        return optimizer(model.parameters(), lr=self.lr, **self.keywords, **of_model)


def key(record: dict[str, Any]) -> str:
    """The identity of a record."""
    return json.dumps([record[name] for name in ("task", "method", "keywords", "lr", "seed", "steps")])


def read(path: Path) -> Records:
    """What a file keeps: the last of each key."""
    return {key(record): record for record in map(in_todays_words, report.read_lines(path))}


def in_todays_words(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the method and keywords that would repeat it: before version 2 every code was the nearest."""
    if record.get("version", 1) >= VERSION:
        return record
    method, keywords = record["method"], dict(record["keywords"])
    if "quantization" in keywords:
        keywords["quantization"] = keywords["quantization"] | {"rounding": "nearest"}
    elif keywords.get("bits") == 2 and keywords.get("storage", "root") == "root":
        method += "-nearest"
        keywords["quantization"] = report.plain(NEAREST["quantization"])
    return record | {"method": method, "keywords": dict(sorted(keywords.items()))}


@cache
def code_hash(method: str) -> str:
    """Of the source that decides a method's figures."""
    files = [Path(tasks.__file__)]
    if method != BASELINE:
        package = Path(lowbit_optim.__file__).parent
        sources = (*SOURCES, *FAMILY_OF[method].sources)
        files += [file for source in sources for file in package.glob(source)]
        files += Path(lowbit_optim.kernels.__file__).parent.glob("*.py")
    return report.source_hash(files)


def is_stale(record: dict[str, Any]) -> bool:
    """Whether the code has changed since."""
    return record["method"] in {BASELINE, *FAMILY_OF} and record["code"] != code_hash(record["method"])


def loss(record: dict[str, Any]) -> float:
    """The final validation loss; infinite if the run diverged."""
    return math.inf if record["validation_loss"] is None else record["validation_loss"]


# ---- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which runs are wanted, in the order in which they are most useful, given what is known."""

    tasks: list[str]
    family: Family
    methods: list[str]
    seeds: int | None = None
    steps: int | None = None

    def run(self, task: str, method: str, lr: float | None, seed: int) -> Run:
        return Run(task, method, lr, seed, self.steps or TASKS[task].steps)

    def tuning(self, known: Records, task: str, method: str) -> tuple[list[Run], float | None]:
        """The runs that tune the rate of `method`, by rate, and the best rate if all of them are known."""
        low, high = GRID.start, GRID.stop
        while True:
            rates = RATES[low:high]
            best = self.best(known, task, method, rates)
            if best == rates[0] and low > 0:
                low -= 1
            elif best == rates[-1] and high < len(RATES):
                high += 1
            else:
                break
        if best is not None:
            rates = tuple(sorted({*rates, float(f"{best / BETWEEN:.2g}"), float(f"{best * BETWEEN:.2g}")}))
        runs = [self.run(task, method, lr, TUNING_SEED) for lr in rates]
        return runs, self.best(known, task, method, rates)

    def best(self, known: Records, task: str, method: str, rates: Sequence[float]) -> float | None:
        """The rate of least loss; None if one of them has not been run."""
        keys = [self.run(task, method, lr, TUNING_SEED).key for lr in rates]
        if any(name not in known for name in keys):
            return None
        return min(zip(keys, rates, strict=True), key=lambda pair: loss(known[pair[0]]))[1]

    def seeds_of(self, task: str, method: str) -> range:
        decisive = PAPER in self.family.methods and method in DECISIVE
        count = self.seeds or (self.family.seeds or (DECISIVE_SEEDS if decisive else SEEDS))[task]
        return range(FIRST_SEED, FIRST_SEED + count)

    @property
    def reference(self) -> str:
        """The method of the family that the others are compared with."""
        return self.family.reference or next(iter(self.family.methods))

    def tuned_with(self, method: str) -> str:
        """The method whose best rate it takes."""
        return BASELINE if method == BASELINE else self.family.rates or self.reference

    def rate(self, known: Records, task: str, method: str) -> float | None:
        return self.tuning(known, task, self.tuned_with(method))[1]

    def result(self, known: Records, task: str, method: str) -> "Result":
        """What is there of a method at its rate."""
        rate = self.rate(known, task, method)
        seeds = self.seeds_of(task, method)
        keys = [self.run(task, method, rate, seed).key for seed in seeds]
        return Result(method, [known[name] for name in keys if name in known], len(seeds))

    def results(self, known: Records, task: str) -> dict[str, "Result"]:
        """Of every method of the family, and of the baseline."""
        return {method: self.result(known, task, method) for method in (BASELINE, *self.family.methods)}

    def limit(self, results: dict[str, "Result"]) -> float:
        """How much more loss than the reference's is as good as none."""
        baseline = results[BASELINE]
        if self.family.of_moments:
            return stdev(baseline.losses.values()) if len(baseline.losses) > 1 else 0.0
        gains = baseline.differences(results[self.reference])
        return fmean(gains) / 4 if gains else 0.0

    def runs(self, known: Records) -> list[Run]:
        """Rates first, then seed by seed over all methods."""
        tuned = sorted({self.tuned_with(method) for method in self.methods})
        wanted = [run for task in self.tasks for method in tuned for run in self.tuning(known, task, method)[0]]
        last = max(self.seeds_of(task, method).stop for task in self.tasks for method in self.methods)
        for seed in range(FIRST_SEED, last):
            for task in self.tasks:
                methods = [m for m in self.methods if seed in self.seeds_of(task, m)]
                wanted += [self.run(task, m, self.rate(known, task, m), seed) for m in methods]
        return list(dict.fromkeys(wanted))


# ---- processes -------------------------------------------------------------------------------------------------------

_told: Any = None  # in a worker: the queue of (run, steps done)


def start_worker(queue: Any) -> None:
    global _told
    _told = queue
    torch.set_num_threads(1)


def work(run: Run, folder: Path) -> dict[str, Any]:
    """Train, in a worker."""
    tell = (lambda step: _told.put((run.key, step))) if _told is not None else (lambda step: None)
    return tasks.train(TASKS[run.task], run.make_optimizer, seed=run.seed, steps=run.steps, folder=folder, tell=tell)


def execute(plan: Plan, known: Records, path: Path, folder: Path, jobs: int, until: float) -> int:
    """Run what `plan` wants and is not known, `jobs` at a time, until the clock says so. Returns how many failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # two threads that share a busy core are far slower than one
    context = get_context("spawn")
    queue = context.SimpleQueue()
    code = {method: code_hash(method) for method in plan.methods}  # as it is now that the workers load it
    busy: dict[Future[dict[str, Any]], Run] = {}
    failed: set[str] = set()

    def next_run(runs: list[Run]) -> Run | None:
        taken = failed | known.keys() | {run.key for run in busy.values()}
        return next((run for run in runs if run.lr is not None and run.key not in taken), None)

    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(queue,))
    with pool, report.Bars() as bars:
        runs = plan.runs(known)
        while True:
            while len(busy) < jobs and time.monotonic() < until and (run := next_run(runs)):
                bars.start(run.key, f"{run.task} {run.method} {run.lr:g} seed {run.seed}", run.steps)
                busy[pool.submit(work, run, folder)] = run
            if not busy:
                return len(failed)
            ended, _ = wait(busy, timeout=0.5, return_when=FIRST_COMPLETED)
            while not queue.empty():
                bars.step(*queue.get())
            for future in ended:
                run = busy.pop(future)
                if error := future.exception():
                    failed.add(run.key)
                    bars.end(run.key, f"failed: {type(error).__name__}: {error}")
                    continue
                record = {"version": VERSION, **run.describe(), **future.result()}
                record |= {"code": code[run.method], **report.environment()}
                report.append_line(path, record)
                known[run.key] = record
                bars.end(run.key, f"loss {loss(record):.4f}, {record['seconds']:.1f} CPU s")
            if ended:
                runs = plan.runs(known)
            bars.count(sum(run.key in known for run in runs), len(runs))


def repeat(plan: Plan, known: Records, folder: Path, count: int) -> int:
    """Train the first so many of the kept runs again, without the tuning ones. Returns how many end otherwise."""
    torch.set_num_threads(1)
    wanted = [run for run in plan.runs(known) if run.key in known and run.seed != TUNING_SEED]
    differ = 0
    for run in wanted[:count]:
        before, after = loss(known[run.key]), loss(work(run, folder))
        differ += before != after
        end = "the same to the last bit" if before == after else f"NOT the same: {after!r}"
        print(f"{run.task} {run.method} {run.lr:g} seed {run.seed}: {before!r}, {end}", flush=True)
    return differ


# ---- summary ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The runs of one method on one task, at its rate."""

    method: str
    records: list[dict[str, Any]]
    planned: int

    @property
    def sound(self) -> bool:
        """Whether every planned run is there, and none diverged."""
        return len(self.losses) == self.planned

    @property
    def losses(self) -> dict[int, float]:
        """By seed, without the runs that diverged."""
        return {r["seed"]: loss(r) for r in self.records if math.isfinite(loss(r))}

    @property
    def mean(self) -> float:
        return fmean(self.losses.values()) if self.losses else math.inf

    @property
    def color(self) -> int:
        """For the plot: the baseline, the reference, others' forms, ours."""
        if self.method.endswith("-32"):
            return 1
        return {BASELINE: 0, PAPER: 2, "naive-4": 2}.get(self.method, 3)

    @property
    def label(self) -> str:
        return f"{self.method} ({self.bits:.1f} bits)" if self.bits else self.method

    @property
    def bits(self) -> float:
        """Bits of all that factors keep, per element of their squares."""
        return 8 * self.records[0]["preconditioner_bytes"] / self.records[0]["factor_elements"]

    def minus(self, other: "Result") -> tuple[float, float]:
        """The mean difference, seed by seed, and half its 95 % interval."""
        return report.mean_and_error(self.differences(other))

    def differences(self, other: "Result") -> list[float]:
        """Seed by seed, of those that both have."""
        return [self.losses[seed] - other.losses[seed] for seed in sorted(self.losses.keys() & other.losses)]

    def row(self, reference: "Result") -> dict[str, Any]:
        """Of the table."""
        n, diverged = len(self.losses), len(self.records) - len(self.losses)
        difference, error = self.minus(reference)
        return {
            "method": self.method,
            "bits": f"{self.bits:.2f}" if self.bits else None,
            "rate": f"{self.records[0]['lr']:g}",
            "mean loss": f"{self.mean:.4f}",
            "sd": f"{stdev(self.losses.values()):.4f}" if n > 1 else None,
            "n": f"{n}" + f" ({diverged} diverged)" * (diverged > 0),
            f"minus {reference.method}": f"{difference:+.4f} ± {error:.4f}" if self is not reference else None,
            "CPU s": f"{fmean(r['seconds'] for r in self.records):.1f}",
            "factor bytes": f"{self.records[0]['preconditioner_bytes']:,}",
        }

    def verdict(self, limit: float, baseline: "Result", reference: "Result", paper: "Result | None") -> dict[str, bool]:
        """Each condition on a form, in words, and whether it holds; none does where a run is missing or diverged."""
        bound = sum(self.minus(reference))
        sound = self.sound and reference.sound and baseline.sound
        verdict = {f"upper bound {bound:+.4f} <= {limit:.4f}": sound and bound <= limit}
        if paper is not None and paper.losses and self.method != PAPER:
            more, error = self.minus(paper)
            verdict[f"minus {PAPER} {more:+.4f} ± {error:.4f}, its mean <= 0"] = (
                self.sound and paper.sound and more <= 0
            )
        return verdict


def summarize(plan: Plan, known: Records, image: Path) -> None:
    """Print tables and verdicts, and draw the plot."""
    from benchmarks import figures  # matplotlib takes a second to import

    if stale := sum(is_stale(record) for record in known.values()):
        print(f"Made with other code than is here: {stale} of the {len(known)} runs; --again tells what that changes.")
    compared: list[str] = []
    holds: dict[str, dict[str, list[bool]]] = {}  # method -> task -> whether each condition holds
    for task in plan.tasks:
        print(f"\n{TASKS[task].title}: loss with seed {TUNING_SEED} at each rate tried")
        for method in sorted({plan.tuned_with(method) for method in plan.methods}):
            runs = [run for run in plan.tuning(known, task, method)[0] if run.key in known]
            print(f"  {method}: " + (", ".join(f"{run.lr:g} -> {loss(known[run.key]):.4f}" for run in runs) or "none"))
        results = plan.results(known, task)
        baseline, reference, paper = results[BASELINE], results[plan.reference], results.get(PAPER)
        if not (baseline.losses and reference.losses):
            print("  nothing to compare without runs of both at their best rates")
            continue
        shown = [results[method] for method in plan.methods if results[method].records]
        note = "bits: all that factors keep, per element of their squares; ±: half a 95 % interval, paired by seed"
        report.show(TASKS[task].title, [result.row(reference) for result in shown], note)
        limit = plan.limit(results)
        if plan.family.of_moments:
            print(f"standard deviation of {BASELINE} between seeds: {limit:.4f}")
        else:
            gain, error = baseline.minus(reference)
            what = f"gain of {plan.reference} over tuned {BASELINE}"
            print(f"{what}: {gain:+.4f} ± {error:.4f}; a quarter of it: {limit:+.4f}")
            if gain <= error:
                print("  that is not shown to be a gain: this task tells forms apart by nothing")
        if not all(result.sound for result in results.values()):
            print("  runs are missing or diverged: where they are, no condition holds")
        for result in shown:
            if result.method not in (BASELINE, plan.reference):
                verdict = result.verdict(limit, baseline, reference, paper)
                holds.setdefault(result.method, {})[task] = list(verdict.values())
                print(f"  {result.method}: " + "; ".join(f"{k}: {'yes' if v else 'NO'}" for k, v in verdict.items()))
        compared.append(task)

    against = f" / the mean against {PAPER}" if PAPER in plan.family.methods else ""
    print(f"\nTasks, of {len(compared)}, on which the upper bound{against} is not shown to pass:")
    for method, by_task in holds.items():
        fails = [[task for task in compared if by_task.get(task, [])[i : i + 1] != [True]] for i in range(2)]
        conditions = max(map(len, by_task.values()))
        print(f"  {method}: " + " / ".join(", ".join(names) or "none" for names in fails[:conditions]))
    print(f"{sum(run.key not in known for run in plan.runs(known))} runs are missing.")
    if compared:
        figures.losses(plan, known).save(image)
        print(f"drawn in {image}")


# ---- command line ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    add("--family", choices=FAMILIES, default="shampoo", help="whose forms (default shampoo)")
    add("--methods", nargs="+", metavar="METHOD", help=f"of {BASELINE}, {', '.join(FAMILY_OF)} (default the family's)")
    add("--seeds", type=int, help=f"how many (default {SEEDS})")
    add("--steps", type=int, help="of every run, to try something out (default: the task's)")
    add("--jobs", type=int, default=1, help="processes, of one thread each (default 1)")
    add("--time-limit", type=float, default=math.inf, metavar="MINUTES", help="start no more runs after that")
    add("--fresh", action="store_true", help="run again what was run with other code")
    add("--again", type=int, default=0, metavar="N", help="run N of the kept runs again: do they end as they did?")
    add("--summary", action="store_true", help="run nothing; print and plot what is there")
    add("--data", type=Path, default=tasks.default_folder(), help=f"folder (default ${tasks.DATA_VARIABLE} or ./data)")
    add("--results", type=Path, default=report.RESULTS / "convergence.jsonl", help="file of the records")
    args = parser.parse_args()
    family = FAMILIES[args.family]
    methods = args.methods or [BASELINE, *family.methods]
    if unknown := set(methods) - {BASELINE, *family.methods}:
        parser.error(f"{', '.join(sorted(unknown))}: {args.family} has {BASELINE}, {', '.join(family.methods)}")
    plan = Plan(args.tasks, family, methods, args.seeds, args.steps)
    known = read(args.results)
    if args.summary:
        suffix = "" if args.family == "shampoo" else f"-{args.family}"
        summarize(plan, known, args.results.with_name(f"{args.results.stem}{suffix}.png"))
        return 0

    if stale := [run for run in plan.runs(known) if run.key in known and is_stale(known[run.key])]:
        what = "they are run again" if args.fresh else "they are kept; --fresh runs them again"
        print(f"{len(stale)} of the runs that are there were made with other code: {what}")
    if args.fresh:
        known = {name: record for name, record in known.items() if not is_stale(record)}
    try:
        for task in args.tasks:
            TASKS[task].data(args.data)
    except MissingData as missing:
        print(missing, file=sys.stderr)
        return 2
    if args.again:
        return 1 if repeat(plan, known, args.data, args.again) else 0
    until = time.monotonic() + 60 * args.time_limit
    try:
        failed = execute(plan, known, args.results, args.data, args.jobs, until)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    left = sum(run.key not in known for run in plan.runs(known))
    print(f"{failed} runs failed, {left} are left; --summary shows what is there")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
