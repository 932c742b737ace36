"""Every storage form: its bits, its error after one coding and after many updates, and what an update costs.

The recursive error is that of A^(-1/4) against a float64 moving average of the same statistics, at the form's own rule
for small eigenvalues, after a number of updates A <- 0.95 A + 0.05 G G^T. Bits count everything that the form keeps of
one factor, statistic and root. Figures are means over streams; a cost is the median CPU time of an update with its
refresh, over that of the dense form in the same run.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.matrices import (
    bits_per_element,
    exact_root,
    log_spaced,
    power_law,
    relative_error,
    spiked,
    statistics,
    uneven,
)
from benchmarks.plots import pareto
from benchmarks.recursive_error import advance, average, fourth_root
from benchmarks.report import RESULTS, keep, show
from lowbit_optim.presets import WANG2024
from lowbit_optim.storage import Quantization, Symmetric
from lowbit_optim.storage.budget import form
from lowbit_optim.storage.factors import Factor
from lowbit_optim.storage.root import Root

SPECTRA = {"log-spaced": log_spaced, "power law": power_law, "spiked": spiked}
PAPER = {key: WANG2024[key] for key in ("initial_scale", "statistic_limit")}
RECTIFY = {"rectify_update": 1, "rectify_root": 4, "orthogonal_iterations": 1}


def forms() -> dict[str, Factor]:
    """What is compared, by the name of its row."""
    linear2 = Quantization(4, "linear-2")
    rows: dict[str, Factor] = {
        "dense": form("dense", 32, None, "triangle", True, **RECTIFY),
        "eigen, the paper": form("eigen", 4, linear2, "square", True, **RECTIFY, **PAPER),
        "direct, naive": form("direct", 4, linear2, "square", True, **RECTIFY, **PAPER),
    }
    for storage, budgets in {
        "eigen": (8, 4, 3),
        "reflector": (4, 2),
        "cholesky": (4, 2),
        "cholesky-feedback": (4, 2),
        "root": (8, 4, 3, 2, 1.5, 1),
    }.items():
        rows |= {f"{storage} {bits}": form(storage, bits, None, "triangle", True, **RECTIFY) for bits in budgets}
    for bits, codebook in ((8, "linear"), (4, "nf"), (2, "nf")):
        codec = Symmetric(Quantization(bits, codebook, double=True, scale="absmax" if bits == 8 else "fitted"))
        for name, power in (("8th", 8.0), ("32nd", 32.0), ("logarithm", float("inf"))):
            rows[f"root {bits / 2:g}, kept as {name}"] = Root(codec=codec, stored_power=power)
        rows[f"root {bits / 2:g}, correlations"] = Root(codec=replace(codec, correlations=True))
    return rows


def static_error(factor: Factor, levels: Tensor, seeds: range) -> float:
    """The error of the root after the first statistic, which is of full rank and known exactly."""
    (m,) = statistics(levels, 4 * len(levels), seeds, 1)
    state = advance(factor, factor.init(len(seeds), len(levels), torch.float32, "cpu"), m)
    a = factor.initial_scale * 0.95 * torch.eye(len(levels)) + 0.05 * m if factor.initial_scale else m
    return relative_error(fourth_root(factor, state), exact_root(a, factor)).mean().item()


def recursive_error(
    factor: Factor, stream: Iterable[Tensor], seeds: range, order: int, updates: int
) -> tuple[float, float, list[float]]:
    """The error after ``updates``, the drift (its ratio to that after 100), and the CPU seconds of each update."""
    state, a = factor.init(len(seeds), order, torch.float32, "cpu"), None
    errors, seconds = {}, []
    for t, m in enumerate(stream, 1):
        a = average(a, m)
        began = time.process_time()
        state = advance(factor, state, m)
        seconds.append(time.process_time() - began)
        if t in (min(100, updates), updates):
            errors[t] = relative_error(fourth_root(factor, state), exact_root(a, factor)).mean().item()
    return errors[updates], errors[updates] / errors[min(100, updates)], seconds


def streams(order: int, seeds: range, updates: int, spectra: list[str]) -> dict[str, Iterator[Tensor]]:
    """The streams of statistics, by the name of their column."""
    named = {}
    for name in spectra:
        for noise, columns in (("", order // 4), (", noisy", order // 16)):
            named[f"{name}{noise}"] = statistics(SPECTRA[name](order), columns, seeds, updates)
    named["uneven rows"] = statistics(log_spaced(order), order // 4, seeds, updates, uneven(order))
    return named


def measure(order: int, seeds: range, updates: int, spectra: list[str]) -> list[dict[str, Any]]:
    """One row a form."""
    rows, dense = [], 1.0
    for label, factor in track(forms().items(), f"order {order}", transient=True):
        row: dict[str, Any] = {"form": label, "bits": bits_per_element(factor, order)}
        row["static"] = static_error(factor, log_spaced(order), seeds)
        seconds: list[float] = []
        for name, stream in streams(order, seeds, updates, spectra).items():
            row[name], drift, spent = recursive_error(factor, stream, seeds, order, updates)
            row.setdefault("drift", drift)
            seconds += spent
        dense = median(seconds) if label == "dense" else dense
        row["update / dense"] = median(seconds) / dense
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, nargs="+", default=[128, 384], help="orders (default 128 384)")
    parser.add_argument("--updates", type=int, default=300, help="updates of each stream (default 300)")
    parser.add_argument("--seeds", type=int, default=3, help="streams per figure (default 3)")
    parser.add_argument("--spectra", nargs="+", default=list(SPECTRA), choices=list(SPECTRA), help="default all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the PNG (default benchmarks/results)")
    args = parser.parse_args()
    tables = {}
    for order in args.orders:
        rows = measure(order, range(args.seeds), args.updates, args.spectra)
        tables[f"order {order}"] = rows
        show(f"Error of A^(-1/4) at order {order}, {args.updates} updates, mean of {args.seeds} streams", rows)
        keep("storage", tables)
        pareto([(r["form"], r["bits"], r[args.spectra[0]]) for r in rows], args.out / f"storage-{order}.png", order)


if __name__ == "__main__":
    main()
