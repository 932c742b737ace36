"""checkpoint.json: the index of a checkpoint, which vouches for every byte of its other files and of itself."""

import hashlib
import json
import os
import re
import stat
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

FORMAT_VERSION = 2  # the newest that is read
LARGEST_JSON = 1_000_000_000  # bytes of a JSON file
MANIFEST = "checkpoint.json"
DATA_FILE = re.compile(
    r"(?P<kind>model|optimizer)(-rank\d{5,})?(-\d{5,}-of-\d{5,})?-[0-9a-f]{16}\.safetensors|"
    r"(?P<trainer>trainer)-[0-9a-f]{16}\.json|(?P<random>random)-rank\d{5,}-[0-9a-f]{16}\.json"
)
_SHA256 = re.compile("[0-9a-f]{64}")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded: the message names the file, the tensor if there is one, and the way out.

    Example:
        >>> from lowbit_optim import CheckpointError, load_checkpoint
        >>> try:
        ...     load_checkpoint("no/such/folder")
        ... except CheckpointError as error:
        ...     print(str(error).partition(" (")[0])
        ...
        no/such/folder/checkpoint.json cannot be read
    """


class Entry(NamedTuple):
    """What checkpoint.json says of a file."""

    name: str
    size: int
    sha256: str  # of what comes before the tensors: of all of trainer.json, of a safetensors file's length and header
    tensors: dict[str, str]  # name -> sha256 of its bytes


def library_version() -> str:
    """The version of this library that is installed."""
    return version("lowbit-optim")


def version_for(ranks: int) -> int:
    """The version of the format that so many ranks write."""
    return 1 if ranks == 1 else 2


def damaged(file: Path, what: object) -> CheckpointError:
    return CheckpointError(f"{file}: {what}; the checkpoint is damaged: use another one, or copy it again")


def not_ours(file: Path, error: BaseException) -> CheckpointError:
    return damaged(file, f"is not what save_checkpoint writes ({type(error).__name__}: {error})")


def regular_size(file: Path) -> int:
    """Bytes of a file that must be one, and no link to one."""
    try:
        status = file.lstat()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); a checkpoint is a folder with {MANIFEST} and all the files "
            "that it names, as written by save_checkpoint: give that folder, complete"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise damaged(file, "must be a regular file, and is a folder, a link or a device")
    return status.st_size


def version_of(file: Path) -> object:
    """Something that is another after the file was replaced."""
    try:
        status = file.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def parse_json(text: bytes) -> Any:
    """JSON in which no object has the same name twice: Python would take the last, another reader the first."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def manifest_bytes(files: dict[str, list[Entry]]) -> bytes:
    """The content of checkpoint.json; its last member is the sha256 of all bytes before that member's comma."""
    manifest = {
        "format_version": version_for(len(files.get("random", ())) + 1),
        "library_version": library_version(),
        "files": {kind: [entry._asdict() for entry in entries] for kind, entries in files.items()},
    }
    body = json.dumps(manifest, indent=1).encode().removesuffix(b"\n}")
    return body + _seal(body)


def _seal(body: bytes) -> bytes:
    return b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def read_manifest(folder: Path) -> dict[str, list[Entry]]:
    """The files of each kind."""
    file = folder / MANIFEST
    if (size := regular_size(file)) > LARGEST_JSON:
        raise damaged(file, f"has {size} bytes, more than {LARGEST_JSON}")
    try:
        text = file.read_bytes()
        manifest = parse_json(text)
        version = manifest["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format version {version} is newer than {FORMAT_VERSION}, the newest that lowbit-optim "
                f"{library_version()} reads; it was written by {manifest.get('library_version')}: install that"
            )
        body = text[: -len(_seal(b""))]
        if text != body + _seal(body):
            raise ValueError("the content does not match its own sha256")
        if type(version) is not int or version < 1:
            raise ValueError(f"there is no format version {version!r}")
        files = {kind: [_entry(kind, **entry) for entry in entries] for kind, entries in manifest["files"].items()}
        if len(files["trainer"]) != 1:
            raise ValueError(f"it names {len(files['trainer'])} trainer files, where there is one")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise not_ours(file, error) from error
    return files


def _entry(kind: str, name: Any, size: Any, sha256: Any, tensors: Any) -> Entry:
    match = DATA_FILE.fullmatch(name)
    if match is None or kind not in match.group("kind", "trainer", "random"):
        raise ValueError(f"it names the {kind} file {name!r}, where only the {kind} files of the same folder can be")
    if type(size) is not int or size < 0:
        raise ValueError(f"the size of {name} is {size!r}")
    if wrong := [digest for digest in (sha256, *tensors.values()) if not _SHA256.fullmatch(digest)]:
        raise ValueError(f"a sha256 of {name} is {wrong[0]!r}")
    return Entry(name, size, sha256, tensors)


def has_manifest(folder: Path) -> bool:
    return os.path.lexists(folder / MANIFEST)
