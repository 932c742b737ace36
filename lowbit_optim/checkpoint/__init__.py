"""Checkpoints: a folder that is either the old checkpoint or the new one, and loads completely or not at all.

    checkpoint.json                 format and library version; of every other file name, size and checksums
    model-<token>.safetensors       parameters and buffers, tied ones once
    optimizer-<token>.safetensors   state tensors as "<parameter>/<state key>"; codecs and codebooks in the header
    trainer-<token>.json            step, extras, scheduler, random states, param groups, which tensor goes where

In a process group each rank writes the rows that it has into files of its own, model-rank00001-<token>.safetensors.

Every save writes files of fresh names, and replacing checkpoint.json is the commit. Plain JSON turns integer keys into
strings and tuples into lists (after which MultiStepLR never decays again), so what JSON lacks is tagged: `{"$tuple":
[1, 2]}`. Nothing is pickled, so nothing is executed by loading. The format is that of
docs/reference/checkpoint-format.md.
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowbit_optim.checkpoint.background import Saving, in_background, join_all, join_last, last_in
from lowbit_optim.checkpoint.contents import check_same, contents_of
from lowbit_optim.checkpoint.fitting import fit_model, fit_optimizer
from lowbit_optim.checkpoint.live import (
    load_optimizer,
    match_model,
    match_optimizer,
    model_undo,
    optimizer_undo,
    parameters_of,
    random_state,
    scheduler_undo,
    section_of,
    set_random_state,
)
from lowbit_optim.checkpoint.manifest import CheckpointError, has_manifest
from lowbit_optim.checkpoint.pieces import checked_layout
from lowbit_optim.checkpoint.ranks import Ranks
from lowbit_optim.checkpoint.reading import Checkpoint
from lowbit_optim.checkpoint.rotation import read_newest, rotate
from lowbit_optim.checkpoint.tensors import snapshot
from lowbit_optim.checkpoint.writing import commit
from lowbit_optim.planning import PlanError, parse_bytes
from lowbit_optim.shards import is_dtensor

__all__ = ["CheckpointError", "Saving", "load_checkpoint", "save_checkpoint"]

_RESERVED = "report"  # what `load_checkpoint(strict=False)` returns beside the extras


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    step: int | None = None,
    keep: int | None = None,
    max_file_size: int | str = "5GB",
    background: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    **extras: Any,
) -> Saving:
    """Write a checkpoint into the folder `path`, replacing the one that is there.

    Whatever interrupts it, the folder holds the earlier checkpoint or this one, whole. Python's, numpy's and torch's
    random states (CPU, and CUDA once in use) are saved too. Files in the folder that are not a checkpoint's stay.
    On the host it takes room for the largest tensor that is not there already (on another device, or not contiguous).

    Args:
        path: the folder; created with its parents if missing.
        model: its `state_dict()` is saved, each tensor in its own dtype and any shape; tied weights once.
        optimizer: any with the `state_dict()` of a `torch.optim.Optimizer`: values are tensors or what `extras` may be.
            With `model`, parameters are known by their names in it, else by their index. An optional method
            `state_codecs() -> {index: {key prefix: {"codebook": ..., "bits": ..., ...}}}` is written to the header.
        scheduler: any with `state_dict()` and `load_state_dict()`.
        step: comes back from `load_checkpoint` as "step"; default None.
        keep: write into `path`/step-<step>, which `path`/latest then names, and remove all but the last `keep` of
            these folders; `load_checkpoint(path)` takes the latest. Default None: into `path` itself.
        max_file_size: of the tensors in one file, in bytes or as "5GB" (10^9), "5GiB" (2^30); what outgrows it becomes
            several files. A single tensor may be larger. Default "5GB".
        background: copy everything to the host, return, and write in a thread. It takes room on the host for all that
            is saved. The next save into the same folder first waits for this one. Default False.
        process_group: all of whose ranks call this with the same arguments and write together into the same folder:
            each its rows of DTensors (as `fully_shard` makes them) and its random states, the first rank all else,
            which is taken from it alone. With `background` it must be a gloo group that nothing else uses. Default
            None: this process writes alone, and has all rows of what it saves.
        **extras: come back too, under any name but "report": None, bool, int, float, str, bytes, list, tuple, dict,
            OrderedDict, Counter, torch tensors, numpy arrays and scalars, nested as you like.

    Returns:
        A `Saving`: `wait()` returns when all is written, and raises what the writing raised; `done()` tells without
        waiting. Without `background` it is done. What nobody waited for, the next save into the folder raises.

    Raises:
        TypeError: a value that cannot be stored exactly, named by where it is; nothing has been written.
        ValueError: the optimizer has a parameter that is not the model's, or an argument is none of the above, or the
            extras are over 1 GB, or ranks have not the same, or are absent that have rows; nothing has been written.
        BlockingIOError: another process or thread is saving into the folder; nothing has been written.
        OSError: writing failed; the earlier checkpoint is intact. If only the last sync of the folder failed, this one
            is there already, whole, but a power cut may still bring the earlier one back.
        RuntimeError: another rank has ended, or gave no answer within the timeout of the process group; what is there
            is the earlier checkpoint or this one, whole. What a rank raises of all the above, every rank raises.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lowbit_optim import Shampoo, load_checkpoint, save_checkpoint
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Shampoo(model.parameters())
        >>> folder = tempfile.TemporaryDirectory()
        >>> saving = save_checkpoint(folder.name, model=model, optimizer=optimizer, step=1000, keep=3, loss=0.25)
        >>> saving.done()
        True
        >>> loaded = load_checkpoint(folder.name, model=model, optimizer=optimizer)
        >>> loaded["step"], loaded["loss"]
        (1000, 0.25)
        >>> folder.cleanup()
    """
    folder = Path(path)
    ranks = Ranks(process_group)
    with ranks.agreed():
        largest = _bytes(max_file_size)
        _check_arguments(folder, step, keep, extras)
        _check_group(process_group, background)
        last_in(folder).wait()
    with ranks.agreed():
        trainer = {"step": step, "extras": extras, "random": random_state()}
        contents, pools = contents_of(model, optimizer, scheduler, trainer, largest, ranks)
        if background:
            contents = {kind: snapshot(parts) for kind, parts in contents.items()}
    check_same(ranks, pools, {"step": step, "keep": keep})
    if keep is None:
        write = partial(commit, folder, contents, ranks)
    else:
        assert step is not None
        write = partial(rotate, folder, step, keep, contents, ranks)
    if background:
        return in_background(folder, write)
    write()
    return Saving()


def _bytes(size: int | str) -> int:
    try:
        count = parse_bytes(size) if isinstance(size, str) else size
    except PlanError as error:
        raise ValueError(f"max_file_size: {error}") from error
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"max_file_size is {size!r}; it must be a positive number of bytes, or text like 5GB")
    return count


def _check_arguments(folder: Path, step: int | None, keep: int | None, extras: dict[str, Any]) -> None:
    if _RESERVED in extras:
        raise ValueError(f"{_RESERVED!r} is what load_checkpoint(strict=False) reports: give the extra another name")
    if keep is None:
        return
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep is {keep!r}; it must be a positive integer, the number of checkpoints in the folder")
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}; with keep it names the folder, so it must be an integer of at least 0")
    if has_manifest(folder):
        raise ValueError(
            f"{folder} is a checkpoint itself, which load_checkpoint({str(folder)!r}) would go on taking: "
            "with keep, give a folder without one"
        )


def _check_group(process_group: Any, background: bool) -> None:
    if process_group is None:
        return
    join_all()
    if background and (process_group is dist.group.WORLD or dist.get_backend(process_group) != "gloo"):
        raise ValueError(
            "background=True exchanges a little between the ranks in a thread, and must not meet the training's own "
            'exchanges: give a process_group that nothing else uses, torch.distributed.new_group(backend="gloo")'
        )


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    strict: bool = True,
    process_group: "dist.ProcessGroup | None" = None,
) -> dict[str, Any]:
    """Load what was saved in the folder `path` into the objects given, and restore the random states.

    Every file is read and checked against its checksums, and every tensor against the live objects, before the first
    of these is touched. Names, shapes and dtypes must be those that were saved; devices may differ. A part that was
    saved may be left out here, but its files must be intact. So that it can be undone, loading takes room for a copy
    of the model on the host, and for the new state of the optimizer beside the old one.

    Args:
        path: the folder; with checkpoints of `save_checkpoint(keep=...)`, the latest of them is loaded.
        model: loaded in place.
        optimizer: of the class that was saved, with the same groups of parameters; it may have taken steps or not.
            Its `check_state_dict(state_dict)`, if it has one, is asked first and refuses with a ValueError. Otherwise
            saved state must have the keys, shapes and dtypes of live state, where there is live state.
        scheduler: of the class that was saved.
        strict: False loads of the model the tensors that fit by name, shape and dtype, and of the optimizer the state
            of the parameters that fit by name (by index, if it was saved or is loaded without a model) and shape, where
            the optimizer takes it, and the settings of param groups of the same parameters. All else of the two stays
            as it is. The scheduler is loaded as ever. Default True.
        process_group: all of whose ranks call this with the same arguments: all of them load the checkpoint, or none,
            however many have saved it. Each reads of DTensors its own rows, and gets the random states of the rank of
            its number, if there was one. Only with strict. Default None: this process loads alone.

    Returns:
        `{"step": step, **extras}` as saved; torch tensors come back on the CPU. With strict=False also "report": for
        "model" and "optimizer", where given, the names of tensors or parameters as {"matched": [...], "missing":
        [...] (live, but not saved), "unexpected": [...] (the other way round), "mismatched": {name: reason}}.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of a newer format, or of other objects; or an object
            refused its state. All the objects and random states are as they were, on all ranks.
        ValueError: the optimizer has a parameter that is not the model's, or ranks do not take part that have rows of
            its tensors, or there are several and strict is False; nothing has been touched.
        TypeError: a DTensor has placements that a checkpoint cannot hold; nothing has been touched.
        RuntimeError: another rank has ended, or gave no answer within the timeout of the process group, before
            anything was touched; once it was, that is a CheckpointError, too.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lowbit_optim import Shampoo, load_checkpoint, save_checkpoint
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Shampoo(model.parameters())
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_checkpoint(folder.name, model=model, optimizer=optimizer, step=1000).wait()
        >>> load_checkpoint(folder.name, model=model, optimizer=optimizer)
        {'step': 1000}
        >>> report = load_checkpoint(folder.name, model=torch.nn.Linear(64, 10), strict=False)["report"]
        >>> report["model"]["mismatched"]["weight"]
        "tensor 'weight' is torch.float32 [64, 64], the live one torch.float32 [10, 64]"
        >>> folder.cleanup()
    """
    folder = Path(path)
    ranks = Ranks(process_group)
    if ranks.size > 1 and not strict:
        raise ValueError("strict=False is for one process: what fits could be another thing on each rank of a group")
    if process_group is not None:
        join_all()
    join_last(folder)
    with ranks.agreed():
        checkpoint = read_newest(folder, ranks)
    _check_one_checkpoint(folder, checkpoint, ranks)
    # An optimizer's may be an exchange between the ranks: all of them are here, or none.
    live: dict[str, Any] = {"model": None if model is None else model.state_dict()}
    live["optimizer"] = None if optimizer is None else optimizer.state_dict()
    with ranks.agreed():
        _check_present(optimizer, live, ranks)
        loads, report = _matched(checkpoint, model, optimizer, scheduler, live, strict)
    del live  # the optimizer may have made it for this
    _load(folder, loads, checkpoint.random.get(ranks.rank), ranks)
    reported = {} if strict else {_RESERVED: report}
    return {"step": checkpoint.trainer["step"], **checkpoint.trainer["extras"], **reported}


def _check_one_checkpoint(folder: Path, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Raise CheckpointError on all ranks if they do not read the same."""
    found = ranks.all(Path(checkpoint.files["trainer"]).name)
    if len({*found}) > 1:
        raise CheckpointError(
            f"{folder}: the ranks found {', '.join(found)}; a save beside this has replaced one by another, or the "
            "ranks read folders of their own: load again, from one folder that all share"
        )


def _check_present(optimizer: Any, live: dict[str, Any], ranks: Ranks) -> None:
    """Raise ValueError if a DTensor has rows on ranks that do not take part, and TypeError if it is no such DTensor."""
    tensors = [(f"model tensor {name!r}", value) for name, value in (live["model"] or {}).items()]
    if optimizer is not None:
        tensors += [(f"parameter {i} of the optimizer", value) for i, value in enumerate(parameters_of(optimizer))]
        for i, entry in live["optimizer"]["state"].items():
            tensors += [(f"{key!r} of parameter {i} of the optimizer", value) for key, value in entry.items()]
    for what, value in tensors:
        if is_dtensor(value):
            checked_layout(what, value, ranks)


# What is live, how to put it back, how to load it.
_Loads = list[tuple[Any, Callable[[Any], Callable[[], None]], Callable[[], Any]]]


def _matched(
    checkpoint: Checkpoint,
    model: torch.nn.Module | None,
    optimizer: Any,
    scheduler: Any,
    live: dict[str, Any],
    strict: bool,
) -> tuple[_Loads, dict[str, Any]]:
    """What is to be done, and the report of what is not strict; ``live`` are the state dicts."""
    loads: _Loads = []
    report: dict[str, Any] = {}
    if model is not None:
        if strict:
            state = match_model(checkpoint, model, live["model"])
        else:
            state, report["model"] = fit_model(checkpoint, model, live["model"])
        loads.append((model, model_undo, partial(model.load_state_dict, state)))
    if optimizer is not None:
        if strict:
            state = match_optimizer(checkpoint, optimizer, model, live["optimizer"])
        else:
            state, report["optimizer"] = fit_optimizer(checkpoint, optimizer, model, live["optimizer"])
        if strict or report["optimizer"]["matched"]:
            load = partial(load_optimizer, optimizer, state, checkpoint.tensors["optimizer"])
            loads.append((optimizer, optimizer_undo, load))
    if scheduler is not None:
        state = section_of(checkpoint, "scheduler", scheduler)[1]["state_dict"]
        loads.append((scheduler, scheduler_undo, partial(scheduler.load_state_dict, state)))
    return loads, report


def _load(folder: Path, loads: _Loads, random: dict[str, Any] | None, ranks: Ranks) -> None:
    """Load all of them, the last first, and the random states if there are any for this rank; or none, on all ranks."""
    before = random_state()
    with contextlib.ExitStack() as undo:
        try:
            undo.callback(set_random_state, before)
            for live, prepare_undo, load in reversed(loads):
                with ranks.agreed():
                    undo.callback(prepare_undo(live))
                    load()
            with ranks.agreed():
                set_random_state(before if random is None else random)
        except Exception as error:
            raise CheckpointError(
                f"{folder}: the files are intact, but loading them raised {type(error).__name__}: {error}; "
                "everything was put back as it was"
            ) from error
        undo.pop_all()
