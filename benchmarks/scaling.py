"""How the cost of a step grows: with the number of equal layers, and with their width.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --device cuda

Layers are square matrices. Every method takes a step at every size in each round; a figure is the median over rounds:
CPU time of the process on a CPU, wall time between synchronizations on CUDA. "root" is a step with statistics and roots
of all blocks. A line through the logarithms, by least squares, gives the exponent: 1 is linear. "largest jump" is the
largest quotient of the cost of a number (or layer) by that at the size before: a cliff would show there. Exponents in
the width mix that of what is done for each number (2) with that of the matmuls (3). Peers that are not installed are
left out.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: waiting threads are no CPU time

import numpy as np
import torch

from benchmarks import methods, report, timing
from benchmarks.methods import Kind, Run, Shape, adamw, gradients_of, scalable, shampoo
from benchmarks.timing import Turn, middle, take_turns, unit

BLOCK = 512  # the peer's default
Rows = list[dict[str, Any]]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of a line through (log size, log cost), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def largest_jump(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The largest quotient of cost / size of one size by that of the size before."""
    each = [cost / size for size, cost in zip(sizes, costs, strict=True)]
    return max(after / before for before, after in pairwise(each))


def sweep(shapes: dict[int, list[Shape]], args: argparse.Namespace) -> dict[tuple[str, Kind], dict[int, float]]:
    """For each method and kind of step its median at every size."""
    device = torch.device(args.device)
    runs: dict[tuple[str, int], Run] = {}
    for size, layers in shapes.items():
        gradients = gradients_of(layers, torch.float32, device)
        for method in (adamw(), shampoo(4, BLOCK), scalable(BLOCK)):
            try:
                runs[method.label, size] = Run(method, gradients)
            except ImportError as error:
                print(f"{method.label} is left out: {error}")
    found: dict[tuple[str, Kind], dict[int, float]] = {}
    plan: list[tuple[Kind, int, int]] = [("ordinary", args.rounds, 2)]
    if args.updates:
        plan.insert(0, ("root", args.updates, 1))  # first: before the first root a step does less
    for kind, rounds, warm_up in plan:
        turns = {
            f"{label} {size}": Turn(partial(run.prepare, kind), run.optimizer.step)
            for (label, size), run in runs.items()
            if kind == "ordinary" or run.method.ours  # a peer's take minutes
        }
        taken = take_turns(turns, device, rounds, warm_up, args.budget)
        for label, size in runs:
            if f"{label} {size}" in taken:
                found.setdefault((label, kind), {})[size] = middle(taken[f"{label} {size}"]).main
    return found


def tables(
    name: str, found: dict[tuple[str, Kind], dict[int, float]], parameters: dict[int, int], at: str
) -> tuple[Rows, Rows]:
    """The figures of a sweep, and what is fitted to them; ``name`` says what the sizes are."""
    figures: Rows = [
        {name: size, "parameters": numel}
        | {f"{label}, {kind}, {at}": costs.get(size) for (label, kind), costs in found.items()}
        for size, numel in parameters.items()
    ]
    fits: Rows = []
    for (label, kind), costs in found.items():
        by_number = [parameters[size] for size in costs]
        values = list(costs.values())
        row: dict[str, Any] = {"optimizer": label, "step": kind, f"exponent in {name}": exponent(list(costs), values)}
        row |= {"exponent in parameters": exponent(by_number, values)}
        fits.append(row | {"largest jump": largest_jump(by_number, values)})
    return figures, fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256, 512], help="(default 8 16 ... 512)")
    add("--layer-width", type=int, default=256, help="of these layers (default 256)")
    add("--widths", nargs="+", type=int, default=[128, 256, 512, 1024], help="(default 128 256 512 1024)")
    add("--depth", type=int, default=8, help="how many layers of these widths (default 8)")
    add("--rounds", type=int, default=7, help="ordinary steps that are timed (default 7)")
    add("--updates", type=int, default=2, help="steps with statistics and roots that are timed (default 2)")
    add("--budget", type=float, default=8.0, help="seconds for timed steps of one kind and size (default 8)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads (default torch's choice)")
    add("--device", default=os.environ.get("LOWBIT_DEVICE", "cpu"), choices=["cpu", "cuda"], help="(default cpu)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cuda, at = args.device == "cuda", unit(torch.device(args.device))
    place = torch.cuda.get_device_name() if on_cuda else f"{args.threads} threads"
    suffix = f", {place}" if on_cuda else ""
    width, depth = args.layer_width, args.depth
    sweeps: dict[str, dict[int, list[Shape]]] = {
        "layers": {layers: [(width, width)] * layers for layers in args.layers},
        "width": {side: [(side, side)] * depth for side in args.widths},
    }
    titles = {"layers": f"layers of {width} x {width}", "width": f"{depth} layers of width x width"}
    kept: dict[str, Rows] = {}
    for name, shapes in sweeps.items():
        numel = {size: sum(a * b for a, b in layers) for size, layers in shapes.items()}
        found = sweep(shapes, args)
        figures, fits = tables(name, found, numel, at)
        report.show(f"{titles[name]}, {place}", figures)
        report.show(f"{titles[name]}: fitted", fits)
        kept |= {f"{name}{suffix}": figures, f"{name}, fitted{suffix}": fits}
    code = report.code_hash(__file__, methods.__file__, timing.__file__)
    how = {"environment": report.environment(), "code": code, "wait policy": os.environ["OMP_WAIT_POLICY"]} | vars(args)
    report.add("scaling", kept, how)
    from benchmarks import figures  # matplotlib is not needed to measure

    figures.draw("scaling-cuda.png" if on_cuda else "scaling.png")


if __name__ == "__main__":
    main()
