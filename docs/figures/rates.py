"""Final losses of AdamW and of 32-bit Shampoo at several rates: the runs by which benchmarks.convergence tunes."""

from collections import defaultdict

from figures import BLUE, GREY, ORANGE, WIDTH
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from benchmarks.convergence import TUNING_SEED
from benchmarks.report import RESULTS, read_lines

TASKS = {
    "digits-mlp": "digits, MLP",
    "fashion-convnet": "Fashion, ConvNet",
    "fashion-vit": "Fashion, ViT",
    "shakespeare-gpt": "Shakespeare, GPT",
}
LINES = {
    "adamw": {"label": "AdamW", "color": ORANGE, "marker": "s"},
    "shampoo-32": {"label": "Shampoo, 32 bits", "color": BLUE, "marker": "o", "linestyle": "--"},
}


def draw() -> Figure:
    found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for run in read_lines(RESULTS / "convergence.jsonl"):
        if run["seed"] == TUNING_SEED and run["validation_loss"] is not None:
            found[run["task"], run["method"]][run["lr"]] = run["validation_loss"]
    figure = Figure(figsize=(WIDTH, 4.6))
    grid = figure.subplots(2, 2).flat
    for ax, (task, title) in zip(grid, TASKS.items(), strict=True):
        for method, line in LINES.items():
            ax.semilogx(*zip(*sorted(found[task, method].items()), strict=True), markersize=5, **line)
        least = min(loss for method in LINES for loss in found[task, method].values())
        ax.set_ylim(top=1.45 * least)  # what lies above is no candidate
        ax.set_title(title, fontsize=11, color=GREY)
        ax.xaxis.set_major_locator(FixedLocator([1e-3, 1e-2]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("learning rate", fontsize=11)
    figure.supylabel("validation loss", fontsize=11)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
