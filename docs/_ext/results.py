"""Tables out of benchmarks/results, made when the site is built: no figure of theirs can be older than its file.

    ```{results} memory.json
    :table: state gpt2
    :by: optimizer
    - optimizer
    - {key: bytes_per_parameter, as: GPT-2, format: .2f}
    - {key: bytes_per_parameter, table: state vit-s, as: ViT-S/16, format: .2f}
    ```

Each line of the body is a column, in YAML: a key of the rows, or a mapping of what ``Column`` says. A key within a
key is written ``kinds > roots``. ``:where:`` (``{dtype: float32, bits: [2, 4]}``) chooses rows. With ``:by:`` there is
one row for each value of these keys, and columns may come from other tables (``table``) or other rows (``where``).
Without ``:table:`` the file itself is the only row. Below stands where the figures come from. A file, a table or a key
that is not there fails the build.

    ```{losses} 32 bits; 4 bits; 2 bits
    - [digits-mlp, shampoo, Shampoo, root-4, root-2]
    ```

has a row for each task, family, name, and methods of the family: the loss of the family's reference, and what the
methods lose against it.

    ```{convergence} kfac
    ```

has what ``python -m benchmarks.convergence --family kfac --summary`` prints, task by task.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks import convergence
from benchmarks.convergence import BASELINE, FAMILIES, PAPER, Plan, Records, Result
from benchmarks.tasks import TASKS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NOTHING = "-"
ONE_THREAD = {"threads": 1}  # of every worker of benchmarks.convergence

Row = dict[str, Any]
Cells = list[list[str]]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the rows; or several, which ``format`` then has places for: "{:.2f} to {:.2f}".
        heading: above it, with the unit.
        format: of a number, as in format().
        scale: what the number is multiplied with.
        per: another key, whose number it is divided by.
        table: with ``:by:``, the table it is looked up in, if not the directive's.
        where: with ``:by:``, the rows that count for it alone.
    """

    key: str | list[str]
    heading: str = ""
    format: str = ""
    scale: float = 1
    per: str = ""
    table: str = ""
    where: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, line: str | dict[str, Any]) -> "Column":
        if isinstance(line, str):
            return cls(line, line)
        words = {"heading" if word == "as" else word: value for word, value in line.items()}
        if unknown := words.keys() - cls.__dataclass_fields__.keys():
            raise LookupError(
                f"a column has no {', '.join(sorted(unknown))}: it is key, as, format, scale, per, table, where"
            )
        return cls(**{"heading": str(words["key"]), **words})

    def cell(self, row: Row) -> str:
        if isinstance(self.key, list):
            if not self.format:
                raise LookupError(f"the column of {', '.join(self.key)} has no format, which says where each goes")
            return self.format.format(*(find(row, key) for key in self.key))
        value = find(row, self.key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return {None: NOTHING, True: "yes", False: "no"}.get(value, str(value))
        if self.per:
            value = value / find(row, self.per)
        value = value * self.scale
        return format(value, self.format or ("," if isinstance(value, int) else ".3g" if abs(value) < 1000 else ",.0f"))


def find(row: Row, path: str) -> Any:
    """What is under a key, or under a key within a key."""
    value: Any = row
    for key in path.split(" > "):
        if not isinstance(value, dict) or key not in value:
            raise LookupError(f"no {key!r} in it; it has {', '.join(map(repr, value))}")
        value = value[key]
    return value


def rows_of(data: Row, table: str) -> list[Row]:
    """Of a table; of the whole file without a name."""
    if not table:
        return [data]
    tables = data.get("tables", data)
    rows = find(tables, table)
    return list(rows.values()) if isinstance(rows, dict) else rows


def chosen(rows: Iterable[Row], where: dict[str, Any]) -> list[Row]:
    """The rows that have these values."""
    wanted = {key: value if isinstance(value, list) else [value] for key, value in where.items()}
    found = [row for row in rows if all(find(row, key) in values for key, values in wanted.items())]
    if not found:
        raise LookupError(f"no row with {where}" if where else "no rows")
    return found


def tabulate(data: Row, table: str, columns: list[Column], where: dict[str, Any], by: list[str]) -> Cells:
    """The cells of all rows."""
    rows = chosen(rows_of(data, table), where)
    if not by:
        return [[column.cell(row) for column in columns] for row in rows]

    def name(row: Row) -> tuple[Any, ...]:
        return tuple(find(row, key) for key in by)

    cells: dict[tuple[Any, ...], list[str]] = {name(row): [] for row in rows}
    for column in columns:
        of_column = chosen(rows_of(data, column.table or table), {} if column.table else where)
        known: dict[tuple[Any, ...], str] = {}
        for row in chosen(of_column, column.where):
            if known.setdefault(name(row), column.cell(row)) != column.cell(row):
                raise LookupError(
                    f"several values of {column.heading!r} at {name(row)}: say `where`, or more in `:by:`"
                )
        for row_name, own in cells.items():
            own.append(known.get(row_name, NOTHING))
    return list(cells.values())


def origin(environment: Row, settings: Row) -> str:
    """Device, threads, versions and date of a measurement, and what of it was not recorded."""
    cores, threads = environment.get("cores"), environment.get("threads", settings.get("threads"))
    machine, costs = environment.get("machine") or environment.get("system", ""), settings.get("costs")
    parts = [
        environment.get("date", "date not recorded"),
        environment.get("cpu") or f"processor not recorded ({machine})",
        f"{cores} cores" if cores else "",
        f"{threads} thread" + "s" * (threads != 1) if threads else "threads not recorded",
        environment.get("gpu") or "no GPU",
        f"torch {environment['torch']}",
        f"Python {environment['python']}",
        f"lowbit-optim {environment['lowbit_optim']}",
        f"costs {costs['source']}" if costs else "",
    ]
    return ", ".join(part for part in parts if part)


def origins(data: Row, tables: Iterable[str]) -> list[str]:
    """Of each table, where tables were measured apart; the same said once."""
    found = []
    for table in tables:
        own = data.get("settings", {}).get(table)
        own = own if isinstance(own, dict) and "environment" in own else {}
        found.append(origin(own.get("environment") or find(data, "environment"), own or data.get("settings", {})))
    return list(dict.fromkeys(found))


class Figures(SphinxDirective):
    """What both directives share."""

    def read(self, name: str) -> Path:
        """The path of a file of results, which the page is made anew after."""
        path = RESULTS / name
        if not path.is_file():
            raise self.error(f"{name}: no such file in benchmarks/results")
        for source in (str(path), __file__, convergence.__file__):
            self.env.note_dependency(source)
        return path

    def table(self, headings: list[str], rows: Cells) -> nodes.table:
        group = nodes.tgroup(cols=len(headings))
        group += [nodes.colspec(colwidth=1) for _ in headings]
        group += nodes.thead("", self.row(headings))
        group += nodes.tbody("", *(self.row(row) for row in rows))
        return nodes.table("", group, classes=["figures"])

    @staticmethod
    def row(cells: list[str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", cell)) for cell in cells))

    def source(self, path: Path, said: list[str]) -> nodes.paragraph:
        """The line underneath, with the file to download."""
        target = "/" + Path("..", path.relative_to(ROOT)).as_posix()
        where = {"reftarget": target, "refdoc": self.env.docname, "refexplicit": True}
        link = addnodes.download_reference("", "", nodes.literal("", path.name), **where)
        text = nodes.Text(": " + "; ".join(said) + ".")
        return nodes.paragraph("", "", nodes.emphasis("", "", link, text), classes=["origin"])


class Results(Figures):
    """A table of a JSON file."""

    required_arguments = 1
    has_content = True
    option_spec = {"table": directives.unchanged, "where": directives.unchanged, "by": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        path = self.read(self.arguments[0])
        table = self.options.get("table", "")
        try:
            columns = [Column.of(line) for line in yaml.safe_load("\n".join(self.content))]
            where = yaml.safe_load(self.options.get("where", "{}"))
            by = [key.strip() for key in self.options.get("by", "").split(";") if key]
            data = json.loads(path.read_text(encoding="utf-8"))
            cells = tabulate(data, table, columns, where, by)
            said = origins(data, dict.fromkeys([table, *(column.table or table for column in columns)]))
        except (ArithmeticError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
            raise self.error(f"{path.name}, table {table!r}: {error}") from error
        return [self.table([column.heading for column in columns], cells), self.source(path, said)]


class OfRuns(Figures):
    """What is made of the runs of benchmarks.convergence, by that module's own statistics."""

    required_arguments = 1
    final_argument_whitespace = True

    def known(self) -> Records:
        """All runs, by key."""
        self.path = self.read("convergence.jsonl")
        return convergence.read(self.path)

    def source_of(self, runs: list[Row]) -> nodes.paragraph:
        """The line underneath."""
        stale = sum(map(convergence.is_stale, runs))
        said = sorted({origin(record, ONE_THREAD) for record in runs})
        return self.source(
            self.path, [*said, f"{len(runs)} runs, {stale} of them made with code that has changed since"]
        )

    def plan(self, family: str) -> Plan:
        if family not in FAMILIES:
            raise self.error(f"{family}: no family of benchmarks.convergence, which has {', '.join(FAMILIES)}")
        return Plan(list(TASKS), FAMILIES[family], [BASELINE, *FAMILIES[family].methods])


class Losses(OfRuns):
    """Some methods of several families and tasks, in one table."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        known = self.known()
        cells: Cells = []
        runs: dict[str, Row] = {}
        for task, family, name, *methods in yaml.safe_load("\n".join(self.content)):
            plan = self.plan(family)
            if task not in TASKS or (unknown := set(methods) - {*plan.methods, None}):
                what = task if task not in TASKS else ", ".join(sorted(unknown))
                raise self.error(
                    f"{self.path.name}: {what}: no such task or method of {family} in benchmarks.convergence"
                )
            used = [plan.result(known, task, method) for method in (plan.reference, BASELINE, *filter(None, methods))]
            if not all(result.losses for result in used):
                raise self.error(f"{self.path.name}: {task}, {family}: no runs of {', '.join(r.method for r in used)}")
            runs |= {convergence.key(record): record for result in used for record in result.records}
            reference, baseline, *_ = used
            of = {result.method: result for result in used}
            limit = plan.limit(of)
            lost = [NOTHING if m is None else loss_against(of[m], reference, baseline, limit) for m in methods]
            cells.append([name, str(len(reference.losses)), f"{reference.mean:.4f}", *lost, f"{limit:.4f}"])
        headings = ["", "seeds", *(heading.strip() for heading in self.arguments[0].split(";")), "room"]
        return [self.table(headings, cells), self.source_of(list(runs.values()))]


class Convergence(OfRuns):
    """The runs of one family, task by task."""

    def run(self) -> list[nodes.Node]:
        known, plan = self.known(), self.plan(self.arguments[0])
        found: list[nodes.Node] = []
        shown: list[Row] = []
        for task in plan.tasks:
            results = [plan.result(known, task, method) for method in plan.methods]
            if not any(result.records for result in results[1:]):
                found.append(nodes.paragraph("", f"{TASKS[task].title}: not run."))
                continue
            try:
                rows, notes = compared(plan, known, task, results)
            except LookupError as error:
                raise self.error(f"{self.path.name}: {error}") from error
            cells = [[NOTHING if value is None else str(value) for value in row.values()] for row in rows]
            listed = [nodes.list_item("", nodes.paragraph("", note)) for note in notes]
            found += [nodes.rubric("", TASKS[task].title), self.table(list(rows[0]), cells)]
            found.append(nodes.bullet_list("", *listed))
            shown += [record for result in results for record in result.records]
        if shown:
            found.append(self.source_of(shown))
        return found


def compared(plan: Plan, known: Records, task: str, results: list[Result]) -> tuple[list[Row], list[str]]:
    """The table of a task, and what ``benchmarks.convergence.summarize`` says beside it."""
    of = {result.method: result for result in results}
    baseline, reference, paper = of[BASELINE], of[plan.reference], of.get(PAPER)
    if not (baseline.losses and reference.losses):
        raise LookupError(f"{task}: no runs of {BASELINE} and {plan.reference} at their best rates")
    notes = [rates(plan, known, task, method) for method in dict.fromkeys(map(plan.tuned_with, plan.methods))]
    limit = plan.limit(of)
    if plan.family.of_moments:
        notes.append(f"Room, the standard deviation of {BASELINE} between seeds: {limit:.4f}.")
    else:
        gain, error = baseline.minus(reference)
        notes.append(
            f"{plan.reference} gains {gain:+.4f} ± {error:.4f} over {BASELINE}. Room, a quarter: {limit:+.4f}."
        )
        if gain <= error:
            notes.append("That is not shown to be a gain: this task tells forms apart by nothing.")
    for result in results:
        if result.records and not result.sound:
            notes.append(f"{result.method}: {len(result.losses)} of {result.planned} planned runs have a finite loss.")
        if result.records and result.method not in (BASELINE, plan.reference):
            verdict = result.verdict(limit, baseline, reference, paper)
            said = (f"{what}: {'yes' if holds else 'NO'}" for what, holds in verdict.items())
            notes.append(f"{result.method}: {'; '.join(said)}.")
    return [result.row(reference) for result in results if result.records], notes


def loss_against(result: Result, reference: Result, baseline: Result, limit: float) -> str:
    """The mean difference with its interval, and a tick where that lies within the room."""
    difference, error = result.minus(reference)
    holds = all(result.verdict(limit, baseline, reference, None).values())
    return f"{difference:+.4f} ± {error:.4f}" + " ✓" * holds


def rates(plan: Plan, known: Records, task: str, method: str) -> str:
    """Losses of the rates that were tried; that of a run that diverged is infinite."""
    runs = [run for run in plan.tuning(known, task, method)[0] if run.key in known]
    losses = ", ".join(f"{run.lr:g} → {convergence.loss(known[run.key]):.4f}" for run in runs)
    return f"{method}, loss with seed {convergence.TUNING_SEED} at each rate tried: {losses}."


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("results", Results)
    app.add_directive("convergence", Convergence)
    app.add_directive("losses", Losses)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
