"""What every rank has, holds and sends in a step of Shampoo, worked out without processes, for any number of them.

Three modes, on R ranks:

* "ddp" (``process_group``): every rank has all gradients. A block has one owner. In each round every rank sends its
  preconditioned blocks to all others, filled up to the most that a rank has: R - 1 times the numbers of that rank.
* "whole" (FSDP2): every rank has rows of each matrix. They go to the owners of the blocks that they lie in, and come
  back: of n numbers in rows, b in blocks that it owns, s in both, a rank sends n - s and then b - s.
* "local" (FSDP2): blocks are cut from the rows that a rank has. None is sent.

In all of them five float64 of each block go from its owner to everybody, filled up to the most blocks of a rank, and an
int32 for each parameter without blocks. HSDP is "whole" on the ranks that have one copy of the model together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from lowbit_optim import AdamW, Shampoo
from lowbit_optim.blocking import Blocking, blocking, blocking_of
from lowbit_optim.distributed import Placement, Runs, Unit, chunks, runs_of
from lowbit_optim.preconditioners.shared import rounds
from lowbit_optim.storage.factors import put

Shape = tuple[int, ...]
Counts = NDArray[np.int64]  # of each rank, [ranks]; of each round, too, [rounds, ranks]

MODES = ("ddp", "whole", "local")
MEASURES = 5 * 8  # bytes of what is told of a block
WORKED_ON = 4  # bytes of a number that is worked on


@dataclass(frozen=True)
class Blocks:
    """Blocks of one size, and how many of them each rank works on."""

    rows: int
    columns: int
    counts: Counts

    @property
    def numbers(self) -> Counts:
        """In them, with what they are filled up with."""
        return self.counts * self.rows * self.columns


@dataclass(frozen=True)
class Share:
    """What each rank has of one matrix.

    Attributes:
        blocks: that it works on.
        rows, inside, kept: numbers in its rows, in its blocks without what they are filled up with, in both.
        targets, sources: pieces of blocks in its rows, and of its blocks in the rows of ranks; under "whole".
        runs: as the library has them.
    """

    blocks: tuple[Blocks, ...]
    rows: Counts
    inside: Counts
    kept: Counts
    targets: Counts
    sources: Counts
    runs: Runs

    @property
    def numbers(self) -> Counts:
        """That a rank works on."""
        return sum((own.numbers for own in self.blocks), np.zeros_like(self.rows))


class Spread:
    """A step of Shampoo on parameters of the given shapes.

    Args:
        shapes: of parameters that are preconditioned, those of rank 0 and 1 among them.
        mode: one of ``MODES``.
        ranks: how many.
        left: parameters that are left to the base.
        limit: ``max_preconditioner_dim``.
        workspace: as the keyword.
        sent_as: bytes of a number on its way: 4, or 2 with ``exchange_dtype="bfloat16"``.
    """

    def __init__(
        self,
        shapes: Iterable[Shape],
        mode: str,
        ranks: int,
        *,
        left: int = 0,
        limit: int = 1200,
        workspace: int = 2**28,
        sent_as: int = 4,
    ) -> None:
        self.mode, self.ranks, self.sent_as = mode, ranks, sent_as
        shapes = list(shapes)
        cuts = {i: cut for i, shape in enumerate(shapes) if (cut := blocking(shape, limit)) is not None}
        self.alone = len(shapes) - len(cuts) + left
        if mode == "local":
            shares = [_local(cut, ranks, limit) for cut in cuts.values()]
        else:
            placement = Placement(ranks)
            placement.place((i, cut.count, cut.rows**3 + cut.columns**3) for i, cut in cuts.items())
            shares = [_placed(cut, placement[i], sharded=mode == "whole") for i, cut in cuts.items()]
        units = [
            Unit((torch.empty(cut.shape, device="meta"),), cut, share.runs, torch.float32)
            for cut, share in zip(cuts.values(), shares, strict=True)
        ]
        ends = rounds(units, [workspace] * len(units), everywhere=mode == "ddp")
        self.rounds = [shares[first:last] for first, last in ends]

    # ---- what is worked on ----

    def summed(self, of_block: Callable[[int, int], float]) -> NDArray[np.float64]:
        """For each round and rank the sum over its blocks, [rounds, ranks].

        Args:
            of_block: from rows and columns of a block.
        """
        known: dict[Shape, float] = {}
        found = np.zeros((len(self.rounds), self.ranks))
        for i, shares in enumerate(self.rounds):
            for blocks in (own for share in shares for own in share.blocks):
                size = blocks.rows, blocks.columns
                known[size] = known[size] if size in known else of_block(*size)
                found[i] += blocks.counts * known[size]
        return found

    @cached_property
    def blocks(self) -> Counts:
        """How many each rank works on in each round."""
        return self.summed(lambda rows, columns: 1).astype(np.int64)

    # ---- what is copied into buffers and out of them ----

    @property
    def pieces(self) -> Counts:
        """How many a rank copies in each round: to send or work on, and back."""
        if self.mode == "whole":
            return 2 * self._of_rounds(lambda share: share.targets + share.sources)
        return self.blocks + (self.blocks.sum(1, keepdims=True) if self.mode == "ddp" else self.blocks)

    @property
    def copied(self) -> Counts:
        """How many numbers they are."""
        return (2 if self.mode == "whole" else 1) * self._of_rounds(lambda share: share.inside + share.rows)

    # ---- what is sent, in bytes ----

    @cached_property
    def gathered(self) -> Counts:
        """What a rank gives to all others when its blocks are ready, filled up: [rounds, 1]; nothing but under DDP."""
        numbers = self._of_rounds(lambda share: share.numbers)
        return numbers.max(1, keepdims=True) * self.sent_as * (self.mode == "ddp")

    @cached_property
    def collected(self) -> tuple[Counts, Counts]:
        """What a rank sends and receives before blocks are worked on; afterwards it is the other way round."""
        sent = self._of_rounds(lambda share: share.rows - share.kept)
        received = self._of_rounds(lambda share: share.inside - share.kept)
        sharded = self.sent_as * (self.mode == "whole")
        return sent * sharded, received * sharded

    @cached_property
    def told(self) -> Counts:
        """What a rank tells all others of its blocks, filled up: [rounds, 1]."""
        return self.blocks.max(1, keepdims=True) * MEASURES

    @cached_property
    def messages(self) -> Counts:
        """How many others a rank sends to, or receives from if that is more, in each round; at most."""
        both = self._of_rounds(lambda share: share.targets), self._of_rounds(lambda share: share.sources)
        return np.minimum(np.maximum(*both), self.ranks - 1)

    @property
    def sent(self) -> Counts:
        """By each rank in a step."""
        to_all = (self.gathered + self.told).sum() + 4 * self.alone
        return sum(self.collected).sum(0) + to_all * (self.ranks - 1)

    # ---- what is there meanwhile, in bytes ----

    @property
    def buffers(self) -> int:
        """Of the rank that has most: what is received and sent, and the blocks, of rounds that overlap."""
        numbers = self._of_rounds(lambda share: share.numbers)
        blocks = numbers * WORKED_ON
        if self.mode == "local":
            coming, going = np.zeros_like(blocks), blocks
        elif self.mode == "ddp":
            coming, going = np.zeros_like(blocks), np.broadcast_to(self.gathered * (self.ranks + 1), blocks.shape)
        else:
            coming = self._of_rounds(lambda share: share.rows + share.inside) * self.sent_as
            going = coming
        nothing = np.zeros_like(blocks[:1])
        return int((blocks + np.vstack([coming[1:], nothing]) + np.vstack([nothing, going[:-1]])).max(initial=0))

    def _of_rounds(self, of_share: Callable[[Share], Counts]) -> Counts:
        nothing = np.zeros(self.ranks, np.int64)
        return np.stack([sum((of_share(share) for share in shares), nothing) for shares in self.rounds])


def _placed(cut: Blocking, runs: Runs, sharded: bool) -> Share:
    """A matrix whose blocks have owners."""
    ranks = len(runs)
    counts = np.diff(np.array(runs))[:, 0]
    blocks = (Blocks(cut.rows, cut.columns, counts),)
    (m, n), (_, across) = cut.matrix, cut.grid
    i, j = np.divmod(np.arange(cut.count), across)
    top, bottom = np.minimum(i * cut.rows, m), np.minimum((i + 1) * cut.rows, m)
    width = np.minimum((j + 1) * cut.columns, n) - np.minimum(j * cut.columns, n)
    owner = np.repeat(np.arange(ranks), counts)

    def of_owners(numbers: Counts) -> Counts:
        return np.bincount(owner, numbers, ranks).astype(np.int64)  # exact below 2^53

    inside = of_owners((bottom - top) * width)
    if not sharded:
        nothing = np.zeros(ranks, np.int64)
        return Share(blocks, np.full(ranks, m * n), inside, inside, nothing, nothing, runs)
    rows = np.array(chunks(cut.shape[0], ranks, m // cut.shape[0]))  # of each rank: the first, the last + 1
    first, last = rows[owner].T
    kept = of_owners(np.maximum(np.minimum(bottom, last) - np.maximum(top, first), 0) * width)
    each = rows[0, 1]
    sources = of_owners(np.where(bottom > top, (bottom - 1) // each - top // each + 1, 0))
    first, last = rows.T
    targets = np.where(last > first, ((last - 1) // cut.rows - first // cut.rows + 1) * across, 0)
    return Share(blocks, (last - first) * n, inside, kept, targets, sources, runs)


def _local(cut: Blocking, ranks: int, limit: int) -> Share:
    """A matrix of whose rows every rank makes blocks of its own."""
    (m, n), length = cut.matrix, cut.shape[0]
    rows = np.diff(np.array(chunks(length, ranks, m // length)))[:, 0]
    blocks = []
    for own in map(int, np.unique(rows[rows > 0])):
        of_rows = blocking_of((own, n), (own, n), limit)
        blocks.append(Blocks(of_rows.rows, of_rows.columns, (rows == own) * of_rows.count))
    nothing, numbers = np.zeros(ranks, np.int64), rows * n
    runs = runs_of(sum((own.counts for own in blocks), nothing).tolist())
    return Share(tuple(blocks), numbers, numbers, numbers, nothing, nothing, runs)


# ---- bytes that stay -------------------------------------------------------------------------------------------------


def factor_bytes(bits: float) -> Callable[[int, int], float]:
    """From rows and columns of a block to the bytes of its factors, as Shampoo keeps them."""
    optimizer = Shampoo([torch.empty(2, 2, device="meta")], bits=bits)

    def of_order(order: int) -> int:
        form = optimizer.preconditioner.form(optimizer.param_groups[0], order)
        return sum(x.nbytes for x in put("", form.init(1, order, torch.float32, "meta")).values())

    return lambda rows, columns: of_order(rows) + of_order(columns)


def moment_bytes(shapes: Sequence[Shape], base_bits: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Of AdamW, on the first of so many ranks, which has most rows of everything."""
    known: dict[Shape, int] = {}
    for shape in set(shapes):
        parameter = torch.empty(shape, dtype=dtype, device="meta")
        optimizer = AdamW([parameter], bits=base_bits)
        layout = optimizer.layout(parameter, optimizer.param_groups[0])
        size = sum(own.numel() * kind.itemsize for own, kind in layout.values() if own)
        known[shape] = size // max(1, shape[0]) * -(-shape[0] // ranks)
    return sum(known[shape] for shape in shapes)


def numbers_on_first(shapes: Iterable[Shape], ranks: int) -> int:
    """In the rows that the first of so many ranks has, which has most."""
    return sum(-(-shape[0] // ranks) * prod(shape[1:]) for shape in shapes)
