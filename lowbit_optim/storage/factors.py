"""How one Kronecker factor A is kept between steps, and how its inverse root A^(-1/p) is had from what is kept.

A form is a frozen description; the state it works on is a dict of plain tensors, stacked over the blocks that share it:
every tensor's first dim is the block. Forms are functions of that state (nothing is changed in place):

    state = form.init(blocks, order, dtype, device)
    state = form.update(state, statistic, magnitude)     # every statistics_frequency steps
    state = form.refresh(state, dtype)                   # every precondition_frequency steps
    left, scale = form.scaled_root(state, dtype)         # every step

An update or refresh that fails for a block leaves that block's state as it was and adds one to its "failures".
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim.linalg import Spikes, each, everywhere, finite, largest_magnitude, power_of_two, symmetrize, trace
from lowbit_optim.roots import inverse_root
from lowbit_optim.storage.blockwise import Parts
from lowbit_optim.storage.symmetric import Symmetric

State = dict[str, Tensor]


def put(name: str, parts: Parts) -> State:
    """Parts under flat names: {"codes": ...} to {"<name>.codes": ...}."""
    return {f"{name}.{key}": value for key, value in parts.items()}


def take(name: str, state: State) -> Parts:
    """The parts that ``put`` named."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def share(decay: float, updates: Tensor, dtype: torch.dtype) -> Tensor:
    """(1 - beta) / (1 - beta^t), [k]: the weight of the t-th of t in their average with weights beta^age."""
    t = updates.clamp(min=1).to(dtype)
    log_decay = math.log(decay) if decay else -math.inf
    return (torch.full_like(t, 1 - decay) / everywhere(lambda x: -torch.expm1(x * log_decay), t)).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True)
class Factor(ABC):
    """What all forms share: the moving average of the statistics, and keeping the last good state.

    Args:
        power: p of the root A^(-1/p).
        decay: beta of the moving average.
        eps: ridge relative to the largest eigenvalue of A.
        ridge: "relative": the root is that of A + eps lambda_max I. "absolute": of A + damping I, with the damping that
            is given to ``update`` and ``refresh``. ``Root`` knows "clamp", too.
        initial_scale: A starts as this times I, and A <- beta A + (1 - beta) M. At 0 A is the average of all statistics
            since the first that is not zero, with weights beta^age (Adam's bias correction).
        statistic_limit: a statistic with tr(M) > statistic_limit max(tr(A), tr(M before it)) is scaled down to tr(A):
            one gradient spike would otherwise own A for hundreds of updates. A change of scale that lasts is followed
            from its second statistic on. The first statistic has nothing to be compared with.
    """

    power: int = 4
    decay: float = 0.95
    eps: float = 1e-6
    ridge: str = "relative"
    initial_scale: float = 0.0
    statistic_limit: float = 4.0

    one_period: ClassVar[bool] = False  # update leaves nothing for refresh to do
    root_needs: ClassVar[tuple[str, ...]] = ("root",)  # how the names of the tensors begin that a root is read from
    copies: ClassVar[int] = 1  # matrices that are there at most while a root is read, beside those that come back

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
    def scaled_root(self, state: State, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A^(-1/p) as of the last refresh over a number, so that its products with others neither over- nor underflow.

        Args:
            state: at least the tensors of ``root_needs``.
            dtype: float32 or float64.
            out: where the matrices may be written, [k, n, n] in ``dtype`` or bfloat16, which rounds them.

        Returns:
            (the matrices [k, n, n], which may be ``out``; the number of each, [k] in ``dtype``, from 1e-30 to 1e30).
        """

    def factored_root(
        self, state: State, dtype: torch.dtype, out: Tensor | None = None
    ) -> tuple[Tensor | Spikes, Tensor]:
        """As ``scaled_root``, or in factors, where the root has fewer numbers so."""
        return self.scaled_root(state, dtype, out)

    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        """A^(-1/p) as of the last refresh, [k, n, n] in ``dtype``."""
        root, scale = self.scaled_root(state, dtype)
        return root * each(scale, root)

    def rounding_error(self, state: State) -> Tensor:
        """How far what ``root`` reads is off for having been rounded when it was written last, estimated, [k] float32.

        Relative, by Frobenius norms; 0 where nothing is coded. What earlier roundings left in the average, it does not
        see.
        """
        return torch.zeros_like(state["previous_norm"])

    @abstractmethod
    def _update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None) -> tuple[State, Tensor]:
        """The changed part of the state and ok [k]."""

    def _refresh(self, state: State, dtype: torch.dtype, damping: Tensor | None) -> tuple[State, Tensor]:
        """The changed part of the state and ok [k]."""
        if self.one_period:
            raise NotImplementedError(f"{type(self).__name__} has one period: its root comes with the update")
        root, ok = inverse_root(self.statistic(state, dtype), self.power, self.eps, damping)
        return self._with_root(root), ok

    def _with_root(self, root: Tensor) -> State:
        """A root as a form of two periods keeps it."""
        raise NotImplementedError

    def mean_eigenvalue(self, state: State, dtype: torch.dtype) -> Tensor:
        """tr(A) / n, [k]."""
        return self.statistic(state, dtype).diagonal(dim1=-2, dim2=-1).mean(-1)

    def update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None = None) -> State:
        """Take in the statistic magnitude^2 M.

        Args:
            m: symmetric positive semidefinite [k, n, n], float32 or float64 (the dtype of the computation).
            magnitude: [k], apart from M because its square may overflow or underflow.
            damping: [k], for the "absolute" ridge of a form whose root comes with the update.
        """
        counted, norm = self._counted(state, m, magnitude)
        changed, ok = self._update(counted, m, magnitude, damping)
        return _keep_good(state, changed | {"updates": counted["updates"], "previous_norm": _storable(norm)}, ok)

    def mean_after(self, state: State, m: Tensor, magnitude: Tensor) -> Tensor:
        """tr(A) / n, [k], as it will be after that update; as it is if the statistic is not finite."""
        n, before, new = m.shape[-1], self.mean_eigenvalue(state, m.dtype), trace(m)
        old_share, new_share = self._shares(self._counted(state, m, magnitude)[0], n * before, new, magnitude)
        mean = old_share * before + new_share * new / n
        return torch.where(torch.isfinite(mean) & finite(m), mean, before)

    def _counted(self, state: State, m: Tensor, magnitude: Tensor) -> tuple[State, Tensor]:
        """The state with one update more, and the statistic's norm (tr M)^(1/2), [k]."""
        norm = magnitude * trace(m).sqrt()  # NaN where a trace is negative, and nothing of that block is kept
        return state | {"updates": state["updates"] + ((state["updates"] > 0) | (norm > 0))}, norm

    def refresh(self, state: State, dtype: torch.dtype, damping: Tensor | None = None) -> State:
        """Compute the root of the statistic that is kept, in ``dtype``; damping: [k], for the "absolute" ridge."""
        return _keep_good(state, *self._refresh(state, dtype, damping))

    def holding(self, a: Tensor, damping: Tensor | None = None) -> State:
        """The state of blocks that have had one statistic, A, with its root, each coded once.

        Args:
            a: symmetric positive semidefinite [k, n, n], finite, float32 or float64 (the dtype of the computation).
            damping: [k], for the "absolute" ridge.

        Returns:
            The state; "updates" and "previous_norm" are those of that statistic, and "failures" are 1 or more where A
            cannot be held. A block whose A is 0 has had none.
        """
        first = replace(self, initial_scale=0.0)  # takes its first statistic with the whole weight
        largest = 2.0**99 if a.dtype == torch.float32 else 2.0**500
        magnitude = power_of_two((trace(a) / a.shape[-1]).clamp(min=0).sqrt(), 1 / largest, largest)
        unit = each(1 / magnitude, a)
        state = first.init(len(a), a.shape[-1], a.dtype, a.device)
        state = first.update(state, a * unit * unit, magnitude, damping)
        if self.one_period:
            return state
        root, ok = inverse_root(a, self.power, self.eps, damping)
        return _keep_good(state, self._with_root(root), ok)

    def _average(self, state: State, a: Tensor, m: Tensor, magnitude: Tensor) -> Tensor:
        """(1 - s) A + s magnitude^2 M, with s = (1 - beta) / (1 - beta^t) at the t-th statistic."""
        return weighted_sum(a, m, *self._shares(state, trace(a), trace(m), magnitude))

    def _shares(
        self, state: State, old: Tensor, new: Tensor, magnitude: Tensor, unit: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """What A and M are multiplied with in their average: 1 - s and s magnitude^2, [k].

        Args:
            old, new: the traces of A and M, [k], that of A in units of unit^2.
            magnitude: [k], in units of unit.
        """
        scale = magnitude.square()
        new_share = torch.full_like(scale, 1 - self.decay)
        if not self.initial_scale:
            reference = old.maximum((state["previous_norm"].to(old.dtype) / unit).square())
            outlier = (old > 0) & (scale * new > self.statistic_limit * reference)
            scale = torch.where(outlier, old / torch.where(new > 0, new, 1.0), scale)
            new_share = share(self.decay, state["updates"], scale.dtype)
        return 1 - new_share, new_share * scale.clamp(max=torch.finfo(scale.dtype).max)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def weighted_sum(a: Tensor, m: Tensor, a_share: Tensor, m_share: Tensor) -> Tensor:
    """a_share A + m_share M, of [k, n, n] and [k]."""
    return torch.addcmul(a * each(a_share, a), m, each(m_share, m))


def _storable(x: Tensor) -> Tensor:
    return x.clamp(max=torch.finfo(torch.float32).max).float()


def _keep_good(state: State, changed: State, ok: Tensor) -> State:
    # The forms judge their numbers before they are rounded; float64 may overflow the float32 that is kept.
    for part in changed.values():
        if part.is_floating_point():
            ok = ok & finite(part)
    kept = {name: torch.where(each(ok, new), new, state[name]) for name, new in changed.items()}
    return state | kept | {"failures": state["failures"] + (~ok).to(torch.int32)}


def without_scale(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Matrices [k, n, n] over the power of two of their largest number, and that power, [k], from 2^-99 to 2^99."""
    magnitude = power_of_two(largest_magnitude(x, (1, 2)), 2.0**-99, 2.0**99)
    return torch.mul(x, each(1 / magnitude, x), out=out), magnitude


def counters(blocks: int, device: torch.device | str) -> State:
    """What every form keeps beside A: statistics since the first, the last one's norm (tr M)^(1/2), failed changes."""
    return {
        "updates": torch.zeros(blocks, dtype=torch.int32, device=device),
        "previous_norm": torch.zeros(blocks, device=device),
        "failures": torch.zeros(blocks, dtype=torch.int32, device=device),
    }


def identity(blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.eye(order, dtype=dtype, device=device).expand(blocks, -1, -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Dense(Factor):
    """A and its root in full: 64 bits per element (128 for float64 parameters). The 32-bit optimizer."""

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        eye = identity(blocks, order, dtype, device)
        return {"statistic": self.initial_scale * eye, "root": eye} | counters(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        return state["statistic"].to(dtype)

    def scaled_root(self, state: State, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return without_scale(state["root"].to(dtype), out)

    def _update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None) -> tuple[State, Tensor]:
        a = self._average(state, state["statistic"], m, magnitude)
        return {"statistic": a}, finite(a)

    def _with_root(self, root: Tensor) -> State:
        return {"root": root}


@dataclass(frozen=True, kw_only=True)
class Coded(Factor):
    """What all forms share that keep the root as a coded symmetric matrix.

    Args:
        codec: how the root is kept, and whatever else the form says.
    """

    codec: Symmetric
    name: ClassVar[str] = "root"  # of that matrix in the state

    def scaled_root(self, state: State, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = None if out is None or out.dtype != dtype else out
        root = self.codec.decode(take(self.name, state), dtype, wide)
        return without_scale(root, root if out is None else out)

    def rounding_error(self, state: State) -> Tensor:
        return self.codec.rounding_error(take(self.name, state))

    def _with_root(self, root: Tensor) -> State:
        return put("root", self.codec.encode(root))


@dataclass(frozen=True, kw_only=True)
class Direct(Coded):
    """A and its root, each as an exact diagonal and a quantized rest: what the papers call naive.

    Rounding makes A indefinite; its negative eigenvalues count as zero.
    """

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        start = self.codec.identity(blocks, order, dtype, device)
        root = put("root", self.codec.identity(blocks, order, dtype, device))
        start["diagonal"] *= self.initial_scale
        return put("statistic", start) | root | counters(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        return symmetrize(self.codec.decode(take("statistic", state), dtype))

    def _update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None) -> tuple[State, Tensor]:
        a = self._average(state, self.statistic(state, m.dtype), m, magnitude)
        return put("statistic", self.codec.encode(a)), finite(a)
