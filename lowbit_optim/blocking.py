"""A parameter as equal matrix blocks, and the blocks of many parameters as one stack."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad


class Rectangle(NamedTuple):
    """Rows top to bottom - 1 and columns left to right - 1 of a matrix."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def numbers(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Blocking:
    """How a tensor of ``shape`` is cut: viewed as ``matrix``, in a grid of blocks of ``rows`` x ``columns``.

    Blocks on the lower and right edge are filled up with zeros, which never leak: they are cut off again, and the rows
    of a statistic that belong to them are zero.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, int]
    grid: tuple[int, int]
    rows: int
    columns: int

    @property
    def count(self) -> int:
        """Blocks of the tensor."""
        return prod(self.grid)

    def place(self, block: int) -> Rectangle:
        """Where a block is in the matrix, without what it is filled up with."""
        (m, n), (i, j) = self.matrix, divmod(block, self.grid[1])
        top, left = i * self.rows, j * self.columns
        return Rectangle(min(top, m), min(top + self.rows, m), min(left, n), min(left + self.columns, n))

    def read(self, x: Tensor, out: Tensor) -> None:
        """Write the blocks of a tensor of ``shape`` into [count, rows, columns], in one copy where that is possible."""
        view = self._view(x)
        if view is None:
            out.copy_(self.split(x))
        else:
            out.unflatten(0, self.grid).copy_(view)

    def write(self, blocks: Tensor, scale: Tensor, x: Tensor) -> None:
        """Write blocks [count, rows, columns], each times its scale, [count], into a tensor of ``shape``."""
        view = self._view(x)
        if view is None:
            x.copy_(self.merge(blocks * scale.view(-1, 1, 1)))
        else:
            torch.mul(blocks.unflatten(0, self.grid), scale.view(*self.grid, 1, 1), out=view)

    def _view(self, x: Tensor) -> Tensor | None:
        """The blocks [*grid, rows, columns] where they lie in x; None where blocks are filled up, or x is strided."""
        (a, b), r, c = self.grid, self.rows, self.columns
        if self.matrix != (a * r, b * c) or not x.is_contiguous():
            return None
        return rearrange(x.view(self.matrix), "(a r) (b c) -> a b r c", a=a, b=b)

    def split(self, x: Tensor) -> Tensor:
        """A tensor of ``shape`` to its blocks [count, rows, columns]."""
        m, n = self.matrix
        (a, b), r, c = self.grid, self.rows, self.columns
        x = pad(x.reshape(m, n), (0, b * c - n, 0, a * r - m))
        return rearrange(x, "(a r) (b c) -> (a b) r c", a=a, b=b)

    def merge(self, blocks: Tensor) -> Tensor:
        """The inverse of ``split``."""
        m, n = self.matrix
        return rearrange(blocks, "(a b) r c -> (a r) (b c)", a=self.grid[0])[:m, :n].reshape(self.shape)


@lru_cache(maxsize=4096)
def blocking(shape: tuple[int, ...], max_dim: int) -> Blocking | None:
    """The blocking of a parameter as a (first dim, rest) matrix; None if it is none: empty, or of rank 0 or 1.

    Dims of size 1 do not count. A side d above ``max_dim`` becomes ceil(d / max_dim) equal blocks.
    """
    dims = [d for d in shape if d != 1]
    if len(dims) < 2 or 0 in dims:
        return None
    return blocking_of(shape, (dims[0], prod(dims[1:])), max_dim)


@lru_cache(maxsize=4096)
def blocking_of(shape: tuple[int, ...], matrix: tuple[int, int], max_dim: int) -> Blocking:
    """The blocking of a tensor viewed as a matrix, which may have a single row."""
    grid = -(-matrix[0] // max_dim), -(-matrix[1] // max_dim)
    rows, columns = (-(-d // g) for d, g in zip(matrix, grid, strict=True))
    return Blocking(shape, matrix, grid, rows, columns)


@dataclass(frozen=True)
class Stack:
    """State of several parameters whose blocks have one shape, read and written as if they were one stack.

    ``states[i]`` owns tensors whose first dim is ``counts[i]``; nothing here holds a copy of them.
    """

    states: list[dict[str, Tensor]]
    counts: list[int]

    def read(self, prefix: str, start: int, stop: int, wanted: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """Blocks start to stop of the tensors named "<prefix>.<name>", by <name>; not to be changed in place.

        Args:
            wanted: only of names that begin with one of these.
        """
        names = [key.removeprefix(f"{prefix}.") for key in self.states[0] if key.startswith(f"{prefix}.")]
        pieces = list(self.pieces(start, stop))
        read = {}
        for name in names:
            if name.startswith(wanted):
                own = [self.states[i][f"{prefix}.{name}"][lo:hi] for i, lo, hi in pieces]
                read[name] = torch.cat(own) if len(own) > 1 else own[0]
        return read

    def write(self, prefix: str, start: int, stop: int, tensors: dict[str, Tensor]) -> None:
        """Write what ``read`` returned, changed, back in place."""
        for i, lo, hi in self.pieces(start, stop):
            for name, tensor in tensors.items():
                self.states[i][f"{prefix}.{name}"][lo:hi].copy_(tensor[: hi - lo])
            tensors = {name: tensor[hi - lo :] for name, tensor in tensors.items()}

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(parameter, its first block, its last block + 1) of what lies between start and stop."""
        offset = 0
        for i, count in enumerate(self.counts):
            lo, hi = max(start - offset, 0), min(stop - offset, count)
            if lo < hi:
                yield i, lo, hi
            offset += count
