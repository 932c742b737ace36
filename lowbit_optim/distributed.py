"""Who owns which block of a gradient, and the collectives that bring gradients to the owners and blocks back.

A unit is what is preconditioned as one matrix. Its gradient is there as rows of that matrix: all rows on every rank
(DDP), or each rank's own (FSDP2). Its blocks are worked on by their owners: each rank has a run of them, or none.
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
import zlib
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_optim.blocking import Blocking, Rectangle, blocking
from lowbit_optim.shards import is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Its older name, which torch 2.13 warns of, is that of torch 2.10.
all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))

T = TypeVar("T")
Layout = dict[str, tuple[torch.Size, torch.dtype]]
Run = tuple[int, int]  # the first, and the last + 1
Runs = tuple[Run, ...]  # of each rank
# Of a block: its index in a run, where a part of it is in the matrix, where that is in the block.
Piece = tuple[int, Rectangle, Rectangle]


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


# ---- placement -------------------------------------------------------------------------------------------------------


class Placement:
    """Which rank owns which blocks: the dearest first, each to the rank that has least to do so far.

    What is placed stays. All ranks come to the same placement, for they ask for the same units in the same order.
    """

    def __init__(self, ranks: int) -> None:
        self.loads = [0] * ranks
        self._runs: dict[Hashable, Runs] = {}

    def place(self, units: Iterable[tuple[Hashable, int, int]]) -> None:
        """Place the units that are not placed yet.

        Args:
            units: for each its key, its number of blocks, and the cost of each of them.
        """
        new = [unit for unit in units if unit[0] not in self._runs]
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

    def __getitem__(self, key: Hashable) -> Runs:
        return self._runs[key]


def runs_of(counts: Iterable[int]) -> Runs:
    """Runs of so many blocks, one after the other."""
    ends = list(accumulate(counts))
    return tuple(zip([0, *ends], ends, strict=False))


@lru_cache(maxsize=4096)
def chunks(count: int, ranks: int) -> Runs:
    """How ``Shard(0)`` of DTensor divides a dim of this size."""
    each = -(-count // ranks)
    return tuple((min(r * each, count), min((r + 1) * each, count)) for r in range(ranks))


# ---- the rows that a rank has ----------------------------------------------------------------------------------------


class _Rows:
    """The rows of a unit's gradient that are here, as one matrix."""

    def __init__(self, unit: Unit, first: int) -> None:
        self._first = first
        self._gradients = [None if p.grad is None else local(p.grad) for p in unit.parameters]
        columns = unit.cut.matrix[1]
        widths = [columns] if len(unit.parameters) == 1 else [columns - 1, 1]
        self._starts = list(accumulate(widths, initial=0))
        # Views of the gradients, where they are contiguous.
        self._parts = [None if g is None else g.reshape(-1, w) for g, w in zip(self._gradients, widths, strict=True)]

    def read(self, place: Rectangle, out: Tensor) -> None:
        for part, start, here in self._overlaps(place):
            target = out[:, start : start + here.columns]
            if part is None:
                target.zero_()
            else:
                target.copy_(part[here.top : here.bottom, here.left : here.right])

    def write(self, place: Rectangle, values: Tensor) -> None:
        for part, start, here in self._overlaps(place):
            if part is not None:
                part[here.top : here.bottom, here.left : here.right] = values[:, start : start + here.columns]

    def done(self) -> None:
        """Bring what was written to gradients that are not contiguous."""
        for gradient, part in zip(self._gradients, self._parts, strict=True):
            if gradient is not None and part is not None and part.data_ptr() != gradient.data_ptr():
                gradient.copy_(part.view_as(gradient))

    def _overlaps(self, place: Rectangle) -> Iterator[tuple[Tensor | None, int, Rectangle]]:
        """For each part that a place lies in: the part, the first column of the place that does, where it is there."""
        top, bottom = place.top - self._first, place.bottom - self._first
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            left, right = max(place.left, start), min(place.right, end)
            if left < right:
                yield part, left - place.left, Rectangle(top, bottom, left - start, right - start)


@lru_cache(maxsize=65536)
def _pieces(cut: Blocking, run: Run, rows: Run) -> tuple[Piece, ...]:
    """Where the blocks of a run meet some rows of the matrix."""
    found = []
    for block in range(*run):
        whole = cut.place(block)
        top, bottom = max(whole.top, rows[0]), min(whole.bottom, rows[1])
        if top < bottom:
            place = Rectangle(top, bottom, whole.left, whole.right)
            inside = Rectangle(top - whole.top, bottom - whole.top, 0, whole.columns)
            found.append((block - run[0], place, inside))
    return tuple(found)


def _owned(unit: Unit, rows: Run) -> Iterator[tuple[int, Piece]]:
    """Where the blocks of all ranks meet some rows of the matrix, and whose they are."""
    starts = [first for first, _ in unit.runs]
    for block, place, inside in _pieces(unit.cut, (0, unit.blocks), rows):
        owner = bisect_right(starts, block) - 1  # the last of those that start there: the others have none
        yield owner, (block - starts[owner], place, inside)


# ---- teams -----------------------------------------------------------------------------------------------------------


class Team:
    """Processes with equal gradients (DDP), which share the blocks of all parameters.

    Args:
        group: the processes.
        exchange_dtype: in which numbers are sent that are worked on in float32; None: as they are.
        mesh: of the DTensors that state is shown as; None: a mesh of the group.
    """

    everywhere = True  # preconditioned blocks come to all ranks; else each has only what is in its rows

    def __init__(
        self, group: dist.ProcessGroup, exchange_dtype: torch.dtype | None = None, mesh: DeviceMesh | None = None
    ) -> None:
        self.group, self.exchange_dtype = group, exchange_dtype
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.placement = Placement(self.size)
        self.sent = 0  # bytes that this rank has sent to others in steps
        self._mesh = mesh

    def __deepcopy__(self, memo: dict[int, Any]) -> Team:
        other = copy.copy(self)
        other.placement = copy.deepcopy(self.placement, memo)
        return other

    # ---- what belongs to whom ----

    def cuts(self, parameter: Tensor, max_dim: int) -> list[Blocking | None]:
        """How a parameter is cut on each rank: everywhere alike, or each rank's part of it."""
        return [blocking(tuple(parameter.shape), max_dim)] * self.size

    def place(
        self, units: dict[Tensor, tuple[Hashable, list[Blocking | None]]], *, divisible: bool
    ) -> dict[Tensor, Runs]:
        """Which blocks of each unit, by its first parameter, every rank owns.

        Args:
            units: for each a key that stays the same when the parameter is replaced, and how it is cut on each rank.
            divisible: whether the blocks of a unit may have different owners.
        """
        asked: list[tuple[Hashable, int, int]] = []
        counts = {}
        for parameter, (key, (cut, *_)) in units.items():
            assert cut is not None
            cost, counts[parameter] = cut.rows**3 + cut.columns**3, 1 if divisible else cut.count
            asked.append((key, cut.count // counts[parameter], cost * counts[parameter]))
        self.placement.place(asked)
        if divisible:
            return {parameter: self.placement[key] for parameter, (key, _) in units.items()}
        return {
            parameter: tuple((a * counts[parameter], b * counts[parameter]) for a, b in self.placement[key])
            for parameter, (key, _) in units.items()
        }

    def own(self, unit: Unit) -> Run:
        """The blocks of ``unit.cut`` that this rank owns."""
        return unit.runs[self.rank]

    def rows(self, unit: Unit) -> Runs | None:
        """The rows that each rank has of a unit's gradient; None if every rank has all."""
        return None

    # ---- in every step ----

    def collect(self, units: Sequence[Unit]) -> Callable[[], list[Tensor]]:
        """Begin to bring the gradients to their owners; the result waits and returns this rank's blocks of each unit.

        They are [own blocks, rows, columns], those at the edges filled up with zeros.
        """
        return lambda: [self._read(unit, self.own(unit)) for unit in units]

    def deliver(self, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to bring the blocks of their owners back to the gradients; the result waits, and writes them there."""
        device = blocks[0].device
        sizes = [
            sum((u.runs[r][1] - u.runs[r][0]) * u.cut.rows * u.cut.columns for u in units) for r in range(self.size)
        ]
        dtype = self._sent_as(units)
        own = torch.zeros(max(sizes), dtype=dtype, device=device)
        torch.cat([b.reshape(-1).to(dtype) for b in blocks], out=own[: sizes[self.rank]])
        out = torch.empty(self.size * max(sizes), dtype=dtype, device=device)
        self.sent += own.nbytes * (self.size - 1)
        work = all_gather(out, own, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            for rank, numbers in enumerate(out.view(self.size, -1).unbind()):
                for unit in units:
                    first, last = unit.runs[rank]
                    if first < last:
                        size = (last - first) * unit.cut.rows * unit.cut.columns
                        whole, numbers = numbers[:size], numbers[size:]
                        self._write(unit, (first, last), whole.view(-1, unit.cut.rows, unit.cut.columns))

        return finish

    def share(self, units: Sequence[Unit], table: Tensor) -> Tensor:
        """Numbers of each block, from the owners to all.

        Args:
            table: of this rank's blocks in the order of the units, [own blocks, m].

        Returns:
            Of all blocks of the units in their order, [blocks, m].
        """
        runs = tuple(unit.runs for unit in units)
        most, order = _rows_of_table(runs, table.device)
        own = table.new_zeros(most, table.shape[1])
        own[: len(table)] = table
        out = table.new_empty(self.size * most, table.shape[1])
        self.sent += own.nbytes * (self.size - 1)
        all_gather(out, own, group=self.group)
        return out[order]

    def largest(self, x: Tensor) -> Tensor:
        """For each number the largest that a rank has."""
        self.sent += x.nbytes * (self.size - 1)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def agree(self, described: dict[str, Any], device: torch.device, problem: Exception | None = None) -> None:
        """Raise RuntimeError, on every rank, unless what is described has the same ``repr`` on all of them.

        Args:
            problem: what this rank has found wrong, which it raises when the others know.
        """
        codes = [zlib.crc32(repr(value).encode()) for value in described.values()]
        own = torch.tensor(codes, device=self._device_of_checks(device))
        out = own.new_empty(self.size * len(codes))
        all_gather(out, own, group=self.group)
        found = out.view(self.size, -1).tolist()
        for i, (what, value) in enumerate(described.items()):
            if len({codes[i] for codes in found}) > 1:
                values: list[Any] = [None] * self.size
                dist.all_gather_object(values, repr(value), group=self.group)
                if problem is not None:
                    raise problem
                other = next(rank for rank, x in enumerate(values) if x != values[0])
                raise RuntimeError(
                    f"the processes that share this optimizer's blocks do not agree on {what}: rank 0 has "
                    f"{_around_difference(values[0], values[other])}, rank {other} "
                    f"{_around_difference(values[other], values[0])}. Nothing has changed; make it the same"
                )
        if problem is not None:
            raise problem

    def _device_of_checks(self, device: torch.device) -> torch.device:
        """Where a few numbers are compared: on the CPU if the group can, for then no device is waited for."""
        backends = {d.type for d in self.group._device_types}
        return torch.device("cpu") if "cpu" in backends else device

    def _sent_as(self, units: Sequence[Unit]) -> torch.dtype:
        dtype = units[0].dtype
        return self.exchange_dtype if self.exchange_dtype is not None and dtype == torch.float32 else dtype

    def _read(self, unit: Unit, run: Run) -> Tensor:
        """Blocks of a gradient of which all rows are here."""
        rows, cut = _Rows(unit, 0), unit.cut
        blocks = torch.zeros(run[1] - run[0], cut.rows, cut.columns, dtype=unit.dtype, device=unit.parameters[0].device)
        for i, place, inside in _pieces(cut, run, (0, cut.matrix[0])):
            rows.read(place, blocks[i, : inside.bottom, : inside.right])
        return blocks

    def _write(self, unit: Unit, run: Run, blocks: Tensor) -> None:
        rows, cut = _Rows(unit, 0), unit.cut
        for i, place, inside in _pieces(cut, run, (0, cut.matrix[0])):
            rows.write(place, blocks[i, : inside.bottom, : inside.right])
        rows.done()

    # ---- the state as others see it ----

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Of the DTensors that state is shown as."""
        from torch.distributed.device_mesh import DeviceMesh

        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.group, device.type)
        return self._mesh

    def layout(self, of_ranks: list[Layout]) -> Layout:
        """Shapes and dtypes of the tensors that are shown, from those of the blocks as they are cut on each rank."""
        return of_ranks[0]

    def shown(self, own: dict[str, Tensor], layout: Layout, runs: Runs) -> dict[str, Tensor]:
        """Tensors of this rank's blocks, a run of the first dim of those in the layout, as DTensors of the whole.

        All ranks must call it; they exchange blocks, so that each has the rows that ``Shard(0)`` gives it.
        """
        return self._dtensors(self._exchange(own, runs, chunks(runs[-1][1], self.size)), layout)

    def taken(self, given: dict[str, Tensor], own: Layout, runs: Runs) -> dict[str, Tensor]:
        """The inverse of ``shown``, which takes whole tensors, too.

        Args:
            own: shapes and dtypes of this rank's tensors.
        """
        first, last = runs[self.rank]
        shards = self._shards_of(given)
        taken = {name: x[first:last] for name, x in given.items() if name not in shards}
        return taken | (self._exchange(shards, chunks(runs[-1][1], self.size), runs) if shards else {})

    def _dtensors(self, parts: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shown: dict[str, Tensor] = {}
        for name, part in parts.items():
            mesh, (shape, _) = self.mesh(part.device), layout[name]
            placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
            stride = torch.empty(shape, device="meta").stride()
            shown[name] = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
        return shown

    def _shards_of(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of those tensors that are DTensors, what this rank has; made whole first, if they are not sharded as ours."""
        from torch.distributed.tensor import Shard

        shards = {}
        for name, x in given.items():
            if is_dtensor(x):
                if x.placements[-1] != Shard(0) or x.device_mesh.size(-1) != self.size:
                    first, last = chunks(x.shape[0], self.size)[self.rank]
                    shards[name] = x.full_tensor()[first:last]
                else:
                    shards[name] = x.to_local()
        return shards

    def _exchange(self, own: dict[str, Tensor], have: Runs, want: Runs) -> dict[str, Tensor]:
        """Tensors of which the ranks have runs of the first dim, of other runs."""
        names = sorted(own)
        each = {name: own[name][0:0].new_empty(own[name].shape[1:]).nbytes for name in names}
        first, last = have[self.rank]
        sends = [_overlap((first, last), run) for run in want]
        receives = [_overlap(run, want[self.rank]) for run in have]
        device = own[names[0]].device
        sent = [own[n][a - first : b - first].contiguous().view(-1).view(torch.uint8) for a, b in sends for n in names]
        all_bytes = sum(each.values())
        out = torch.empty(sum(b - a for a, b in receives) * all_bytes, dtype=torch.uint8, device=device)
        dist.all_to_all_single(
            out,
            torch.cat(sent),
            [(b - a) * all_bytes for a, b in receives],
            [(b - a) * all_bytes for a, b in sends],
            group=self.group,
        )
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for a, b in receives:
            for name in names:
                size = (b - a) * each[name]
                part, out = out[:size], out[size:]
                found[name].append(part.clone().view(own[name].dtype).view(b - a, *own[name].shape[1:]))
        return {name: torch.cat(parts) for name, parts in found.items()}


class ShardTeam(Team):
    """Processes that have rows of each parameter (FSDP2), and share the blocks of the whole matrices."""

    everywhere = False

    def rows(self, unit: Unit) -> Runs | None:
        parameter = unit.parameters[0]
        if not is_dtensor(parameter):
            return None
        each = unit.cut.matrix[0] // parameter.shape[0] if parameter.shape[0] else 0
        rows = chunks(parameter.shape[0], self.size)
        return rows if each == 1 else tuple((first * each, last * each) for first, last in rows)

    def collect(self, units: Sequence[Unit]) -> Callable[[], list[Tensor]]:
        send = self._by_rank((rank, u, piece) for u in units for rank, piece in self._from_rows(u))
        receive = self._by_rank((rank, i, piece) for i, u in enumerate(units) for rank, piece in self._to_blocks(u))
        dtype, device = self._sent_as(units), units[0].parameters[0].device
        sizes = [[sum(place.numbers for _, (_, place, _) in part) for part in parts] for parts in (receive, send)]
        buffer = torch.empty(sum(sizes[1]), dtype=dtype, device=device)
        rows = {unit.parameters: _Rows(unit, self._first_row(unit)) for unit in units}
        at = 0
        for part in send:
            for unit, (_, place, _) in part:
                rows[unit.parameters].read(place, buffer[at : at + place.numbers].view(place.rows, place.columns))
                at += place.numbers
        out, work = self._all_to_all(buffer, *sizes)

        def finish() -> list[Tensor]:
            work.wait()
            blocks = []
            for unit in units:
                first, last = self.own(unit)
                shape = last - first, unit.cut.rows, unit.cut.columns
                blocks.append(torch.zeros(shape, dtype=unit.dtype, device=device))
            at = 0
            for part in receive:
                for i, (block, place, inside) in part:
                    numbers = out[at : at + place.numbers].view(place.rows, place.columns)
                    blocks[i][block, inside.top : inside.bottom, : inside.right] = numbers
                    at += place.numbers
            return blocks

        return finish

    def deliver(self, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        send = self._by_rank((rank, i, piece) for i, u in enumerate(units) for rank, piece in self._from_blocks(u))
        receive = self._by_rank((rank, u, piece) for u in units for rank, piece in self._to_rows(u))
        dtype, device = self._sent_as(units), units[0].parameters[0].device
        sizes = [[sum(place.numbers for _, (_, place, _) in part) for part in parts] for parts in (receive, send)]
        buffer = torch.empty(sum(sizes[1]), dtype=dtype, device=device)
        at = 0
        for part in send:
            for i, (block, place, inside) in part:
                whole = blocks[i][block, inside.top : inside.bottom, : inside.right]
                buffer[at : at + place.numbers].view(place.rows, place.columns).copy_(whole)
                at += place.numbers
        out, work = self._all_to_all(buffer, *sizes)

        def finish() -> None:
            work.wait()
            rows = {unit.parameters: _Rows(unit, self._first_row(unit)) for unit in units}
            at = 0
            for part in receive:
                for unit, (_, place, _) in part:
                    rows[unit.parameters].write(place, out[at : at + place.numbers].view(place.rows, place.columns))
                    at += place.numbers
            for own in rows.values():
                own.done()

        return finish

    def _all_to_all(self, buffer: Tensor, receive: list[int], send: list[int]) -> tuple[Tensor, Any]:
        out = buffer.new_empty(sum(receive))
        self.sent += (sum(send) - send[self.rank]) * buffer.dtype.itemsize
        work = dist.all_to_all_single(out, buffer, receive, send, group=self.group, async_op=True)
        return out, work

    def _first_row(self, unit: Unit) -> int:
        rows = self.rows(unit)
        return 0 if rows is None else rows[self.rank][0]

    def _by_rank(self, pieces: Iterable[tuple[int, T, Piece]]) -> list[list[tuple[T, Piece]]]:
        """Pieces of units, in their order, for each rank."""
        parts: list[list[tuple[T, Piece]]] = [[] for _ in range(self.size)]
        for rank, unit, piece in pieces:
            parts[rank].append((unit, piece))
        return parts

    def _from_rows(self, unit: Unit) -> Iterator[tuple[int, Piece]]:
        """What of the blocks lies in this rank's rows, and who owns them; of what everybody has, its own blocks."""
        rows = self.rows(unit)
        if rows is not None:
            return _owned(unit, rows[self.rank])
        return ((self.rank, piece) for piece in _pieces(unit.cut, self.own(unit), (0, unit.cut.matrix[0])))

    def _to_blocks(self, unit: Unit) -> Iterator[tuple[int, Piece]]:
        """What this rank's blocks are made of, and who has it."""
        return self._from_rows(unit) if self.rows(unit) is None else self._from_blocks(unit)

    def _from_blocks(self, unit: Unit) -> Iterator[tuple[int, Piece]]:
        """What of this rank's blocks goes where, to their rows or to everybody."""
        rows, (first, last) = self.rows(unit), self.own(unit)
        if first == last:
            return
        meeting = range(self.size)
        if rows is not None:  # all but the last have as many
            each = rows[0][1]
            top, bottom = unit.cut.place(first).top, unit.cut.place(last - 1).bottom
            meeting = range(top // each, -(-bottom // each))
        for rank in meeting:
            for piece in _pieces(unit.cut, (first, last), (0, unit.cut.matrix[0]) if rows is None else rows[rank]):
                yield rank, piece

    def _to_rows(self, unit: Unit) -> Iterator[tuple[int, Piece]]:
        """What this rank's rows get, and from whose blocks."""
        rows = self.rows(unit)
        return _owned(unit, (0, unit.cut.matrix[0]) if rows is None else rows[self.rank])


class LocalTeam(Team):
    """Processes that have rows of each parameter (FSDP2), of which each makes blocks of its own."""

    everywhere = False

    def cuts(self, parameter: Tensor, max_dim: int) -> list[Blocking | None]:
        """A rank whose rows are no matrix has no blocks; None if the whole is no matrix."""
        if is_dtensor(parameter):
            return list(_cuts_of_shards(tuple(parameter.shape), max_dim, self.size))
        return super().cuts(parameter, max_dim)

    def place(
        self, units: dict[Tensor, tuple[Hashable, list[Blocking | None]]], *, divisible: bool
    ) -> dict[Tensor, Runs]:
        return {p: runs_of(0 if cut is None else cut.count for cut in cuts) for p, (_, cuts) in units.items()}

    def own(self, unit: Unit) -> Run:
        return 0, unit.cut.count

    def layout(self, of_ranks: list[Layout]) -> Layout:
        """Blocks differ from rank to rank: a row of numbers for each rank, as long as the longest."""
        numbers: dict[str, int] = {}
        for layout in of_ranks:
            for name, (shape, _) in layout.items():
                numbers[name] = max(numbers.get(name, 0), shape.numel())
        dtypes = {name: dtype for layout in of_ranks for name, (_, dtype) in layout.items()}
        return {name: (torch.Size([self.size, most]), dtypes[name]) for name, most in sorted(numbers.items())}

    def shown(self, own: dict[str, Tensor], layout: Layout, runs: Runs) -> dict[str, Tensor]:
        device = next(iter(own.values())).device
        rows = {name: torch.zeros(1, shape[1], dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
        for name, x in own.items():
            rows[name][0, : x.numel()] = x.reshape(-1)
        return self._dtensors(rows, layout)

    def taken(self, given: dict[str, Tensor], own: Layout, runs: Runs) -> dict[str, Tensor]:
        shards = self._shards_of(given)
        rows = {name: shards[name][0] if name in shards else x[self.rank] for name, x in given.items()}
        return {name: rows[name][: shape.numel()].view(shape) for name, (shape, _) in own.items()}

    def deliver(self, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        def finish() -> None:
            for unit, own in zip(units, blocks, strict=True):
                self._write(unit, self.own(unit), own)

        return finish


@lru_cache(maxsize=4096)
def _cuts_of_shards(shape: tuple[int, ...], max_dim: int, ranks: int) -> tuple[Blocking | None, ...]:
    whole = blocking(shape, max_dim)
    if whole is None:
        return (None,) * ranks
    nothing = dataclasses.replace(whole, grid=(0, whole.grid[1]))
    rows = (last - first for first, last in chunks(shape[0], ranks))
    return tuple(blocking((own, *shape[1:]), max_dim) or nothing for own in rows)


def _overlap(a: Run, b: Run) -> Run:
    first, last = max(a[0], b[0]), min(a[1], b[1])
    return first, max(first, last)


@lru_cache(maxsize=4096)
def _rows_of_table(units: tuple[Runs, ...], device: torch.device) -> tuple[int, Tensor]:
    """Of a table of which each rank has the rows of its blocks: the most rows of a rank, and where each block's is."""
    most = max(sum(runs[rank][1] - runs[rank][0] for runs in units) for rank in range(len(units[0])))
    next_row = [rank * most for rank in range(len(units[0]))]
    order: list[int] = []
    for runs in units:
        for rank, (first, last) in enumerate(runs):
            order += range(next_row[rank], next_row[rank] + last - first)
            next_row[rank] += last - first
    return most, torch.tensor(order, device=device)


def _around_difference(own: str, other: str) -> str:
    """Of a long text what stands where it first differs from another."""
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    start, end = max(at - 60, 0), at + 100
    return "..." * (start > 0) + own[start:end] + "..." * (end < len(own))


# ---- which team ------------------------------------------------------------------------------------------------------


class Distribution:
    """How an optimizer is spread over processes, as its user asks for it, and the team that comes of it.

    Args:
        process_group: processes with equal gradients (DDP); None: this one alone, unless parameters are DTensors, whose
            mesh says which.
        replicate: every process keeps everything.
        shards: "whole" or "local": whether blocks are those of whole parameters or of their shards.
        exchange_dtype: "bfloat16" or None.

    Raises:
        ValueError: an unknown value, or a process group of which this process is no member.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        replicate: bool = False,
        shards: str = "whole",
        exchange_dtype: str | None = None,
    ) -> None:
        if shards not in ("whole", "local"):
            raise ValueError(f"shards is {shards!r}; it must be 'whole' or 'local'")
        if exchange_dtype not in (None, "bfloat16"):
            raise ValueError(f"exchange_dtype is {exchange_dtype!r}; it must be None or 'bfloat16'")
        if not isinstance(replicate, bool):
            raise ValueError(f"replicate is {replicate!r}; it must be True or False")
        if process_group is not None and not _is_member(process_group):
            raise ValueError(
                f"process_group is {process_group!r}; it must be a ProcessGroup that this process is a member of, as "
                "torch.distributed.group.WORLD is after init_process_group()"
            )
        self.process_group, self.replicate, self.shards = process_group, replicate, shards
        self.dtype = torch.bfloat16 if exchange_dtype else None
        self._team: Team | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Distribution:
        other = copy.copy(self)
        other._team = copy.deepcopy(self._team, memo)
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None or self._team is not None:
            raise TypeError(
                "an optimizer in a process group cannot be pickled: save its state_dict(), with "
                "torch.distributed.checkpoint or lowbit_optim.save_checkpoint, and make the optimizer anew"
            )
        return super().__reduce_ex__(protocol)

    def team(self, parameters: Sequence[Tensor]) -> Team | None:
        """The processes that share the blocks of the parameters; None if this one has them to itself.

        Raises:
            TypeError: parameters that are sharded in a way that blocks cannot be made of.
            ValueError: process_group or replicate for DTensors.
        """
        mesh = _mesh_of(parameters)
        if mesh is None:
            if self.process_group is None or self.replicate:
                return None
            if self._team is None or type(self._team) is not Team:
                self._team = Team(self.process_group, self.dtype)
            return self._team
        if self.process_group is not None or self.replicate:
            raise ValueError(
                "the parameters are DTensors, whose mesh says which processes share the work, and of which no process "
                "has the whole: leave process_group and replicate out"
            )
        if self._team is None or self._team.mesh(torch.device(mesh.device_type)) != mesh:
            kind = ShardTeam if self.shards == "whole" else LocalTeam
            self._team = kind(mesh.get_group(mesh.ndim - 1), self.dtype, mesh)
        return self._team

    def batches(self, parameters: Sequence[Tensor]) -> list[dist.ProcessGroup]:
        """The groups over which, one after the other, sums over batches are taken."""
        mesh = _mesh_of(parameters)
        if mesh is not None:
            return [mesh.get_group(dim) for dim in range(mesh.ndim)]
        return [] if self.process_group is None else [self.process_group]


def _is_member(group: object) -> bool:
    return dist.is_available() and isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0


def _mesh_of(parameters: Sequence[Tensor]) -> DeviceMesh | None:
    """The mesh of those parameters that are DTensors; None if none is."""
    found = [p for p in parameters if is_dtensor(p)]
    if not found:
        return None
    from torch.distributed.tensor import Replicate, Shard

    for parameter in found:
        mesh, placements = parameter.device_mesh, parameter.placements
        if tuple(placements) not in ((Shard(0),), (Replicate(), Shard(0))) or mesh != found[0].device_mesh:
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} has placements {tuple(placements)} on {mesh}; blocks "
                "are made of parameters that are all sharded on dim 0 of one mesh, (Shard(0),) as fully_shard makes "
                "them, or (Replicate(), Shard(0)) with a mesh of two dims. Other placements (tensor parallelism) are "
                "not supported: give those parameters to another optimizer"
            )
    return found[0].device_mesh
