"""The figures in results/: what each of them draws, of which kept file, and whether it still shows what that file says.

    python -m benchmarks.figures                  draw them all again from what is kept, in seconds
    python -m benchmarks.figures memory.png       draw these
    python -m benchmarks.figures --check          draw nothing; name those that are older than their data

A figure's PNG names its file and the SHA-256 of the numbers and words that are drawn, as a text called "Data". So a new
run that a figure does not show makes no figure old. `make docs` fails on a figure that is.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import convergence, plots, report
from benchmarks.methods import FLOOR
from benchmarks.tasks import TASKS
from lowbit_optim import planning
from lowbit_optim.demo import report as demo_report
from lowbit_optim.demo.worker import RESUMED, Settings

LABEL = "Data"  # of the text in the PNG


@dataclass(frozen=True)
class Drawing:
    """A figure to be: the file that it is drawn from, and what is drawn of it, as plain JSON can say it."""

    file: str
    plot: Callable[..., None]
    drawn: dict[str, Any]

    @property
    def stamp(self) -> str:
        # To twelve digits: the last ones of a mean depend on the version of Python.
        plain = json.loads(json.dumps(self.drawn, default=asdict), parse_float=lambda x: f"{float(x):.12g}")
        numbers = json.dumps(plain, sort_keys=True)
        return json.dumps({"file": self.file, "sha256": hashlib.sha256(numbers.encode()).hexdigest()})

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.plot(**self.drawn, path=path)
        info = PngInfo()
        info.add_text(LABEL, self.stamp)
        with Image.open(path) as image:
            image.save(path, pnginfo=info, dpi=image.info.get("dpi"), optimize=True)


def drawing(name: str) -> Drawing:
    """Of results/<name>, by the part of it before the first dash.

    Raises:
        KeyError: nobody knows what it shows.
    """
    stem, suffix = Path(name).stem, Path(name).suffix
    kind, _, rest = stem.partition("-")
    if suffix != ".png" or kind not in KINDS:
        raise KeyError(f"{name} is drawn by nothing in benchmarks/figures.py, which knows {', '.join(KINDS)}")
    return KINDS[kind](rest)


def wrong() -> Iterator[str]:
    """Every figure in results/ that does not show what is kept, in words."""
    for path in sorted(report.RESULTS.glob("*.png")):
        try:
            wanted = drawing(path.name)
        except KeyError as error:
            yield str(error.args[0])
            continue
        except FileNotFoundError as error:
            yield f"{path.name} has no data: there is no {error.filename}"
            continue
        with Image.open(path) as image:
            if image.info.get(LABEL) != wanted.stamp:
                yield (
                    f"{path.name} is older than its data, {wanted.file}: "
                    f"python -m benchmarks.figures {path.name} draws it again"
                )


def kept(stem: str) -> dict[str, Any]:
    return json.loads((report.RESULTS / f"{stem}.json").read_text(encoding="utf-8"))


def storage(order: str) -> Drawing:
    found = kept(f"storage-{order}")
    spectrum = found["settings"]["spectra"][0]
    points = [(row["form"], row["bits"], row[spectrum]) for row in found["tables"]["error"]]
    drawn = {"points": points, "title": f"order {order}, {spectrum}"}
    return Drawing(f"storage-{order}.json", plots.pareto, drawn)


def memory(_: str) -> Drawing:
    states = {k.removeprefix("state "): v for k, v in kept("memory")["tables"].items() if k.startswith("state ")}
    # Of GPT-2 that one takes 200 bytes per parameter: nothing else could be seen beside it.
    panels = {k: [row for row in v if row["optimizer"] != "pytorch_optimizer Shampoo"] for k, v in states.items()}
    return Drawing("memory.json", planning.draw, {"panels": panels})


def steps(device: str) -> Drawing:
    """Amortised time against bytes of state."""
    at = unit(device)
    points, floors = [], []
    for row in table(kept("steps"), "second-order, gpt", device):
        label, time = row["optimizer"], row[f"amortised 100/500, {at}"]
        label += f" ({row['blocks']})" * (row["blocks"] != "whole")
        if row["optimizer"] == FLOOR:
            floors.append((label, time))
        else:
            points.append((label, row["bytes per parameter"], time, row["ours"]))
    return Drawing("steps.json", plots.costs, {"points": points, "floors": floors, "unit": at})


def scaling(device: str) -> Drawing:
    found, at = kept("scaling"), unit(device)
    how = found["settings"][next(name for name in found["tables"] if name.startswith("layers"))]
    width, depth = how["layer_width"], how["depth"]
    titles = {"layers": f"layers of {width} x {width}", "width": f"{depth} layers of width x width"}
    panels = []
    for name, title in titles.items():
        rows = table(found, name, device)
        columns = [column for column in rows[0] if column.endswith(f", {at}")]
        series = {
            column.removesuffix(f", {at}"): [(row[name], row[column]) for row in rows if row[column] is not None]
            for column in columns
        }
        panels.append((title, name, series))
    return Drawing("scaling.json", plots.lines, {"panels": panels, "axis": f"{at} of a step"})


def unit(device: str) -> str:
    return "ms" if device == "cuda" else "CPU ms"


def table(found: dict[str, Any], name: str, device: str) -> list[dict[str, Any]]:
    """Of a CPU, or the last that was measured on a GPU, which its name ends with."""
    if not device:
        return found["tables"][name]
    others = [n for n in found["tables"] if n.startswith(f"{name}, ") and n != f"{name}, fitted"]
    return found["tables"][others[-1]]


def demo(_: str) -> Drawing:
    found = kept("demo")
    runs = {run: result for run, result in found["runs"].items() if run != RESUMED}
    shown = ("label", "parameters", "train", "validation", "validation_loss", "state_bytes")
    results = {run: {name: result[name] for name in shown} for run, result in runs.items()}
    return Drawing("demo.json", _demo, {"results": results, "settings": found["settings"]})


def _demo(results: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    demo_report.figure(results, Settings(**settings)).savefig(path)


def of_convergence(family: str) -> Drawing:
    own = convergence.FAMILIES[family or "shampoo"]
    plan = convergence.Plan(list(TASKS), own, [convergence.BASELINE, *own.methods])
    return losses(plan, convergence.read(report.RESULTS / "convergence.jsonl"))


def losses(plan: convergence.Plan, known: convergence.Records) -> Drawing:
    """The final losses of all runs of a plan, a panel for each task that has some."""
    panels = []
    for task in plan.tasks:
        results = plan.results(known, task)
        baseline, reference = results[convergence.BASELINE], results[plan.reference]
        if baseline.losses and reference.losses:
            shown = [results[method] for method in plan.methods if results[method].records]
            limit = plan.limit(results)
            band = (reference.mean, reference.mean + limit) if limit > 0 else None
            rows = [plots.Dots(r.label, list(r.losses.values()), r.color) for r in shown]
            panels.append(plots.Panel(TASKS[task].title, rows, band))
    band_is = "the spread of AdamW" if plan.family.of_moments else f"a quarter of the gain of {plan.reference}"
    note = f"Dots: runs. Bars: mean and standard deviation. Band: {band_is} above {plan.reference}."
    drawn = {"panels": panels, "axis": "final validation loss", "note": note}
    return Drawing("convergence.jsonl", plots.dot_plots, drawn)


KINDS: dict[str, Callable[[str], Drawing]] = {
    "convergence": of_convergence,
    "demo": demo,
    "memory": memory,
    "scaling": scaling,
    "steps": steps,
    "storage": storage,
}


def draw(name: str) -> None:
    """Draw results/<name> from what is kept there."""
    drawing(name).save(report.RESULTS / name)
    print(f"drawn in {report.RESULTS / name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PNG", help="(default all that are there)")
    parser.add_argument("--check", action="store_true", help="draw nothing; fail where one is older than its data")
    args = parser.parse_args()
    if args.check:
        found = list(wrong())
        print("\n".join(found) or "every figure shows what is kept")
        return 1 if found else 0
    for name in args.names or sorted(path.name for path in report.RESULTS.glob("*.png")):
        draw(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
