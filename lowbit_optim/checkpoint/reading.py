"""A checkpoint's files, verified: nothing of a file is used before all of it is known to be what was written."""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from lowbit_optim.checkpoint.manifest import (
    LARGEST_JSON,
    MANIFEST,
    CheckpointError,
    Entry,
    damaged,
    not_ours,
    parse_json,
    read_manifest,
    regular_size,
    version_of,
)
from lowbit_optim.checkpoint.pieces import Chunk, Mapped, Piece, join
from lowbit_optim.checkpoint.ranks import ALONE, Ranks
from lowbit_optim.checkpoint.tensors import DTYPES, METADATA
from lowbit_optim.checkpoint.values import decode

TRAINER_KEYS = {"model", "optimizer", "scheduler", "step", "extras", "random"}
_LARGEST_HEADER = 100_000_000  # as in the safetensors library
_CHUNK = 1 << 20
_MOST_COMMITS = 3  # while it is being read


class Checkpoint(NamedTuple):
    """A verified checkpoint. The tensors are mapped from their files, not in memory; writing to one changes no file."""

    trainer: dict[str, Any]
    tensors: defaultdict[str, dict[str, Mapped]]  # by kind of file
    codecs: dict[str, dict[str, Any]]  # of the prefixes of the optimizer's tensors
    files: dict[str, str]  # by kind, for messages
    random: dict[int, dict[str, Any]]  # the random states of rank 0, and of this rank if they were saved


class Place(NamedTuple):
    """A tensor in its file, as the header says."""

    dtype: torch.dtype
    shape: list[int]
    start: int  # in bytes, in the file
    size: int


def read(folder: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Verify every file of the checkpoint, decode trainer.json and map the tensors.

    Args:
        ranks: that read it together. Each file is verified by one of them, and a tensor also by those that need it.
    """
    for _ in range(_MOST_COMMITS):
        seen = version_of(folder / MANIFEST)
        try:
            return _read(folder, ranks)
        except CheckpointError:  # of files that a save beside this has swept?
            if version_of(folder / MANIFEST) == seen:
                raise
    return _read(folder, ranks)


def _read(folder: Path, ranks: Ranks) -> Checkpoint:
    checkpoint = Checkpoint({}, defaultdict(dict), {}, {}, {})
    manifest = read_manifest(folder)
    for kind, entries in manifest.items():
        more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        checkpoint.files[kind] = f"{folder / entries[0].name}{more}" if entries else str(folder / MANIFEST)
        for entry in entries:
            _check_size(folder / entry.name, entry)
    mine = itertools.cycle([rank == ranks.rank for rank in range(ranks.size)])
    for kind, entries in manifest.items():
        for number, entry in enumerate(entries, 1):
            file = folder / entry.name
            with opened(file, entry) as source:
                if kind == "trainer":
                    checkpoint.trainer.update(trainer_of(source, entry))
                    checkpoint.random[0] = checkpoint.trainer["random"]
                elif kind == "random":
                    if next(mine) or number == ranks.rank:
                        checkpoint.random[number] = _json_of(source, entry)
                else:
                    _add(checkpoint, kind, file, source, entry, mine)
    for kind, tensors in checkpoint.tensors.items():
        try:
            join(tensors)
        except ValueError as error:
            raise damaged(folder / MANIFEST, f"of the {kind} files that it names, {error}") from error
    for kind in ("model", "optimizer"):
        if checkpoint.trainer[kind] is not None and kind not in manifest:
            raise damaged(folder / MANIFEST, f"names no {kind} file, which its trainer file says there is")
    return checkpoint


def _add(checkpoint: Checkpoint, kind: str, file: Path, source: BinaryIO, entry: Entry, mine: Iterator[bool]) -> None:
    """Map the tensors of a safetensors file; verify those that are ``mine`` to verify, and the others when needed."""
    places, metadata = header_of(source, entry)
    checkpoint.codecs.update(codecs_in(metadata))
    pieces = pieces_in(metadata, places)
    mapped = torch.from_numpy(np.memmap(source, np.uint8, "c"))
    for name, place in places.items():
        if next(mine):
            _verify(source, entry, name, place)
            verify = _is_verified
        else:
            verify = cache(partial(_verify_alone, file, entry, name, place))
        piece = pieces.get(name, Piece(name, place.shape, 0))
        tensor = checkpoint.tensors[kind].setdefault(piece.tensor, Mapped(place.dtype, piece.shape, []))
        if tensor.chunks and name not in pieces:
            raise ValueError(f"tensor {name!r} is in another file, too")
        if (tensor.dtype, tensor.shape) != (place.dtype, piece.shape):
            raise ValueError(
                f"rows of tensor {piece.tensor!r} are of {place.dtype} {piece.shape}, and others of {tensor.dtype} "
                f"{tensor.shape}"
            )
        tensor.chunks.append(Chunk(piece.first, _view(mapped, place), verify))


def _verify(source: BinaryIO, entry: Entry, name: str, place: Place) -> None:
    source.seek(place.start)
    _check(f"tensor {name!r}", _sha256(source, place.size), entry.tensors[name])


def _verify_alone(file: Path, entry: Entry, name: str, place: Place) -> None:
    with opened(file, entry) as source:
        _verify(source, entry, name, place)


def _is_verified() -> None:
    pass


def _check_size(file: Path, entry: Entry) -> None:
    if (size := regular_size(file)) != entry.size:
        raise damaged(file, f"has {size} bytes, and {MANIFEST} says {entry.size}")


@contextmanager
def opened(file: Path, entry: Entry) -> Iterator[BinaryIO]:
    """A file of the size that checkpoint.json says; what is wrong with its content is a CheckpointError."""
    _check_size(file, entry)
    try:
        with open(file, "rb") as source:
            yield source
    except CheckpointError:
        raise
    # RuntimeError is torch's and RecursionError, ArithmeticError an integer that is too large.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise not_ours(file, error) from error


def codecs_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """How the tensors of a file are coded, by their prefixes."""
    codecs = parse_json(metadata.get("codecs", "{}").encode())
    if not isinstance(codecs, dict):
        raise ValueError("the codecs in its header are no object")
    return codecs


def pieces_in(metadata: Mapping[str, str], places: Mapping[str, Place]) -> dict[str, Piece]:
    """The tensors of a file, at their places, that are rows of others."""
    pieces = {name: Piece(**said) for name, said in parse_json(metadata.get("pieces", "{}").encode()).items()}
    for name, (tensor, shape, first) in pieces.items():
        rows, *row = places[name].shape
        whole = type(tensor) is str and all(type(n) is int and n >= 0 for n in (*shape, first))
        if not (whole and rows and row == shape[1:] and first + rows <= shape[0]):
            raise ValueError(f"{name!r}, {places[name].shape}, is said to be rows from {first} of {tensor!r}, {shape}")
    return pieces


def _json_of(source: BinaryIO, entry: Entry) -> Any:
    """The content of a JSON file, verified and decoded."""
    if entry.tensors:
        raise ValueError(f"{MANIFEST} names tensors in it")
    if entry.size > LARGEST_JSON:
        raise ValueError(f"it has {entry.size} bytes, more than {LARGEST_JSON}")
    text = source.read()
    _check("the content", hashlib.sha256(text).hexdigest(), entry.sha256)
    return decode(parse_json(text))


def trainer_of(source: BinaryIO, entry: Entry) -> dict[str, Any]:
    """The content of trainer.json, verified."""
    trainer: dict[str, Any] = _json_of(source, entry)
    if missing := TRAINER_KEYS - trainer.keys():
        raise ValueError(f"it has no {sorted(missing)}")
    _check_sections(trainer)
    return trainer


def _check_sections(trainer: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless the parts of trainer.json have the members that loading uses."""
    model, optimizer, scheduler = trainer["model"], trainer["optimizer"], trainer["scheduler"]
    dicts = [trainer["extras"], trainer["random"]]
    if model is not None:
        dicts += [model["state_dict"], model["versions"] or {}]
    if scheduler is not None:
        dicts.append(scheduler["state_dict"])
    if optimizer is not None:
        saved = optimizer["state_dict"]
        if not isinstance(name := optimizer["class"], str):
            raise ValueError(f"the class of its optimizer is {name!r}")
        dicts += [saved["state"], *saved["state"].values(), *saved["param_groups"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        for of_each in (optimizer["names"], optimizer["shapes"]):
            if of_each is not None and len(of_each) != len(indices):
                raise ValueError(f"it has {len(of_each)} names or shapes of {len(indices)} parameters")
        if len({*indices}) != len(indices) or not saved["state"].keys() <= {*indices}:
            raise ValueError("the state is not of the parameters in the groups, each of them once")
    if wrong := [value for value in dicts if not isinstance(value, dict)]:
        raise ValueError(f"{str(wrong[0])[:50]!r} is no object")


def header_of(source: BinaryIO, entry: Entry) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors are in a safetensors file, and the metadata of its header, which is verified; no tensor is."""
    head = source.read(8)
    length = int.from_bytes(head, "little")
    if length > min(entry.size - 8, _LARGEST_HEADER):
        raise ValueError(f"its header is said to have {length} bytes, of {entry.size} in the file")
    head += source.read(length)
    _check("the header", hashlib.sha256(head).hexdigest(), entry.sha256)
    header = parse_json(head[8:])
    metadata = header.pop(METADATA, {})
    places = _places(header, len(head), entry.size)
    if unknown := places.keys() ^ entry.tensors.keys():
        raise ValueError(f"tensor {min(unknown)!r} is in only one of the file's header and {MANIFEST}")
    return places, metadata


def _places(header: dict[str, Any], start: int, size: int) -> dict[str, Place]:
    """Where the tensors are in a file, in the order of their bytes, which must fill it from ``start`` on."""
    places = {}
    base = start
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, offsets = DTYPES[said["dtype"]], said["shape"], said["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, *offsets)):
            raise ValueError(f"tensor {name!r} has shape {shape} and offsets {offsets}")
        needed = math.prod(shape) * dtype.itemsize
        if offsets != [start - base, start - base + needed] or start % dtype.itemsize or start + needed > size:
            raise ValueError(
                f"tensor {name!r}, {said['dtype']} {shape}, is said to be the bytes {offsets} of {size - base}, where "
                f"{start - base} is the first that is free: tensors must follow on each other, each aligned"
            )
        places[name] = Place(dtype, shape, start, needed)
        start += needed
    if start != size:
        raise ValueError(f"its tensors end after {start} bytes of {size}")
    return places


def _view(mapped: torch.Tensor, place: Place) -> torch.Tensor:
    return mapped[place.start : place.start + place.size].view(place.dtype).reshape(place.shape)


def _sha256(source: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size and (chunk := source.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _check(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{what} does not match the sha256 in {MANIFEST}")
