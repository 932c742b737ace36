"""Files written beside the ones that are there, and committed by one rename."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from lowbit_optim.checkpoint.manifest import (
    DATA_FILE,
    MANIFEST,
    CheckpointError,
    Entry,
    has_manifest,
    manifest_bytes,
    read_manifest,
)
from lowbit_optim.checkpoint.ranks import ALONE, Ranks
from lowbit_optim.checkpoint.tensors import Part, raw_view

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LATEST = "latest"
_UNFINISHED = re.compile(rf"({re.escape(MANIFEST)}|{LATEST})\.[0-9a-f]{{16}}")  # was to replace the file of that name


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, on disk, too."""
    missing = [new for new in (folder, *folder.parents) if not new.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for new in missing:
        sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder, and needs no sync for a rename
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the folder's only writer. The lock ends with the process, too, and with children that it forked meanwhile."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(
            error.errno,
            f"{folder}: another process or thread is saving into this folder, and nothing was written; give each "
            "writer a folder of its own; processes that train together save together, with process_group=, or let one",
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a child that was forked meanwhile has the descriptor, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):  # some file systems complain of old writes here; ours have been synced
            os.close(descriptor)


@contextlib.contextmanager
def writing(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Make the folder, and be its only writers; no other rank than the first needs the lock for that."""
    with contextlib.ExitStack() as held:
        with ranks.agreed():
            if ranks.first:
                make_folder(folder)
                held.enter_context(locked(folder))
        yield


def commit(folder: Path, contents: dict[str, list[Part]], ranks: Ranks = ALONE) -> None:
    """Write the files of each kind, then make them the checkpoint by replacing checkpoint.json.

    Args:
        contents: what this rank writes.
        ranks: that write it together. The first makes it the checkpoint, when the files of all are on disk.

    Raises:
        BlockingIOError: somebody else is writing into the folder.
        OSError: writing failed; the checkpoint that was there is there. If only the last sync of the folder failed, it
            is the new one already, which a power cut may still undo.
    """
    with writing(folder, ranks):
        # From the system: the generators of the training are left alone.
        token = ranks.from_first(secrets.token_hex(8))
        try:
            with ranks.agreed():
                own = {kind: _write_parts(folder, kind, parts, token, ranks) for kind, parts in contents.items()}
            everyones = ranks.to_first(own)
            with ranks.agreed():
                if ranks.first:
                    kinds = dict.fromkeys(kind for own in everyones for kind in own)
                    files = {kind: [entry for own in everyones for entry in own.get(kind, ())] for kind in kinds}
                    needed = [folder / entry.name for entries in files.values() for entry in entries]
                    _replace(folder / MANIFEST, manifest_bytes(files), token, needed)
                    sweep(folder)
        except BaseException:
            # No other rank sweeps: what it wrote before it failed the first may be about to commit.
            if ranks.first:
                sweep(folder, token)
            raise


def _write_parts(folder: Path, kind: str, parts: list[Part], token: str, ranks: Ranks) -> list[Entry]:
    of_rank = "" if ranks.first else f"-rank{ranks.rank:05}"
    suffix = "json" if kind in ("trainer", "random") else "safetensors"
    numbers = [f"-{i:05}-of-{len(parts):05}" if len(parts) > 1 else "" for i in range(1, len(parts) + 1)]
    return [
        _write(folder / f"{kind}{of_rank}{number}-{token}.{suffix}", part)
        for number, part in zip(numbers, parts, strict=True)
    ]


def write_line(file: Path, line: str) -> None:
    """Replace a text file by one with this line."""
    token = secrets.token_hex(8)
    try:
        _replace(file, f"{line}\n".encode(), token)
    except BaseException:
        sweep(file.parent, token)
        raise


def _replace(file: Path, content: bytes, token: str, needed: Iterable[Path] = ()) -> None:
    """What the folder held before is on disk when the file is replaced, and the file when this returns."""
    new = file.with_name(f"{file.name}.{token}")
    _write(new, Part(content, {}))
    sync_folder(file.parent)
    for other in needed:
        if not os.path.lexists(other):
            raise FileNotFoundError(
                errno.ENOENT,
                "was removed before the checkpoint was complete, as by another writer on a file system without locks, "
                "or is in a folder of another rank's own; give each writer a folder, and all ranks of one the same",
                str(other),
            )
    os.replace(new, file)
    sync_folder(file.parent)


def _write(file: Path, part: Part) -> Entry:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(file, flags, 0o666)
    try:
        sha256 = _append(descriptor, memoryview(part.head))
        # One at a time: a tensor that had to be copied to the host is gone before the next one is.
        tensors = {name: _append(descriptor, raw_view(tensor)) for name, tensor in part.tensors.items()}
        os.fsync(descriptor)
        return Entry(file.name, os.fstat(descriptor).st_size, sha256, tensors)
    finally:
        os.close(descriptor)


def _append(descriptor: int, content: memoryview) -> str:
    """Write all of it; its sha256."""
    digest = hashlib.sha256(content).hexdigest()
    while content:
        content = content[os.write(descriptor, content) :]
    return digest


def sweep(folder: Path, token: str = "") -> None:
    """Remove the files with ``token`` in their names that checkpoint.json does not name; what cannot be, stays."""
    with contextlib.suppress(OSError, CheckpointError):
        named = set()
        if has_manifest(folder):
            named = {entry.name for entries in read_manifest(folder).values() for entry in entries}
        for name in os.listdir(folder):
            if (DATA_FILE.fullmatch(name) or _UNFINISHED.fullmatch(name)) and token in name and name not in named:
                os.unlink(folder / name)
