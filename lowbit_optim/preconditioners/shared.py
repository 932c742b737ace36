"""The step of a preconditioner whose blocks are shared among processes.

Units pass in rounds, as many in each as fit in the workspace: their gradients go to the owners of their blocks, these
update their factors and precondition, a few numbers of each block go to everybody, so that norms are those of whole
units, and the blocks go back. While they do, the next round is worked on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit_optim.blocking import Stack
from lowbit_optim.distributed import Team, Unit
from lowbit_optim.linalg import each
from lowbit_optim.preconditioners.buckets import SIDES, Bucket, Work, largest_storable, mean_norms
from lowbit_optim.preconditioners.measures import Measures, bounded_weight, graft, of_units, owners

if TYPE_CHECKING:
    from lowbit_optim.preconditioners.kronecker import KroneckerPreconditioner


@dataclass
class OwnBucket(Bucket):
    """Of each unit the blocks that this rank owns."""

    blocks: list[Tensor] = field(default_factory=list)  # [own blocks, r, c], of gradients; later preconditioned
    places: list[int] = field(default_factory=list)  # of the units in the round
    norms: list[dict[str, Tensor]] = field(default_factory=list)  # by side, of all blocks of the unit: see mean_norms

    def gather(self, out: Tensor) -> None:
        torch.cat(self.blocks, out=out)

    def mean_norms(self, stack: Stack, side: str) -> Tensor:
        return torch.stack([norms[side] for norms in self.norms])


def shared_step(preconditioner: "KroneckerPreconditioner", team: Team, works: list[Work]) -> list[Tensor]:
    """Precondition the gradients of all units, each rank its own blocks; returns the troubles, int64 [2] each."""
    units = [Unit(w.unit, w.cut, preconditioner.runs(w.unit[0]), w.settings.dtype) for w in works]
    workspaces = [work.settings.workspace for work in works]
    passes = [slice(*ends) for ends in rounds(units, workspaces, everywhere=team.everywhere)]
    troubles: list[Tensor] = []
    collecting = [team.collect(units[own]) for own in passes[:1]]
    delivering: list[Callable[[], None]] = []
    for i, own in enumerate(passes):
        blocks = collecting.pop()()
        collecting += [team.collect(units[following]) for following in passes[i + 1 : i + 2]]
        troubles += _round(preconditioner, team, works[own], units[own], blocks)
        for finish in delivering:
            finish()
        delivering = [preconditioner.bring_back(team, units[own], blocks)]
    for finish in delivering:
        finish()
    return troubles


def rounds(units: Sequence[Unit], workspaces: Sequence[int], *, everywhere: bool) -> Iterator[tuple[int, int]]:
    """Consecutive units of one dtype and device that have room together, or no more blocks than there are ranks.

    Ranks wait for each other in every round, so each should have blocks in it; and all come to the same rounds.

    Args:
        workspaces: bytes of temporaries, of each unit.
        everywhere: whether blocks come to every rank: then all of them fill at most half of the workspace. Else those
            of one rank, on average, an eighth: it has them up to six times, as what is sent, received and worked on.

    Yields:
        (the first unit, the last + 1), of at least one.
    """
    ranks = len(units[0].runs) if units else 1
    copies, shared_by = (2, 1) if everywhere else (8, ranks)
    first = size = blocks = 0
    for i, unit in enumerate(units):
        size, blocks = size + unit.size, blocks + unit.blocks
        fits = copies * size <= shared_by * min(workspaces[first : i + 1]) or blocks <= ranks
        if i > first and (unit.kind != units[first].kind or not fits):
            yield first, i
            first, size, blocks = i, unit.size, unit.blocks
    if units:
        yield first, len(units)


def _round(
    preconditioner: "KroneckerPreconditioner", team: Team, works: list[Work], units: list[Unit], blocks: list[Tensor]
) -> list[Tensor]:
    """Bring this rank's blocks of the units from gradients to preconditioned ones; returns the troubles."""
    buckets = _own_buckets(team, works, units, blocks)
    troubles = []
    for bucket in buckets:
        troubles += [preconditioner.update_part(part) for part in preconditioner.parts(bucket.due(), bucket.workspace)]
    if any(work.settings.in_turns for work in works):
        _share_norms(team, works, units, buckets)
    tables: dict[int, Tensor] = {}
    for bucket in buckets:
        room = preconditioner.workspace.room(bucket.device, bucket.workspace)
        for part in preconditioner.parts(bucket, room):
            gradient = preconditioner.gathered(part)
            measures, _ = preconditioner.preconditioned(part, gradient)
            for own, result in zip(part.blocks, gradient.split(part.counts), strict=True):
                own.copy_(result)
            table = torch.stack([x.to(measures.before.dtype) for x in measures], 1)
            tables |= zip(part.places, table.split(part.counts), strict=True)
    precise = torch.float32 if blocks[0].device.type == "mps" else torch.float64
    measures = Measures(*_shared(team, units, tables, len(Measures._fields), precise).unbind(1))
    bad = _count_bad(works, units, measures.bad)
    _weigh(team, works, units, blocks, measures)
    return [*troubles, torch.stack([bad, torch.zeros_like(bad)])]


def _own_buckets(team: Team, works: list[Work], units: list[Unit], blocks: list[Tensor]) -> list[OwnBucket]:
    """This rank's blocks, sorted by what they share."""
    buckets: dict[Any, OwnBucket] = {}
    for place, (work, unit, own) in enumerate(zip(works, units, blocks, strict=True)):
        if len(own):
            key = (work.cut.rows, work.cut.columns, own.device, work.settings)
            bucket = buckets.setdefault(key, OwnBucket(*work.settings))
            bucket.append(work, work.turn.within(*team.own(unit)), len(own))
            bucket.blocks.append(own)
            bucket.places.append(place)
            bucket.norms.append({})
    return list(buckets.values())


def _share_norms(team: Team, works: list[Work], units: list[Unit], buckets: list[OwnBucket]) -> None:
    """Let everybody know the norms of the statistics that blocks have had, for those that have had none."""
    tables: dict[int, Tensor] = {}
    for bucket in buckets:
        for place, state in zip(bucket.places, bucket.states, strict=True):
            found = [state[f"{side}.{name}"] for side in SIDES for name in ("updates", "previous_norm")]
            tables[place] = torch.stack([x.to(units[0].dtype) for x in found], 1)
    table = _shared(team, units, tables, 2 * len(SIDES), units[0].dtype)
    counts = [unit.blocks for unit in units]
    norms = {side: mean_norms(table[:, 2 * i] > 0, table[:, 2 * i + 1], counts) for i, side in enumerate(SIDES)}
    for bucket in buckets:
        bucket.norms = [{side: norms[side][place] for side in SIDES} for place in bucket.places]


def _shared(team: Team, units: list[Unit], tables: dict[int, Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """From the numbers of this rank's blocks, by unit, those of all blocks, [blocks, width]."""
    nothing = torch.empty(0, width, dtype=dtype, device=units[0].parameters[0].device)
    return team.share(units, torch.cat([nothing, *(tables[place] for place in sorted(tables))]))


def _count_bad(works: list[Work], units: list[Unit], bad: Tensor) -> Tensor:
    """Count the blocks that were not finite in the state of each unit, on every rank; how many they are, int64 []."""
    counts = of_units(bad, [unit.blocks for unit in units]).long()
    torch._foreach_add_([work.state["nonfinite"] for work in works], list(counts.unbind()))
    return counts.sum()


def _weigh(team: Team, works: list[Work], units: list[Unit], blocks: list[Tensor], measures: Measures) -> None:
    """Multiply this rank's blocks with their weights."""
    counts = [unit.blocks for unit in units]
    grafted = [work.settings.graft and work.settings.precondition for work in works]
    weight = measures.weight
    if any(grafted):
        weight = graft(counts, measures)
    if not all(grafted):  # of units, and not of all of them
        chosen = torch.tensor(grafted, device=weight.device)[owners(counts, weight.device)]
        weight = torch.where(chosen, weight, measures.weight)
    for work, unit, own, weights in zip(works, units, blocks, weight.split(counts), strict=True):
        first, last = unit.runs[team.rank]
        own *= each(bounded_weight(weights[first:last], own.dtype), own)
        limit = largest_storable(work.unit)
        own.clamp_(-limit, limit)
