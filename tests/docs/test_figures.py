"""A figure that does not show what is kept is named, and no other."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import convergence, figures, report


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A copy of results/ to spoil."""
    copy = tmp_path / "results"
    shutil.copytree(report.RESULTS, copy)
    monkeypatch.setattr(report, "RESULTS", copy)
    return copy


def test_every_committed_figure_shows_its_data():
    assert list(figures.wrong()) == []


def test_an_older_figure_is_named(results):
    file = results / "memory.json"
    kept = json.loads(file.read_text())
    kept["tables"]["state gpt2"][0]["bytes_per_parameter"] += 1
    file.write_text(json.dumps(kept))
    (found,) = figures.wrong()
    assert found.startswith("memory.png is older than its data, memory.json")
    figures.draw("memory.png")
    assert list(figures.wrong()) == []


def test_a_figure_of_nothing_is_named(results):
    shutil.copy(results / "memory.png", results / "holiday.png")
    (found,) = figures.wrong()
    assert found.startswith("holiday.png is drawn by nothing")


def test_only_the_figures_that_show_a_run_are_older_when_it_changes(results):
    file = results / "convergence.jsonl"
    records = report.read_lines(file)
    record = next(r for r in reversed(records) if r["method"] == "caspr-4" and r["seed"] == convergence.FIRST_SEED)
    report.append_line(file, {**record, "validation_loss": 1.0})
    (found,) = figures.wrong()
    assert found.startswith("convergence-caspr.png is older")
