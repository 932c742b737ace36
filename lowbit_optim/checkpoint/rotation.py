"""Several checkpoints in a folder: step-<number> each, and `latest`, a line of text that names the newest."""

import contextlib
import os
import re
from pathlib import Path

from lowbit_optim.checkpoint.manifest import MANIFEST, CheckpointError, damaged, has_manifest, regular_size
from lowbit_optim.checkpoint.ranks import ALONE, Ranks
from lowbit_optim.checkpoint.reading import Checkpoint, read
from lowbit_optim.checkpoint.tensors import Part
from lowbit_optim.checkpoint.writing import LATEST, commit, locked, sweep, sync_folder, write_line, writing

_STEP = re.compile(r"step-(0|[1-9]\d*)", re.ASCII)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def rotate(folder: Path, step: int, keep: int, contents: dict[str, list[Part]], ranks: Ranks = ALONE) -> None:
    """Commit a checkpoint of this step, point to it, and only then remove those beyond ``keep``."""
    with writing(folder, ranks):
        new = step_folder(folder, step)
        commit(new, contents, ranks)
        with ranks.agreed():
            if ranks.first:
                write_line(folder / LATEST, new.name)
                sweep(folder)
                with contextlib.suppress(OSError):
                    _remove_old(folder, step, keep)


def _remove_old(folder: Path, step: int, keep: int) -> None:
    # Larger steps than this one are of a run that was given up for this one, so they go first.
    ages = sorted(_steps(folder), key=lambda other: (other <= step, other), reverse=True)
    complete = [other for other in ages if has_manifest(step_folder(folder, other))]
    for other in {*ages} - {*complete[:keep]}:
        _remove(step_folder(folder, other))


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, whole or not."""
    with os.scandir(folder) as found:
        names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    return [int(match[1]) for name in names if (match := _STEP.fullmatch(name))]


def _remove(folder: Path) -> None:
    """Remove a checkpoint, which is none from the first moment on; what cannot be removed, stays."""
    with contextlib.suppress(OSError), locked(folder):
        if has_manifest(folder):
            os.unlink(folder / MANIFEST)
            sync_folder(folder)
        sweep(folder)
        os.rmdir(folder)


def newest_in(folder: Path) -> Path:
    """The folder itself or, if it is no checkpoint, the one that its `latest` names."""
    if has_manifest(folder) or not os.path.lexists(folder / LATEST):
        return folder
    return folder / _latest(folder / LATEST)


def read_newest(folder: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """The checkpoint in a folder or, if there is none, the one that its `latest` names."""
    newest = None
    try:
        newest = newest_in(folder)
        while True:
            try:
                return read(newest, ranks)
            except CheckpointError:  # a save beside this may have removed it, and made another the newest
                if (now := newest_in(folder)) == newest:
                    raise
                newest = now
    except CheckpointError as error:
        if newest == folder:
            raise
        steps = [step_folder(folder, step) for step in sorted(_steps(folder))]
        others = ", ".join(str(other) for other in steps if other != newest and has_manifest(other))
        there = f"the others there are {others}: load one of them by its folder" if others else "there is no other"
        raise CheckpointError(f"{error}. It is the one that {folder / LATEST} names; {there}") from error


def _latest(file: Path) -> str:
    regular_size(file)
    try:
        with open(file, "rb") as source:
            line = source.read(100)
    except OSError as error:
        raise damaged(file, f"cannot be read ({error.strerror})") from error
    name = line.decode("latin1").removesuffix("\n")
    if not _STEP.fullmatch(name):
        raise damaged(file, f"says {name!r}, where it must be one line like step-1000")
    return name
