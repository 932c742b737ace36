"""A factor as its largest eigenvalues with their eigenvectors, and one number for all the others."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_optim.linalg import Spikes, add_to_diagonal, compose, damped, eigh, finite, powers, rectify
from lowbit_optim.roots import with_sum
from lowbit_optim.storage.blockwise import Codec, decode, encode, rounding_error
from lowbit_optim.storage.factors import State, put, take
from lowbit_optim.storage.root import Scaled

# Eigenvectors come in so many, so that their number and that of their codes tell the order of the matrix.
_STEP = 8


@dataclass(frozen=True, kw_only=True)
class Spiked(Scaled):
    """A = V diag(lambda) V^T + rho (I - V V^T): m of the n eigenvectors, coded, and a flat rest.

    Statisticians call it a spiked covariance. Few bits go to few vectors here, which leaves enough for each to be
    nearly exact, where a whole matrix of few bits is noisy everywhere. The root is

        A^(-1/p) = c I - V diag(c - lambda^(-1/p)) V^T,    c = rho^(-1/p),

    with c the mean of the other eigenvalues of the exact root: no multiple of I is nearer to what it stands for. So the
    root is no approximation of all of A^(-1/p): where A's eigenvalues are small, of which few statistics tell little,
    it is flat. Eigenvectors are rectified when they are read, in every step.

    Args:
        vectors: how the eigenvectors are kept: all of a block as one row.
        share: m / n, of which m is made a multiple of 8, rounded upwards. Default 1: all are kept.
        rectifications: Björck iterations when they are read. Default 3: the defect of 4-bit codes falls to 1e-6.
    """

    vectors: Codec
    share: float = 1.0
    rectifications: int = 3
    root_needs: ClassVar[tuple[str, ...]] = ("rms", "eigenvalues", "rest", "eigenvectors")
    copies: ClassVar[int] = 2

    def count(self, order: int) -> int:
        """m, of a matrix of that order."""
        return min(order, _STEP * math.ceil(self.share * order / _STEP))

    def scaled_root(self, state: State, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (rest, half), scale = self.factored_root(state, dtype)
        root = add_to_diagonal(-(half.mT @ half), rest)
        return root if out is None else out.copy_(root), scale

    def factored_root(self, state: State, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Spikes, Tensor]:
        roots = powers(state["eigenvalues"].to(dtype), -1 / self.power)
        rest = powers(state["rest"].to(dtype), -1 / self.power)
        shares = (rest.unsqueeze(-1) - roots).clamp(min=0).sqrt()
        return Spikes(rest, self._eigenvectors(state, dtype) * shares.unsqueeze(-1)), self._root_scale(state, dtype)

    def rounding_error(self, state: State) -> Tensor:
        roots = powers(state["eigenvalues"], -1 / self.power)
        rest = powers(state["rest"], -1 / self.power).unsqueeze(-1)
        count, order = roots.shape[-1], self.order(state)
        errors = rounding_error(take("eigenvectors", state), self.vectors, count * order).unflatten(-1, (count, order))
        spread = errors.square().mean(-1)  # of each direction that a vector may err in
        # Into the rest that changes the root by (c - x) (d v^T + v d^T); into another kept vector by the difference of
        # their roots instead, and rectifying leaves the antisymmetric half of such errors.
        into_rest = 2 * (order - count) * (rest - roots).square() * spread
        among = spread * (roots.unsqueeze(-1) - roots.unsqueeze(-2)).square().sum(-1) / 2
        error = (into_rest + among).sum(-1).sqrt()
        return error / (roots.square().sum(-1) + (order - count) * rest.squeeze(-1).square()).sqrt()

    def _start(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        count = self.count(order)
        values, rest = (torch.ones(shape, dtype=torch.float32, device=device) for shape in ((blocks, count), (blocks,)))
        w = torch.eye(count, order, dtype=dtype, device=device).flatten()[None]
        parts = {name: part.repeat(blocks, 1) for name, part in encode(w, self.vectors).items()}
        return {"eigenvalues": values, "rest": rest} | put("eigenvectors", parts)

    def _write(self, a: Tensor) -> tuple[State, Tensor]:
        values, vectors, ok = eigh(a)
        values = damped(values, self._floor, clamp=True).flip(-1)
        count = self.count(a.shape[-1])
        top, others = values[:, :count], values[:, count:]
        rest = powers(powers(others, -1 / self.power).mean(-1), -self.power) if others.shape[-1] else top.amin(-1)
        w = vectors.flip(-1)[..., :count].mT.flatten(1)
        kept = {"eigenvalues": top.float(), "rest": rest.float()} | put("eigenvectors", encode(w, self.vectors))
        return kept, ok & finite(vectors)

    def _read(self, state: State, dtype: torch.dtype, ridge: Tensor | None) -> tuple[Tensor, Tensor]:
        top, rest = state["eigenvalues"].to(dtype), state["rest"].to(dtype).unsqueeze(-1)
        count, order = top.shape[-1], self.order(state)
        values = torch.cat([top, rest.expand(-1, order - count)], -1)
        if ridge is not None:
            values = (values - ridge.unsqueeze(-1)).clamp(min=0)
        values = with_sum(values, self._total(state, order, dtype))
        top, rest = values[:, :count], values[:, -1:] if order > count else torch.zeros_like(rest)
        w = self._eigenvectors(state, dtype)
        a = compose((top - rest).clamp(min=0).sqrt(), w.mT)
        return add_to_diagonal(a, rest.squeeze(-1)), finite(a)

    def _eigenvectors(self, state: State, dtype: torch.dtype) -> Tensor:
        """As rows, by descending eigenvalue, [k, m, n] in ``dtype``."""
        count, order = state["eigenvalues"].shape[-1], self.order(state)
        w = decode(take("eigenvectors", state), self.vectors, count * order, dtype)
        return rectify(w.unflatten(-1, (count, order)), self.rectifications)

    def order(self, state: State) -> int:
        """n, of the matrix of a state."""
        return order_of({name: part.shape for name, part in state.items()}, getattr(self.vectors, "bits", None))


def order_of(shapes: Mapping[str, Sequence[int]], bits: int | None) -> int:
    """n, from the shapes of a state and the bits of its codes.

    Fewer than 8 codes fill up the last byte, and there are 8 eigenvectors or all.
    """
    count = shapes["eigenvalues"][-1]
    if count < _STEP:
        return count
    return (shapes["eigenvectors.codes"][-1] * 8 // bits if bits else shapes["eigenvectors.values"][-1]) // count
