"""Checkpoints: a folder that is either the old checkpoint or the new one, and loads completely or not at all.

    checkpoint.json                 format and library version; name, size, sha256 of each other file; its own sha256
    model-<token>.safetensors       parameters and buffers, tied ones once
    optimizer-<token>.safetensors   state tensors as "<parameter>/<state key>"; codecs and codebooks in the header
    trainer-<token>.json            step, extras, scheduler, random states, param groups, which tensor goes where

Every save writes files of fresh names, and replacing checkpoint.json is the commit. Plain JSON turns integer keys into
strings and tuples into lists (after which MultiStepLR never decays again), so what JSON lacks is tagged: `{"$tuple":
[1, 2]}`. Nothing is pickled, so nothing is executed by loading.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import secrets
import stat
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"

# fmt: off
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}
# fmt: on
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}
_TRAINER_KEYS = {"model", "optimizer", "scheduler", "step", "extras", "random"}
_OUR_FILES = re.compile(r"(model|optimizer|trainer)-[0-9a-f]{16}\.(safetensors|json)|checkpoint\.json\.[0-9a-f]{16}")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded: the message names the file, the tensor if there is one, and the way out."""


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    step: int | None = None,
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
    library = {"format": "pt", "format_version": str(FORMAT_VERSION), "library_version": _library_version()}
    contents: dict[str, Iterable[bytes | memoryview]] = {}
    trainer: dict[str, Any] = {"model": None, "optimizer": None, "scheduler": None}
    if model is not None:
        tensors = _Pool("model")
        state = model.state_dict()
        trainer["model"] = {
            "state_dict": {name: tensors.put(name, value) for name, value in state.items()},
            "versions": getattr(state, "_metadata", None),  # of the modules' state, which load_state_dict looks at
        }
        contents["model"] = tensors.chunks(library)
    if optimizer is not None:
        tensors = _Pool("optimizer")
        state_dict = optimizer.state_dict()
        names = _parameter_names(optimizer, state_dict, model)
        stored = {
            index: {key: tensors.put(f"{names.get(index, index)}/{key}", value) for key, value in entry.items()}
            for index, entry in state_dict["state"].items()
        }
        trainer["optimizer"] = {
            "class": _class_name(optimizer),
            "names": None if model is None else list(names.values()),
            "state_dict": state_dict | {"state": stored},
        }
        contents["optimizer"] = tensors.chunks(library | _codec_metadata(optimizer, names))
    if scheduler is not None:
        trainer["scheduler"] = {"class": _class_name(scheduler), "state_dict": scheduler.state_dict()}
    trainer |= {"step": step, "extras": extras, "random": _random_state()}
    encoded = {key: _encode(value, key) for key, value in trainer.items()}
    contents["trainer"] = [json.dumps(encoded, allow_nan=False).encode()]
    _commit(Path(path), contents)


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
    checkpoint = _read(Path(path))
    loads: list[tuple[Any, Callable[[Any], Callable[[], None]], Any]] = []
    if model is not None:
        loads.append((model, _model_undo, _match_model(checkpoint, model)))
    if optimizer is not None:
        loads.append((optimizer, _optimizer_undo, _match_optimizer(checkpoint, optimizer, model)))
    if scheduler is not None:
        loads.append((scheduler, _scheduler_undo, _section(checkpoint, "scheduler", scheduler)[1]["state_dict"]))
    trainer = checkpoint.trainer
    with contextlib.ExitStack() as undo:
        try:
            undo.callback(_set_random_state, _random_state())
            for live, prepare_undo, state in reversed(loads):
                undo.callback(prepare_undo(live))
                live.load_state_dict(state)
            _set_random_state(trainer["random"])
        except Exception as error:
            raise CheckpointError(
                f"{path}: the files are intact, but loading them raised {type(error).__name__}: {error}; "
                "everything was put back as it was"
            ) from error
        undo.pop_all()
    return {"step": trainer["step"], **trainer["extras"]}


# ---- values: JSON with tags for what JSON lacks ----------------------------------------------------------------------


class _Stored(NamedTuple):
    """Stands for a tensor that is in a safetensors file, under this name."""

    name: str


def _encode(value: Any, where: str) -> Any:
    """Return `value` as JSON that `_decode` turns back into the same types and bits; `where` is for the message."""
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {"$float": str(value)}
    if kind is list:
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is tuple:
        return {"$tuple": [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if kind in _MAPPINGS.values():
        pairs = [[_encode(key, f"a key of {where}"), _encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {f"${kind.__name__}": pairs}
    if kind is _Stored:
        return {"$stored": value.name}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is torch.Tensor and _storable(value):
        data = base64.b64encode(_bytes(value)).decode()
        return {"$tensor": [_DTYPE_NAMES[value.dtype], list(value.shape), data]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"$scalar": _encode(np.asarray(value), where)}
    if kind is np.ndarray and value.dtype.kind in "biufc":
        return {"$array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    raise TypeError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; give numbers, strings, "
        "bytes, lists, tuples, dicts, dense tensors or numeric arrays"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decode(item) for key, item in value.items()}
    content = value[tag]
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]({_decode(key): _decode(item) for key, item in content})
    if tag == "$tensor":
        dtype, shape, data = content
        flat = torch.empty(0, dtype=_DTYPES[dtype])  # which frombuffer does not make
        if data:
            flat = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=flat.dtype)
        return flat.reshape(shape)
    if tag == "$array":
        dtype, shape, data = content
        return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    decoders: dict[str, Callable[[Any], Any]] = {
        "$float": float,
        "$tuple": lambda items: tuple(map(_decode, items)),
        "$stored": _Stored,
        "$bytes": base64.b64decode,
        "$scalar": lambda array: _decode(array)[()],
    }
    return decoders[tag](content)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _storable(tensor: torch.Tensor) -> bool:
    # The bytes of a subclass (DTensor, a quantized wrapper) are not its value.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.dtype in _DTYPE_NAMES


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order as a 1-D uint8 tensor on the CPU, sharing memory when it can."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return _raw(tensor).numpy().data


def _memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Equal for tied tensors: the same elements of the same memory. None for an empty tensor, which has no memory."""
    if tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


class _Pool:
    """The tensors of one file: tied ones once, under the name that came first."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[Any, str] = {}

    def put(self, name: str, value: Any) -> Any:
        """Keep a tensor and return what stands for it in trainer.json; anything else is returned as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if not _storable(value):
            raise TypeError(
                f"{self.kind} tensor {name!r} is a {type(value).__qualname__} ({value.dtype}, {value.layout}, "
                f"{value.device}); a checkpoint holds dense tensors of {', '.join(map(str, _DTYPE_NAMES))}"
            )
        memory = _memory(value)
        first = name if memory is None else self.names.setdefault(memory, name)
        if first == name:
            if name in self.tensors:
                raise ValueError(f"two {self.kind} tensors would be stored as {name!r}; rename the parameter")
            self.tensors[name] = value
        return _Stored(first)

    def chunks(self, metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
        """The safetensors file, one tensor at a time: length of the header, the header (JSON), the data."""
        # Wide elements first, so that every tensor is aligned to its own element size.
        ordered = sorted(self.tensors.items(), key=lambda item: -item[1].element_size())
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, tensor in ordered:
            start, end = end, end + tensor.numel() * tensor.element_size()
            dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            yield _bytes(tensor)


def _codec_metadata(optimizer: Any, names: dict[int, str]) -> dict[str, str]:
    """What a reader without this library needs to decode the state: the codec of each prefix, and the tables."""
    if not hasattr(optimizer, "state_codecs"):
        return {}
    codecs = {
        f"{names[index]}/{prefix}": codec
        for index, prefixes in optimizer.state_codecs().items()
        for prefix, codec in prefixes.items()
    }
    tables: dict[str, dict[str, list[float]]] = {}
    for codec in codecs.values():
        if codec.get("codebook") is not None:
            tables.setdefault(codec["codebook"], {})[str(codec["bits"])] = _table(codec["codebook"], codec["bits"])
    return {"codecs": json.dumps(codecs), "codebooks": json.dumps(tables)}


@functools.cache
def _table(name: str, bits: int) -> list[float]:
    from lowbit_optim.storage.codebooks import codebook

    values: list[float] = codebook(name, bits).tolist()
    return values


# ---- files -----------------------------------------------------------------------------------------------------------


def _library_version() -> str:
    try:
        return importlib.metadata.version("lowbit-optim")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit(folder: Path, contents: dict[str, Iterable[bytes | memoryview]]) -> None:
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
        manifest = {"format_version": FORMAT_VERSION, "library_version": _library_version(), "files": files}
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


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Checkpoint(NamedTuple):
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
                f"{_library_version()} reads; it was written by {manifest.get('library_version')}: install that"
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


def _read(folder: Path) -> _Checkpoint:
    """Verify every file of the checkpoint, decode trainer.json and map the tensors."""
    checkpoint = _Checkpoint({}, defaultdict(dict), {})
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
                    checkpoint.trainer.update(_decode(json.loads(file.read_bytes())))
                    if missing := _TRAINER_KEYS - checkpoint.trainer.keys():
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


# ---- matching against the live objects -------------------------------------------------------------------------------


def _class_name(thing: Any) -> str:
    """Package and class: modules inside a package move, and AdamW alone could be anybody's."""
    return f"{type(thing).__module__.partition('.')[0]}.{type(thing).__qualname__}"


def _parameter_names(optimizer: Any, state_dict: dict[str, Any], model: torch.nn.Module | None) -> dict[int, str]:
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


def _section(checkpoint: _Checkpoint, kind: str, live: Any) -> tuple[str, dict[str, Any]]:
    """The file to name in messages, and this part of trainer.json."""
    section: dict[str, Any] | None = checkpoint.trainer[kind]
    file = checkpoint.files.get(kind, checkpoint.files["trainer"])
    if section is None:
        raise CheckpointError(f"{file}: the checkpoint was saved without {kind}=; load it without, too")
    if section.get("class", _class_name(live)) != _class_name(live):
        raise CheckpointError(
            f"{file}: holds the state of a {section['class']}, and the {kind} given is a {_class_name(live)}; state is "
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


def _differences(saved: dict[str, Any], live: dict[str, Any], prefix: str = "") -> list[str]:
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


def _resolve(file: str, entries: dict[Any, Any], tensors: dict[str, torch.Tensor]) -> dict[Any, Any]:
    """Put the tensors of the file where trainer.json says."""
    names = [value.name for value in entries.values() if type(value) is _Stored]
    _refuse(file, "checkpoint", [f"tensor {name!r} is missing" for name in names if name not in tensors])
    return {key: tensors[value.name] if type(value) is _Stored else value for key, value in entries.items()}


def _match_model(checkpoint: _Checkpoint, model: torch.nn.Module) -> dict[str, Any]:
    file, section = _section(checkpoint, "model", model)
    stored, live = section["state_dict"], model.state_dict()
    saved = OrderedDict(_resolve(file, stored, checkpoint.tensors["model"]))
    problems = _differences(saved, live)
    tied: dict[Any, str] = {}
    for name, value in live.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            problems.append(f"tensor {name!r} of the model is on the meta device and can hold no values")
        elif memory := _memory(value):
            other = tied.setdefault(memory, name)
            if stored.get(name) != stored.get(other):
                problems.append(f"tensors {name!r} and {other!r} are tied in the model, but were not when saved")
    _refuse(file, "model", problems)
    if section["versions"] is not None:
        saved._metadata = section["versions"]  # type: ignore[attr-defined]
    return saved


def _match_optimizer(checkpoint: _Checkpoint, optimizer: Any, model: torch.nn.Module | None) -> dict[str, Any]:
    file, section = _section(checkpoint, "optimizer", optimizer)
    saved, live, tensors = section["state_dict"], optimizer.state_dict(), checkpoint.tensors["optimizer"]
    sizes, live_sizes = ([len(group["params"]) for group in d["param_groups"]] for d in (saved, live))
    if sizes != live_sizes:
        _refuse(file, "optimizer", [f"has groups of {sizes} parameters, the live optimizer has {live_sizes}"])
    names = _parameter_names(optimizer, live, model)
    if model is not None and section["names"] is not None:
        pairs = enumerate(zip(section["names"], names.values(), strict=True))
        changed = [f"parameter {i} is {old!r}, in the live optimizer {new!r}" for i, (old, new) in pairs if old != new]
        _refuse(file, "optimizer", changed)

    state = {index: _resolve(file, entry, tensors) for index, entry in saved["state"].items()}
    if hasattr(optimizer, "check_state_dict"):
        try:
            optimizer.check_state_dict(saved | {"state": state})
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error
    else:  # before its first step an optimizer has no state, and nothing to compare with
        problems = []
        for index, entry in state.items():
            if entry and live["state"].get(index):
                problems += _differences(entry, live["state"][index], f"{names.get(index, index)}/")
        _refuse(file, "optimizer", problems)

    # load_state_dict may keep the tensors that it is given, so these must not be pages of a file: copy each once.
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    state = {index: _resolve(file, entry, owned) for index, entry in saved["state"].items()}
    return {**saved, "state": state}


# ---- the live objects as they were, should a load fail half-way ------------------------------------------------------


def _random_state() -> dict[str, Any]:
    # Asking for CUDA's would start CUDA, so a process that never used it has none.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}  # noqa: NPY002


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 (whichever generator the training uses)
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def _scheduler_undo(scheduler: Any) -> Callable[[], None]:
    attributes, state = dict(vars(scheduler)), copy.deepcopy(scheduler.state_dict())

    def undo() -> None:
        with contextlib.suppress(Exception):  # for schedulers within this one; it may refuse its own state, too
            scheduler.load_state_dict(state)
        vars(scheduler).clear()
        vars(scheduler).update(attributes)

    return undo


def _optimizer_undo(optimizer: Any) -> Callable[[], None]:
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

    return undo


def _model_undo(model: torch.nn.Module) -> Callable[[], None]:
    # The new tensors are mapped from the file, so this copy on the host is the only one.
    live = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    kept = {name: _raw(tensor).clone() for name, tensor in live.items()}

    @torch.no_grad()
    def undo() -> None:
        for name, tensor in live.items():
            if not torch.equal(_raw(tensor), kept[name]):  # an expanded tensor cannot be written, but is unchanged
                tensor.copy_(kept[name].view(tensor.dtype).reshape(tensor.shape))

    return undo
