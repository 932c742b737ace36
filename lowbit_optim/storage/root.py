"""Factors of which one thing is kept for statistic and root: the inverse root alone, or the logarithm alone."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim.linalg import (
    add_to_diagonal,
    damped,
    each,
    eigh,
    everywhere,
    exponential,
    finite,
    largest_eigenvalue,
    matrix_power,
    powers,
    symmetrize,
    trace,
)
from lowbit_optim.roots import inverse_power, inverse_root, with_sum
from lowbit_optim.storage.factors import Coded, Factor, State, counters, put, take, weighted_sum

# Of a root: a root of low power of tiny statistics would overflow in float32, and its direction is what matters.
_LARGEST_SCALE = 1e30


@dataclass(frozen=True, kw_only=True)
class Scaled(Factor):
    """What forms share that keep one thing for statistic and root: that of A / r^2 with r^2 = tr(A) / n, and r.

    What is kept is then near 1 at any scale of the gradient, and reading A back to its known trace keeps what coding
    does to it from compounding through the average. A ridge that is added ("relative", "absolute") is kept, too, and
    taken off again when A is read: it must not enter the average. "clamp" adds none: it raises small eigenvalues to
    eps of the largest.
    """

    ridge: str = "clamp"
    one_period: ClassVar[bool] = True

    @abstractmethod
    def _start(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """What is kept of identity matrices."""

    @abstractmethod
    def _write(self, a: Tensor) -> tuple[State, Tensor]:
        """What is kept of A / r^2 with its ridge, [k, n, n]; ok [k]."""

    @abstractmethod
    def _read(self, state: State, dtype: torch.dtype, ridge: Tensor | None) -> tuple[Tensor, Tensor]:
        """A / r^2 without its ridge [k], of trace n, or zeros where r is 0; ok [k]."""

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        rms = torch.full((blocks,), math.sqrt(self.initial_scale), dtype=torch.float32, device=device)
        ridge = {} if self.ridge == "clamp" else {"ridge": torch.zeros_like(rms)}
        return {"rms": rms} | ridge | self._start(blocks, order, dtype, device) | counters(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        a, _ = self._normalized_statistic(state, dtype)
        return a * each(state["rms"].to(dtype).square(), a)

    def mean_eigenvalue(self, state: State, dtype: torch.dtype) -> Tensor:
        return state["rms"].to(dtype).square()

    @property
    def _floor(self) -> float:
        """Of the eigenvalues of A with its ridge, relative to the largest."""
        return self.eps if self.ridge == "clamp" else 1e-7

    def _root_scale(self, state: State, dtype: torch.dtype) -> Tensor:
        """r^(-2/p), [k]: by what the root of A / r^2 is multiplied."""
        rms = state["rms"].to(dtype)
        return powers(torch.where(rms > 0, rms, 1.0), -2 / self.power).clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)

    def _total(self, state: State, order: int, dtype: torch.dtype) -> Tensor:
        """tr(A / r^2), [k]. (A is read as I if a ridge was so large that nothing is left of it.)"""
        return torch.where(state["rms"] > 0, float(order), 0.0).to(dtype)

    def _normalized_statistic(self, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._read(state, dtype, None if self.ridge == "clamp" else state["ridge"].to(dtype))

    def _update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None) -> tuple[State, Tensor]:
        rms = state["rms"].to(m.dtype)
        unit = torch.where(rms > 0, rms, magnitude)
        unit = torch.where(unit > 0, unit, 1.0)
        a, ok = self._normalized_statistic(state, m.dtype)
        old, new = trace(a), trace(m)
        old_share, new_share = self._shares(state, old, new, magnitude / unit, unit)
        mean = (old_share * old + new_share * new) / a.shape[-1]
        rms = unit * mean.sqrt()
        changed = {"rms": rms.float()}
        mean = torch.where(mean > 0, mean, 1.0)
        a = weighted_sum(a, m, old_share / mean, new_share / mean)
        if self.ridge != "clamp":
            ridge = self._added(a, damping, rms)
            changed["ridge"] = ridge.float()
            add_to_diagonal(a, ridge)
        kept, kept_ok = self._write(a)
        return changed | kept, ok & kept_ok

    def _added(self, a: Tensor, damping: Tensor | None, rms: Tensor) -> Tensor:
        """The ridge of a normalized A, [k]."""
        if damping is not None:
            return damping / torch.where(rms > 0, rms, 1.0).square()
        return self.eps * largest_eigenvalue(a)


@dataclass(frozen=True, kw_only=True)
class Root(Scaled, Coded):
    """Only X = A^(-1/q), from which the root A^(-1/p) and, as A = X^-q, the statistic are had.

    The power compresses the spectrum, so that uniform rounding is harmless everywhere, and X is symmetric, so that one
    triangle holds it. Rounding errors of X^-q all push upwards: without the known trace they would compound through
    the average. When A is read, X's eigenvalues are raised to eps^(1/q) of the largest (ridge "clamp"): no true
    eigenvalue lies below.

    Args:
        codec: how X is kept.
        stored_power: q, a power of two times ``power``; None means the smallest of at least 4, so that X is the root
            itself from p = 4 on. A larger one compresses the spectrum more, and costs a matrix product per doubling in
            every step.
    """

    stored_power: int | None = None
    root_needs: ClassVar[tuple[str, ...]] = ("rms", "root")

    def _start(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        return put(self.name, self.codec.identity(blocks, order, dtype, device))

    def scaled_root(self, state: State, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if out is not None and self._is_kept:
            root = self.codec.decode(take(self.name, state), out.dtype, out)
        else:
            root = self._normalized_root(self.codec.decode(take(self.name, state), dtype))
        return root, self._root_scale(state, dtype)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"stored_power": self._q}

    @property
    def _q(self) -> int:
        return self.stored_power or self.power * max(1, 2 ** math.ceil(math.log2(4 / self.power)))

    @property
    def copies(self) -> int:  # type: ignore[override]
        """See ``Factor``; the powers of X are there with X itself."""
        return 0 if self._is_kept else 3

    @property
    def _is_kept(self) -> bool:
        """Whether X is the root itself."""
        return self._q == self.power

    def _write(self, a: Tensor) -> tuple[State, Tensor]:
        x, ok = self._kept(a)
        return put(self.name, self.codec.encode(x, self._weight(a, x))), ok

    def _read(self, state: State, dtype: torch.dtype, ridge: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.codec.decode(take(self.name, state), dtype)
        if self.codec.layout == "square":
            x = symmetrize(x)
        return self._statistic_of(x, ridge, self._total(state, x.shape[-1], dtype))

    def _kept(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """X of a normalized A with its ridge, before coding; ok [k]."""
        return inverse_root(a, self._q, self._floor, clamp=True)

    def _weight(self, a: Tensor, x: Tensor) -> Tensor | None:
        """A^(1/2) (for an odd q a little more), by which X is rounded; None where each number is by itself.

        Of a gradient with covariance A, the error of its product with X would be weighed by A; of the A that is read
        back, by less. A^(1/2) serves both better than A^(1/4) or A.
        """
        return symmetrize(a @ torch.linalg.matrix_power(x, self._q // 2)) if self.codec.adaptive else None

    def _statistic_of(self, x: Tensor, ridge: Tensor | None, total: Tensor) -> tuple[Tensor, Tensor]:
        """A from X, without its ridge [k], times what makes its trace total [k]; ok [k]."""
        return inverse_power(x, self._q, self._floor, ridge, total)

    def _normalized_root(self, x: Tensor) -> Tensor:
        """A^(-1/p) from X."""
        return x if self._is_kept else torch.linalg.matrix_power(x, self._q // self.power)


@dataclass(frozen=True, kw_only=True)
class Logarithm(Root):
    """Only X = -log A, from which the root exp(X / p) and, as A = exp(-X), the statistic are had.

    Rounding errors of X are relative errors of A's eigenvalues, the same for large and small ones, where those of
    A^(-1/q) fall on the largest; so the statistic does not wander at 4-bit codes and less. Each root costs six
    matrix products more, in every step (at p = 4 and eps = 1e-6), and an update takes two eigendecompositions on every
    device: there is no route by products.
    """

    name: ClassVar[str] = "logarithm"
    root_needs: ClassVar[tuple[str, ...]] = ("rms", "logarithm")

    _is_kept: ClassVar[bool] = False
    copies: ClassVar[int] = 7

    def _weight(self, a: Tensor, x: Tensor) -> None:
        """Errors of a logarithm weigh on all eigenvalues alike."""

    def _start(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        state = super()._start(blocks, order, dtype, device)
        return state | {"logarithm.diagonal": torch.zeros_like(state["logarithm.diagonal"])}

    def _kept(self, a: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors, ok = eigh(a)
        x = (vectors * -everywhere(torch.log, damped(values, self._floor, clamp=True)).unsqueeze(-2)) @ vectors.mT
        return x, ok & finite(x)

    def _statistic_of(self, x: Tensor, ridge: Tensor | None, total: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors, ok = eigh(x)
        smallest = values[..., :1]
        values = everywhere(torch.exp, smallest - values)  # 1 for the smallest of X, the largest of A
        if ridge is not None:
            values = (values * everywhere(torch.exp, -smallest.clamp(min=-60)) - ridge.unsqueeze(-1)).clamp(min=0)
        return matrix_power(with_sum(values, total), vectors, 1.0), ok

    def _normalized_root(self, x: Tensor) -> Tensor:
        return exponential(x / self.power, -math.log(self._floor) / self.power)
