"""A factor with an eigenbasis of its statistic beside it, coded: what optimizers that work in the eigenbasis keep."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_optim.linalg import each, eigh, orthogonal_iteration, rectify, trace
from lowbit_optim.storage.eigen import Reflectors, Rows
from lowbit_optim.storage.factors import Factor, State, put, take


@dataclass(frozen=True)
class Basis:
    """The eigenvectors of a factor's statistic, as of the last turn.

    Args:
        order: n.
        factor: how the statistic is kept.
        vectors: how the eigenvectors are kept, as columns by descending eigenvalue; the identity at first.
        rectifications: Björck iterations when they are read; reflectors need none.
        iterations: orthogonal iterations per turn.
    """

    order: int
    factor: Factor
    vectors: Rows | Reflectors
    rectifications: int = 4
    iterations: int = 1

    one_period = False  # the basis turns when it is told to
    root_needs = ("basis",)
    copies = 4

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """The state before the first update."""
        state = self.factor.init(blocks, order, dtype, device)
        if not self.factor.one_period:  # the root, which nobody asks for
            state = {name: part for name, part in state.items() if not name.startswith("root")}
        turns = torch.zeros(blocks, dtype=torch.int32, device=device)
        return state | put("basis", self.vectors.identity(blocks, order, dtype, device)) | {"turns": turns}

    def describe(self) -> dict[str, Any]:
        """The form and its settings as JSON-able values."""
        return self.factor.describe() | {"basis": type(self.vectors).__name__.lower()}

    def update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None = None) -> State:
        """Take in the statistic magnitude^2 M, as ``Factor.update``."""
        return self.factor.update(state, m, magnitude, damping)

    def root(self, state: State, dtype: torch.dtype) -> Tensor:
        """The basis, [k, n, n] in ``dtype``."""
        return rectify(self.vectors.decode(take("basis", state), self.order, dtype), self.rectifications)

    def scaled_root(self, state: State, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The basis and ones, as ``Factor.scaled_root``."""
        basis = self.root(state, dtype)
        return basis, torch.ones_like(basis[:, 0, 0])

    factored_root = scaled_root

    def rounding_error(self, state: State) -> None:
        """Not estimated of a basis."""
        return

    def refresh(self, state: State, dtype: torch.dtype, damping: Tensor | None = None) -> State:
        """Decompose the statistic that is kept; no damping enters."""
        return self.turn(state, dtype, anew=True)[0]

    def turn(self, state: State, dtype: torch.dtype, *, anew: bool) -> tuple[State, Tensor]:
        """Follow the statistic: by its decomposition, or by orthogonal iteration from the last basis.

        Returns:
            (the state; the columns of the old basis in the order that the new ones follow, int64 [k, n]: by
            descending Rayleigh quotient, or as they were if ``anew``). "turns" counts. Where that failed, which
            "failures" counts, or there is no statistic yet, the basis stays, and so does the order.
        """
        a, old = self.factor.statistic(state, dtype), self.root(state, dtype)
        unchanged = torch.arange(self.order, device=a.device).expand(len(a), -1)
        if anew:
            order = unchanged
            _, new, ok = eigh(a)
            new = new.flip(-1)
        else:
            order = (old * (a @ old)).sum(-2).argsort(dim=-1, descending=True, stable=True)
            _, new, ok = orthogonal_iteration(a, old.gather(-1, order.unsqueeze(-2).expand_as(old)), self.iterations)
        failed, ok = ~ok & (trace(a) > 0), ok & (trace(a) > 0)
        coded = put("basis", self.vectors.encode(torch.where(each(ok, new), new, old)))
        kept = {name: torch.where(each(ok, part), part, state[name]) for name, part in coded.items()}
        kept |= {"failures": state["failures"] + failed, "turns": state["turns"] + ok}
        return state | kept, torch.where(ok[:, None], order, unchanged)
