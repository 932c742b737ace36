"""Eigenvalues of a matrix after one coding of the matrix itself, of its eigenvectors and of its inverse root."""

import torch
from figures import BLUE, GREEN, GREY, ORANGE, axes
from matplotlib.figure import Figure

from benchmarks.matrices import log_spaced, low_bit, of_the_paper, orthogonal, power

ORDER = 384
FORMS = {
    "A itself, 4-bit square": (of_the_paper("direct"), {"color": ORANGE, "marker": "s"}),
    "eigenvectors, 4-bit square": (of_the_paper("eigen"), {"color": GREEN, "marker": "^"}),
    "root, bits=2": (low_bit("root", 2), {"color": BLUE, "marker": "o"}),
}


def draw() -> Figure:
    values = log_spaced(ORDER)
    a = power(values, orthogonal(ORDER, torch.Generator().manual_seed(0)), 1.0)[None]
    figure, ax = axes(3.8)
    for label, (factor, line) in FORMS.items():
        kept = factor.statistic(factor.holding(a.float()), torch.float64)
        found = torch.linalg.eigvalsh(kept)[0].flip(0).clamp(min=1e-6)
        ax.semilogy(found, label=label, markevery=24, markersize=5, **line)
    ax.semilogy(values, label="exact", color=GREY, linewidth=3, alpha=0.6, zorder=0)
    ax.set_ylim(5e-7, 8)
    ax.set_xlabel("eigenvalue, largest first")
    ax.legend(fontsize=10, loc="lower left")
    return figure
