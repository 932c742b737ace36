"""Seconds that a rank's part of a step of Shampoo takes: measured on this CPU, or assumed from rates of a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import lowbit_optim
from benchmarks import methods, report, timing
from benchmarks.methods import Method, Run, Shape, gradients_of, shampoo
from benchmarks.timing import Turn
from lowbit_optim.roots import forced_route

Rows = list[dict[str, Any]]
TINY, SQUARE = (16, 16), (1024, 1024)
MEASURED = [(128, 128), (256, 256), (512, 512), SQUARE, (16, 1024), (128, 1024)]


@dataclass(frozen=True)
class Costs:
    """Seconds of one rank's work.

    Attributes:
        source: where they are from.
        ordinary: of a block of r x c, for each unit of rc(r + c), r^2 + c^2 and rc.
        update: beyond that, of r^3 + c^3, rc(r + c) and r^2 + c^2.
        base: of a number, in the base's step.
        each_round: of the host.
    """

    source: str
    ordinary: tuple[float, ...]
    update: tuple[float, ...]
    base: float
    each_round: float

    def of_ordinary(self, rows: int, columns: int) -> float:
        """Of a block in a step without an update."""
        return float(np.dot(self.ordinary, _work_of_step(rows, columns)))

    def of_update(self, rows: int, columns: int) -> float:
        """Of its statistics and roots."""
        return float(np.dot(self.update, _work_of_update(rows, columns)))


def _work_of_step(r: int, c: int) -> tuple[float, ...]:
    return r * c * (r + c), r * r + c * c, r * c


def _work_of_update(r: int, c: int) -> tuple[float, ...]:
    return r**3 + c**3, r * c * (r + c), r * r + c * c


def measured(bits: float, base_bits: int, rounds: int) -> tuple[Costs, Rows]:
    """On one thread of this CPU; and how well what is fitted fits."""
    device = torch.device("cpu")
    low = Method("AdamW", None, partial(lowbit_optim.AdamW, lr=1e-3, bits=base_bits))
    turns, counts = {}, {}
    for size in (TINY, *MEASURED):
        counts[size] = 1 if size == TINY else min(64, max(1, 2**31 // sum(n**3 for n in size)))
        gradients = gradients_of([size] * counts[size], torch.float32, device)
        run, alone = Run(shampoo(bits, max(size)), gradients), Run(methods.adamw(), gradients)
        run.prepare("root")
        run.optimizer.step()  # an ordinary step before the first update does less
        for kind in ("ordinary", "root"):
            turns[size, kind] = Turn(partial(run.prepare, kind), run.optimizer.step)
        turns[size, "base"] = Turn(alone.prepare, alone.optimizer.step)
    moments = Run(low, gradients_of([SQUARE], torch.float32, device))
    turns[SQUARE, "moments"] = Turn(moments.prepare, moments.optimizer.step)
    taken = timing.take_turns(turns, device, rounds, warm_up=1)
    seconds = {key: timing.middle(times).main / 1e3 for key, times in taken.items()}
    each_round = seconds[TINY, "ordinary"] - seconds[TINY, "base"]
    own, more = {}, {}
    for size in MEASURED:
        ordinary = seconds[size, "ordinary"]
        own[size] = (ordinary - seconds[size, "base"] - each_round) / counts[size]
        more[size] = (seconds[size, "root"] - ordinary) / counts[size]
    costs = Costs(
        f"measured: {report.environment()['cpu']}, {torch.get_num_threads()} thread",
        _fitted(_work_of_step, own),
        _fitted(_work_of_update, more),
        seconds[SQUARE, "moments"] / prod(SQUARE),
        each_round,
    )
    rows: Rows = [
        {"block": f"{r} x {c}", "ordinary ms": 1e3 * own[r, c], "fitted": 1e3 * costs.of_ordinary(r, c)}
        | {"update ms": 1e3 * more[r, c], "update fitted": 1e3 * costs.of_update(r, c)}
        for r, c in own
    ]
    return costs, rows


def _fitted(work: Callable[[int, int], tuple[float, ...]], seconds: dict[Shape, float]) -> tuple[float, ...]:
    """Non-negative factors of the terms of work, by least squares of relative errors."""
    from scipy.optimize import nnls  # with the extra `bench` only

    terms = np.array([[term / seconds[size] for term in work(*size)] for size in seconds])
    return tuple(map(float, nnls(terms, np.ones(len(terms)))[0]))


def assumed(
    bits: float, base_bits: int, itemsize: int, flops: float, bandwidth: float, each_round: float
) -> tuple[Costs, Rows]:
    """From what the library multiplies and rates of a GPU, in multiplications or additions and in bytes a second."""
    product, byte = 2 / flops, 1 / bandwidth
    products = products_of_update(bits)
    costs = Costs(
        f"ASSUMED: {flops / 1e12:g} TFLOP/s of float32 products, {bandwidth / 1e9:g} GB/s of memory",
        (product, byte * (bits / 8 + 8), byte * 40),
        (product * (products - 1), product, byte * 12 * products),
        byte * (base_bits / 2 + 3 * itemsize),
        each_round,
    )
    rows: Rows = [
        {"block": f"{r} x {c}", "ordinary ms": 1e3 * costs.of_ordinary(r, c), "update ms": 1e3 * costs.of_update(r, c)}
        | {"products of an update": products}
        for r, c in MEASURED
    ]
    return costs, rows


def products_of_update(bits: float) -> float:
    """How many products of its order an update of a factor takes on a GPU, its statistic among them: counted."""
    side = 128
    run = Run(shampoo(bits, side), gradients_of([(side, side)], torch.float32, torch.device("cpu")))
    counted = {}
    with forced_route("products"):
        for kind in ("root", "root", "ordinary"):
            run.prepare(kind)  # type: ignore[arg-type]
            with FlopCounterMode(display=False) as counter:
                run.optimizer.step()
            counted[kind] = counter.get_total_flops()
    return (counted["root"] - counted["ordinary"]) / 2 / (2 * side**3)
