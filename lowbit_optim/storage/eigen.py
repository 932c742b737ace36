"""A factor as its eigenvalues and eigenvectors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_optim.kernels.reference import lower
from lowbit_optim.linalg import (
    damped,
    eigh,
    finite,
    householder,
    matrix_power,
    orthogonal_iteration,
    rectify,
    reflect,
    symmetrize,
)
from lowbit_optim.storage.blockwise import Codec, Parts, decode, encode, zeros
from lowbit_optim.storage.factors import Coded, State, counters, put, take


@dataclass(frozen=True)
class Rows:
    """An orthogonal matrix by its columns, each a row of codes; what comes back is only nearly orthogonal."""

    codec: Codec

    def encode(self, u: Tensor) -> Parts:
        """Orthogonal [k, n, n] to parts."""
        return encode(u.mT, self.codec)

    def decode(self, parts: Parts, n: int, dtype: torch.dtype) -> Tensor:
        """The matrices [k, n, n] in ``dtype``."""
        return decode(parts, self.codec, n, dtype).mT

    def identity(self, k: int, n: int, dtype: torch.dtype, device: torch.device | str) -> Parts:
        """The parts of k identity matrices of order n."""
        eye = self.encode(torch.eye(n, dtype=dtype, device=device)[None])
        return {name: part.repeat(k, 1, 1) for name, part in eye.items()}


@dataclass(frozen=True)
class Reflectors:
    """An orthogonal matrix by its Householder reflectors, one coded triangle; exactly orthogonal whatever was rounded.

    The signs of the columns are not kept: they mean nothing to eigenvectors.
    """

    codec: Codec

    def encode(self, u: Tensor) -> Parts:
        """Orthogonal [k, n, n] to parts."""
        return encode(householder(u).flatten(-2)[:, lower(u.shape[-1], u.device)], self.codec)

    def decode(self, parts: Parts, n: int, dtype: torch.dtype) -> Tensor:
        """The matrices [k, n, n] in ``dtype``, up to the signs of their columns."""
        triangle = decode(parts, self.codec, n * (n - 1) // 2, dtype)
        v = triangle.new_zeros(len(triangle), n * n).index_copy_(1, lower(n, triangle.device), triangle)
        return reflect(v.unflatten(1, (n, n)))

    def identity(self, k: int, n: int, dtype: torch.dtype, device: torch.device | str) -> Parts:
        """The parts of k identity matrices of order n, up to the signs of their columns."""
        return zeros((k, n * (n - 1) // 2), self.codec, dtype, device)


@dataclass(frozen=True, kw_only=True)
class Eigen(Coded):
    """A as float32 eigenvalues and coded eigenvectors (with ``Rows``: Wang et al. 2024, alg. 1 and 2).

    Args:
        vectors: how the eigenvectors are kept.
        rectify_update: Björck iterations t1 before the eigenvectors enter an update; reflectors need none.
        rectify_root: Björck iterations t2 before they make a root; reflectors need none.
        iterations: orthogonal iterations per update.
    """

    vectors: Rows | Reflectors
    rectify_update: int = 1
    rectify_root: int = 4
    iterations: int = 1

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        return {
            "eigenvalues": torch.full((blocks, order), self.initial_scale, dtype=torch.float32, device=device),
            **put("eigenvectors", self.vectors.identity(blocks, order, dtype, device)),
            **put("root", self.codec.identity(blocks, order, dtype, device)),
            **counters(blocks, device),
        }

    def eigenvectors(self, state: State, rectifications: int, dtype: torch.dtype) -> Tensor:
        """The eigenvectors as columns, [k, n, n] in ``dtype``."""
        n = state["eigenvalues"].shape[-1]
        return rectify(self.vectors.decode(take("eigenvectors", state), n, dtype), rectifications)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        return self._statistic(state, self.eigenvectors(state, self.rectify_update, dtype))

    def holding(self, a: Tensor, damping: Tensor | None = None) -> State:
        """As ``Factor.holding``; A is decomposed, where an update follows the eigenvectors that are there."""
        state = super().holding(a, damping)
        values, vectors, ok = eigh(a)
        state |= {"eigenvalues": values.flip(-1).clamp(min=0).float()}
        state |= put("eigenvectors", self.vectors.encode(vectors.flip(-1)))
        return state | {"failures": state["failures"] + (~ok).to(torch.int32)}

    def _statistic(self, state: State, v: Tensor) -> Tensor:
        return symmetrize((v * state["eigenvalues"].to(v.dtype).unsqueeze(-2)) @ v.mT)

    def _update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None) -> tuple[State, Tensor]:
        v = self.eigenvectors(state, self.rectify_update, m.dtype)
        a = self._average(state, self._statistic(state, v), m, magnitude)
        values, p, ok = orthogonal_iteration(a, v, self.iterations)
        return {"eigenvalues": values.float()} | put("eigenvectors", self.vectors.encode(p)), ok & finite(values)

    def _refresh(self, state: State, dtype: torch.dtype, damping: Tensor | None) -> tuple[State, Tensor]:
        v = self.eigenvectors(state, self.rectify_root, dtype)
        root = matrix_power(damped(state["eigenvalues"].to(dtype), self.eps, damping), v, -1 / self.power)
        return self._with_root(root), finite(root)
