"""The largest eigenvalue that the root form gives back, over the true one, with and without the trace that it keeps."""

from dataclasses import dataclass
from typing import Any

import torch
from figures import BLUE, ORANGE, PINK, axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.matrices import advance, averages, log_spaced, low_bit, statistics, top_ratio
from benchmarks.storage import rounded
from lowbit_optim.roots import inverse_power
from lowbit_optim.storage.factors import Factor
from lowbit_optim.storage.root import Root

ORDER, UPDATES, EVERY, SEEDS = 128, 200, 5, range(2)


@dataclass(frozen=True, kw_only=True)
class Forgetful(Root):
    """The root form, but that A is X^-q as it comes, whatever its trace was."""

    lowest: float = 1e-6  # to which eigenvalues are raised, relative to the largest

    def _statistic_of(self, x: Tensor, ridge: Tensor | None, total: Tensor) -> tuple[Tensor, Tensor]:
        return inverse_power(x, self._q, self.lowest, ridge, None)


def ratios(factor: Factor) -> list[float]:
    """After every few updates, the mean over the streams."""
    state = factor.init(len(SEEDS), ORDER, torch.float32, "cpu")
    found = []
    for t, (m, a) in enumerate(averages(statistics(log_spaced(ORDER), ORDER // 4, SEEDS, UPDATES)), 1):
        state = advance(factor, state, m)
        if t % EVERY == 0:
            found.append(float(top_ratio(factor, state, a).mean()))
    return found


def draw() -> Figure:
    figure, ax = axes(3.6)
    kept: Any = rounded(low_bit("root", 2), "nearest")
    codec = kept.codec
    for label, factor, line in (
        ("naive", Forgetful(codec=codec, lowest=1e-20), {"color": ORANGE, "linestyle": "-."}),
        ("eigenvalues clamped", Forgetful(codec=codec), {"color": PINK, "linestyle": "--"}),
        ("clamped, and its trace kept", kept, {"color": BLUE}),
    ):
        ax.semilogy(range(EVERY, UPDATES + 1, EVERY), ratios(factor), label=label, **line)
    ax.set_xlabel("updates")
    ax.set_ylabel("largest eigenvalue / true")
    figure.legend(loc="outside upper center", fontsize=10)
    return figure
