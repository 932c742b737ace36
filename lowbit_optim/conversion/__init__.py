"""The command `convert`: an optimizer's state at other bits, or from what other libraries save, as a checkpoint."""

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import UninitializedParameter

from lowbit_optim.checkpoint.contents import contents_of
from lowbit_optim.checkpoint.live import random_state, resolve
from lowbit_optim.checkpoint.reading import Checkpoint
from lowbit_optim.checkpoint.rotation import read_newest
from lowbit_optim.checkpoint.writing import LATEST, commit
from lowbit_optim.conversion.foreign import OF_FACTORS, under, unpacked
from lowbit_optim.conversion.foreign import read as read_foreign
from lowbit_optim.conversion.forms import Choices, Codecs, converted
from lowbit_optim.conversion.saved import FIRST_ORDER, ConversionError, Own, Saved, Told, parameters_of, preconditioners
from lowbit_optim.inspection import printable
from lowbit_optim.optimizers.report import aligned, tensors_in

__all__ = ["ConversionError", "Request", "convert", "run"]


@dataclass(frozen=True)
class Request:
    """What the options of the command say.

    Args:
        source: a checkpoint folder of this library, or a file of torch.save.
        target: the folder for the new checkpoint.
        bits, storage, base_bits: as in ``forms.Choices``.
        optimizer: "shampoo" or "caspr", to put a first-order optimizer's moments under it. Default None.
        soap_moments: as for ``foreign.read``. Default "eigenbasis".
        force: write into a folder that is not empty, and replace a checkpoint that is there. Default False.
    """

    source: Path
    target: Path
    bits: float
    storage: str | None = None
    base_bits: int | None = None
    optimizer: str | None = None
    soap_moments: str = "eigenbasis"
    force: bool = False


def convert(request: Request) -> tuple[dict[str, int], Saved]:
    """Write the checkpoint that is asked for; the source stays as it is.

    Model, scheduler, step, extras and random states of a source folder go into the new one as they are. Of a file, the
    optimizer's state is all there is, and the random states are those of this process.

    Returns:
        (the bytes of "factors" and of "moments" in the source, what was written).

    Raises:
        ConversionError: the source holds nothing that can be read, or not finite numbers; or the options cannot be; or
            the target is not empty. Nothing has been written.
        CheckpointError: the source is a damaged checkpoint, or none.
        OSError: writing failed.
    """
    _check_target(request)
    checkpoint, loaded = _opened(request.source)
    state = unpacked(loaded)[0]
    try:
        _check_finite(state, "state")
    except RecursionError as error:
        raise ConversionError(f"{request.source}: the state holds lists or dicts that hold themselves") from error
    told: Told = ({}, {}) if checkpoint is None else _told(checkpoint)
    if checkpoint is not None and checkpoint.trainer["optimizer"]["class"] in (*FIRST_ORDER, *preconditioners()):
        source = _ours(checkpoint, loaded, told)
    else:
        source = read_foreign(loaded, request.soap_moments, told)
    asked = source if request.optimizer is None else under(source, request.optimizer)
    base_bits = request.base_bits
    if asked is not source and base_bits is None:
        base_bits, *others = sorted({group["bits"] for group in source.groups})
        if others:
            raise ConversionError(
                f"the groups have moments of {', '.join(map(str, (base_bits, *others)))} bits, and under a "
                "preconditioner all have the same: give --base-bits"
            )
    choices = Choices(request.bits, request.storage, base_bits)
    made, codecs = converted(asked, choices)
    _write(request.target, checkpoint, made, codecs)
    return _bytes(state), made


def run(request: Request) -> int:
    """Convert, print what became of it, and return the exit code."""
    try:
        before, made = convert(request)
    except OSError as error:
        raise ConversionError(
            f"{error}; `lowbit-optim inspect --verify {request.target}` tells whether there is a whole checkpoint"
        ) from error
    for line in (_call(request.target, made), "", *aligned(_table(before, _bytes(made.state)), left=1)):
        print(printable(line))
    for note in made.notes:
        print(printable(f"note: {note}"))
    return 0


# ---- reading ---------------------------------------------------------------------------------------------------------


def _check_target(request: Request) -> None:
    source, target = request.source.resolve(), request.target.resolve()
    if source == target or source in target.parents:
        raise ConversionError(f"{request.target} is in {request.source}, which stays as it is: name another folder")
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{request.target} is a file; a checkpoint is a folder: name another")
    if os.path.lexists(request.target / LATEST):
        raise ConversionError(
            f"{request.target} holds checkpoints of several steps, and load_checkpoint would take the new one instead "
            f"of the one that its `{LATEST}` names: name another folder"
        )
    if target.is_dir() and any(target.iterdir()) and not request.force:
        raise ConversionError(f"{request.target} is not empty: name another folder, or give --force")


def _opened(path: Path) -> tuple[Checkpoint | None, Any]:
    """The checkpoint, if it is one, and the optimizer's state dict or whatever the file holds."""
    if path.is_dir() or not path.exists():
        checkpoint = read_newest(path)
        section = checkpoint.trainer["optimizer"]
        if section is None:
            raise ConversionError(f"{path}: the checkpoint was saved without optimizer=: there is nothing to convert")
        saved = section["state_dict"]
        state = {index: _resolved(checkpoint, "optimizer", own) for index, own in saved["state"].items()}
        return checkpoint, {**saved, "state": state}
    try:
        return None, torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: torch.load(weights_only=True) refuses it, and nothing else is tried, for that could run code: "
            f"{_short(error)}. Save state dicts of tensors, lists and numbers, and no objects of classes"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        said = f"{path} is neither a checkpoint folder nor a file of torch.save ({_short(error)})"
        raise ConversionError(said) from error


def _short(error: BaseException) -> str:
    """What torch did not know, or the first line: its messages are pages."""
    if named := re.search(r"[Uu]nsupported (?:global: |class: )?(?:GLOBAL )?([\w.]+)", str(error)):
        return f"it holds a {named[1]}"
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:200]


def _resolved(checkpoint: Checkpoint, kind: str, entries: dict[Any, Any]) -> dict[Any, Any]:
    """With tensors in the place of what stands for them."""
    file = checkpoint.files.get(kind, checkpoint.files["trainer"])
    return resolve(file, entries, checkpoint.tensors[kind])


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, Tensor):
        for tensor in tensors_in(value):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ConversionError(
                    f"{name} has numbers that are not finite; nothing is written: convert an earlier state"
                )
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_finite(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            _check_finite(part, f"{name}[{place}]")


def _told(checkpoint: Checkpoint) -> Told:
    """Of the parameters the tensors in the model, and the shapes, where the checkpoint has them."""
    section = checkpoint.trainer["optimizer"]
    known = {}
    if section["names"] is not None and checkpoint.trainer["model"] is not None:
        model = _resolved(checkpoint, "model", checkpoint.trainer["model"]["state_dict"])
        known = {i: model[name] for i, name in enumerate(section["names"]) if isinstance(model.get(name), Tensor)}
    return known, {i: shape for i, shape in enumerate(section["shapes"]) if shape is not None}


def _ours(checkpoint: Checkpoint, state_dict: dict[str, Any], told: Told) -> Saved:
    groups = [{"base_bits": 32, **group} if "base" in group else dict(group) for group in state_dict["param_groups"]]
    indices = [index for group in groups for index in group["params"]]
    if indices != list(range(len(indices))):
        raise ConversionError(f"the groups have the parameters {indices[:20]}, and not their places in order")
    state: dict[int, Own] = {index: own for index, own in state_dict["state"].items() if own}
    return Saved(checkpoint.trainer["optimizer"]["class"], groups, state, parameters_of(groups, state, told))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write(target: Path, checkpoint: Checkpoint | None, made: Saved, codecs: Codecs) -> None:
    trainer: Mapping[str, Any] = {} if checkpoint is None else checkpoint.trainer
    model: Any = None
    scheduler: Any = None
    names = None if checkpoint is None else trainer["optimizer"]["names"]
    parameters = {i: UninitializedParameter() if p.shape == (0,) else p for i, p in made.parameters.items()}
    if checkpoint is not None and trainer["model"] is not None:
        state = OrderedDict(_resolved(checkpoint, "model", trainer["model"]["state_dict"]))
        if trainer["model"]["versions"] is not None:
            state._metadata = trainer["model"]["versions"]  # type: ignore[attr-defined]
        named = list(zip(names or (), parameters.values(), strict=False))
        model = SimpleNamespace(state_dict=lambda: state, named_parameters=lambda: named)
    optimizer = _stand_in(
        made.kind,
        state_dict=lambda: {"state": made.state, "param_groups": made.groups},
        param_groups=[{"params": [parameters[i] for i in group["params"]]} for group in made.groups],
        state_codecs=lambda: codecs,
    )
    if trainer and trainer["scheduler"] is not None:
        scheduler = _stand_in(trainer["scheduler"]["class"], state_dict=lambda: trainer["scheduler"]["state_dict"])
    kept = {key: trainer[key] for key in ("step", "extras", "random")} if trainer else _of_now()
    try:
        contents, _ = contents_of(model, optimizer, scheduler, kept)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversionError(f"the state or the groups hold what a checkpoint cannot: {error}") from error
    commit(target, contents)


def _of_now() -> dict[str, Any]:
    return {"step": None, "extras": {}, "random": random_state()}


def _stand_in(name: str, **attributes: Any) -> Any:
    """An object of a class that checkpoints know by this name."""
    package, _, qualname = name.partition(".")
    return type(qualname, (SimpleNamespace,), {"__module__": package, "__qualname__": qualname})(**attributes)


# ---- what is said ----------------------------------------------------------------------------------------------------


def _call(target: Path, made: Saved) -> str:
    """How the optimizer is to be made that loads it."""
    group = made.groups[0]
    keys = ["bits"] if made.first_order else ["bits", "storage", "layout", "base_bits"]
    settings = ", ".join(f"{key}={group[key]!r}" for key in keys if key in group)
    several = ", as its first group has it" * (len(made.groups) > 1)
    return f"{target}: load_checkpoint puts it into {made.kind}(..., {settings}){several}"


def _table(before: dict[str, int], after: dict[str, int]) -> list[list[str]]:
    rows = [["", "bytes before", "bytes after", "ratio"]]
    for kind in (*before, "total"):
        old, new = (sum(found.values()) if kind == "total" else found[kind] for found in (before, after))
        rows.append([kind, f"{old:,}", f"{new:,}", f"{new / old:.4f}" if old else "-"])
    return rows


def _bytes(state: Mapping[int, Own]) -> dict[str, int]:
    """Of matrices, whatever library's, and of all else."""
    found = {"factors": 0, "moments": 0}
    for own in state.values():
        for key, value in own.items():
            kind = "factors" if key.startswith(("left.", "right.")) or key in OF_FACTORS else "moments"
            found[kind] += sum(tensor.nbytes for tensor in tensors_in(value))
    return found
