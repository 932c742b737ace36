"""A good checkpoint, live objects that a bad one must not change, and what was counted."""

import pytest

from tests.checkpoint.common import build, save, train


@pytest.fixture
def good(tmp_path):
    objects = build(0, width=4)
    train(*objects, 2)
    save(tmp_path / "run", objects, step=2)
    return tmp_path / "run"


@pytest.fixture
def live():
    objects = build(1, width=4)
    train(*objects, 3)
    return objects


def pytest_terminal_summary(terminalreporter):
    """What tests gave to `record_property`, also with -q and from other processes."""
    reports = [r for r in terminalreporter.stats.get("passed", []) if "tests/checkpoint/" in r.nodeid]
    for report in sorted(reports, key=lambda report: report.nodeid):
        for what, value in getattr(report, "user_properties", ()):
            terminalreporter.write_line(f"{report.nodeid.partition('checkpoint/')[2]}: {what}: {value}")
