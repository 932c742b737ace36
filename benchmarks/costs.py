"""Seconds that a rank's part of a step of Shampoo takes: measured on this CPU, or assumed from rates of a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import lowbit_optim
from benchmarks import methods, report, timing
from benchmarks.methods import Method, Run, Shape, gradients_of, shampoo
from benchmarks.timing import Turn
from lowbit_optim.blocking import blocking
from lowbit_optim.distributed.placement import Placement, Unit, chunks, rows_of_table
from lowbit_optim.distributed.team import ShardTeam
from lowbit_optim.roots import forced_route

Rows = list[dict[str, Any]]
SQUARE = (1024, 1024)
MEASURED = [(128, 128), (256, 256), (512, 512), SQUARE, (16, 1024), (128, 1024)]


@dataclass(frozen=True)
class Costs:
    """Seconds of one rank's work.

    Attributes:
        source: where they are from.
        ordinary: of a block of r x c, for each unit of rc(r + c), r^2 + c^2 and rc.
        update: beyond that, of r^3 + c^3, rc(r + c) and r^2 + c^2.
        base: of a number, in the base's step.
        copied: of a number that is copied into a buffer or out of it.
        host: of the host.
    """

    source: str
    ordinary: tuple[float, ...]
    update: tuple[float, ...]
    base: float
    copied: float
    host: "Host"

    def of_ordinary(self, rows: int, columns: int) -> float:
        """Of a block in a step without an update."""
        return float(np.dot(self.ordinary, _work_of_step(rows, columns)))

    def of_update(self, rows: int, columns: int) -> float:
        """Of its statistics and roots."""
        return float(np.dot(self.update, _work_of_update(rows, columns)))


class Host(NamedTuple):
    """Seconds of the host, which are not those of the numbers that it works on."""

    each_round: float
    each_piece: float  # that is copied
    each_owner: float  # in a step, for each matrix and rank: who has what of it


def _work_of_step(r: int, c: int) -> tuple[float, ...]:
    return r * c * (r + c), r * r + c * c, r * c


def _work_of_update(r: int, c: int) -> tuple[float, ...]:
    return r**3 + c**3, r * c * (r + c), r * r + c * c


def measured(bits: float, base_bits: int, rounds: int) -> tuple[Costs, Rows]:
    """On one thread of this CPU; and how well what is fitted fits."""
    device = torch.device("cpu")
    low = Method("AdamW", None, partial(lowbit_optim.AdamW, lr=1e-3, bits=base_bits))
    turns, counts = {}, {}
    for size in MEASURED:
        counts[size] = min(64, max(1, 2**31 // sum(n**3 for n in size)))
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
    own = {size: (seconds[size, "ordinary"] - seconds[size, "base"]) / counts[size] for size in MEASURED}
    more = {size: (seconds[size, "root"] - seconds[size, "ordinary"]) / counts[size] for size in MEASURED}
    host, copied = of_host(rounds)
    costs = Costs(
        f"measured: {report.environment()['cpu']}, {torch.get_num_threads()} thread",
        _fitted(_work_of_step, own),
        _fitted(_work_of_update, more),
        seconds[SQUARE, "moments"] / prod(SQUARE),
        copied,
        host,
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
    bits: float, base_bits: int, itemsize: int, flops: float, bandwidth: float, rounds: int
) -> tuple[Costs, Rows]:
    """From what the library multiplies and rates of a GPU, in multiplications or additions and in bytes a second.

    The host's are measured here all the same.
    """
    product, byte = 2 / flops, 1 / bandwidth
    products = products_of_update(bits)
    costs = Costs(
        f"ASSUMED: {flops / 1e12:g} TFLOP/s of float32 products, {bandwidth / 1e9:g} GB/s of memory",
        (product, byte * (bits / 8 + 8), byte * 40),
        (product * (products - 1), product, byte * 12 * products),
        byte * (base_bits / 2 + 3 * itemsize),
        byte * 8,
        of_host(rounds)[0],
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


# ---- the host --------------------------------------------------------------------------------------------------------


class OneOfMany(ShardTeam):
    """A rank whose exchanges bring zeros at once."""

    def __init__(self, ranks: int) -> None:
        self.rank, self.size, self.exchange_dtype, self.sent = 0, ranks, None, 0
        self.placement = Placement(ranks)

    def unit(self, rows: int, columns: int, limit: int) -> Unit:
        """A matrix of which this rank has its rows."""
        cut = blocking((rows, columns), limit)
        assert cut is not None
        grad = torch.zeros(-(-rows // self.size), columns)
        parameter: Any = SimpleNamespace(shape=(rows, columns), grad=grad, device=grad.device)
        self.placement.place([((rows, columns), cut.count, 1)])
        return Unit((parameter,), cut, self.placement[rows, columns], torch.float32)

    def _rows(self, unit: Unit) -> Any:
        return chunks(unit.cut.matrix[0], self.size)

    def _all_to_all(self, buffer: torch.Tensor, send: list[int], receive: Any) -> tuple[torch.Tensor, Any]:
        numbers = sum(piece.place.numbers for part in receive for _, piece in part)
        return buffer.new_zeros(numbers), SimpleNamespace(wait=lambda: None)


def of_host(rounds: int) -> tuple[Host, float]:
    """What the library's own Python takes here, on one thread; and what copying a number does."""

    def seconds(work: Callable[[], Any]) -> float:
        work()
        return median(timing.timed(work, torch.device("cpu")).main / 1e3 for _ in range(rounds))

    def exchange(team: OneOfMany, unit: Unit) -> None:
        team.deliver([unit], team.collect([unit])())()

    few, many = OneOfMany(64), OneOfMany(1024)
    # Of 128 pieces of 64 numbers each way, and of 16 of 32768.
    small, large = few.unit(64, 4096, 64), few.unit(4096, 4096, 512)
    terms = np.array([[256, 256 * 64], [32, 32 * 32768]])
    each_piece, copied = np.linalg.solve(terms, [seconds(partial(exchange, few, unit)) for unit in (small, large)])
    unit = many.unit(4096, 4096, 1200)
    parameters = [torch.empty(4096, 4096, device="meta") for _ in range(64)]

    def own() -> None:
        """What a step does with all ranks of every matrix."""
        runs = many.place({p: many.cuts(p, 1200) for p in parameters}, divisible=True)
        units = [unit._replace(runs=own) for own in runs.values()]
        for back in (False, True):
            many._routes(units, many._in_my_rows, back=back)
            many._routes(units, many._of_my_blocks, back=back)
        rows_of_table(tuple(own.runs for own in units), torch.device("cpu"))

    each_owner = seconds(own) / len(parameters) / many.size
    return Host(_each_round(seconds), float(each_piece), each_owner), float(copied)


def _each_round(seconds: Callable[[Callable[[], Any]], float]) -> float:
    """Of a real step of tiny matrices, each of which is a round, in a group of one."""
    count = 32
    parameters = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        settings: dict[str, Any] = {"workspace": 1, "statistics_frequency": methods.NEVER, "fused": True}
        optimizer = lowbit_optim.Shampoo(parameters, process_group=dist.group.WORLD, **settings)
        return seconds(optimizer.step) / count
    finally:
        dist.destroy_process_group()
