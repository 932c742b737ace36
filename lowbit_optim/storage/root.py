"""A factor as its inverse root alone, or as its logarithm alone."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_optim.linalg import (
    damped,
    each,
    eigh,
    exponential,
    finite,
    inverse_root,
    matrix_power,
    symmetrize,
    trace,
)
from lowbit_optim.storage.factors import Factor, State, counters, put, take
from lowbit_optim.storage.symmetric import Symmetric

# Of a root: a root of low power of tiny statistics would overflow in float32, and its direction is what matters.
_LARGEST_SCALE = 1e30


@dataclass(frozen=True, kw_only=True)
class Root(Factor):
    """Only X = A^(-1/q), from which the root A^(-1/p) and, as A = X^-q, the statistic are had.

    The power compresses the spectrum, so that uniform rounding is harmless everywhere, and X is symmetric, so that one
    triangle holds it. What is kept is the root of A / r^2 with r^2 = tr(A) / n, and r: the root is then a number near 1
    at any scale of the gradient, and reading A back to its known trace keeps the rounding errors of X^-q, which all
    push upwards, from compounding through the average. When A is read, X's eigenvalues are raised to eps^(1/q) of the
    largest: no true eigenvalue lies below.

    Args:
        codec: how X is kept.
        stored_power: q, a power of two times ``power``; None means ``power``, so that X is the root itself. For study:
            a larger one compresses the spectrum more, and costs a matrix product per doubling in every step.
    """

    codec: Symmetric
    stored_power: int | None = None
    one_period: ClassVar[bool] = True
    name: ClassVar[str] = "root"  # of X in the state

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        start = put(self.name, self.codec.identity(blocks, order, dtype, device))
        rms = torch.full((blocks,), math.sqrt(self.initial_scale), dtype=torch.float32, device=device)
        return {"rms": rms} | start | counters(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        a, _ = self._normalized_statistic(state, dtype)
        return a * each(state["rms"].to(dtype).square(), a)

    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        rms = state["rms"].to(dtype)
        root = self._normalized_root(self.codec.decode(take(self.name, state), dtype))
        scale = torch.where(rms > 0, rms, 1.0).pow(-2 / self.power).clamp(max=_LARGEST_SCALE)
        return root * each(scale, root)

    @property
    def _q(self) -> int:
        return self.stored_power or self.power

    def _normalized_statistic(self, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A / r^2, of trace n, or zeros before the first statistic; ok [k]."""
        values, vectors, ok = eigh(symmetrize(self.codec.decode(take(self.name, state), dtype)))
        values = self._eigenvalues(values)
        values = values * (values.shape[-1] / values.sum(-1, keepdim=True))
        a = matrix_power(values, vectors, 1.0)
        return torch.where(each(state["rms"] > 0, a), a, 0.0), ok

    def _update(self, state: State, m: Tensor, magnitude: Tensor) -> tuple[State, Tensor]:
        rms = state["rms"].to(m.dtype)
        unit = torch.where(rms > 0, rms, magnitude)
        a, ok = self._normalized_statistic(state, m.dtype)
        safe = torch.where(unit > 0, unit, 1.0)
        a = self._average(state, a, m, magnitude / safe, safe)
        mean = trace(a) / a.shape[-1]
        x, x_ok = self._kept(a / each(torch.where(mean > 0, mean, 1.0), a))
        return {"rms": (unit * mean.sqrt()).float()} | put(self.name, self.codec.encode(x)), ok & x_ok

    def _kept(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """X of a normalized A, before coding; ok [k]."""
        return inverse_root(a, self._q, self.eps, clamp=True)

    def _eigenvalues(self, values: Tensor) -> Tensor:
        """Of A, from those of X, [k, n] ascending; their scale does not matter."""
        return damped(values, self.eps ** (1 / self._q), clamp=True).pow(-self._q)

    def _normalized_root(self, x: Tensor) -> Tensor:
        """A^(-1/p) from X."""
        return x if self._q == self.power else torch.linalg.matrix_power(x, self._q // self.power)


@dataclass(frozen=True, kw_only=True)
class Logarithm(Root):
    """Only X = -log A, from which the root exp(X / p) and, as A = exp(-X), the statistic are had.

    Rounding errors of X are relative errors of A's eigenvalues, the same for large and small ones, where those of
    A^(-1/q) fall on the largest; so the statistic does not wander at 4-bit codes and less. Each root costs eight
    matrix products more, in every step.
    """

    name: ClassVar[str] = "logarithm"

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        state = super().init(blocks, order, dtype, device)
        return state | {"logarithm.diagonal": torch.zeros_like(state["logarithm.diagonal"])}

    def _kept(self, a: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors, ok = eigh(a)
        x = symmetrize((vectors * -damped(values, self.eps, clamp=True).log().unsqueeze(-2)) @ vectors.mT)
        return x, ok & finite(x)

    def _eigenvalues(self, values: Tensor) -> Tensor:
        return (values[..., :1] - values).exp()  # 1 for the smallest of X, the largest of A

    def _normalized_root(self, x: Tensor) -> Tensor:
        return exponential(x / self.power)
