"""The command `inspect`: what a checkpoint holds, from the headers of its files alone unless it is to be verified."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit_optim.checkpoint.manifest import CheckpointError, read_manifest
from lowbit_optim.checkpoint.pieces import Piece
from lowbit_optim.checkpoint.reading import Place, codecs_in, header_of, opened, pieces_in, read, trainer_of
from lowbit_optim.checkpoint.rotation import newest_in
from lowbit_optim.checkpoint.tensors import DTYPE_NAMES
from lowbit_optim.optimizers.report import aligned
from lowbit_optim.preconditioners.buckets import SIDES
from lowbit_optim.storage.spiked import order_of

_PARTS = {"codes", "scales", "scale_maxima", "diagonal", "values"}  # of one matrix or moment
_SQUARES = {"statistic", "eigenvectors", "cholesky", "root", "logarithm", "basis"}  # matrices of a factor
_BESIDE = {"rms", "ridge", "eigenvalues", "rest", "error"}  # what a dense factor does without


@dataclass
class Row:
    """A tensor of a checkpoint.

    Args:
        kind: of its file: "model", "optimizer".
        name: as in the file.
        parameter, key: the parts of the name of an optimizer's tensor; of another, the name and "".
        dtype: as safetensors says it.
        shape, bytes: of what is stored.
        bits: of each code; None where nothing is coded.
        codec: in words, how it is coded; None where it is not.
        dense_bytes: of the same content in float32: moments as numbers, factors as full squares, statistic and root.
    """

    kind: str
    name: str
    parameter: str
    key: str
    dtype: str
    shape: list[int]
    bytes: int
    bits: float | None = None
    codec: str | None = None
    dense_bytes: int = 0


def inspect(path: Path, verify: bool = False) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        path: its folder.
        verify: check every file against its checksums. Else headers and trainer.json alone, and no tensor is read.

    Returns:
        JSON-able: "path", "verified", "library_version", "step", "optimizer" and "scheduler" (class names or None),
        "settings" (numbers, strings and switches of the first group), "tensors" (as ``Row``), "totals" (by
        kind and key: "kind", "key", "tensors", "bytes", "dense_bytes", "ratio").

    Raises:
        CheckpointError: it is no checkpoint, or a damaged one.
    """
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; inspect reads folders that save_checkpoint wrote. `lowbit-optim convert` reads files "
            "of torch.save, and writes such a folder"
        )
    folder = newest_in(path)
    if verify:
        read(folder)
    found: dict[tuple[str, str], Row] = {}
    codecs: dict[str, Any] = {}
    head: dict[str, Any] = {"path": str(folder), "verified": verify, "library_version": None}
    for kind, entries in read_manifest(folder).items():
        for entry in entries:
            with opened(folder / entry.name, entry) as source:
                if kind == "trainer":
                    head |= _trainer(trainer_of(source, entry))
                elif kind != "random":
                    places, metadata = header_of(source, entry)
                    head["library_version"] = metadata.get("library_version", head["library_version"])
                    codecs |= codecs_in(metadata)
                    _add_rows(found, kind, places, pieces_in(metadata, places))
    rows = [*found.values()]
    _explain(rows, codecs)
    return head | {"tensors": [asdict(entry) for entry in rows], "totals": _totals(rows)}


def run(path: Path, verify: bool = False, as_json: bool = False) -> int:
    """Print what a checkpoint holds; return the exit code."""
    found = inspect(path, verify)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        for line in _lines(found):
            print(printable(line))
    return 0


def printable(text: str) -> str:
    """Text with escapes in the place of all that is not printable: a file must not talk to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _add_rows(
    found: dict[tuple[str, str], Row], kind: str, places: Mapping[str, Place], pieces: Mapping[str, Piece]
) -> None:
    """Add the tensors of a file; one in pieces is one row, with the bytes of all of them."""
    for own_name, place in places.items():
        name, shape, _ = pieces.get(own_name, Piece(own_name, place.shape, 0))
        parameter, _, key = name.rpartition("/") if kind == "optimizer" else (name, "", "")
        row = found.setdefault((kind, name), Row(kind, name, parameter, key, DTYPE_NAMES[place.dtype], shape, 0))
        row.bytes += place.size
        row.dense_bytes = row.bytes


def _trainer(found: Mapping[str, Any]) -> dict[str, Any]:
    """Step, classes and settings."""
    optimizer, scheduler = found["optimizer"], found["scheduler"]
    groups = optimizer["state_dict"]["param_groups"] if optimizer else []
    group = groups[0] if groups else {}
    return {
        "step": found["step"] if type(found["step"]) is int else None,
        "optimizer": str(optimizer["class"]) if optimizer else None,
        "scheduler": str(scheduler["class"]) if scheduler else None,
        "settings": {str(k): v for k, v in group.items() if type(v) in (str, bool, int) or _is_finite(v)},
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


# ---- what it means ---------------------------------------------------------------------------------------------------


def _explain(entries: list[Row], codecs: Mapping[str, Any]) -> None:
    """Say of an optimizer's tensors how they are coded, and what they would be in full."""
    owners: dict[tuple[str, str], list[Row]] = {}
    for entry in entries:
        if entry.kind == "optimizer" and entry.key not in SIDES:  # a user's own key; ours are side.name
            owners.setdefault((entry.parameter, _owner(entry.key)), []).append(entry)
    numbers = {entry.name: math.prod(entry.shape) for entry in entries if entry.kind == "model"}
    for (parameter, owner), own in owners.items():
        codec = codecs.get(f"{parameter}/{owner}")
        codec = codec if isinstance(codec, dict) else {}
        if owner in SIDES:
            _explain_factor(own, codec)
        elif any(_last(entry.key) == "codes" for entry in own):
            _explain_moment(own, codec, numbers.get(parameter))


def _owner(key: str) -> str:
    """What the tensors of a factor, or of a moment, have in common."""
    side, _, name = key.partition(".")
    return side if side in SIDES and name else _matrix(key)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _matrix(key: str) -> str:
    """Of a matrix or a moment, whichever part of it that is."""
    return key.rpartition(".")[0] if _last(key) in _PARTS else key


def _explain_factor(own: list[Row], codec: Mapping[str, Any]) -> None:
    form = str(codec["form"]) if "form" in codec else None
    matrices = {entry.name: entry.key.split(".")[1] for entry in own}
    names = set(matrices.values())
    order = next((e.shape[-1] for e in own if _last(e.key) in ("diagonal", "eigenvalues", "statistic") and e.shape), 0)
    if "rest" in names:  # which has fewer eigenvalues
        shapes = {entry.key.partition(".")[2]: entry.shape for entry in own}
        with suppress(KeyError, IndexError, ZeroDivisionError):  # of a file that nobody here has written
            order = order_of(shapes, (_quantization(codec, "eigenvectors") or {}).get("bits"))
    # A form with one matrix stands for the statistic and the root, but beside a basis, where nobody asks for a root.
    alone = "rms" in names and "basis" not in names
    counted = set()
    for entry in own:
        name = matrices[entry.name]
        entry.codec = form
        if name in _BESIDE:
            entry.dense_bytes = 0
        elif name in _SQUARES and entry.shape:
            squares = 0 if name in counted else 2 if alone else 1
            entry.dense_bytes = squares * entry.shape[0] * order * order * 4
            counted.add(name)
        if _last(entry.key) == "codes" and entry.shape:
            quantization = _quantization(codec, name)
            if quantization is not None:
                entry.bits, entry.codec = quantization["bits"], f"{form}, {_codec(quantization)}"
            else:  # of a basis, which the header does not tell: from its size
                in_rows = math.prod(entry.shape[:-1]) > entry.shape[0]
                entry.bits = 8 * entry.shape[-1] // max(1, order if in_rows else order * (order - 1) // 2)


def _quantization(codec: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """That of a matrix of a factor, from what ``Factor.describe`` says."""
    part: Any = codec.get("vectors") if name == "eigenvectors" else None if name == "basis" else codec
    while isinstance(part, dict):
        if isinstance(part.get("bits"), int):
            return part
        part = part.get("codec")
    return None


def _explain_moment(own: list[Row], codec: Mapping[str, Any], numbers: int | None) -> None:
    for entry in own:
        entry.dense_bytes = 0
        entry.codec = _codec(codec) if codec else None
        bits = codec.get("bits")
        if _last(entry.key) == "codes" and isinstance(bits, int) and bits > 0:
            entry.bits = bits
            entry.dense_bytes = 4 * (math.prod(entry.shape) * 8 // bits if numbers is None else numbers)


def _codec(codec: Mapping[str, Any]) -> str:
    block = f", blocks of {codec['block_size']}" if "block_size" in codec else ""
    details = ", coded scales" * bool(codec.get("double")) + ", adaptive" * (codec.get("rounding") == "adaptive")
    return f"{codec.get('codebook')}-{codec.get('bits')}{block}{details}"


def _totals(entries: list[Row]) -> list[dict[str, Any]]:
    """By kind and state key, then of each kind and of all."""
    sums: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        key = _matrix(entry.key) if entry.kind == "optimizer" else ""
        places = [(entry.kind, key)] * bool(key) + [(entry.kind, "all"), ("all", "")]
        for place in places:
            own = sums.setdefault(place, [0, 0, 0])
            own[0] += 1
            own[1] += entry.bytes
            own[2] += entry.dense_bytes
    order = sorted(sums, key=lambda place: (place[0] == "all", place[0], place[1] == "all", place[1]))
    return [
        {
            "kind": kind,
            "key": key,
            "tensors": sums[kind, key][0],
            "bytes": sums[kind, key][1],
            "dense_bytes": sums[kind, key][2],
            "ratio": sums[kind, key][1] / sums[kind, key][2] if sums[kind, key][2] else None,
        }
        for kind, key in order
    ]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    checked = "every checksum holds" if found["verified"] else "headers alone were read: --verify checks the checksums"
    yield f"{found['path']}: written by lowbit-optim {found['library_version']}; {checked}"
    yield f"step {found['step']}, optimizer {found['optimizer']}, scheduler {found['scheduler']}"
    if found["settings"]:
        yield ", ".join(f"{key}={value!r}" for key, value in found["settings"].items())
    yield ""
    head = ["kind", "tensor", "dtype", "shape", "codec", "bits", "bytes"]
    rows = [
        [
            *(_text(entry[key]) for key in ("kind", "name", "dtype")),
            " x ".join(map(str, entry["shape"])) or "-",
            _text(entry["codec"]),
            _text(entry["bits"]),
            f"{entry['bytes']:,}",
        ]
        for entry in found["tensors"]
    ]
    yield from aligned([head, *rows], left=5)
    yield ""
    head = ["kind", "key", "tensors", "bytes", "in float32", "ratio"]
    rows = [
        [
            _text(total["kind"]),
            _text(total["key"] or "-"),
            f"{total['tensors']:,}",
            f"{total['bytes']:,}",
            f"{total['dense_bytes']:,}",
            "-" if total["ratio"] is None else f"{total['ratio']:.4f}",
        ]
        for total in found["totals"]
    ]
    yield from aligned([head, *rows], left=2)
    yield ""
    yield "in float32: moments as numbers; of each factor a full square of the statistic, and one of the root or basis"


def _text(value: Any) -> str:
    """A cell; escaped here, for its width counts."""
    return "-" if value is None else printable(str(value))
