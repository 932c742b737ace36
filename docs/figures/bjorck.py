"""Björck's iteration on an orthogonal matrix that has been rounded to codes."""

import torch
from figures import BLUE, ORANGE, axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.matrices import orthogonal
from lowbit_optim.linalg import rectify
from lowbit_optim.storage import Quantization

ORDER = 256
LINES = {
    4: {"color": BLUE, "marker": "o"},
    3: {"color": ORANGE, "marker": "s"},
}


def draw() -> Figure:
    u = orthogonal(ORDER, torch.Generator().manual_seed(0))[None]
    eye = torch.eye(ORDER, dtype=u.dtype)
    figure, ax = axes(3.4)
    for bits, line in LINES.items():
        quantization = Quantization(bits, "linear-2", 64)  # the paper's
        rows = quantization.decode(quantization.encode(u.mT), ORDER, torch.float64)
        iterates = [rectify(rows.mT, count) for count in range(6)]
        defects = [float((v.mT @ v - eye).norm() / ORDER**0.5) for v in iterates]
        distances = [float((v - u).norm() / ORDER**0.5) for v in iterates]
        ax.semilogy(defects, label=f"{bits} bits: from orthogonal", **line)
        ax.semilogy(distances, label=f"{bits} bits: from the true one", linestyle=":", **line)
    ax.set_ylim(bottom=1e-12)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("iterations")
    ax.set_ylabel("distance, per column")
    ax.legend(fontsize=10)
    return figure
