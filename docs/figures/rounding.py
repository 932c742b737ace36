"""What one rounding costs: normal numbers in blocks of 64, by table, bits and kind of scale."""

import torch
from figures import BLUE, GREEN, ORANGE, PINK, axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from lowbit_optim.storage import Quantization
from lowbit_optim.storage.codebooks import BITS

LINES = {
    ("linear", "absmax"): {"color": ORANGE, "marker": "s"},
    ("linear", "fitted"): {"color": ORANGE, "marker": "s", "linestyle": ":"},
    ("nf", "absmax"): {"color": BLUE, "marker": "o"},
    ("nf", "fitted"): {"color": BLUE, "marker": "o", "linestyle": ":"},
    ("linear-2", "absmax"): {"color": GREEN, "marker": "^"},
    ("lloyd-max", "fitted"): {"color": PINK, "marker": "v", "linestyle": ":"},
}


def error(quantization: Quantization, x: torch.Tensor) -> float:
    back = quantization.decode(quantization.encode(x), x.shape[-1])
    return float((back - x).norm() / x.norm())


def draw() -> Figure:
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    figure, ax = axes(3.6)
    for (table, scale), line in LINES.items():
        errors = [error(Quantization(bits, table, 64, double=True, scale=scale), x) for bits in BITS]
        ax.semilogy(BITS, errors, label=f"{table}, {scale}", markersize=5, **line)
    ax.xaxis.set_major_locator(FixedLocator(BITS))
    ax.set_xlabel("bits of a code")
    ax.set_ylabel("relative error")
    ax.legend(fontsize=10)
    return figure
