"""Times and memory of steps, taken in turns, so that all methods meet the same load of the machine.

On a CPU the main figure is the process' CPU time, every thread of it: wall time depends on who else is there. On CUDA
it is the wall time between two synchronizations.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from lowbit_optim.peak import Tracker


class Time(NamedTuple):
    """Milliseconds of a step: the main figure of its device, and wall time."""

    main: float
    wall: float


class Turn(NamedTuple):
    """A step that is timed, and what comes before it and is not."""

    prepare: Callable[[], object]
    step: Callable[[], object]


def unit(device: torch.device) -> str:
    """What the main figure is called."""
    return "ms" if device.type == "cuda" else "CPU ms"


def timed(step: Callable[[], object], device: torch.device) -> Time:
    """The times of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall = 1e3 * (time.perf_counter() - wall)
    return Time(wall if device.type == "cuda" else 1e3 * (time.process_time() - cpu), wall)


def take_turns(
    turns: Mapping[str, Turn], device: torch.device, rounds: int, warm_up: int = 0, budget: float = float("inf")
) -> dict[str, list[Time]]:
    """The times of every turn: in each round every one of them is taken once, in order.

    Args:
        rounds: that are timed.
        warm_up: rounds before them.
        budget: seconds of wall time after which a turn is not taken again; every one is timed at least once.
    """
    taken: dict[str, list[Time]] = {name: [] for name in turns}
    for r in track(range(warm_up + rounds), transient=True):
        for name, turn in turns.items():
            if sum(t.wall for t in taken[name]) < 1e3 * budget:
                turn.prepare()
                time_of_it = timed(turn.step, device)
                if r >= warm_up:
                    taken[name].append(time_of_it)
    return taken


def middle(times: Iterable[Time]) -> Time:
    """The medians."""
    return Time(*(median(column) for column in zip(*times, strict=True)))


def amortised(ordinary: float, statistics: float | None, root: float, periods: tuple[int, int]) -> float:
    """The mean cost of a step over a whole number of periods.

    ordinary + (statistics - ordinary) / T1 + (root - statistics) / T2: every T1-th step takes statistics, and every
    T2-th, which is one of those, computes roots as well.

    Args:
        ordinary: of a step without either.
        statistics: of a step with statistics; None where they come with the roots only, or in every step.
        root: of a step with both.
        periods: (T1, T2), T2 a multiple of T1. T1 does not count where ``statistics`` is None.
    """
    t1, t2 = periods
    if t2 % t1:
        raise ValueError(f"periods are {periods}; the second must be a multiple of the first")
    if statistics is None:
        return ordinary + (root - ordinary) / t2
    return ordinary + (statistics - ordinary) / t1 + (root - statistics) / t2


def tensors(value: Any) -> Iterable[Tensor]:
    """The plain tensors of a state, also inside of containers, of tensor subclasses and of other objects."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors(vars(value))


def state_bytes(optimizer: Any, apart: Iterable[Tensor] = ()) -> int:
    """The bytes of all tensors of the state, shared ones counted once and those of ``apart`` not at all."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in apart}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(dict(optimizer.state))}
    return sum(size for pointer, size in storages.items() if pointer not in left_out)


def extra_bytes(optimizer: Any, apart: Iterable[Tensor]) -> int:
    """The most bytes that one step holds at one time beyond the state before it.

    On CUDA by the allocator's count; elsewhere operators are watched, and what one makes and frees is not seen.

    Args:
        apart: parameters and gradients.
    """
    apart = list(apart)
    if apart[0].is_cuda:
        torch.cuda.synchronize(apart[0].device)
        torch.cuda.reset_peak_memory_stats(apart[0].device)
        before = torch.cuda.memory_allocated(apart[0].device)
        optimizer.step()
        return torch.cuda.max_memory_allocated(apart[0].device) - before
    tracker = Tracker()
    tracker.leave_out(apart)
    tracker.add(tensors(dict(optimizer.state)))
    before = tracker.live
    with tracker:
        optimizer.step()
    return tracker.peak - before
