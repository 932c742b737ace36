"""The processes that share the blocks of an optimizer's parameters, and the collectives of a step."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_optim.blocking import Blocking, blocking, blocking_of
from lowbit_optim.distributed.placement import (
    Pieces,
    Placement,
    Run,
    Runs,
    Unit,
    chunks,
    from_rows,
    in_rows,
    pieces,
    rows_of_table,
    runs_of,
)
from lowbit_optim.distributed.rows import Rows
from lowbit_optim.distributed.state import OwnRuns, OwnShards
from lowbit_optim.shards import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Its older name, which torch 2.13 warns of, is that of torch 2.10.
all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


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
        self.state = OwnRuns(group, mesh)
        self.sent = 0  # bytes that this rank has sent to others in steps

    def __deepcopy__(self, memo: dict[int, Any]) -> Team:
        other = copy.copy(self)
        other.placement = copy.deepcopy(self.placement, memo)
        return other

    # ---- what belongs to whom ----

    def cuts(self, parameter: Tensor, max_dim: int) -> list[Blocking | None]:
        """How a parameter is cut on each rank: everywhere alike, or each rank's part of it."""
        return [blocking(tuple(parameter.shape), max_dim)] * self.size

    def place(self, units: dict[Tensor, list[Blocking | None]], *, divisible: bool) -> dict[Tensor, Runs]:
        """Which blocks of each unit, by its first parameter, every rank owns.

        Args:
            units: how each is cut on each rank.
            divisible: whether the blocks of a unit may have different owners.
        """
        asked: list[tuple[Tensor, int, int]] = []
        together = {}
        for parameter, (cut, *_) in units.items():
            assert cut is not None
            cost, together[parameter] = cut.rows**3 + cut.columns**3, 1 if divisible else cut.count
            asked.append((parameter, cut.count // together[parameter], cost * together[parameter]))
        self.placement.place(asked)
        if divisible:
            return {p: self.placement[p] for p in together}
        return {p: tuple((a * n, b * n) for a, b in self.placement[p]) for p, n in together.items()}

    def own(self, unit: Unit) -> Run:
        """The blocks of ``unit.cut`` that this rank owns."""
        return unit.runs[self.rank]

    # ---- blocks ----

    def collect(self, units: Sequence[Unit]) -> Callable[[], list[Tensor]]:
        """Begin to bring the gradients to their owners; the result waits and returns this rank's blocks of each unit.

        They are [own blocks, rows, columns], those at the edges filled up with zeros.
        """
        return lambda: [self._read(unit, self.own(unit)) for unit in units]

    def deliver(self, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to bring the blocks of their owners back to the gradients; the result waits, and writes them there."""
        sizes = [sum((u.runs[r][1] - u.runs[r][0]) * u.cut.rows * u.cut.columns for u in units) for r in self._ranks]
        dtype, device = self._sent_as(units), blocks[0].device
        own = torch.zeros(max(sizes), dtype=dtype, device=device)
        torch.cat([b.reshape(-1).to(dtype) for b in blocks], out=own[: sizes[self.rank]])
        out = torch.empty(self.size * max(sizes), dtype=dtype, device=device)
        self.sent += own.nbytes * (self.size - 1)
        work = all_gather(out, own, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            numbers = list(out.view(self.size, -1).unbind())
            for unit in units:
                gradient, cut = Rows(unit, 0), unit.cut
                for rank, run in enumerate(unit.runs):
                    size = (run[1] - run[0]) * cut.rows * cut.columns
                    own, numbers[rank] = numbers[rank][:size].view(-1, cut.rows, cut.columns), numbers[rank][size:]
                    for i, place, inside in pieces(cut, run, (0, cut.matrix[0])):
                        gradient.write(place, own[i, : inside.bottom, : inside.right])
                gradient.done()

        return finish

    @property
    def _ranks(self) -> range:
        return range(self.size)

    def _sent_as(self, units: Sequence[Unit]) -> torch.dtype:
        dtype = units[0].dtype
        return self.exchange_dtype if self.exchange_dtype is not None and dtype == torch.float32 else dtype

    def _read(self, unit: Unit, run: Run) -> Tensor:
        """Blocks of a gradient of which all rows are here."""
        rows, cut = Rows(unit, 0), unit.cut
        blocks = torch.zeros(run[1] - run[0], cut.rows, cut.columns, dtype=unit.dtype, device=unit.kind[1])
        for i, place, inside in pieces(cut, run, (0, cut.matrix[0])):
            rows.read(place, blocks[i, : inside.bottom, : inside.right])
        return blocks

    # ---- numbers ----

    def share(self, units: Sequence[Unit], table: Tensor) -> Tensor:
        """Numbers of each block, from the owners to all.

        Args:
            table: of this rank's blocks in the order of the units, [own blocks, m].

        Returns:
            Of all blocks of the units in their order, [blocks, m].
        """
        most, order = rows_of_table(tuple(unit.runs for unit in units), table.device)
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


class ShardTeam(Team):
    """Processes that have rows of each parameter (FSDP2), and share the blocks of the whole matrices."""

    everywhere = False

    def collect(self, units: Sequence[Unit]) -> Callable[[], list[Tensor]]:
        dtype, device = self._sent_as(units), units[0].kind[1]
        gradients = [Rows(unit, self._first_row(unit)) for unit in units]
        send, receive = self._routes(units, self._in_my_rows), self._routes(units, self._of_my_blocks)
        buffer, sizes = _buffer(send, dtype, device)
        for (i, own), part in _parts(send, buffer):
            gradients[i].read(own.place, part)
        out, work = self._all_to_all(buffer, sizes, receive)

        def finish() -> list[Tensor]:
            work.wait()
            blocks = []
            for unit in units:
                first, last = self.own(unit)
                shape = last - first, unit.cut.rows, unit.cut.columns
                blocks.append(torch.zeros(shape, dtype=unit.dtype, device=device))
            for (i, own), part in _parts(receive, out):
                blocks[i][own.block, own.inside.top : own.inside.bottom, : own.inside.right] = part
            return blocks

        return finish

    def deliver(self, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        send = self._routes(units, self._of_my_blocks, back=True)
        receive = self._routes(units, self._in_my_rows, back=True)
        buffer, sizes = _buffer(send, self._sent_as(units), units[0].kind[1])
        for (i, own), part in _parts(send, buffer):
            part.copy_(blocks[i][own.block, own.inside.top : own.inside.bottom, : own.inside.right])
        out, work = self._all_to_all(buffer, sizes, receive)

        def finish() -> None:
            work.wait()
            gradients = [Rows(unit, self._first_row(unit)) for unit in units]
            for (i, own), part in _parts(receive, out):
                gradients[i].write(own.place, part)
            for gradient in gradients:
                gradient.done()

        return finish

    def _all_to_all(self, buffer: Tensor, send: list[int], receive: Routing) -> tuple[Tensor, Any]:
        sizes = _sizes(receive)
        self.sent += (sum(send) - send[self.rank]) * buffer.dtype.itemsize
        out = buffer.new_empty(sum(sizes))
        return out, dist.all_to_all_single(out, buffer, sizes, send, group=self.group, async_op=True)

    def _routes(
        self, units: Sequence[Unit], of: Callable[[Unit, bool], Iterable[tuple[int, Pieces]]], *, back: bool = False
    ) -> Routing:
        """For each other rank the pieces, each with the index of its unit, that go between it and this one."""
        routing: Routing = [[] for _ in self._ranks]
        for i, unit in enumerate(units):
            for rank, own in of(unit, back):
                routing[rank] += ((i, piece) for piece in own)
        return routing

    def _in_my_rows(self, unit: Unit, back: bool) -> Iterable[tuple[int, Pieces]]:
        """For each owner what of its blocks is in the rows that are here."""
        rows = self._rows(unit)
        if rows is not None:
            return in_rows(unit.cut, unit.runs, rows[self.rank])
        everything = 0, unit.cut.matrix[0]  # which everybody has, so that a gradient has no way to go
        return in_rows(unit.cut, unit.runs, everything) if back else self._my_own(unit)

    def _of_my_blocks(self, unit: Unit, back: bool) -> Iterable[tuple[int, Pieces]]:
        """For each rank what of the blocks here is in its rows."""
        rows = self._rows(unit)
        if rows is not None:
            return from_rows(unit.cut, self.own(unit), rows)
        everything = 0, unit.cut.matrix[0]
        return from_rows(unit.cut, self.own(unit), (everything,) * self.size) if back else self._my_own(unit)

    def _my_own(self, unit: Unit) -> Iterable[tuple[int, Pieces]]:
        return [(self.rank, pieces(unit.cut, self.own(unit), (0, unit.cut.matrix[0])))]

    def _rows(self, unit: Unit) -> Runs | None:
        """The rows that each rank has of a unit's gradient; None if every rank has all."""
        parameter = unit.parameters[0]
        if not is_dtensor(parameter):
            return None
        length = parameter.shape[0]
        return chunks(length, self.size, unit.cut.matrix[0] // length)

    def _first_row(self, unit: Unit) -> int:
        rows = self._rows(unit)
        return 0 if rows is None else rows[self.rank][0]


class LocalTeam(Team):
    """Processes that have rows of each parameter (FSDP2), of which each makes blocks of its own.

    A parameter that is no DTensor has no blocks.
    """

    everywhere = False

    def __init__(
        self, group: dist.ProcessGroup, exchange_dtype: torch.dtype | None = None, mesh: DeviceMesh | None = None
    ) -> None:
        super().__init__(group, exchange_dtype, mesh)
        self.state = OwnShards(group, mesh)

    def cuts(self, parameter: Tensor, max_dim: int) -> list[Blocking | None]:
        whole = blocking(tuple(parameter.shape), max_dim)
        if whole is None or not is_dtensor(parameter):
            return [None] * self.size
        length, rest = parameter.shape[0], tuple(parameter.shape[1:])
        rows, columns = whole.matrix[0] // length, whole.matrix[1]
        sizes = [last - first for first, last in chunks(length, self.size)]
        nothing = dataclasses.replace(whole, grid=(0, whole.grid[1]))
        return [blocking_of((n, *rest), (n * rows, columns), max_dim) if n else nothing for n in sizes]

    def place(self, units: dict[Tensor, list[Blocking | None]], *, divisible: bool) -> dict[Tensor, Runs]:
        return {p: runs_of(0 if cut is None else cut.count for cut in cuts) for p, cuts in units.items()}

    def own(self, unit: Unit) -> Run:
        return 0, unit.cut.count

    def deliver(self, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        def finish() -> None:
            for unit, own in zip(units, blocks, strict=True):
                gradient = Rows(unit, 0)
                for i, place, inside in pieces(unit.cut, self.own(unit), (0, unit.cut.matrix[0])):
                    gradient.write(place, own[i, : inside.bottom, : inside.right])
                gradient.done()

        return finish


Routing = list[list[tuple[int, Any]]]  # for each rank pieces, each with the index of its unit


def _sizes(routing: Routing) -> list[int]:
    return [sum(own.place.numbers for _, own in part) for part in routing]


def _buffer(routing: Routing, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[int]]:
    """Room for all pieces, and how many numbers those of each rank are."""
    sizes = _sizes(routing)
    return torch.empty(sum(sizes), dtype=dtype, device=device), sizes


def _parts(routing: Routing, buffer: Tensor) -> Iterable[tuple[tuple[int, Any], Tensor]]:
    """The pieces in their order, and where each is in the buffer, as a matrix."""
    at = 0
    for part in routing:
        for i, own in part:
            yield (i, own), buffer[at : at + own.place.numbers].view(own.place.rows, own.place.columns)
            at += own.place.numbers


def _around_difference(own: str, other: str) -> str:
    """Of a long text what stands where it first differs from another."""
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    start, end = max(at - 60, 0), at + 100
    return "..." * (start > 0) + own[start:end] + "..." * (end < len(own))
