"""The loss curves of the demo, as `make demo` has left them in benchmarks/results/demo.json."""

from figures import BLUE, ORANGE, SKY, axes
from matplotlib.figure import Figure

from benchmarks.figures import kept

# Two runs lie on each other: one is wide, the other a narrow dashed line on top of it.
LINES = {
    "adamw": {"color": ORANGE, "linewidth": 2},
    "shampoo-32bit": {"color": SKY, "linewidth": 4},
    "shampoo": {"color": BLUE, "linewidth": 1.5, "linestyle": "--"},
}


def draw() -> Figure:
    runs = kept("demo")["runs"]
    figure, ax = axes(3.2)
    for name, line in LINES.items():
        ax.plot(*zip(*runs[name]["validation"], strict=True), label=runs[name]["label"], **line)
    ax.set_xlabel("step")
    ax.set_ylabel("validation loss (nats)")
    ax.legend()
    return figure
