"""How the benchmarks' figures look; what they show is in figures.py."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which the colour-blind tell apart.
FAMILIES = ("#777777", "#000000", "#D55E00", "#0072B2")
BAND = "#009E73"
_SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5}


@dataclass
class Dots:
    """One method: a dot for each run, and their mean and standard deviation, in the colour of its family."""

    label: str
    losses: list[float]
    family: int


@dataclass
class Panel:
    """One task: its methods from top to bottom, and the losses from which to which counts as equal."""

    title: str
    rows: list[Dots]
    band: tuple[float, float] | None


def dot_plots(panels: list[Panel], axis: str, note: str, path: Path) -> None:
    """Draw the panels, two in a row, into a PNG."""
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, min(2, len(panels)), figsize=(11, 0.6 + 3.4 * lines), squeeze=False, dpi=130)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, panel in zip(axes.flat, panels, strict=False):
        if panel.band is not None:
            ax.axvspan(*panel.band, color=BAND, alpha=0.18, linewidth=0)
            ax.axvline(panel.band[0], color=FAMILIES[1], linewidth=0.8, linestyle=":")
        for y, row in enumerate(panel.rows):
            if not row.losses:
                continue
            color = FAMILIES[row.family]
            ax.plot(row.losses, [y] * len(row.losses), "o", color=color, alpha=0.45, markersize=5, markeredgewidth=0)
            spread = stdev(row.losses) if len(row.losses) > 1 else 0.0
            ax.errorbar(fmean(row.losses), y, xerr=spread, fmt="|", color=color, markersize=15, capsize=3)
        ax.set_yticks(range(len(panel.rows)), [row.label for row in panel.rows])
        ax.set_ylim(len(panel.rows) - 0.5, -0.5)
        ax.set_title(panel.title, loc="left", fontsize=11)
        ax.set_xlabel(axis)
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.006, note, fontsize=8.5)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    figure.savefig(path)
    plt.close(figure)


def pareto(points: list[tuple[str, float, float]], title: str, path: Path) -> None:
    """Draw (label, bits, error) points and the front of those that no other beats in both, into a PNG."""
    figure, ax = plt.subplots(figsize=(10, 6), dpi=120)
    best = float("inf")
    front = []
    for label, bits, error in sorted(points, key=lambda point: point[1:]):
        if error < best:
            best = error
            front.append((bits, error))
        family = FAMILIES[3] if label.startswith(("root", "logarithm", "spiked")) else FAMILIES[2]
        ax.plot(bits, error, "o", color=family, markersize=5)
        ax.annotate(label, (bits, error), xytext=(5, 3), textcoords="offset points", fontsize=7.5)
    ax.plot(*zip(*front, strict=True), color=FAMILIES[1], linewidth=1, linestyle=":", drawstyle="steps-post")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("bits per element of the factor, everything that is kept counted")
    ax.set_ylabel("recursive relative error of the inverse fourth root")
    ax.set_title(f"Storage forms, {title}: lower left is better; dotted, the front", loc="left", fontsize=11)
    _finish(figure, ax, path)


def costs(points: list[tuple[str, float, float, bool]], floors: list[tuple[str, float]], unit: str, path: Path) -> None:
    """Draw (label, bytes per parameter, time, whether it is ours) points, and floors of the time, into a PNG."""
    figure, ax = plt.subplots(figsize=(10, 6), dpi=120)
    for i, (label, time) in enumerate(floors):
        ax.axhline(time, color=FAMILIES[0], linewidth=0.9, linestyle=":")
        ax.annotate(
            label, (0, time), xycoords=("axes fraction", "data"), xytext=(3, 2 - 10 * (i % 2)), **_SMALL, ha="left"
        )
    for label, size, time, own in points:
        color = FAMILIES[2] if own else FAMILIES[3]
        ax.plot(size, time, "o" if own else "s", color=color, markersize=5)
        ax.annotate(label, (size, time), xytext=(5, 3), color=color, **_SMALL)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.margins(x=0.15)
    ax.set_xlabel("bytes of optimizer state per parameter")
    ax.set_ylabel(f"{unit} of a step, amortised")
    title = "A step on the parameters of a GPT, statistics every 100 steps, roots every 500 (ours: both every 100)"
    ax.set_title(title + "\nlower left is better; dots are ours", loc="left", fontsize=11)
    _finish(figure, ax, path)


def lines(panels: list[tuple[str, str, dict[str, list[tuple[float, float]]]]], axis: str, path: Path) -> None:
    """Draw panels of (title, what the sizes are, for each label its (size, time) points) into a PNG, in log-log."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.8), squeeze=False, dpi=120)
    for ax, (title, sizes, series) in zip(axes.flat, panels, strict=True):
        for i, (label, points) in enumerate(series.items()):
            color = (*FAMILIES[1:], BAND, FAMILIES[0])[i % 5]
            ax.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=4, linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(sizes)
        ax.set_ylabel(axis)
        ax.set_title(title, loc="left", fontsize=11)
        ax.legend(frameon=False, fontsize=8)
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    for ax in np.ravel(axes):
        ax.grid(alpha=0.25, which="both")
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
