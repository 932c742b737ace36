"""What a step has to do, sorted so that it can be done to many blocks at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack
from lowbit_optim.storage.factors import Factor
from lowbit_optim.storage.moment import Moment

SIDES = ("left", "right")
LARGEST = 2.0**124  # of a preconditioned gradient: what is added to it must not overflow at once


class Forms(NamedTuple):
    """The forms of the two factors of a block, and of the gradient's moment in their eigenbases where one is kept."""

    left: Factor
    right: Factor
    moment: Moment | None = None

    def sides(self) -> Iterator[tuple[str, Factor]]:
        """("left", its form), ("right", its form)."""
        return zip(SIDES, (self.left, self.right), strict=True)

    def roots(self, stack: Stack, start: int, stop: int, dtype: torch.dtype) -> list[Tensor]:
        """Both roots of blocks start to stop, [k, r, r] and [k, c, c] in ``dtype``."""
        return [form.root(stack.read(side, start, stop, form.root_needs), dtype) for side, form in self.sides()]


class Due(NamedTuple):
    """What this step asks of a unit."""

    update: bool
    refresh: bool
    precondition: bool


class Turn(NamedTuple):
    """Blocks first to last - 1, and what of ``Due`` is done to their factors."""

    first: int
    last: int
    update: bool
    refresh: bool


@dataclass
class Bucket:
    """Units of one step that share a block shape and every setting."""

    forms: Forms
    precondition: bool
    in_turns: bool  # some blocks of a unit may have had their first statistic, and others not yet
    graft: bool
    workspace: int
    dtype: torch.dtype
    apply_dtype: torch.dtype
    units: list[tuple[Tensor, ...]] = field(default_factory=list)
    blockings: list[Blocking] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.units[0][0].device

    @property
    def counts(self) -> list[int]:
        """Blocks of each unit."""
        return [cut.count for cut in self.blockings]

    @property
    def owner(self) -> Tensor:
        """For each block the index of its unit, int64 [k]."""
        return _owner(tuple(self.counts), self.device)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.blockings[0].rows, self.blockings[0].columns

    @property
    def update_bytes(self) -> int:
        """What the update of both factors of a block takes."""
        return 8 * sum(n * n for n in self.block) * self.dtype.itemsize

    @property
    def apply_bytes(self) -> int:
        """What both roots of a block take, with what reading them takes, and a temporary of the block."""
        roots = sum(
            n * n * (self.apply_dtype.itemsize + factor.copies * self.dtype.itemsize)
            for n, (_, factor) in zip(self.block, self.forms.sides(), strict=True)
        )
        return roots + self.block[0] * self.block[1] * self.apply_dtype.itemsize

    def add(self, unit: tuple[Tensor, ...], cut: Blocking, state: dict[str, Any], turn: Turn) -> None:
        for own, x in zip((self.units, self.blockings, self.states, self.turns), (unit, cut, state, turn), strict=True):
            own.append(x)  # type: ignore[attr-defined]

    def part(self, wanted: Iterable[int]) -> "Bucket":
        """Some of the units."""
        wanted = list(wanted)
        lists = {name: getattr(self, name) for name in ("units", "blockings", "states", "turns")}
        changed: dict[str, Any] = {name: [own[i] for i in wanted] for name, own in lists.items()}
        return replace(self, **changed)

    def due(self) -> "Bucket":
        """The units of which some blocks have their turn."""
        return self.part(i for i, turn in enumerate(self.turns) if turn.first < turn.last)

    def runs(self) -> Iterator[Turn]:
        """Runs of the stacked blocks whose turn it is."""
        offset, run = 0, Turn(0, 0, False, False)
        for count, turn in zip(self.counts, self.turns, strict=True):
            own = turn._replace(first=turn.first + offset, last=turn.last + offset)
            offset += count
            if own.first == own.last:
                continue
            if own == run._replace(first=own.first, last=own.last) and own.first == run.last:
                run = run._replace(last=own.last)
                continue
            if run.first < run.last:
                yield run
            run = own
        if run.first < run.last:
            yield run

    def gather(self, out: Tensor) -> None:
        """Write the blocks of all gradients into [k, r, c]."""
        for unit, cut, own in zip(self.units, self.blockings, out.split(self.counts), strict=True):
            cut.read(_joint_gradient(unit), own)

    def scatter(self, blocks: Tensor, weight: Tensor, *, bounded: bool = False) -> None:
        """Write the blocks times their weights, [k], into the gradients.

        They stay below ``LARGEST``, unless they are said to be bounded, and below what their dtype can hold. The blocks
        may be overwritten.
        """
        stacked = zip(self.units, self.blockings, blocks.split(self.counts), weight.split(self.counts), strict=True)
        for unit, cut, own, scale in stacked:
            gradients = [parameter.grad for parameter in unit]
            limit = min([LARGEST, *(torch.finfo(g.dtype).max for g in gradients if g is not None)])
            if not bounded or limit < LARGEST:
                own *= scale.view(-1, 1, 1)
                own.clamp_(-limit, limit)
                scale = torch.ones_like(scale)
            if len(gradients) == 1:
                assert gradients[0] is not None
                cut.write(own, scale, gradients[0])
                continue
            own *= scale.view(-1, 1, 1)
            matrix = cut.merge(own)
            for gradient, part in zip(gradients, (matrix[:, :-1], matrix[:, -1]), strict=True):
                if gradient is not None:
                    gradient.copy_(part.view_as(gradient))


def parts(bucket: Bucket, room: int) -> Iterator[Bucket]:
    """Whole units whose blocks, and as many temporaries, fill half of the room; at least one each time."""
    start, used = 0, 0
    if not bucket.units:
        return
    for i, cut in enumerate(bucket.blockings):
        size = 2 * cut.count * cut.rows * cut.columns * bucket.dtype.itemsize
        if i > start and used + size > room // 2:
            yield bucket.part(range(start, i))
            start, used = i, 0
        used += size
    yield bucket.part(range(start, len(bucket.units)))


def slices(start: int, stop: int, each: int, room: int) -> Iterator[tuple[int, int]]:
    """Runs of the blocks start to stop - 1 that take ``each`` bytes and fit in the room together; at least one each."""
    run = max(1, room // each)
    for first in range(start, stop, run):
        yield first, min(first + run, stop)


def staggered(cost_before: int, cost: int, count: int, total: int, period: int, step: int) -> tuple[int, int]:
    """Which of the blocks of a unit, (first, last + 1), have their turn at a step (counted from 1) of their period.

    Blocks take turns in the order of the parameters, so that every step of a period has about as much to do.

    Args:
        cost_before: of all blocks of the units before this one.
        cost: of each block of the unit.
        count: blocks of the unit.
        total: the cost of all blocks with this period.
    """
    now = (step - 1) % period
    # The turn of block i is floor(period (cost_before + i cost) / total).
    first, last = (-(-(t * total - period * cost_before) // (period * cost)) for t in (now, now + 1))
    return min(max(first, 0), count), min(max(last, 0), count)


def _joint_gradient(unit: tuple[Tensor, ...]) -> Tensor:
    """The gradient of a parameter, or of a weight and its bias as the last column: [first dim, the rest + 1]."""
    if len(unit) == 1:
        assert unit[0].grad is not None
        return unit[0].grad
    weight, bias = (torch.zeros_like(p) if p.grad is None else p.grad for p in unit)
    return torch.cat([weight.flatten(1), bias.to(weight.dtype).unsqueeze(1)], 1)


@lru_cache(maxsize=4096)
def _owner(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """For each block of a stack the index of its unit, int64 [sum(counts)]."""
    return torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)


@lru_cache(maxsize=4096)
def lengths(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The counts as a tensor, int64."""
    return torch.tensor(counts, device=device)
