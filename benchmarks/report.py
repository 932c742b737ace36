"""How every benchmark prints and keeps what it measured."""

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table

import lowbit_optim

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "lowbit_optim": lowbit_optim.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def show(title: str, rows: list[dict[str, Any]], note: str = "") -> None:
    """Print rows of one shape as a table; floats with three significant digits."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    Console(width=max(console.width, 110)).print(table)


def keep(name: str, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Write the tables and the environment to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "tables": tables}, indent=1) + "\n")
    print(f"kept in {path}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)
