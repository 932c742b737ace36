"""A pytest plugin: ``--conformance=FILE`` writes what every optimizer was tested for, as a table for the docs.

A test counts if it is parametrized over optimizers, that is, over functions of ``tests.contract`` that make one. What
it promises is its name in words. The class is in the ``user_properties`` of its reports, which the workers of
pytest-xdist pass on.
"""

from collections import defaultdict
from pathlib import Path

import pytest

# fmt: off
COLUMNS = {
    "Shampoo": "Shampoo", "CASPR": "CASPR", "KFAC": "K-FAC", "AdaBK": "AdaBK", "EKFAC": "EKFAC", "SOAP": "SOAP",
    "AdamW": "AdamW", "SGD": "SGD", "Adagrad": "Adagrad",
}
# fmt: on

HEAD = """# Conformance

What the optimizers are tested for: tests passed of tests run. Each line is one test function of `tests/`, run
over settings of the class, dtypes and options, and "-" says that it does not run over that class. Other libraries are
asked some of it in [promises](evidence/promises.md). This makes the table again:

    make test ARGS="--conformance=docs/conformance.md"

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", metavar="FILE", help="write a table of what optimizers were tested for")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--conformance"):
        config.pluginmanager.register(Table(), "conformance-table")


def pytest_itemcollected(item: pytest.Item) -> None:
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        if optimizer := getattr(value, "optimizer", None):
            item.user_properties.append(("optimizer", optimizer.__name__))


class Table:
    """Collects outcomes by promise and optimizer."""

    def __init__(self) -> None:
        # {(file, line, promise): {optimizer: {test: whether it passed}}}
        self.outcomes: dict[tuple[str, int, str], dict[str, dict[str, bool]]] = defaultdict(lambda: defaultdict(dict))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file, line, name = report.location
        optimizer = dict(report.user_properties).get("optimizer")
        # A test has passed by its call, and may still fail when it cleans up.
        if optimizer is None or not (report.failed or (report.passed and report.when == "call")):
            return
        promise = name.partition("[")[0].removeprefix("test_").replace("_", " ").capitalize()
        self.outcomes[file, line or 0, promise][str(optimizer)][report.nodeid] = report.passed

    def lines(self) -> list[str]:
        """The rows of the table, in the order of files and lines."""
        rows = [["", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
        for key, found in sorted(self.outcomes.items()):
            cells = [f"{sum(found[c].values())} of {len(found[c])}" if c in found else "-" for c in COLUMNS]
            rows.append([key[2], *cells])
        return [f"| {' | '.join(row)} |" for row in rows]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        lines = self.lines()
        Path(config.getoption("--conformance")).write_text(HEAD + "\n".join(lines) + "\n")
        terminalreporter.section("conformance")
        terminalreporter.write_line("\n".join(lines))
