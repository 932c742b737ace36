"""What the demo says at its end: a table, the verdict on the resumed run, a summary, report.png and report.json."""

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lowbit_optim import __version__
from lowbit_optim.demo.worker import ADAMW, RESUMED, SHAMPOO, SHAMPOO32, Settings
from lowbit_optim.storage.budget import ONE_PERIOD

Results = dict[str, dict[str, Any]]  # by run, as the worker writes them
KINDS = {"statistics": "preconditioner: statistics", "roots": "preconditioner: roots", "moments": "moments of AdamW"}

# Okabe and Ito's colours, which colour-blind people can tell apart.
# The two Shampoos lie on each other, so one is drawn wide and hollow, the other narrow on top of it.
RUN_COLOURS = {ADAMW: "#E69F00", SHAMPOO32: "#56B4E9", SHAMPOO: "#000000"}
LINES: dict[str, dict[str, Any]] = {
    ADAMW: {"linewidth": 1.8},
    SHAMPOO32: {"linewidth": 3.0},
    SHAMPOO: {"linewidth": 1.2, "linestyle": (0, (5, 2))},
}
MARKERS: dict[str, dict[str, Any]] = {
    ADAMW: {"marker": "s", "markersize": 6},
    SHAMPOO32: {"marker": "o", "markersize": 10, "markerfacecolor": "white", "markeredgewidth": 2},
    SHAMPOO: {"marker": "o", "markersize": 5},
}
KIND_COLOURS = {"moments": "#BBBBBB", "roots": "#009E73", "statistics": "#CC79A7"}


def publish(
    out: Path, settings: Settings, characters: int, labels: dict[str, str], seconds: float, console: Console
) -> bool:
    """Write and print everything; returns whether the resumed run equals the uninterrupted one."""
    results: Results = {
        run: json.loads((out / run / "result.json").read_text(encoding="utf-8")) | {"label": label}
        for run, label in labels.items()
    }
    resumed = results.pop(RESUMED)
    same = resumed["sha256"] == results[SHAMPOO]["sha256"]
    numbers = {
        "settings": vars(settings),
        "characters": characters,
        "seconds": seconds,
        "resumed_equals_uninterrupted": same,
        "environment": environment(settings.device),
        "runs": {run: _without_times(result) for run, result in (results | {RESUMED: resumed}).items()},
    }
    (out / "report.json").write_text(json.dumps(_finite(numbers), indent=1) + "\n", encoding="utf-8")
    figure(results, settings).savefig(out / "report.png")

    console.print()
    console.print(table(results, settings), soft_wrap=False)
    console.print(verdict(results[SHAMPOO]["sha256"], resumed["sha256"]))
    console.print(summary(results, settings))
    console.print(f"\nPicture: {out / 'report.png'}\nNumbers: {out / 'report.json'}", markup=False)
    console.print(f"[dim]Took {seconds:.0f} s.[/]")
    return same


def environment(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "lowbit_optim": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
    }


def _without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("step_ms", "optimizer_ms")}


def _finite(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- words -----------------------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    """Bytes for people."""
    if count < 1000:
        return f"{count:.0f} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def preconditioner_bytes(result: dict[str, Any]) -> int:
    """Statistics and roots."""
    return int(result["state_bytes"]["statistics"] + result["state_bytes"]["roots"])


def per_parameter(count: int, result: dict[str, Any]) -> str:
    """Bytes per parameter."""
    return f"{count / result['parameters']:.2f}" if count else "-"


def time_name(settings: Settings) -> str:
    """What the worker's clock counts."""
    return "CPU time" if torch.device(settings.device).type == "cpu" else "time"


def table(results: Results, settings: Settings) -> Table:
    """One column for each optimizer."""
    made = Table(
        title=f"After {settings.steps} steps", title_style="bold", title_justify="left", caption_justify="left"
    )
    made.add_column("")

    def row(name: str, cell: Any, **style: Any) -> None:
        made.add_row(name, *(cell(result) for result in results.values()), **style)

    def state(kind: str) -> Any:
        return lambda result: _size(result["state_bytes"][kind]) if result["state_bytes"][kind] else "-"

    def total(result: dict[str, Any]) -> int:
        return sum(result["state_bytes"].values())

    def update(result: dict[str, Any]) -> str:
        value = result["time_ms"]["update"]
        return f"{value:.1f} ms" if value is not None and result is not results[ADAMW] else "-"

    for result in results.values():
        made.add_column(result["label"].replace(" Shampoo", "\nShampoo"), justify="right")
    row("Validation loss (nats/char)", lambda r: _loss(r["validation_loss"]), style="bold", end_section=True)
    row("Optimizer state", lambda r: _size(total(r)), style="bold")
    for kind, name in {**KINDS, "counters": "counters"}.items():
        row(f"  {name}", state(kind))
    row("  bytes per parameter", lambda r: per_parameter(total(r), r))
    row("  of which preconditioner", lambda r: per_parameter(preconditioner_bytes(r), r), end_section=True)
    row("Checkpoint: optimizer file", lambda r: _size(r["checkpoint_bytes"]), style="bold")
    row("  the same with torch.save", lambda r: _size(r["torch_save_bytes"]), end_section=True)
    row(f"Per step, average {time_name(settings)}", lambda r: f"{r['time_ms']['average']:.1f} ms", style="bold")
    row("  ordinary step, median", lambda r: f"{r['time_ms']['ordinary']:.1f} ms")
    row("  step with update, median", update)
    row("  optimizer's part, average", lambda r: f"{r['time_ms']['optimizer_average']:.1f} ms")
    if settings.storage in ONE_PERIOD and settings.bits < 32:
        made.caption = f"Storage {settings.storage!r} keeps one matrix: statistic and root are both read from it."
    return made


def verdict(uninterrupted: dict[str, str], resumed: dict[str, str]) -> str:
    """Whether the resumed run ended with the same bits, and the proof."""
    same = uninterrupted == resumed
    lines = [
        "[bold green]BIT FOR BIT EQUAL: the run resumed in a fresh process and the uninterrupted one.[/]"
        if same
        else "[bold red]NOT EQUAL: the run resumed in a fresh process and the uninterrupted one differ.[/]"
    ]
    for what, name in {"parameters": "parameters     ", "optimizer": "optimizer state"}.items():
        sign = "==" if resumed[what] == uninterrupted[what] else "!="
        lines.append(f"  sha256 of {name}  {resumed[what][:16]} {sign} {uninterrupted[what][:16]}")
    return "\n".join(["", *lines, ""])


def summary(results: Results, settings: Settings) -> str:
    """The measured facts in a few sentences, whoever won."""
    adamw, low, full = results[ADAMW], results[SHAMPOO], results.get(SHAMPOO32)

    def compared(other: dict[str, Any]) -> str:
        difference = round(low["validation_loss"], 3) - round(other["validation_loss"], 3)
        if not math.isfinite(difference):
            return f"against {_loss(other['validation_loss'])} of {other['label']}"
        place = (
            f"{abs(difference):.3f} {'below' if difference < 0 else 'above'}" if round(difference, 3) else "equal to"
        )
        return f"{place} {other['label']} ({_loss(other['validation_loss'])})"

    sentences = [f"{low['label']} ends at a validation loss of {_loss(low['validation_loss'])}: {compared(adamw)}"]
    sentences[0] += f" and {compared(full)}." if full else "."
    if not low["validation_loss"] < adamw["validation_loss"]:
        sentences.append("It does not win here.")
        if settings.steps < Settings.steps:
            sentences.append(f"{settings.steps} steps are few; the default is {Settings.steps}.")
    if full:
        small, large = preconditioner_bytes(low), preconditioner_bytes(full)
        sentences += [
            f"Its preconditioner takes {small / low['parameters']:.2f} bytes per parameter instead of"
            f" {large / full['parameters']:.2f} ({large / small:.1f}x less),",
            f"and the optimizer's checkpoint {_size(low['checkpoint_bytes'])} instead of the"
            f" {_size(full['torch_save_bytes'])} that torch.save writes for {full['label']}.",
        ]
    sentences.append(
        f"A step takes {low['time_ms']['average']:.0f} ms of {time_name(settings)} on average, with"
        f" {adamw['label']} {adamw['time_ms']['average']:.0f} ms."
    )
    return "\n".join(sentences)


# ---- picture ---------------------------------------------------------------------------------------------------------


def figure(results: Results, settings: Settings) -> Figure:
    """Loss curves on the left, memory on the right."""
    made = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    curves, bars = made.subplots(1, 2, width_ratios=[1.5, 1])
    _draw_curves(curves, results, settings)
    _draw_memory(bars, results)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return made


def _draw_curves(axes: Axes, results: Results, settings: Settings) -> None:
    window = max(1, settings.steps // 30)
    points: list[float] = []
    for run, result in results.items():
        smooth = np.convolve(result["train"], np.full(window, 1 / window), "valid")
        axes.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=RUN_COLOURS[run], alpha=0.6, **LINES[run])
    for run, result in results.items():
        steps, losses = zip(*result["validation"], strict=True)
        name = f"{result['label']}: {_loss(result['validation_loss'])} at the end"
        axes.plot(steps, losses, color=RUN_COLOURS[run], linestyle="none", label=name, **MARKERS[run])
        points += [loss for loss in losses if math.isfinite(loss)]
    if points:  # with the first steps in view, the rest would be flat
        room = 0.08 * (max(points) - min(points)) + 1e-3
        axes.set_ylim(min(points) - 2 * room, max(points) + 2 * room)
    axes.axvline(settings.steps // 2, color="#777777", linestyle="dotted", zorder=0)
    axes.annotate(
        "checkpoint, resumed in a fresh process ",
        (settings.steps // 2, 0.02),
        xycoords=axes.get_xaxis_transform(),
        ha="right",
        color="#555555",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        zorder=1,
    )
    axes.set_title("Loss", loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per character")
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(title=f"points: validation\nlines: training, mean of {window} steps", edgecolor="none", framealpha=1)


def _draw_memory(axes: Axes, results: Results) -> None:
    labels = [result["label"].replace(" ", "\n") for result in results.values()]
    bottom = np.zeros(len(labels))
    for kind in KIND_COLOURS:
        heights = np.array([result["state_bytes"][kind] / result["parameters"] for result in results.values()])
        axes.bar(labels, heights, 0.6, bottom=bottom, color=KIND_COLOURS[kind], label=KINDS[kind])
        bottom += heights
    for i, (height, result) in enumerate(zip(bottom, results.values(), strict=True)):
        axes.annotate(
            f"{height:.1f}\n{_size(sum(result['state_bytes'].values()))}",
            (i, height),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
    axes.set_ylim(0, 1.45 * bottom.max())
    axes.set_title("Optimizer state", loc="left", fontweight="bold")
    axes.set_ylabel("bytes per parameter")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], frameon=False, loc="upper left")
