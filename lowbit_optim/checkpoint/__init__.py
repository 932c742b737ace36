"""Checkpoints: a folder that is either the old checkpoint or the new one, and loads completely or not at all.

    checkpoint.json                 format and library version; name, size, sha256 of each other file; its own sha256
    model-<token>.safetensors       parameters and buffers, tied ones once
    optimizer-<token>.safetensors   state tensors as "<parameter>/<state key>"; codecs and codebooks in the header
    trainer-<token>.json            step, extras, scheduler, random states, param groups, which tensor goes where

Every save writes files of fresh names, and replacing checkpoint.json is the commit. Plain JSON turns integer keys into
strings and tuples into lists (after which MultiStepLR never decays again), so what JSON lacks is tagged: `{"$tuple":
[1, 2]}`. Nothing is pickled, so nothing is executed by loading.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lowbit_optim.checkpoint.files import FORMAT_VERSION, CheckpointError, commit, library_version, read
from lowbit_optim.checkpoint.live import (
    class_name,
    match_model,
    match_optimizer,
    model_undo,
    optimizer_undo,
    parameter_names,
    random_state,
    scheduler_undo,
    section_of,
    set_random_state,
)
from lowbit_optim.checkpoint.tensors import Pool, codec_metadata
from lowbit_optim.checkpoint.values import encode

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    step: int | None = None,
    _random: dict[str, Any] | None = None,  # states that were saved before, instead of those of this process
    **extras: Any,
) -> None:
    """Write a checkpoint into the folder `path`, replacing the one that is there.

    Whatever interrupts it, the folder holds the earlier checkpoint or this one, whole. Python's, numpy's and torch's
    random states (CPU, and CUDA once in use) are saved too. Files in the folder that are not a checkpoint's stay.

    Args:
        path: the folder; created with its parents if missing.
        model: its `state_dict()` is saved, each tensor in its own dtype and any shape; tied weights once.
        optimizer: any with the `state_dict()` of a `torch.optim.Optimizer`: values are tensors or what `extras` may be.
            With `model`, parameters are known by their names in it, else by their index. An optional method
            `state_codecs() -> {index: {key prefix: {"codebook": ..., "bits": ..., ...}}}` is written to the header.
        scheduler: any with `state_dict()` and `load_state_dict()`.
        step: comes back from `load_checkpoint` as "step"; default None.
        **extras: come back too: None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict, Counter,
            torch tensors, numpy arrays and scalars, nested as you like.

    Raises:
        TypeError: a value that cannot be stored exactly, named by where it is; nothing has been written.
        ValueError: the optimizer has a parameter that is not the model's; nothing has been written.
        OSError: writing failed; the earlier checkpoint is intact.
    """
    library = {"format": "pt", "format_version": str(FORMAT_VERSION), "library_version": library_version()}
    contents: dict[str, Iterable[bytes | memoryview]] = {}
    trainer: dict[str, Any] = {"model": None, "optimizer": None, "scheduler": None}
    if model is not None:
        tensors = Pool("model")
        state = model.state_dict()
        trainer["model"] = {
            "state_dict": {name: tensors.put(name, value) for name, value in state.items()},
            "versions": getattr(state, "_metadata", None),  # of the modules' state, which load_state_dict looks at
        }
        contents["model"] = tensors.chunks(library)
    if optimizer is not None:
        tensors = Pool("optimizer")
        state_dict = optimizer.state_dict()
        names = parameter_names(optimizer, state_dict, model)
        stored = {
            index: {key: tensors.put(f"{names.get(index, index)}/{key}", value) for key, value in entry.items()}
            for index, entry in state_dict["state"].items()
        }
        trainer["optimizer"] = {
            "class": class_name(optimizer),
            "names": None if model is None else list(names.values()),
            "state_dict": state_dict | {"state": stored},
        }
        contents["optimizer"] = tensors.chunks(library | codec_metadata(optimizer, names))
    if scheduler is not None:
        trainer["scheduler"] = {"class": class_name(scheduler), "state_dict": scheduler.state_dict()}
    trainer |= {"step": step, "extras": extras, "random": _random or random_state()}
    encoded = {key: encode(value, key) for key, value in trainer.items()}
    contents["trainer"] = [json.dumps(encoded, allow_nan=False).encode()]
    commit(Path(path), contents)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Load what was saved in the folder `path` into the objects given, and restore the random states.

    Every file is read and checked against its sha256, and every tensor against the live objects, before the first of
    these is touched. Names, shapes and dtypes must be those that were saved; devices may differ. A part that was saved
    may be left out here, but its files must be intact.

    Args:
        path: the folder.
        model: loaded in place.
        optimizer: of the class that was saved, with the same groups of parameters; it may have taken steps or not.
            Its `check_state_dict(state_dict)`, if it has one, is asked first and refuses with a ValueError. Otherwise
            saved state must have the keys, shapes and dtypes of live state, where there is live state.
        scheduler: of the class that was saved.

    Returns:
        `{"step": step, **extras}` as saved; torch tensors come back on the CPU.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of a newer format, or of other objects; or an object
            refused its state. All the objects and random states are as they were.
        ValueError: the optimizer has a parameter that is not the model's; nothing has been touched.
    """
    checkpoint = read(Path(path))
    loads: list[tuple[Any, Callable[[Any], Callable[[], None]], Any]] = []
    if model is not None:
        loads.append((model, model_undo, match_model(checkpoint, model)))
    if optimizer is not None:
        loads.append((optimizer, optimizer_undo, match_optimizer(checkpoint, optimizer, model)))
    if scheduler is not None:
        loads.append((scheduler, scheduler_undo, section_of(checkpoint, "scheduler", scheduler)[1]["state_dict"]))
    trainer = checkpoint.trainer
    with contextlib.ExitStack() as undo:
        try:
            undo.callback(set_random_state, random_state())
            for live, prepare_undo, state in reversed(loads):
                undo.callback(prepare_undo(live))
                live.load_state_dict(state)
            set_random_state(trainer["random"])
        except Exception as error:
            raise CheckpointError(
                f"{path}: the files are intact, but loading them raised {type(error).__name__}: {error}; "
                "everything was put back as it was"
            ) from error
        undo.pop_all()
    return {"step": trainer["step"], **trainer["extras"]}
