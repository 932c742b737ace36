"""What of a checkpoint fits into live objects that are not those that were saved: `load_checkpoint(strict=False)`."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from lowbit_optim.checkpoint.live import (
    class_name,
    differences,
    not_finite_in,
    off_file,
    parameter_names,
    parameter_shapes,
    parameters_of,
    refusal,
    resolve,
    saved_entry,
)
from lowbit_optim.checkpoint.manifest import CheckpointError
from lowbit_optim.checkpoint.pieces import layout_of
from lowbit_optim.checkpoint.reading import Checkpoint
from lowbit_optim.checkpoint.tensors import memory_key

Report = dict[str, Any]


def report_of(saved: list[str], live: list[str], mismatched: dict[str, str]) -> Report:
    """Which names are loaded, which of the live ones were not saved, and the other way round."""
    of_saved, of_live = {*saved}, {*live}
    return {
        "matched": [name for name in live if name in of_saved and name not in mismatched],
        "missing": [name for name in live if name not in of_saved],
        "unexpected": [name for name in saved if name not in of_live],
        "mismatched": mismatched,
    }


def fit_model(checkpoint: Checkpoint, model: torch.nn.Module, live: dict[str, Any]) -> tuple[dict[str, Any], Report]:
    """The model's ``live`` state dict with what was saved in its place, by name, shape and dtype."""
    section = checkpoint.trainer["model"] or {"state_dict": {}, "versions": None}
    file = checkpoint.files.get("model", checkpoint.files["trainer"])
    stored = section["state_dict"]
    saved = resolve(file, stored, checkpoint.tensors["model"], lambda name, _: layout_of(live.get(name)))
    mismatched: dict[str, str] = {}
    tied: dict[Any, str] = {}
    for name in [name for name in live if name in saved]:
        now, problems = live[name], differences({name: saved[name]}, {name: live[name]})
        if isinstance(now, torch.Tensor) != isinstance(saved[name], torch.Tensor):
            problems = [f"{name!r} is a {type(saved[name]).__name__}, the live one a {type(now).__name__}"]
        elif isinstance(now, torch.Tensor) and now.is_meta:
            problems.append("it is on the meta device and can hold no values")
        elif isinstance(now, torch.Tensor):
            other = tied.setdefault(memory_key(now) or name, name)
            if stored[name] != stored[other]:
                problems.append(f"it is tied to {other!r} in the model, but was not when saved")
        if problems:
            mismatched[name] = problems[0]
    report = report_of([*saved], [*live], mismatched)
    whole = OrderedDict({**live, **off_file({name: saved[name] for name in report["matched"]}, model)})
    modules = {name.rpartition(".")[0] for name in report["matched"]}
    versions = {name: version for name, version in (section["versions"] or {}).items() if name in modules}
    whole._metadata = {**getattr(live, "_metadata", {}), **versions}  # type: ignore[attr-defined]
    return whole, report


class _Saved(NamedTuple):
    """A parameter when the checkpoint was saved."""

    index: Any
    group: dict[str, Any]
    shape: list[int] | None


def fit_optimizer(
    checkpoint: Checkpoint, optimizer: Any, model: torch.nn.Module | None, live: dict[str, Any]
) -> tuple[dict[str, Any], Report]:
    """The optimizer's ``live`` state dict with the state of each parameter of the same name, where it takes that.

    If either side has no names, parameters are the same whose indices are; the report has the live names all the same.
    A group of exactly the saved parameters has the saved settings, every other its own.
    """
    labels = parameter_names(optimizer, live, model)
    section = checkpoint.trainer["optimizer"]
    if section is None:
        return live, report_of([], [*labels.values()], {})
    named = model is not None and section["names"] is not None
    names = labels if named else {index: str(index) for index in labels}
    label = {names[index]: shown for index, shown in labels.items()}
    saved = _saved_parameters(section, named)
    if section["class"] != class_name(optimizer):
        reason = f"it is the state of a {section['class']}, and the optimizer is a {class_name(optimizer)}"
        return live, _labelled(report_of([*saved], [*label], {name: reason for name in label if name in saved}), label)

    groups = [_settings(group, names, saved) for group in live["param_groups"]]
    if hasattr(optimizer, "check_state_dict"):  # each with what is live otherwise
        for i, group in enumerate(groups):
            others = [group if j == i else own for j, own in enumerate(live["param_groups"])]
            if refusal(optimizer, {"state": {}, "param_groups": others}):
                groups[i] = live["param_groups"][i]
    merged, state, mismatched = {**live, "param_groups": groups}, dict(live["state"]), {}
    shapes = dict(zip(names, parameter_shapes(optimizer), strict=True))
    parameters = dict(zip(names, parameters_of(optimizer), strict=True))
    for index, name in names.items():
        if name not in saved:
            continue
        entry = saved_entry(checkpoint, saved[name].index, live["state"].get(index, {}), parameters[index])
        if problem := _problem(checkpoint, optimizer, merged, index, shapes[index], saved[name], entry):
            mismatched[name] = problem
            continue
        state.pop(index, None)
        if entry:
            state[index] = entry
    merged["state"] = state
    if hasattr(optimizer, "check_state_dict") and (problem := refusal(optimizer, merged)):
        raise CheckpointError(f"{checkpoint.files['optimizer']}: {problem}")
    return merged, _labelled(report_of([*saved], [*label], mismatched), label)


def _labelled(report: Report, label: dict[str, str]) -> Report:
    return {
        "mismatched": {label[name]: reason for name, reason in report.pop("mismatched").items()},
        **{kind: [label.get(name, name) for name in names] for kind, names in report.items()},
    }


def _saved_parameters(section: dict[str, Any], named: bool) -> dict[str, _Saved]:
    """By name, or by index."""
    indices = [(index, group) for group in section["state_dict"]["param_groups"] for index in group["params"]]
    names = section["names"] if named else [str(index) for index, _ in indices]
    return {
        name: _Saved(index, group, shape)
        for name, (index, group), shape in zip(names, indices, section["shapes"], strict=True)
    }


def _settings(group: dict[str, Any], names: dict[int, str], saved: dict[str, _Saved]) -> dict[str, Any]:
    """A live group, with the settings of the saved group of the same parameters in the same order, if there is one."""
    own = [names[index] for index in group["params"]]
    if not own or own[0] not in saved:
        return group
    other = saved[own[0]].group
    of_other = [name for name, place in saved.items() if place.group is other]
    return {**other, "params": group["params"]} if of_other == own else group


def _problem(
    checkpoint: Checkpoint,
    optimizer: Any,
    merged: dict[str, Any],
    index: int,
    shape: list[int] | None,
    saved: _Saved,
    entry: dict[str, Any],
) -> str | None:
    """Why the saved state of a parameter is not for it."""
    if saved.shape is not None and saved.shape != shape:
        return f"the parameter is {saved.shape}, the live one {shape}"
    if not entry:
        return None
    if problems := not_finite_in(checkpoint, saved.index, entry):
        return problems[0]
    if not hasattr(optimizer, "check_state_dict"):
        live = merged["state"].get(index)
        return next(iter(differences(entry, live) if live else []), None)
    # Under the settings that it was saved with, which say what its numbers mean, and under those it will have.
    as_saved = [
        {**saved.group, "params": group["params"]} if index in group["params"] else group
        for group in merged["param_groups"]
    ]
    for groups in (as_saved, merged["param_groups"]):
        if problem := refusal(optimizer, {**merged, "state": {index: entry}, "param_groups": groups}):
            return problem
    return None
