"""The files of a checkpoint folder: written beside the old ones, committed by one rename, verified when read."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import stat
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lowbit_optim.checkpoint.values import decode

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
TRAINER_KEYS = {"model", "optimizer", "scheduler", "step", "extras", "random"}
_OUR_FILES = re.compile(r"(model|optimizer|trainer)-[0-9a-f]{16}\.(safetensors|json)|checkpoint\.json\.[0-9a-f]{16}")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded: the message names the file, the tensor if there is one, and the way out."""


def library_version() -> str:
    """The version of this library that is installed."""
    return version("lowbit-optim")


def commit(folder: Path, contents: dict[str, Iterable[bytes | memoryview]]) -> None:
    """Write one file per kind, then make them the checkpoint by replacing checkpoint.json."""
    missing = [new for new in (folder, *folder.parents) if not new.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for new in missing:
        _sync_folder(new.parent)
    token = secrets.token_hex(8)  # from the system: the generators of the training are left alone
    try:
        files = {}
        for kind, chunks in contents.items():
            suffix = "json" if kind == "trainer" else "safetensors"
            files[kind] = [_write(folder / f"{kind}-{token}.{suffix}", chunks)]
        manifest = {"format_version": FORMAT_VERSION, "library_version": library_version(), "files": files}
        manifest["sha256"] = _manifest_sha256(manifest)
        _write(folder / f"{MANIFEST}.{token}", [json.dumps(manifest, indent=1).encode()])
        _sync_folder(folder)
        os.replace(folder / f"{MANIFEST}.{token}", folder / MANIFEST)
        _sync_folder(folder)
    except BaseException:
        _sweep(folder, token)
        raise
    _sweep(folder)


def _write(file: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(file, "xb") as out:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    return {"name": file.name, "size": size, "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder, and needs no sync for a rename
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path, token: str = "") -> None:
    """Remove the files with `token` in their names that checkpoint.json does not name; what cannot be, stays."""
    with contextlib.suppress(OSError, CheckpointError):
        named = set()
        if (folder / MANIFEST).exists():
            named = {name for entries in _read_manifest(folder).values() for name, _, _ in entries}
        for file in folder.iterdir():
            if _OUR_FILES.fullmatch(file.name) and token in file.name and file.name not in named:
                file.unlink()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Checkpoint(NamedTuple):
    """A verified checkpoint. The tensors are mapped from their file, not in memory."""

    trainer: dict[str, Any]
    tensors: defaultdict[str, dict[str, torch.Tensor]]  # by kind of file
    files: dict[str, str]  # by kind, for messages


def _damaged(file: Path, what: object) -> CheckpointError:
    return CheckpointError(f"{file}: {what}; the checkpoint is damaged: use another one, or copy it again")


def _size(file: Path) -> int:
    try:
        status = file.lstat()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); a checkpoint is a folder with {MANIFEST} and all the files "
            "that it names, as written by save_checkpoint: give that folder, complete"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise _damaged(file, "must be a regular file, and is a folder, a link or a device")
    return status.st_size


def _read_manifest(folder: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Name, size and sha256 of the files of each kind."""
    file = folder / MANIFEST
    _size(file)
    try:
        manifest = json.loads(file.read_bytes())
        version, digest = manifest["format_version"], manifest["sha256"]
        if type(version) is int and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format version {version} is newer than {FORMAT_VERSION}, the newest that lowbit-optim "
                f"{library_version()} reads; it was written by {manifest.get('library_version')}: install that"
            )
        if digest != _manifest_sha256(manifest):
            raise ValueError("the content does not match its own sha256")
        files = {
            kind: [(entry["name"], entry["size"], entry["sha256"]) for entry in entries]
            for kind, entries in manifest["files"].items()
        }
        for name, _, _ in itertools.chain(files["trainer"], *files.values()):
            if not _OUR_FILES.fullmatch(name):
                raise ValueError(f"it names the file {name!r}, where only files of the same folder are allowed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"is not what save_checkpoint writes ({type(error).__name__}: {error})") from error
    return files


def listed(folder: Path) -> dict[str, list[Path]]:
    """The files of each kind that checkpoint.json names; none of them has been looked at."""
    return {kind: [folder / entry[0] for entry in entries] for kind, entries in _read_manifest(folder).items()}


def read(folder: Path) -> Checkpoint:
    """Verify every file of the checkpoint, decode trainer.json and map the tensors."""
    checkpoint = Checkpoint({}, defaultdict(dict), {})
    for kind, entries in _read_manifest(folder).items():
        for name, size, digest in entries:
            file = folder / name
            checkpoint.files[kind] = str(file)
            if (found := _size(file)) != size:
                raise _damaged(file, f"has {found} bytes, and {MANIFEST} says {size}")
            try:
                if _sha256(file) != digest:
                    raise ValueError(f"the content does not match the sha256 in {MANIFEST}")
                if kind == "trainer":
                    checkpoint.trainer.update(decode(json.loads(file.read_bytes())))
                    if missing := TRAINER_KEYS - checkpoint.trainer.keys():
                        raise ValueError(f"it has no {sorted(missing)}")
                else:
                    with safe_open(file, "pt") as source:
                        names = source.keys()
                        checkpoint.tensors[kind].update({key: source.get_tensor(key) for key in names})
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
                raise _damaged(file, f"is not what save_checkpoint writes ({type(error).__name__}: {error})") from error
    return checkpoint


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
