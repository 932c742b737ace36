"""How every benchmark prints and keeps what it measured."""

import ast
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import lowbit_optim

# Elsewhere than beside the code where somebody says so: figures of another machine are looked at before they are kept.
RESULTS = Path(os.environ.get("LOWBIT_RESULTS") or Path(__file__).parent / "results")


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "lowbit_optim": lowbit_optim.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str | None:
    """The processor's name where the system tells it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def show(title: str, rows: list[dict[str, Any]], note: str = "") -> None:
    """Print rows of one shape as a table; floats with three significant digits."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    Console(width=max(console.width, 110, 30 + 11 * len(rows[0]))).print(table)


def keep(name: str, tables: dict[str, list[dict[str, Any]]], settings: dict[str, Any] | None = None) -> None:
    """Write the tables, the settings that they were made with and the environment to results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"environment": environment(), "settings": settings or {}, "tables": tables}, indent=1) + "\n"
    )
    print(f"kept in {path}")


def add(name: str, tables: dict[str, list[dict[str, Any]]], how: dict[str, Any]) -> None:
    """Put tables into results/<name>.json, each with how it was made, in the place of those of the same names."""
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = kept.get("settings", {}) | dict.fromkeys(tables, how)
    keep(name, kept.get("tables", {}) | tables, settings)


def plain(value: Any) -> Any:
    """A keyword's value as JSON can say it; infinity, which it cannot, as a word."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none if there is no file."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # cut short when it was written
            print(f"{path}, line {number}, is not JSON and is ignored", file=sys.stderr)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record, on a line of its own even if the last one was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * broken + json.dumps(record, allow_nan=False) + "\n")


def source_hash(files: Iterable[Path]) -> str:
    """One number for Python sources, whatever their comments, docstrings and layout."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.parent.name, file.name)):  # wherever the package lies
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(f"{file.name}\n{ast.unparse(tree)}\n".encode())
    return digest.hexdigest()[:16]


def code_hash(*files: str) -> str:
    """Of the library and of these files."""
    package = Path(lowbit_optim.__file__).parent
    kernels = Path(lowbit_optim.kernels.__file__).parent.glob("*.py")
    return source_hash({Path(file).resolve() for file in (*package.rglob("*.py"), *kernels, *files)})


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and half its 95 % interval (Student's t); infinite where there are too few values."""
    from scipy.special import stdtrit  # with the extra `bench` only

    n = len(values)
    error = float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return fmean(values) if values else math.inf, error


class Bars:
    """Progress: a bar for everything, and one for each run that is under way, which ends as a line."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns)
        self.all = self.progress.add_task("all runs", total=None)
        self.each: dict[str, tuple[TaskID, str]] = {}

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def start(self, name: str, label: str, steps: int) -> None:
        self.each[name] = self.progress.add_task(label, total=steps), label

    def step(self, name: str, done: int) -> None:
        if name in self.each:
            self.progress.update(self.each[name][0], completed=done)

    def end(self, name: str, said: str) -> None:
        bar, label = self.each.pop(name)
        self.progress.remove_task(bar)
        self.progress.console.print(f"{label}: {said}", highlight=False, soft_wrap=True)

    def count(self, done: int, total: int) -> None:
        self.progress.update(self.all, completed=done, total=total)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)
