"""The tables that the site makes of benchmarks/results: docs/_ext/results.py."""

import json
from pathlib import Path

import pytest

from tests.extensions import extension

results = extension("results")

from docutils.core import publish_doctree  # noqa: E402 - comes with Sphinx, which may not be there
from docutils.parsers.rst import directives  # noqa: E402

DATA = {
    "environment": {
        "date": "2020-01-02",
        "torch": "2",
        "python": "3",
        "lowbit_optim": "0",
        "machine": "m",
        "gpu": None,
    },
    "tables": {
        "one": [
            {"name": "a", "bits": 2, "x": 0.5, "in": {"it": 3}},
            {"name": "b", "bits": 4, "x": None, "in": {"it": 4}},
        ],
        "two": [{"name": "b", "bits": 4, "x": 1234.5}],
    },
}


def cells(lines: list, table: str = "one", where: dict | None = None, by: tuple[str, ...] = ()) -> list[list[str]]:
    return results.tabulate(DATA, table, [results.Column.of(line) for line in lines], where or {}, list(by))


def test_columns_are_formatted_scaled_and_found_within_keys():
    lines = [
        "name",
        {"key": "x", "format": ".2f", "scale": 10},
        "in > it",
        {"key": ["bits", "in > it"], "format": "{}/{}"},
    ]
    assert cells(lines) == [["a", "5.00", "3", "2/3"], ["b", "-", "4", "4/4"]]
    assert cells([{"key": "in > it", "per": "bits", "format": ".1f"}]) == [["1.5"], ["1.0"]]


def test_rows_are_chosen_and_joined():
    assert cells(["name"], where={"bits": [4, 8]}) == [["b"]]
    assert cells(["name", {"key": "x", "table": "two"}], by=("name",)) == [["a", "-"], ["b", "1,234"]]


@pytest.mark.parametrize(
    ("lines", "table", "said"),
    [
        (["speed"], "one", "no 'speed' in it; it has 'name', 'bits', 'x', 'in'"),
        (["name"], "three", "no 'three' in it; it has 'one', 'two'"),
        ([{"key": "x", "round": 2}], "one", "a column has no round"),
    ],
)
def test_what_is_not_there_is_named(lines: list, table: str, said: str):
    with pytest.raises(LookupError, match=said):
        cells(lines, table)


def test_ambiguous_rows_are_refused():
    with pytest.raises(LookupError, match="several values of 'x'"):
        results.tabulate(
            {"tables": {"t": [{"k": 1, "x": 1}, {"k": 1, "x": 2}]}}, "t", [results.Column("x", "x")], {}, ["k"]
        )


def test_the_origin_says_what_was_not_recorded():
    said = results.origin(DATA["environment"], {})
    assert said.startswith("2020-01-02, processor not recorded (m), threads not recorded, no GPU")
    assert results.origin({**DATA["environment"], "threads": 1}, {}).count("1 thread,") == 1
    undated = {key: value for key, value in DATA["environment"].items() if key != "date"}
    assert results.origin(undated, {}).startswith("date not recorded")


@pytest.mark.parametrize(
    ("body", "said"),
    [("- speed", "made-up.json, table 'one': no 'speed' in it"), ("- [", "made-up.json, table 'one': while parsing")],
)
def test_a_build_fails_with_the_file_and_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str):
    (tmp_path / "made-up.json").write_text(json.dumps(DATA))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results.Results, "read", lambda self, name: results.RESULTS / name)  # there is no Sphinx here
    directives.register_directive("results", results.Results)
    page = f".. results:: made-up.json\n   :table: one\n\n   {body}\n"
    tree = publish_doctree(page, settings_overrides={"report_level": 5, "halt_level": 6})
    assert said in tree.astext()


def test_several_keys_want_a_format():
    with pytest.raises(LookupError, match="speed, name has no format"):
        results.Column.of({"key": ["speed", "name"]}).cell({"speed": 1.0, "name": "one"})


def test_every_family_of_the_record_has_its_table():
    known = results.convergence.read(results.RESULTS / "convergence.jsonl")
    plan = results.Plan(["digits-mlp"], results.FAMILIES["kfac"], ["adamw", "kfac-32", "kfac-4", "kfac-2-nearest"])
    of_task = [plan.result(known, "digits-mlp", method) for method in plan.methods]
    rows, notes = results.compared(plan, known, "digits-mlp", of_task)
    assert [row["method"] for row in rows] == plan.methods
    assert rows[2]["minus kfac-32"] == "{:+.4f} ± {:.4f}".format(*of_task[2].minus(of_task[1]))
    assert sum("upper bound" in note for note in notes) == 2
