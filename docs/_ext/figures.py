"""Draws the figures of the site when it is built, so that none is older than its data or than the library.

Each script in docs/figures has a function ``draw()``, which returns a matplotlib figure, or ``write()``, which returns
Markdown. They end up in docs/figures/drawn, as <name>.svg and <name>.md, which pages show and include.
"""

import importlib
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError
from sphinx.util import logging

from benchmarks.figures import kept

DOCS = Path(__file__).parent.parent
DRAWN = DOCS / "figures" / "drawn"

GREY = "#777777"  # equally readable on white and on near-black
# Okabe and Ito's colours, which colour-blind people can tell apart, without their yellow and black.
BLUE, ORANGE, GREEN, RED, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
WIDTH = 5.0  # inches: so small that a phone need not shrink letters much

_STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11.0,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "lowbit-optim",  # the same bytes from the same data
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), GREY
    ),
}
logger = logging.getLogger(__name__)


def axes(height: float) -> tuple[Figure, Any]:
    """A figure of the common width with one set of axes."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def table(file: str, name: str) -> list[dict[str, Any]]:
    """A table of a results file in benchmarks/results."""
    rows: list[dict[str, Any]] = kept(file)["tables"][name]
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of strings as a table, the first column to the left."""
    head = list(rows[0])
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *([row[key] for key in head] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_all(app: Sphinx) -> None:
    """Run every script, and remove what none has drawn."""
    DRAWN.mkdir(exist_ok=True)
    scripts = sorted(path.stem for path in (DOCS / "figures").glob("*.py"))
    for old in DRAWN.iterdir():
        if old.stem not in scripts:
            old.unlink()
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("**/*.md"))
    for name in scripts:
        if f"drawn/{name}." not in pages:
            raise ExtensionError(f"docs/figures/{name}.py: no page shows it")
    sys.path.insert(0, str(DOCS / "figures"))
    for name in scripts:
        logger.info("drawing %s", name)
        try:
            _draw(name)
        except Exception as error:
            raise ExtensionError(f"docs/figures/{name}.py: {error!r}", error) from error


def _draw(name: str) -> None:
    script = importlib.import_module(name)
    if hasattr(script, "write"):
        _replace(DRAWN / f"{name}.md", script.write())
        return
    svg = StringIO()
    with mpl.rc_context(_STYLE):
        script.draw().savefig(svg, format="svg", metadata={"Date": None})
    _replace(DRAWN / f"{name}.svg", svg.getvalue())


def _replace(path: Path, content: str) -> None:
    """Write it if it differs, so that pages are not built again for nothing."""
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")


def _no_pages(app: Sphinx, config: Config) -> None:
    config.exclude_patterns.append("figures")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", _no_pages)
    app.connect("builder-inited", draw_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
