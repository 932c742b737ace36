"""Every storage form: its bits, its error after one statistic and after many, what an update costs, and its drift.

The error is that of A^(-1/4) against a float64 moving average of the same statistics G G^T (beta 0.95), at the form's
own rule for small eigenvalues; beside it stands by what angle gradients of that covariance are off. Bits count
everything that the form keeps of one factor, statistic and root. Figures are means over streams; a cost is the median
time of an update with its refresh, of one CPU thread and, where there is one, on the GPU, over that of the dense form
in the same run. Up to order 128 every form and every stream is measured, above it the main ones.

    python -m benchmarks.storage                                      # orders 128 and 384, and the drift
    python -m benchmarks.storage --orders 1200 --updates 60 --spectra log-spaced --drift-updates 0
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.matrices import (
    SPECTRA,
    WIDTHS,
    advance,
    angle,
    averages,
    bits_per_element,
    exact_root,
    fourth_root,
    log_spaced,
    low_bit,
    of_the_paper,
    power,
    relative_error,
    statistics,
    top_ratio,
    uneven,
)
from benchmarks.report import keep, show
from lowbit_optim.storage.factors import Factor

STUDY_ORDER = 128  # above it, only the main forms and streams
BUDGETS = (4.2, 2.2)  # bits per element, everything counted, within which the least error is named
DRIFT_FORMS = {"root": WIDTHS, "logarithm": (4, 2, 1), "spiked": (4, 2, 1)}
WINDOW = 100  # updates that a figure of the drift is a mean over


def forms(order: int) -> dict[str, Factor]:
    """What is compared, by the name of its row."""
    rows = {
        "dense": low_bit("dense", 32),
        "eigen, the paper": of_the_paper("eigen"),
        "direct, naive": of_the_paper("direct"),
    }
    study = order <= STUDY_ORDER
    few: dict[str, tuple[float, ...]] = {"reflector": (4,), "cholesky": (4,), **DRIFT_FORMS}
    every = {"eigen": (8, 4, 3), **few, "reflector": (4, 2), "cholesky": (4, 2), "cholesky-feedback": (4, 2)}
    for storage, budgets in (every if study else few).items():
        rows |= {f"{storage} {bits}": low_bit(storage, bits) for bits in budgets}
    rows["root 2, nearest"] = rounded(low_bit("root", 2), "nearest")
    rows |= {f"root {bits}, adaptive": rounded(low_bit("root", bits), "adaptive") for bits in (1.5, 1)}
    for bits in (4, 2, 1) if study else ():
        root = low_bit("root", bits)
        rows[f"root {bits}, kept as 8th"] = replace(root, stored_power=8)
        rows[f"root {bits}, kept as 32nd"] = replace(root, stored_power=32)
        plain: Any = rounded(root, "nearest") if bits == 2 else root
        rows[f"root {bits}, correlations"] = replace(plain, codec=replace(plain.codec, correlations=True))
    return rows


def rounded(factor: Any, rounding: str) -> Factor:
    """The form with another rounding of its codes."""
    codec = replace(factor.codec.codec, rounding=rounding)
    return replace(factor, codec=replace(factor.codec, codec=codec))


def static_error(factor: Factor, levels: Tensor, seeds: range) -> float:
    """The error of the root after the first statistic, which is of full rank and known exactly."""
    stream = statistics(levels, 4 * len(levels), seeds, 1)
    return recursive_error(factor, stream, seeds, len(levels))[0]


def recursive_error(
    factor: Factor, stream: Iterable[Tensor], seeds: range, order: int
) -> tuple[float, float, list[float]]:
    """After the last statistic: the error, and the angle of gradients in degrees; the CPU seconds of each update.

    The angle is that between what the root and the exact root make of gradients whose covariance is A.
    """
    state = factor.init(len(seeds), order, torch.float32, "cpu")
    seconds = []
    for m, a in averages(stream, factor.initial_scale):
        mean = a
        began = time.process_time()
        state = advance(factor, state, m)
        seconds.append(time.process_time() - began)
    root, exact = fourth_root(factor, state), exact_root(mean, factor)
    values, vectors = torch.linalg.eigh(mean)
    gradients = power(values.clamp(min=0), vectors, 1 / 2)
    return relative_error(root, exact).mean().item(), angle(root @ gradients, exact @ gradients).mean().item(), seconds


def gpu_seconds(factor: Factor, order: int, seeds: range) -> float:
    """The median time of an update on the GPU, once it is warm."""
    state = factor.init(len(seeds), order, torch.float32, "cuda")
    seconds = []
    for m in list(statistics(log_spaced(order), order // 4, seeds, 12)):
        m = m.to("cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        state = advance(factor, state, m)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds[2:])


def streams(order: int, seeds: range, updates: int, spectra: list[str]) -> dict[str, Iterator[Tensor]]:
    """The streams of statistics, by the name of their column."""
    named = {}
    for name in spectra:
        named[name] = statistics(SPECTRA[name](order), order // 4, seeds, updates)
        if order <= STUDY_ORDER:
            named[f"{name}, noisy"] = statistics(SPECTRA[name](order), order // 16, seeds, updates)
    if order <= STUDY_ORDER:
        named["uneven rows"] = statistics(log_spaced(order), order // 4, seeds, updates, uneven(order))
    return named


def measure(
    order: int, seeds: range, updates: int, spectra: list[str], only: list[str] | None = None
) -> list[dict[str, Any]]:
    """One row a form; of the storages in `only`, or of all."""
    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    wanted = {label: f for label, f in forms(order).items() if only is None or label.split()[0] in ["dense", *only]}
    for label, factor in track(wanted.items(), f"order {order}", transient=True):
        row: dict[str, Any] = {"form": label, "bits": bits_per_element(factor, order)}
        row["static"] = static_error(factor, log_spaced(order), seeds)
        seconds: list[float] = []
        for name, stream in streams(order, seeds, updates, spectra).items():
            row[name], row[f"{name}, angle"], spent = recursive_error(factor, stream, seeds, order)
            seconds += spent
        costs = {"update / dense": median(seconds)}
        if torch.cuda.is_available():
            costs["on the GPU / dense"] = gpu_seconds(factor, order, seeds)
        dense = dense or costs  # the first row
        rows.append(row | {name: cost / dense[name] for name, cost in costs.items()})
    return rows


def least(rows: list[dict[str, Any]], spectra: list[str]) -> list[dict[str, Any]]:
    """Within each of BUDGETS the form of least error, on each spectrum, beside the paper's."""
    paper = next(row for row in rows if row["form"] == "eigen, the paper")
    best = []
    for budget in BUDGETS:
        for spectrum in spectra:
            row = min((r for r in rows if r["bits"] <= budget), key=lambda r: r[spectrum])
            share = {"form": row["form"], "bits": row["bits"], "error": row[spectrum], "paper": paper[spectrum]}
            best.append({"bits at most": budget, "spectrum": spectrum, **share})
    return best


def drift(
    order: int, seeds: range, updates: int, spectra: list[str], only: list[str] | None = None
) -> list[dict[str, Any]]:
    """Error and largest eigenvalue (over the true one) after 100 updates and after ``updates``.

    A figure is the mean over the streams and over every second of the 100 updates around 100, or before the last.
    """
    rows = []
    ends = (100 + WINDOW // 2, updates)
    wanted = {storage: by for storage, by in DRIFT_FORMS.items() if only is None or storage in only}
    asked = [(storage, bits, spectrum) for storage, by in wanted.items() for bits in by for spectrum in spectra]
    for storage, bits, spectrum in track(asked, f"drift, order {order}", transient=True):
        factor = low_bit(storage, bits)
        state = factor.init(len(seeds), order, torch.float32, "cpu")
        ratios: dict[int, list[Tensor]] = {end: [] for end in ends}
        errors: dict[int, list[Tensor]] = {end: [] for end in ends}
        for t, (m, a) in enumerate(averages(statistics(SPECTRA[spectrum](order), order // 4, seeds, updates)), 1):
            state = advance(factor, state, m)
            for end in ends:
                if end - WINDOW < t <= end and t % 2 == 0:
                    ratios[end].append(top_ratio(factor, state, a).log())
                    errors[end].append(relative_error(fourth_root(factor, state), exact_root(a, factor)))
        error = [torch.stack(errors[end]).mean().item() for end in ends]
        ratio = [torch.stack(ratios[end]).mean().exp().item() for end in ends]
        row: dict[str, Any] = {"form": f"{storage} {bits}", "spectrum": spectrum}
        row |= {"error at 100": error[0], f"at {updates}": error[1], "quotient": error[1] / error[0]}
        row |= {"top eigenvalue at 100": ratio[0], f"top at {updates}": ratio[1], "its quotient": ratio[1] / ratio[0]}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--orders", type=int, nargs="*", default=[128, 384], help="orders (default 128 384)")
    add("--updates", type=int, default=300, help="updates of each stream (default 300)")
    add("--seeds", type=int, default=1, help="streams per figure (default 1)")
    add("--spectra", nargs="+", default=list(SPECTRA), choices=list(SPECTRA), help="default all")
    add("--only", nargs="+", metavar="STORAGE", help="of these storages and dense, into files named after them")
    add("--drift-order", type=int, default=128, help="order of the drift's matrices (default 128)")
    add("--drift-updates", type=int, default=1000, help="updates of the drift, 0 for none (default 1000)")
    add("--drift-seeds", type=int, default=2, help="streams of the drift (default 2)")
    args = parser.parse_args()
    from benchmarks import figures  # matplotlib is not needed to measure

    if 0 < args.drift_updates < 100 + WINDOW:
        parser.error(f"--drift-updates is {args.drift_updates}; it must be 0 or at least {100 + WINDOW}")
    torch.set_num_threads(1)  # waiting threads would count as CPU time
    seeds = range(args.seeds)
    suffix = "".join(f"-{storage}" for storage in args.only or ())
    for order in args.orders:
        rows = measure(order, seeds, args.updates, args.spectra, args.only)
        # At small orders diagonals weigh too much.
        best = least(rows, args.spectra) if order > STUDY_ORDER and args.only is None else []
        show(f"Error of A^(-1/4) at order {order}, {args.updates} updates, mean of {args.seeds} stream(s)", rows)
        if best:
            show(f"Least error within a budget of bits per element, order {order}", best)
        keep(f"storage-{order}{suffix}", {"error": rows, "least": best}, vars(args))
        if args.only is None:
            figures.draw(f"storage-{order}.png")
    if args.drift_updates:
        rows = drift(args.drift_order, range(args.drift_seeds), args.drift_updates, args.spectra, args.only)
        show(f"Drift, order {args.drift_order}, mean of {args.drift_seeds} stream(s)", rows)
        keep(f"storage-drift-{args.drift_order}{suffix}", {"drift": rows}, vars(args))


if __name__ == "__main__":
    main()
