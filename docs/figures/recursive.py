"""Errors of A^(-1/4) while the state goes through its average again and again, for some forms."""

import torch
from figures import BLUE, GREEN, ORANGE, RED, SKY, axes
from matplotlib.figure import Figure

from benchmarks.matrices import (
    advance,
    averages,
    exact_root,
    fourth_root,
    log_spaced,
    low_bit,
    of_the_paper,
    relative_error,
    statistics,
)
from lowbit_optim.storage.factors import Factor

ORDER, UPDATES, SEEDS = 128, 150, range(3)
FORMS = {
    "A and root, 4-bit squares": (of_the_paper("direct"), {"color": ORANGE, "linestyle": "-."}),
    "eigenvectors and root, 4-bit squares": (of_the_paper("eigen"), {"color": GREEN, "linestyle": "--"}),
    "root, bits=1": (low_bit("root", 1), {"color": RED, "linestyle": ":"}),
    "root, bits=2": (low_bit("root", 2), {"color": BLUE}),
    "root, bits=4": (low_bit("root", 4), {"color": SKY}),
}


def errors(factor: Factor) -> list[float]:
    """Of every update, the mean over the streams."""
    state = factor.init(len(SEEDS), ORDER, torch.float32, "cpu")
    found = []
    for m, a in averages(statistics(log_spaced(ORDER), ORDER // 4, SEEDS, UPDATES), factor.initial_scale):
        state = advance(factor, state, m)
        found.append(float(relative_error(fourth_root(factor, state), exact_root(a, factor)).mean()))
    return found


def draw() -> Figure:
    figure, ax = axes(4.0)
    for label, (factor, line) in FORMS.items():
        ax.semilogy(range(1, UPDATES + 1), errors(factor), label=label, **line)
    ax.set_xlabel("updates")
    ax.set_ylabel("relative error of the root")
    figure.legend(loc="outside upper center", fontsize=10)
    return figure
