"""Tensors of which each rank has some rows: a DTensor's, and those that a checkpoint has in several files."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lowbit_optim.checkpoint.ranks import Ranks
from lowbit_optim.distributed import chunks
from lowbit_optim.shards import is_dtensor, local


class Layout(NamedTuple):
    """How a DTensor's rows lie on the ranks: `Shard(0)` over one dimension of the mesh at most, the same on others."""

    mesh: Any
    placements: tuple[Any, ...]

    def rows(self, count: int) -> tuple[int, int]:
        """Of so many rows the first that this rank has, and the one after its last."""
        place = self.mesh.get_coordinate()
        if place is None:
            return count, count
        for dim, placement in enumerate(self.placements):
            if placement.is_shard():
                return chunks(count, self.mesh.size(dim))[place[dim]]
        return 0, count

    def writes(self, count: int) -> bool:
        """Whether this rank is, of those that have its rows, the one to save them; the first saves what has none."""
        place = self.mesh.get_coordinate()
        if place is None:
            return False
        first, last = self.rows(count)
        shared = [n for n, placement in zip(place, self.placements, strict=True) if not placement.is_shard()]
        return not any(shared) and (first < last or not any(place))


def layout_of(value: Any) -> Layout | None:
    """None of what is no DTensor."""
    return Layout(value.device_mesh, tuple(value.placements)) if is_dtensor(value) else None


def checked_layout(what: str, tensor: Any, ranks: Ranks) -> Layout:
    """The layout of a DTensor that these ranks can save and load.

    Raises:
        TypeError: its rows do not lie as a `Layout` says.
        ValueError: ranks that have rows of it do not take part.
    """
    from torch.distributed.tensor import Replicate, Shard

    layout = Layout(tensor.device_mesh, tuple(tensor.placements))
    shards = [placement for placement in layout.placements if type(placement) is not Replicate]
    if len(shards) > 1 or any(type(placement) is not Shard or placement.dim != 0 for placement in shards):
        raise TypeError(
            f"{what} is a DTensor with the placements {layout.placements}; a checkpoint holds those of Replicate() and "
            "at most one Shard(0), as fully_shard makes them: redistribute it, or give its full_tensor()"
        )
    if absent := {*layout.mesh.mesh.flatten().tolist()} - ranks.members():
        raise ValueError(
            f"{what} is a DTensor of which the ranks {sorted(absent)} have parts, and they do not take part: call this "
            "on all of its ranks, and give a process_group= of all of them, as torch.distributed.group.WORLD"
        )
    if tensor.ndim and layout.mesh.get_coordinate() is not None:
        first, last = layout.rows(tensor.shape[0])
        if list(local(tensor).shape) != [last - first, *tensor.shape[1:]]:
            raise TypeError(
                f"{what} is a DTensor of the shape {list(tensor.shape)} with {list(local(tensor).shape)} on this rank, "
                f"where torch.chunk gives the rows from {first} to {last}: redistribute it"
            )
    return layout


class Piece(NamedTuple):
    """Rows of a tensor, as the header of their file says."""

    tensor: str
    shape: list[int]  # of the tensor
    first: int  # row


class Chunk(NamedTuple):
    """Rows of a tensor, mapped from their file; writing to them changes no file."""

    first: int
    unverified: torch.Tensor
    verify: Callable[[], None]  # raises CheckpointError; costs nothing when it was called before

    @property
    def last(self) -> int:
        return self.first + len(self.unverified)

    def rows(self) -> torch.Tensor:
        self.verify()
        return self.unverified


class Mapped(NamedTuple):
    """A tensor in the files of a checkpoint: all of it in one, or rows of it in several."""

    dtype: torch.dtype
    shape: list[int]
    chunks: list[Chunk]  # in the order of their rows

    def whole(self) -> torch.Tensor:
        """The tensor; mapped, if it is in one file."""
        return self.chunks[0].rows() if len(self.chunks) == 1 else self.rows(0, self.shape[0])

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Some rows; mapped, if they are in one file. No other files are read."""
        found = [chunk for chunk in self.chunks if chunk.first < last and first < chunk.last]
        cut = [chunk.rows()[max(first - chunk.first, 0) : last - chunk.first] for chunk in found]
        if not cut:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return cut[0] if len(cut) == 1 else torch.cat(cut)

    def placed(self, layout: Layout | None) -> torch.Tensor:
        """The tensor, or a DTensor of this layout, for which only the rows of this rank are read."""
        if layout is None:
            return self.whole()
        from torch.distributed.tensor import DTensor

        shape = torch.Size(self.shape)
        own = self.rows(*layout.rows(shape[0])) if shape else self.whole()
        stride = torch.empty(shape, device="meta").stride()
        placed: torch.Tensor = DTensor.from_local(own, *layout, run_check=False, shape=shape, stride=stride)
        return placed


def join(tensors: dict[str, Mapped]) -> None:
    """Bring the rows of each tensor into order, which are in files that were read in any.

    Raises:
        ValueError: rows are in no file, or in two.
    """
    for name, tensor in tensors.items():
        tensor.chunks.sort(key=lambda chunk: chunk.first)
        if len(tensor.chunks) == 1 and list(tensor.chunks[0].unverified.shape) == tensor.shape:
            continue
        end = 0
        for first, last in [*((chunk.first, chunk.last) for chunk in tensor.chunks), (tensor.shape[0],) * 2]:
            if first != end:
                what = "in no file" if first > end else "in two files"
                raise ValueError(f"rows {min(first, end)} to {max(first, end)} of tensor {name!r} are {what}")
            end = last
