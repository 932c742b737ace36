"""The live objects: what a checkpoint must match in them, and how they are put back if loading fails half-way."""

import contextlib
import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from lowbit_optim.checkpoint.manifest import CheckpointError
from lowbit_optim.checkpoint.pieces import Layout, Mapped, layout_of
from lowbit_optim.checkpoint.reading import Checkpoint
from lowbit_optim.checkpoint.tensors import Stored, host_copy, memory_key, prefixes_of, raw_bytes
from lowbit_optim.optimizers.second_order import SecondOrder
from lowbit_optim.shards import local

# Of the dtypes that factors and scales are kept in, those that have NaN.
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def class_name(thing: Any) -> str:
    """Package and class: modules inside a package move, and AdamW alone could be anybody's."""
    return f"{type(thing).__module__.partition('.')[0]}.{type(thing).__qualname__}"


def parameter_names(optimizer: Any, state_dict: dict[str, Any], model: torch.nn.Module | None) -> dict[int, str]:
    """Index in the state dict -> name in the model, or the index itself without a model."""
    pairs = [
        (index, parameter)
        for packed, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
        for index, parameter in zip(packed["params"], group["params"], strict=True)
    ]
    if model is None:
        return {index: str(index) for index, _ in pairs}
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, parameter in pairs:
        if id(parameter) not in known:
            raise ValueError(
                f"parameter {index} of the optimizer, of shape {list(parameter.shape)}, is not a parameter of the "
                "model, so its values would not be in the checkpoint; give a module that holds all parameters as model"
            )
    return {index: known[id(parameter)] for index, parameter in pairs}


def parameters_of(optimizer: Any) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameter_shapes(optimizer: Any) -> list[list[int] | None]:
    """Of all parameters; None of those that have no shape yet (of lazy modules)."""
    return [None if is_lazy(parameter) else list(parameter.shape) for parameter in parameters_of(optimizer)]


def section_of(checkpoint: Checkpoint, kind: str, live: Any) -> tuple[str, dict[str, Any]]:
    """The file to name in messages, and this part of trainer.json."""
    section: dict[str, Any] | None = checkpoint.trainer[kind]
    file = checkpoint.files.get(kind, checkpoint.files["trainer"])
    if section is None:
        raise CheckpointError(f"{file}: the checkpoint was saved without {kind}=; load it without, too")
    if section.get("class", class_name(live)) != class_name(live):
        raise CheckpointError(
            f"{file}: holds the state of a {section['class']}, and the {kind} given is a {class_name(live)}; state is "
            "loaded into the class that it was saved from: give one of that class, or none"
        )
    return file, section


def _refuse(file: str, kind: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{file}: {'; '.join(problems[:3])}{more}. A checkpoint is loaded exactly or not at all: "
            f"build the {kind} as it was when the checkpoint was saved"
        )


def differences(saved: dict[str, Any], live: dict[str, Any], prefix: str = "") -> list[str]:
    """What keeps the tensors of `saved` from becoming those of `live`."""
    problems = [f"tensor '{prefix}{key}' is missing" for key in live if key not in saved]
    problems += [f"tensor '{prefix}{key}' is there, but has no place" for key in saved if key not in live]
    for key, now in live.items():
        old = saved.get(key)
        if not (isinstance(old, torch.Tensor) and isinstance(now, torch.Tensor)):
            continue
        if (old.shape, old.dtype) != (now.shape, now.dtype):
            problems.append(
                f"tensor '{prefix}{key}' is {old.dtype} {list(old.shape)}, the live one {now.dtype} {list(now.shape)}"
            )
    return problems


def resolve(
    file: str,
    entries: dict[Any, Any],
    tensors: dict[str, Mapped],
    layout: Callable[[Any, Mapped], Layout | None] = lambda key, tensor: None,
) -> dict[Any, Any]:
    """Put the tensors of the files where trainer.json says, each with the layout for its key."""
    names = [value.name for value in entries.values() if type(value) is Stored]
    _refuse(file, "checkpoint", [f"tensor {name!r} is missing" for name in names if name not in tensors])

    found: dict[Any, torch.Tensor] = {}  # tied ones once, here too
    whole = dict(entries)
    for key, value in entries.items():
        if type(value) is Stored:
            place = value.name, layout(key, tensors[value.name])
            if place not in found:
                found[place] = tensors[value.name].placed(place[1])
            whole[key] = found[place]
    return whole


def off_file(tensors: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """The same with copies of what `load_state_dict` may keep: all but parameters and buffers, such as extra state."""
    own = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    written = {name for of_kind in own for name, _ in of_kind}
    return {
        name: value.clone() if isinstance(value, torch.Tensor) and name not in written else value
        for name, value in tensors.items()
    }


def match_model(checkpoint: Checkpoint, model: torch.nn.Module, live: dict[str, Any]) -> dict[str, Any]:
    """The saved state of the model, whose ``live`` state dict it matches in all names, shapes, dtypes and ties."""
    file, section = section_of(checkpoint, "model", model)
    stored = section["state_dict"]
    saved = resolve(file, stored, checkpoint.tensors["model"], lambda name, _: layout_of(live.get(name)))
    problems = differences(saved, live)
    tied: dict[Any, str] = {}
    for name, value in live.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            problems.append(f"tensor {name!r} of the model is on the meta device and can hold no values")
        elif key := memory_key(value):
            other = tied.setdefault(key, name)
            if stored.get(name) != stored.get(other):
                problems.append(f"tensors {name!r} and {other!r} are tied in the model, but were not when saved")
    _refuse(file, "model", problems)
    whole = OrderedDict(off_file(saved, model))
    if section["versions"] is not None:
        whole._metadata = section["versions"]  # type: ignore[attr-defined]
    return whole


def match_optimizer(
    checkpoint: Checkpoint, optimizer: Any, model: torch.nn.Module | None, live: dict[str, Any]
) -> dict[str, Any]:
    """The saved state dict of the optimizer, whose ``live`` one it matches in groups, names, and shapes and dtypes."""
    file, section = section_of(checkpoint, "optimizer", optimizer)
    saved = section["state_dict"]
    sizes, live_sizes = ([len(group["params"]) for group in d["param_groups"]] for d in (saved, live))
    if sizes != live_sizes:
        _refuse(file, "optimizer", [f"has groups of {sizes} parameters, the live optimizer has {live_sizes}"])
    names = parameter_names(optimizer, live, model)
    if model is not None and section["names"] is not None:
        pairs = enumerate(zip(section["names"], names.values(), strict=True))
        changed = [f"parameter {i} is {old!r}, in the live optimizer {new!r}" for i, (old, new) in pairs if old != new]
        _refuse(file, "optimizer", changed)
    triples = zip(names.values(), section["shapes"], parameter_shapes(optimizer), strict=True)
    changed = [
        f"parameter {name!r} is {old}, the live one {new}" for name, old, new in triples if old not in (None, new)
    ]
    _refuse(file, "optimizer", changed)
    parameters = dict(zip(names, parameters_of(optimizer), strict=True))
    state = {
        index: saved_entry(checkpoint, index, live["state"].get(index, {}), parameters.get(index))
        for index in saved["state"]
    }
    whole = {**saved, "state": state}
    if not_finite := [problem for index in state for problem in not_finite_in(checkpoint, index, state[index])]:
        raise CheckpointError(f"{file}: {not_finite[0]}; the state was damaged before it was saved: use an earlier one")
    if hasattr(optimizer, "check_state_dict"):
        if problem := refusal(optimizer, whole):
            raise CheckpointError(f"{file}: {problem}")
    else:  # before its first step an optimizer has no state, and nothing to compare with
        problems = []
        for index, entry in state.items():
            if entry and live["state"].get(index):
                problems += differences(entry, live["state"][index], f"{names.get(index, index)}/")
        _refuse(file, "optimizer", problems)
    return whole


def saved_entry(checkpoint: Checkpoint, index: Any, live: dict[str, Any], parameter: Any) -> dict[str, Any]:
    """The state of a parameter, by its index when saved; laid out as what is live, or as the optimizer makes it."""

    def layout(key: str, tensor: Mapped) -> Layout | None:
        if isinstance(live.get(key), torch.Tensor):
            return layout_of(live[key])
        of_parameter = layout_of(parameter)
        like_it = of_parameter and (len(tensor.chunks) > 1 or tensor.shape == list(parameter.shape))
        return of_parameter if like_it else None

    entry = checkpoint.trainer["optimizer"]["state_dict"]["state"].get(index, {})
    return resolve(checkpoint.files["optimizer"], entry, checkpoint.tensors["optimizer"], layout)


def not_finite_in(checkpoint: Checkpoint, index: Any, entry: dict[str, Any]) -> list[str]:
    """What is wrong with the numbers (scales, diagonals, ...) of a parameter's factors and coded moments, here.

    Args:
        entry: ``saved_entry`` of this index.
    """
    stored = checkpoint.trainer["optimizer"]["state_dict"]["state"].get(index, {})
    tensors = {value.name: local(entry[key]) for key, value in stored.items() if type(value) is Stored}
    return [
        f"tensor {name!r} holds NaN or infinity, which no optimizer keeps there"
        for name, tensor in sorted(tensors.items())
        if not checkpoint.codecs.keys().isdisjoint(prefixes_of(name))
        and tensor.dtype in _NUMBERS
        and not tensor.isfinite().all()
    ]


def refusal(optimizer: Any, state_dict: dict[str, Any]) -> str | None:
    """Why the optimizer's ``check_state_dict`` does not take a state dict; None if it does."""
    try:
        optimizer.check_state_dict(state_dict)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:  # all but the first: not looked for
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None


def load_optimizer(optimizer: Any, state: dict[str, Any], tensors: dict[str, Mapped]) -> None:
    """Load state, of which nothing may stay in mapped files: tensors that the optimizer kept are copied."""
    optimizer.load_state_dict(state)
    chunks = (chunk for tensor in tensors.values() for chunk in tensor.chunks)
    mapped = {chunk.unverified.untyped_storage().data_ptr() for chunk in chunks}
    copies: dict[Any, torch.Tensor] = {}  # one of tied tensors
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and local(value).untyped_storage().data_ptr() in mapped:
                copy_key = memory_key(value) or (id(entry), key)
                if copy_key not in copies:
                    copies[copy_key] = value.clone()
                entry[key] = copies[copy_key]


def random_state() -> dict[str, Any]:
    # Asking for CUDA's would start CUDA, so a process that never used it has none.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}  # noqa: NPY002


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 (whichever generator the training uses)
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def scheduler_undo(scheduler: Any) -> Callable[[], None]:
    attributes, state = dict(vars(scheduler)), copy.deepcopy(scheduler.state_dict())

    def undo() -> None:
        with contextlib.suppress(Exception):  # for schedulers within this one; it may refuse its own state, too
            scheduler.load_state_dict(state)
        vars(scheduler).clear()
        vars(scheduler).update(attributes)

    return undo


def optimizer_undo(optimizer: Any) -> Callable[[], None]:
    # Containers are kept, tensors are not copied: load_state_dict replaces state tensors and does not write into them.
    attributes = dict(vars(optimizer))
    state = {parameter: (entry, dict(entry)) for parameter, entry in optimizer.state.items()}
    groups = [(group, dict(group)) for group in optimizer.param_groups]

    def undo() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for kept, content in (*state.values(), *groups):
            kept.clear()
            kept.update(content)
        optimizer.state.clear()
        optimizer.state.update({parameter: entry for parameter, (entry, _) in state.items()})
        optimizer.param_groups[:] = [group for group, _ in groups]
        if isinstance(optimizer, SecondOrder):  # loading has bound the hooks of K-FAC to the state that was loaded
            optimizer._prepare()

    return undo


def model_undo(model: torch.nn.Module) -> Callable[[], None]:
    # The new tensors are mapped from the file, so this copy on the host is the only one.
    live = {name: local(value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    kept = {name: raw_bytes(host_copy(tensor)) for name, tensor in live.items()}

    @torch.no_grad()
    def undo() -> None:
        for name, tensor in live.items():
            if not torch.equal(raw_bytes(tensor), kept[name]):  # an expanded tensor cannot be written, but is unchanged
                tensor.copy_(kept[name].view(tensor.dtype).reshape(tensor.shape))

    return undo
