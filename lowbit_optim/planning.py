"""The command `estimate`: what a model's training will take with one optimizer and another."""

import importlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowbit_optim.memory import LOW_BIT_BASES, SECOND_ORDER, Estimate, estimate
from lowbit_optim.optimizers.report import KINDS, aligned
from lowbit_optim.shapes import MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS: tuple[float, ...] = (4, 2, 1)
DEFAULT_BASE_BITS = 4
# Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#009E73", "#777777", "#E69F00", "#000000", "#CC79A7"), strict=True))
NOTE = """\
Total: parameters, gradients, state, and the workspace of the worst step. Activations are not counted: they and the
workspace are there at different times, so a backward pass has what parameters, gradients and state leave it.
Buffers of solvers and of communication come on top."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class PlanError(Exception):
    """What is wrong with the command line, for the user to read."""


@dataclass(frozen=True)
class Plan:
    """What the options of the command say.

    Args:
        spec: which model, as for ``load``.
        optimizer: by name, as for ``estimate``. Default "shampoo".
        bits: of it; None is each of 4, 2 and 1.
        base_bits: of its moments. Default 4.
        dtype: of parameters and gradients. Default "float32".
        world_size, sharding: as for ``estimate``.
        budget: bytes that each rank has, as "80GB" (10^9) or "80GiB" (2^30). Default None.
    """

    spec: str
    optimizer: str = "shampoo"
    bits: float | None = None
    base_bits: int = DEFAULT_BASE_BITS
    dtype: str = "float32"
    world_size: int = 1
    sharding: str | None = None
    budget: str | None = None


def load(spec: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model or the shapes that a name stands for, on the meta device.

    Args:
        spec: the name of one of the published models (``shapes.MODELS``); "module:function", a function without
            arguments that returns a module, shapes, or names and shapes; a folder or a JSON file with a configuration
            of Hugging Face; or the name of a model whose configuration is in its cache.
        dtype: that a module's parameters are cast to.

    Raises:
        PlanError: it is none of these, or what it names fails.
    """
    if spec in MODELS:
        return MODELS[spec]()
    path = Path(spec)
    if ":" in spec and not path.exists():
        made = _call(spec)
    else:
        made = _hugging_face(spec, path)
    return made.to(dtype) if isinstance(made, nn.Module) else made


def _call(spec: str) -> Any:
    module, _, function = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise PlanError(f"{spec}: {error}") from error
    finally:
        del sys.path[0]
    with torch.device("meta"):
        try:
            return found()
        except Exception as error:
            raise PlanError(f"{spec} raised {type(error).__name__}: {error}") from error


def _hugging_face(spec: str, path: Path) -> nn.Module:
    file = path / "config.json" if path.is_dir() else path
    if path.exists():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{file} is no configuration: {error}") from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise PlanError(f"{file} has no model_type: it is no configuration of Hugging Face")
    try:
        import transformers
    except ModuleNotFoundError as error:
        names = ", ".join(MODELS)
        raise PlanError(
            f"{spec} is neither one of {names} nor module:function; to read it as a configuration of Hugging Face, "
            f"pip install transformers ({error})"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(file if path.exists() else spec), local_files_only=True)
    except (OSError, ValueError) as error:
        raise PlanError(f"{spec}: neither a file nor a configuration in the local cache ({error})") from error
    kinds = [getattr(transformers, name, None) for name in config.architectures or ()]
    with torch.device("meta"):
        for kind in kinds:
            if kind is not None:
                made: nn.Module = kind(config)
                return made
        return transformers.AutoModel.from_config(config)


def rows(plan: Plan) -> list[dict[str, Any]]:
    """A row for each optimizer: AdamW of 32 and 8 bits, 32-bit Shampoo, and the one that was asked for.

    Returns:
        "optimizer": its name; "numbers": how many parameters; "parameters", "gradients", "state", "workspace", "total":
        bytes on the rank that has most; "bytes_per_parameter": of the whole state; "kinds": bytes of the whole state
        by kind; "fits": whether the budget is enough, None without one.

    Raises:
        PlanError: an option or a model that cannot be.
    """
    budget = None if plan.budget is None else parse_bytes(plan.budget)
    if plan.dtype not in DTYPES:
        raise PlanError(f"unknown dtype {plan.dtype!r}; it must be one of {', '.join(DTYPES)}")
    dtype = DTYPES[plan.dtype]
    model = load(plan.spec, dtype)
    wanted: list[tuple[str, str | type[Optimizer], dict[str, Any]]] = [
        ("AdamW of torch", torch.optim.AdamW, {}),
        ("AdamW of bitsandbytes, 8 bits", "adamw8bit", {}),
        ("Shampoo, 32 bits", "shampoo", {"bits": 32}),
        *_asked(plan),
    ]
    found = []
    for label, name, keywords in wanted:
        shared: dict[str, Any] = {"world_size": plan.world_size, "sharding": plan.sharding, "dtype": dtype}
        try:
            planned = estimate(model, name, **shared, **keywords)
        except (TypeError, ValueError) as error:
            raise PlanError(f"{label}: {error}") from error
        found.append(_row(label, planned, plan, dtype.itemsize, budget))
    return found


def _asked(plan: Plan) -> list[tuple[str, str | type[Optimizer], dict[str, Any]]]:
    """The optimizer of the command line at its bits."""
    name, several = plan.optimizer, BITS if plan.bits is None else (plan.bits,)
    if plan.bits is None and name in LOW_BIT_BASES:
        several = (8, 4)
    elif name not in LOW_BIT_BASES and name not in SECOND_ORDER:
        return [(name, name, {})]
    if name in LOW_BIT_BASES:
        several = tuple(int(bits) if bits == int(bits) else bits for bits in several)
    few: dict[str, Any] = {"base_bits": plan.base_bits} if name in SECOND_ORDER else {}
    moments = f", moments {plan.base_bits}" if few else ""
    return [(f"{name}, {_plural(bits)}{moments}", name, {"bits": bits, **few}) for bits in several]


def _plural(bits: float) -> str:
    return f"{bits:g} bit{'s' * (bits != 1)}"


def _row(label: str, planned: Estimate, plan: Plan, itemsize: int, budget: int | None) -> dict[str, Any]:
    ranks = plan.world_size if plan.sharding == "fsdp2" else 1
    weights = -(-planned.parameters * itemsize // ranks)
    total = 2 * weights + planned.peak
    return {
        "optimizer": label,
        "numbers": planned.parameters,
        "bytes_per_parameter": planned.bytes_per_parameter,
        "parameters": weights,
        "gradients": weights,
        "state": max(planned.ranks),
        "workspace": planned.workspace,
        "total": total,
        "kinds": planned.kinds,
        "fits": None if budget is None else total <= budget,
    }


def parse_bytes(text: str) -> int:
    """ "80GB" to 80e9, "80GiB" to 80 * 2^30; PlanError if it is neither."""
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or match[1].count(".") > 1 or match[1] == ".":
        raise PlanError(f"{text!r} is no number of bytes: write 80GB (80 x 10^9), 80GiB (80 x 2^30), 24576MiB ...")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def table(plan: Plan, found: list[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    columns = ["parameters", "gradients", "state", "workspace", "total"]
    head = ["optimizer", "B/param", *(f"{column} GB" for column in columns)]
    body = [[row["optimizer"], f"{row['bytes_per_parameter']:.2f}"] for row in found]
    for line, row in zip(body, found, strict=True):
        line += [f"{row[column] / 1e9:.3f}" for column in columns]
    if plan.budget is not None:
        head.append(f"fits {plan.budget}")
        for line, row in zip(body, found, strict=True):
            line.append("yes" if row["fits"] else "no")
    where = "" if plan.world_size == 1 else f", on the rank of {plan.world_size} that has most"
    title = f"{plan.spec}: {found[0]['numbers']:,} parameters in {plan.dtype}; GB are 10^9 bytes{where}"
    return "\n".join([title, "", *aligned([head, *body], left=1), "", NOTE])


def draw(panels: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw bars into a file (PNG, SVG, PDF): bytes of state per parameter by kind.

    Args:
        panels: for each title rows with "optimizer", "numbers", "kinds" and "bytes_per_parameter".
        path: of the file; its folder is made.

    Raises:
        PlanError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise PlanError('a figure needs matplotlib: pip install "lowbit-optim[demo]"') from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    heights = [1 + 0.4 * len(found) for found in panels.values()]
    drawing, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, dpi=130, sharex=True
    )
    used = [k for k in KINDS if any(row["kinds"][k] > 0.005 * row["numbers"] for f in panels.values() for row in f)]
    for ax, (title, found) in zip(axes.flat, panels.items(), strict=True):
        labels = [row["optimizer"] for row in found]
        left = [0.0] * len(found)
        for kind in used:
            sizes = [row["kinds"][kind] / max(1, row["numbers"]) for row in found]
            ax.barh(labels, sizes, left=left, color=COLORS[kind], label=kind)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for y, (end, row) in enumerate(zip(left, found, strict=True)):
            ax.annotate(f" {row['bytes_per_parameter']:.2f}", (end, y), va="center", fontsize=8.5)
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.set_title(title, loc="left", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8.5)
    axes.flat[-1].set_xlabel("bytes of optimizer state per parameter")
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)
    plt.close(drawing)


def run(plan: Plan, figure_path: Path | None = None, json_path: Path | None = None) -> int:
    """Print the table, draw the figure, write the JSON; return the exit code."""
    found = rows(plan)
    print(table(plan, found))
    if figure_path is not None:
        draw({plan.spec: found}, figure_path)
        print(f"figure: {figure_path}")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"plan": asdict(plan), "rows": found}, indent=1) + "\n", encoding="utf-8")
        print(f"numbers: {json_path}")
    return 0
