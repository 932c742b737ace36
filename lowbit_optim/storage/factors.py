"""How one Kronecker factor A is kept between steps, and how its inverse root A^(-1/p) is had from what is kept.

A form is a frozen description; the state it works on is a dict of plain tensors, stacked over the blocks that share it:
every tensor's first dim is the block. Forms are functions of that state (nothing is changed in place):

    state = form.init(blocks, order, dtype, device)
    state = form.update(state, statistic, magnitude)     # every statistics_frequency steps
    state = form.refresh(state, dtype)                   # every precondition_frequency steps
    left = form.root(state, dtype)                       # every step

An update or refresh that fails for a block leaves that block's state as it was and adds one to its "failures".
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim.linalg import (
    damped,
    eigh,
    finite,
    inverse_root,
    matrix_power,
    orthogonal_iteration,
    rectify,
    symmetrize,
    trace,
)
from lowbit_optim.storage.blockwise import Codec, Parts, decode, encode
from lowbit_optim.storage.symmetric import Symmetric

State = dict[str, Tensor]


def put(name: str, parts: Parts) -> State:
    """Parts under flat names: {"codes": ...} to {"<name>.codes": ...}."""
    return {f"{name}.{key}": value for key, value in parts.items()}


def take(name: str, state: State) -> Parts:
    """The parts that ``put`` named."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _each(mask: Tensor, like: Tensor) -> Tensor:
    """[k] to [k, 1, ...] with the dims of ``like``."""
    return mask.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class Factor(ABC):
    """What all forms share: the moving average of the statistics, and keeping the last good state.

    Args:
        power: p of the root A^(-1/p).
        decay: beta of A <- beta A + (1 - beta) M.
        eps: ridge relative to the largest eigenvalue of A.
        initial_scale: A starts as this times I. At 0 the first non-zero statistic replaces A, whatever its size.
        statistic_limit: a later statistic is scaled down so that tr(M) <= statistic_limit max(tr(A), tr(M before it));
            one gradient spike would otherwise own A for hundreds of updates. A change of scale that lasts is followed
            from its second statistic on.
    """

    power: int = 4
    decay: float = 0.95
    eps: float = 1e-6
    initial_scale: float = 0.0
    statistic_limit: float = 4.0

    one_period: ClassVar[bool] = False  # update leaves nothing for refresh to do

    @abstractmethod
    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """The state before the first update, whose root is a multiple of I; computation will be in ``dtype``."""

    def describe(self) -> dict[str, Any]:
        """The form and its settings as JSON-able values."""
        return {"form": type(self).__name__.lower(), **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}

    @abstractmethod
    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        """A as far as the state tells, [k, n, n] in ``dtype``."""

    @abstractmethod
    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        """A^(-1/p) as of the last refresh, [k, n, n] in ``dtype``."""

    @abstractmethod
    def _update(self, state: State, m: Tensor, magnitude: Tensor) -> tuple[State, Tensor]:
        """The changed part of the state and ok [k]."""

    def _refresh(self, state: State, dtype: torch.dtype) -> tuple[State, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has one period: its root comes with the update")

    def update(self, state: State, m: Tensor, magnitude: Tensor) -> State:
        """Take in the statistic magnitude^2 M.

        Args:
            m: symmetric positive semidefinite [k, n, n], float32 or float64 (the dtype of the computation).
            magnitude: [k], apart from M because its square may overflow or underflow.
        """
        changed, ok = self._update(state, m, magnitude)
        return _keep_good(state, changed | {"previous_norm": _storable(magnitude * trace(m).sqrt())}, ok)

    def refresh(self, state: State, dtype: torch.dtype) -> State:
        """Compute the root of the statistic that is kept, in ``dtype``."""
        return _keep_good(state, *self._refresh(state, dtype))

    def _average(self, a: Tensor, m: Tensor, magnitude: Tensor, previous: Tensor) -> Tensor:
        """beta A + (1 - beta) w M, w = magnitude^2 limited; w M alone where A is still zero and not to be started.

        ``previous`` is the square root of the trace of the statistic before this one, [k].
        """
        old, new = trace(a), trace(m)
        if self.initial_scale:
            weight = magnitude.square()
        else:
            usual = old.maximum(previous.to(old.dtype).square())
            ceiling = self.statistic_limit * usual / torch.where(new > 0, new, 1.0)
            weight = magnitude.square().minimum(torch.where(old > 0, ceiling, torch.inf))
        share = torch.where(old > 0, 1 - self.decay, 1.0) * weight.clamp(max=torch.finfo(m.dtype).max)
        return self.decay * a + _each(share, m) * m


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _storable(x: Tensor) -> Tensor:
    return x.clamp(max=torch.finfo(torch.float32).max).float()


def _keep_good(state: State, changed: State, ok: Tensor) -> State:
    # The forms judge their numbers before they are rounded; float64 may overflow the float32 that is kept.
    for part in changed.values():
        if part.is_floating_point():
            ok = ok & torch.isfinite(part).reshape(len(ok), -1).all(1)
    kept = {name: torch.where(_each(ok, new), new, state[name]) for name, new in changed.items()}
    return state | kept | {"failures": state["failures"] + (~ok).to(torch.int32)}


def _records(blocks: int, device: torch.device | str) -> State:
    """What every form keeps beside A: the root of the last statistic's trace, and how many of its changes failed."""
    return {
        "previous_norm": torch.zeros(blocks, device=device),
        "failures": torch.zeros(blocks, dtype=torch.int32, device=device),
    }


def _identity(blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.eye(order, dtype=dtype, device=device).expand(blocks, -1, -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Dense(Factor):
    """A and its root in full: 64 bits per element (128 for float64 parameters). The 32-bit optimizer."""

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        eye = _identity(blocks, order, dtype, device)
        return {"statistic": self.initial_scale * eye, "root": eye} | _records(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        return state["statistic"].to(dtype)

    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        return state["root"].to(dtype)

    def _update(self, state: State, m: Tensor, magnitude: Tensor) -> tuple[State, Tensor]:
        a = self._average(state["statistic"], m, magnitude, state["previous_norm"])
        return {"statistic": a}, finite(a)

    def _refresh(self, state: State, dtype: torch.dtype) -> tuple[State, Tensor]:
        root, ok = inverse_root(self.statistic(state, dtype), self.power, self.eps)
        return {"root": root}, ok


@dataclass(frozen=True, kw_only=True)
class Direct(Factor):
    """A and its root, each as an exact diagonal and a quantized rest: what the papers call naive.

    Rounding makes A indefinite; its negative eigenvalues count as zero.
    """

    codec: Symmetric

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        start = self.codec.identity(blocks, order, dtype, device)
        root = put("root", self.codec.identity(blocks, order, dtype, device))
        start["diagonal"] *= self.initial_scale
        return put("statistic", start) | root | _records(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        return symmetrize(self.codec.decode(take("statistic", state), dtype))

    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(take("root", state), dtype)

    def _update(self, state: State, m: Tensor, magnitude: Tensor) -> tuple[State, Tensor]:
        a = self._average(self.statistic(state, m.dtype), m, magnitude, state["previous_norm"])
        return put("statistic", self.codec.encode(a)), finite(a)

    def _refresh(self, state: State, dtype: torch.dtype) -> tuple[State, Tensor]:
        root, ok = inverse_root(self.statistic(state, dtype), self.power, self.eps)
        return put("root", self.codec.encode(root)), ok


@dataclass(frozen=True, kw_only=True)
class Eigen(Factor):
    """A as float32 eigenvalues and coded eigenvectors that are rectified when read (Wang et al. 2024, alg. 1 and 2).

    Args:
        vectors: how the eigenvectors are kept; a row is one eigenvector.
        codec: how the root is kept.
        rectify_update: Björck iterations t1 before the eigenvectors enter an update.
        rectify_root: Björck iterations t2 before they make a root.
        iterations: orthogonal iterations per update.
    """

    vectors: Codec
    codec: Symmetric
    rectify_update: int = 1
    rectify_root: int = 4
    iterations: int = 1

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        eye = encode(torch.eye(order, dtype=dtype, device=device), self.vectors)
        return {
            "eigenvalues": torch.full((blocks, order), self.initial_scale, dtype=torch.float32, device=device),
            **put("eigenvectors", {name: part.repeat(blocks, 1, 1) for name, part in eye.items()}),
            **put("root", self.codec.identity(blocks, order, dtype, device)),
            **_records(blocks, device),
        }

    def eigenvectors(self, state: State, rectifications: int, dtype: torch.dtype) -> Tensor:
        """The eigenvectors as columns, [k, n, n] in ``dtype``."""
        n = state["eigenvalues"].shape[-1]
        return rectify(decode(take("eigenvectors", state), self.vectors, n, dtype).mT, rectifications)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        return self._statistic(state, self.eigenvectors(state, self.rectify_update, dtype))

    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(take("root", state), dtype)

    def _statistic(self, state: State, v: Tensor) -> Tensor:
        return symmetrize((v * state["eigenvalues"].to(v.dtype).unsqueeze(-2)) @ v.mT)

    def _update(self, state: State, m: Tensor, magnitude: Tensor) -> tuple[State, Tensor]:
        v = self.eigenvectors(state, self.rectify_update, m.dtype)
        a = self._average(self._statistic(state, v), m, magnitude, state["previous_norm"])
        values, p, ok = orthogonal_iteration(a, v, self.iterations)
        return {"eigenvalues": values.float()} | put("eigenvectors", encode(p.mT, self.vectors)), ok & finite(values)

    def _refresh(self, state: State, dtype: torch.dtype) -> tuple[State, Tensor]:
        v = self.eigenvectors(state, self.rectify_root, dtype)
        root = matrix_power(damped(state["eigenvalues"].to(dtype), self.eps), v, -1 / self.power)
        return put("root", self.codec.encode(root)), finite(root)


@dataclass(frozen=True, kw_only=True)
class Root(Factor):
    """Only X = A^(-1/p), which is the root and, as A = X^-p, the statistic at once.

    The power compresses the spectrum, so that uniform rounding is harmless everywhere, and X is symmetric, so that one
    triangle holds it. What is kept is the root of A / r^2 with r^2 = tr(A) / n, and r: the root is then a number near 1
    at any scale of the gradient, and reading A back to its known trace keeps the rounding errors of X^-p, which all
    push upwards, from compounding through the average. When A is read, X's eigenvalues are raised to eps^(1/p) of the
    largest: no true eigenvalue lies below.
    """

    codec: Symmetric
    one_period: ClassVar[bool] = True

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        rms = torch.full((blocks,), math.sqrt(self.initial_scale), dtype=torch.float32, device=device)
        return {"rms": rms} | put("root", self.codec.identity(blocks, order, dtype, device)) | _records(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        a, _ = self._normalized_statistic(state, dtype)
        return a * _each(state["rms"].to(dtype).square(), a)

    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        rms = state["rms"].to(dtype)
        root = self.codec.decode(take("root", state), dtype)
        return root * _each(torch.where(rms > 0, rms, 1.0).pow(-2 / self.power), root)

    def _normalized_statistic(self, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A / r^2, of trace n, or zeros before the first statistic; ok [k]."""
        values, vectors, ok = eigh(symmetrize(self.codec.decode(take("root", state), dtype)))
        values = damped(values, self.eps ** (1 / self.power), clamp=True).pow(-self.power)
        values = values * (values.shape[-1] / values.sum(-1, keepdim=True))
        a = matrix_power(values, vectors, 1.0)
        return torch.where(_each(state["rms"] > 0, a), a, 0.0), ok

    def _update(self, state: State, m: Tensor, magnitude: Tensor) -> tuple[State, Tensor]:
        rms = state["rms"].to(m.dtype)
        unit = torch.where(rms > 0, rms, magnitude)
        a, ok = self._normalized_statistic(state, m.dtype)
        safe = torch.where(unit > 0, unit, 1.0)
        a = self._average(a, m, magnitude / safe, state["previous_norm"] / safe)
        mean = trace(a) / a.shape[-1]
        root, root_ok = inverse_root(a / _each(torch.where(mean > 0, mean, 1.0), a), self.power, self.eps, clamp=True)
        return {"rms": (unit * mean.sqrt()).float()} | put("root", self.codec.encode(root)), ok & root_ok
