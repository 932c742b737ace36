"""What an update of a factor costs, by storage form, order, number of blocks and route to the inverse root.

An update takes in one statistic and makes the new root. A cost is the median over rounds, in milliseconds (of CPU time,
or by CUDA's events) and in matrix products of the same order and number of blocks, float32, measured in the same round.
The routes are those of ``lowbit_optim.roots``: "eigh" decomposes one matrix after the other, "products" multiplies
stacked ones. On the CPU the first is what is used, and the second is only measured; on a GPU it is the other way round.

Then how far off the root is by either route: relative errors of A^(-1/4) against float64, mean of three streams of
statistics, at the tenth update, while statistics are of low rank, and over every second one from the 42nd to the 120th.

    python -m benchmarks.updates
    python -m benchmarks.updates --device cuda --orders 256 512 1024 2048
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: waiting threads count as CPU time

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.matrices import (
    SPECTRA,
    advance,
    averages,
    exact_root,
    fourth_root,
    log_spaced,
    low_bit,
    of_the_paper,
    relative_error,
    statistics,
)
from benchmarks.report import keep, show
from lowbit_optim.linalg import full_precision
from lowbit_optim.roots import ROUTES, forced_route
from lowbit_optim.storage.factors import Factor

EARLY, SETTLED = 10, range(42, 121, 2)  # updates whose errors are shown
ONE_ROUTE = ("eigen, the paper",)  # it has no decomposition and no iteration


def forms() -> dict[str, Factor]:
    """What is measured, by the name of its rows."""
    roots = {f"root {bits}": low_bit("root", bits) for bits in (4, 2)}
    return {"dense": low_bit("dense", 32), **roots, "eigen, the paper": of_the_paper("eigen")}


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call: CPU time of the process, or the time between events on the GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)


def updates(order: int, blocks: int, m: Tensor) -> dict[tuple[str, str], Callable[[], Any]]:
    """The update of each form by each route, of a state that has seen two statistics."""

    def update(factor: Factor, route: str) -> Callable[[], Any]:
        state = factor.init(blocks, order, torch.float32, m.device)
        with forced_route("products"):
            state = advance(factor, advance(factor, state, m), m)

        def work() -> None:
            with forced_route(route):
                advance(factor, state, m)

        return work

    asked = [(name, factor, route) for name, factor in forms().items() for route in ROUTES]
    return {(name, r): update(f, r) for name, f, r in asked if name not in ONE_ROUTE or r == ROUTES[0]}


def measure(order: int, blocks: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a form and route."""
    (one,) = statistics(log_spaced(order), order // 4, range(1), 1)
    m = one.to(device, torch.float32).expand(blocks, -1, -1).contiguous()
    work = updates(order, blocks, m)
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    product: list[float] = []
    for r in range(rounds + 1):  # the first warms up
        product.append(milliseconds(lambda: m @ m, device))
        for key, run in work.items():
            spent[key].append(milliseconds(run, device))
        if r == 0:
            product.clear()
            spent = {key: [] for key in work}
    rows = []
    for (name, route), cost in spent.items():
        ms = median(cost)
        shown = "none" if name in ONE_ROUTE else route
        row = {"form": name, "route": shown, "order": order, "blocks": blocks}
        rows.append(row | {"ms": ms, "in products": ms / median(product)})
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times longer the route by decomposition takes, for each form, order and number of blocks."""
    by = {(r["form"], r["order"], r["blocks"], r["route"]): r["ms"] for r in rows}
    pairs = [key[:3] for key in by if key[3] == "eigh"]
    return [
        {"form": form, "order": order, "blocks": blocks, "eigh / products": by[form, order, blocks, "eigh"] / ms}
        for form, order, blocks in pairs
        for ms in [by[form, order, blocks, "products"]]
    ]


def errors(order: int, device: torch.device, seeds: range = range(3)) -> list[dict[str, Any]]:
    """One row a form of few bits and route."""
    rows = []
    asked = [(name, factor, route) for name, factor in forms().items() if factor.one_period for route in ROUTES]
    for name, factor, route in track(asked, "errors", transient=True):
        row: dict[str, Any] = {"form": name, "route": route, "order": order}
        for spectrum, levels in SPECTRA.items():
            state = factor.init(len(seeds), order, torch.float32, device)
            off = {}
            for t, (m, a) in enumerate(averages(statistics(levels(order), order // 4, seeds, SETTLED[-1])), 1):
                with forced_route(route):
                    state = advance(factor, state, m.to(device))
                if t == EARLY or t in SETTLED:
                    off[t] = relative_error(fourth_root(factor, state).cpu(), exact_root(a, factor)).mean().item()
            row |= {f"{spectrum}, early": off[EARLY], spectrum: mean(off[t] for t in SETTLED)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--orders", type=int, nargs="+", default=[128, 384, 768], help="orders (default 128 384 768)")
    add("--blocks", type=int, nargs="+", default=[1, 16], help="blocks that are updated together (default 1 16)")
    add("--rounds", type=int, default=5, help="rounds that a median is taken of (default 5)")
    add("--largest", type=int, default=1_000_000, help="of blocks order^2, on the CPU: more is left out (default 1e6)")
    add("--threads", type=int, default=1, help="threads on the CPU (default 1)")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    sizes = [(order, blocks) for order in args.orders for blocks in args.blocks]
    if device.type == "cpu":
        sizes = [(order, blocks) for order, blocks in sizes if blocks * order**2 <= args.largest]
    rows: list[dict[str, Any]] = []
    with full_precision():
        for order, blocks in track(sizes, transient=True):
            rows += measure(order, blocks, args.rounds, device)
        off = errors(args.orders[0], device)
    show(f"Cost of an update on {device.type}, {args.threads} thread(s)", rows)
    compared = ratios(rows)
    if device.type == "cuda":
        show("The decomposition of one matrix after the other, over the default route", compared)
    name = "updates" if device.type == "cpu" else f"updates-{device.type}"
    show(f"Errors of A^(-1/4), order {args.orders[0]}", off)
    keep(name, {"updates": rows, "ratios": compared, "errors": off}, vars(args))


if __name__ == "__main__":
    main()
