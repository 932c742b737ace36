"""Which rank owns which blocks, and which rows each has; without any communication."""

import heapq
from collections.abc import Hashable, Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Rectangle

Run = tuple[int, int]  # the first, and the last + 1
Runs = tuple[Run, ...]  # of each rank


class Unit(NamedTuple):
    """The parameters whose gradients are one matrix, how it is cut, and which of the blocks each rank owns."""

    parameters: tuple[Tensor, ...]
    cut: Blocking
    runs: Runs
    dtype: torch.dtype  # in which its blocks are worked on

    @property
    def blocks(self) -> int:
        """How many there are on all ranks."""
        return self.runs[-1][1]

    @property
    def size(self) -> int:
        """Bytes of all blocks, up to what they are filled up with."""
        return sum(p.numel() for p in self.parameters) * self.dtype.itemsize

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """What must be the same of units that are sent together."""
        return self.dtype, self.parameters[0].device


class Placement:
    """Which rank owns which blocks: the dearest first, each to the rank that has least to do so far.

    What is placed stays, unless it comes in another number of blocks. All ranks come to the same placement, for they
    ask for the same units in the same order.
    """

    def __init__(self, ranks: int) -> None:
        self.loads = [0] * ranks
        self._runs: dict[Any, Runs] = {}

    def place(self, units: Iterable[tuple[Hashable, int, int]]) -> None:
        """Place the units that are not placed yet.

        Args:
            units: for each its key, its number of blocks, and the cost of each of them.
        """
        new = [(key, count, cost) for key, count, cost in units if self._count(key) != count]
        queue = [(load, rank) for rank, load in enumerate(self.loads)]
        heapq.heapify(queue)
        for key, count, cost in sorted(new, key=lambda unit: -unit[2]):
            taken = [0] * len(self.loads)
            for _ in range(count):
                load, rank = queue[0]
                taken[rank] += 1
                heapq.heapreplace(queue, (load + cost, rank))
            self._runs[key] = runs_of(taken)
        for load, rank in queue:
            self.loads[rank] = load

    def _count(self, key: Hashable) -> int | None:
        return self._runs[key][-1][1] if key in self._runs else None

    def __getitem__(self, key: Hashable) -> Runs:
        return self._runs[key]


def runs_of(counts: Iterable[int]) -> Runs:
    """Runs of so many blocks, one after the other."""
    ends = list(accumulate(counts))
    return tuple(zip([0, *ends], ends, strict=False))


@lru_cache(maxsize=4096)
def chunks(count: int, ranks: int, each: int = 1) -> Runs:
    """How ``Shard(0)`` of DTensor divides a dim of this size, of which every index is so many rows."""
    size = -(-count // ranks)
    return tuple((min(r * size, count) * each, min((r + 1) * size, count) * each) for r in range(ranks))


def overlap(a: Run, b: Run) -> Run:
    """What two runs have in common, from the larger start."""
    first, last = max(a[0], b[0]), min(a[1], b[1])
    return first, max(first, last)


class Piece(NamedTuple):
    """Where a block of a run meets some rows of the matrix."""

    block: int  # its index in the run
    place: Rectangle  # in the matrix
    inside: Rectangle  # in the block


Pieces = tuple[Piece, ...]
Routes = tuple[tuple[int, Pieces], ...]  # rank and pieces, of the ranks that have any


@lru_cache(maxsize=16384)
def pieces(cut: Blocking, run: Run, rows: Run) -> Pieces:
    """Where the blocks of a run meet some rows of the matrix."""
    found = []
    for block in range(*run):
        whole = cut.place(block)
        top, bottom = max(whole.top, rows[0]), min(whole.bottom, rows[1])
        if top < bottom:
            place = Rectangle(top, bottom, whole.left, whole.right)
            inside = Rectangle(top - whole.top, bottom - whole.top, 0, whole.columns)
            found.append(Piece(block - run[0], place, inside))
    return tuple(found)


@lru_cache(maxsize=16384)
def from_rows(cut: Blocking, run: Run, rows: Runs) -> Routes:
    """Of the blocks of a run the pieces that are in the rows of each rank."""
    found = ((rank, pieces(cut, run, own)) for rank, own in enumerate(rows))
    return tuple((rank, own) for rank, own in found if own)


@lru_cache(maxsize=16384)
def in_rows(cut: Blocking, runs: Runs, rows: Run) -> Routes:
    """Of the blocks of each rank the pieces that are in some rows."""
    found = ((rank, pieces(cut, run, rows)) for rank, run in enumerate(runs) if run[0] < run[1])
    return tuple((rank, own) for rank, own in found if own)


@lru_cache(maxsize=4096)
def rows_of_table(units: tuple[Runs, ...], device: torch.device) -> tuple[int, Tensor]:
    """Of a table of which each rank has the rows of its blocks: the most rows of a rank, and where each block's is."""
    ranks = range(len(units[0]))
    most = max(sum(runs[rank][1] - runs[rank][0] for runs in units) for rank in ranks)
    next_row = [rank * most for rank in ranks]
    order: list[int] = []
    for runs in units:
        for rank, (first, last) in enumerate(runs):
            order += range(next_row[rank], next_row[rank] + last - first)
            next_row[rank] += last - first
    return most, torch.tensor(order, dtype=torch.int64, device=device)
