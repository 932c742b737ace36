"""What a step has to do, sorted so that it can be done to many blocks at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack
from lowbit_optim.preconditioners.measures import Counts, of_units, owners
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

    def within(self, first: int, last: int) -> "Turn":
        """What of it is among the blocks first to last - 1, counted from there."""
        start, stop = (min(max(x, first), last) - first for x in (self.first, self.last))
        return self._replace(first=start, last=stop)


class Settings(NamedTuple):
    """What the units of a bucket share beside the shape of their blocks."""

    forms: Forms
    precondition: bool
    in_turns: bool  # some blocks of a unit may have had their first statistic, and others not yet
    graft: bool
    workspace: int
    dtype: torch.dtype
    apply_dtype: torch.dtype


class Work(NamedTuple):
    """What a step asks of a unit."""

    unit: tuple[Tensor, ...]
    cut: Blocking
    state: dict[str, Any]
    turn: Turn
    settings: Settings


B = TypeVar("B", bound="Bucket")


@dataclass
class Bucket:
    """Units of one step that share a block shape and every setting; of each the blocks that this process works on."""

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
    counts: list[int] = field(default_factory=list)  # blocks of each unit

    @property
    def device(self) -> torch.device:
        return self.units[0][0].device

    @property
    def owner(self) -> Tensor:
        """For each block the index of its unit, int64 [k]."""
        return owners(self.counts, self.device)

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

    def add(self, work: Work) -> None:
        """Add all blocks of a unit."""
        self.append(work, work.turn, work.cut.count)

    def append(self, work: Work, turn: Turn, count: int) -> None:
        """Add so many blocks of a unit, of which ``turn`` have theirs."""
        self.units.append(work.unit)
        self.blockings.append(work.cut)
        self.states.append(work.state)
        self.turns.append(turn)
        self.counts.append(count)

    def part(self: B, wanted: Iterable[int]) -> B:
        """Some of the units."""
        wanted = list(wanted)
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), list)]
        changed: dict[str, Any] = {name: [getattr(self, name)[i] for i in wanted] for name in names}
        return replace(self, **changed)

    def due(self: B) -> B:
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

    def count_bad(self, bad: Tensor) -> Tensor:
        """Count the blocks that are not finite in the state of each unit; returns how many they are, int64 []."""
        total = torch.zeros(len(self.states), dtype=torch.int64, device=bad.device)
        total.index_add_(0, self.owner, bad.long())
        torch._foreach_add_([state["nonfinite"] for state in self.states], list(total.unbind()))
        return total.sum()

    def mean_norms(self, stack: Stack, side: str) -> Tensor:
        """The mean (tr M)^(1/2) of the last statistics M of each unit's blocks, of those that had one, [units]."""
        state = stack.read(side, 0, sum(self.counts), ("updates", "previous_norm"))
        return mean_norms(state["updates"] > 0, state["previous_norm"].to(self.dtype), self.counts)

    def scatter(self, blocks: Tensor, weight: Tensor, *, bounded: bool = False) -> None:
        """Write the blocks times their weights, [k], into the gradients.

        They stay below ``LARGEST``, unless they are said to be bounded, and below what their dtype can hold. The blocks
        may be overwritten.
        """
        stacked = zip(self.units, self.blockings, blocks.split(self.counts), weight.split(self.counts), strict=True)
        for unit, cut, own, scale in stacked:
            gradients = [parameter.grad for parameter in unit]
            limit = largest_storable(unit)
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


def largest_storable(unit: tuple[Tensor, ...]) -> float:
    """Below this the numbers of a unit's gradients must stay."""
    return min([LARGEST, *(torch.finfo(p.grad.dtype).max for p in unit if p.grad is not None)])


def bucketed(works: Iterable[Work]) -> list[Bucket]:
    """Units sorted by what they share."""
    buckets: dict[Any, Bucket] = {}
    for work in works:
        cut, device = work.cut, work.unit[0].device
        bucket = buckets.setdefault((cut.rows, cut.columns, device, work.settings), Bucket(*work.settings))
        bucket.add(work)
    return list(buckets.values())


def parts(bucket: B, room: int) -> Iterator[B]:
    """Whole units whose blocks, and as many temporaries, fill half of the room; at least one each time."""
    start, used = 0, 0
    if not bucket.units:
        return
    rows, columns = bucket.block
    for i, count in enumerate(bucket.counts):
        size = 2 * count * rows * columns * bucket.dtype.itemsize
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


def mean_norms(have: Tensor, norms: Tensor, counts: Counts) -> Tensor:
    """The means of the norms of each unit's blocks, [k], of those that have one; [units], 0 where none has."""
    total, count = (of_units(x, counts) for x in (norms * have, have.to(norms.dtype)))
    return torch.where(count > 0, total / count, 0.0)
