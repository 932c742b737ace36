"""A factor as its Cholesky factor, with or without error feedback."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_optim.linalg import cholesky, finite
from lowbit_optim.storage.factors import Coded, State, counters, put, take

# What makes A definite, relative to its mean eigenvalue, at most: it enters the average, as damping must not.
_RIDGE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Cholesky(Coded):
    """A = C C^T by its lower triangle C, and the root (Li, Ding, Toh, Zhou 2024).

    With error feedback, what coding C lost is kept as well, coded, and given back before the next coding:
    Q_k = Q(C_k + E_(k-1)), E_k = b E_(k-1) + (1 - b) (C_k + E_(k-1) - D(Q_k)), with b the decay of the statistics.

    C is that of A + eps tr(A) / n I, which makes it exist: that ridge is kept, and enters the average.

    Args:
        codec: how C, the error and the root are kept, each as one triangle; C and the root with an exact diagonal.
        feedback: keep the error.
    """

    feedback: bool = False

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        start = self.codec.identity(blocks, order, dtype, device)
        start["diagonal"] *= self.initial_scale**0.5
        state = put("cholesky", start) | put("root", self.codec.identity(blocks, order, dtype, device))
        if self.feedback:
            error = self.codec.identity(blocks, order, dtype, device)
            del error["diagonal"]
            state |= put("error", error)
        return state | counters(blocks, device)

    def statistic(self, state: State, dtype: torch.dtype) -> Tensor:
        c = self.codec.decode(take("cholesky", state), dtype).tril()
        return c @ c.mT

    def _update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None) -> tuple[State, Tensor]:
        a = self._average(state, self.statistic(state, m.dtype), m, magnitude)
        c, ok = cholesky(a, min(self.eps, _RIDGE))
        if not self.feedback:
            return put("cholesky", self.codec.encode(c)), ok & finite(a)
        error = self._error(state, m.dtype)
        wanted = c + error
        parts = self.codec.encode(wanted)
        kept = self.codec.decode(parts, m.dtype).tril()
        error = self.decay * error + (1 - self.decay) * (wanted - kept)
        coded = self.codec.encode(error)
        del coded["diagonal"]
        return put("cholesky", parts) | put("error", coded), ok & finite(a)

    def _error(self, state: State, dtype: torch.dtype) -> Tensor:
        parts = take("error", state)
        nothing = torch.zeros_like(state["cholesky.diagonal"])
        return self.codec.decode({"diagonal": nothing, **parts}, dtype).tril()
