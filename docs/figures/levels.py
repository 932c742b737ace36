"""The values that 4-bit codes stand for, of every table that the library has."""

from figures import BLUE, axes
from matplotlib.figure import Figure

from lowbit_optim.storage.codebooks import CODEBOOKS, codebook


def draw() -> Figure:
    figure, ax = axes(2.6)
    for name in CODEBOOKS:
        values = codebook(name, 4).unique()
        ax.scatter(values, [name] * len(values), color=BLUE, marker="|", s=220, linewidths=1.8)
    ax.invert_yaxis()
    ax.set_xlabel("code value, in units of the scale")
    ax.margins(y=0.15)
    return figure
