"""The tensors of a checkpoint's safetensors files: tied ones once, of DTensors the rows, in files of some size."""

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch

from lowbit_optim.checkpoint.pieces import Piece, checked_layout
from lowbit_optim.checkpoint.ranks import ALONE, Ranks
from lowbit_optim.shards import is_dtensor, local
from lowbit_optim.storage.codebooks import codebook
from lowbit_optim.storage.small_floats import code_table

# fmt: off
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}
# fmt: on
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"  # in a safetensors header, beside the tensors


def storable(tensor: torch.Tensor) -> bool:
    # The bytes of a subclass (a quantized wrapper, say) are not its value.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.dtype in DTYPE_NAMES


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order on the CPU, in one copy whatever the tensor is."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order as a 1-D uint8 tensor on the CPU, sharing memory when it can."""
    tensor = tensor.detach()
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        tensor = host_copy(tensor)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)  # one number may have any stride


def raw_view(tensor: torch.Tensor) -> memoryview:
    return raw_bytes(tensor).numpy().data


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Equal for tied tensors: the same elements of the same memory. None for an empty tensor, which has no memory."""
    tensor = local(tensor)
    if tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


class Stored(NamedTuple):
    """Stands for a tensor that is in a safetensors file, under this name."""

    name: str


class Part(NamedTuple):
    """The content of one file: bytes, and then tensors."""

    head: bytes
    tensors: dict[str, torch.Tensor]


class Pool:
    """The tensors of one kind of file: tied ones once, under the name that came first.

    Args:
        ranks: that save together. Each has what it is to write: the first what is no DTensor, and all of a DTensor the
            rows that they have.
    """

    def __init__(self, kind: str, ranks: Ranks = ALONE) -> None:
        self.kind = kind
        self.ranks = ranks
        self.tensors: dict[str, torch.Tensor] = {}
        self.pieces: dict[str, Piece] = {}  # of the names in `tensors` those of rows
        self.names: dict[Any, str] = {}
        self.outline: dict[str, str] = {}  # of all names dtype, shape and placements, which all ranks must have
        self.tied: dict[str, str] = {}  # as this rank sees it: one without rows sees nothing

    def put(self, name: str, value: Any) -> Any:
        """Keep a tensor and return what stands for it in trainer.json; anything else is returned as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        own = local(value)
        if not storable(own):
            raise TypeError(
                f"{self.kind} tensor {name!r} is a {type(own).__qualname__} ({own.dtype}, {own.layout}, "
                f"{own.device}); a checkpoint holds dense tensors of {', '.join(map(str, DTYPE_NAMES))}"
            )
        layout = checked_layout(f"{self.kind} tensor {name!r}", value, self.ranks) if is_dtensor(value) else None
        self.outline[name] = f"{value.dtype} {list(value.shape)}" + (f" {layout.placements}" if layout else "")
        key = memory_key(own)
        first = name if key is None else self.names.setdefault(key, name)
        if first != name:
            self.tied[name] = first
            return Stored(first)
        count = len(value) if value.ndim else 1
        if not (layout.writes(count) if layout else self.ranks.first):
            return Stored(first)
        if layout is None or own.shape == value.shape:
            self._keep(name, own)
        else:
            row, _ = layout.rows(count)
            self._keep(f"{name}@{row}", own)
            self.pieces[f"{name}@{row}"] = Piece(name, list(value.shape), row)
        return Stored(first)

    def _keep(self, name: str, own: torch.Tensor) -> None:
        if name in self.tensors or name == METADATA:
            raise ValueError(f"the name {name!r} of a {self.kind} tensor is taken; rename the parameter")
        self.tensors[name] = own

    def parts(self, largest: int, metadata: Callable[[Collection[str]], dict[str, str]]) -> list[Part]:
        """The safetensors files in order, one at least but on other ranks than the first.

        Args:
            largest: a new file begins where tensors outgrow so many bytes.
            metadata: for the header of a file with tensors, or rows of tensors, of these names.
        """
        files: list[dict[str, torch.Tensor]] = [{}]
        size = 0
        for name, tensor in self.tensors.items():
            size += tensor.nbytes
            if size > largest and files[-1]:
                files.append({})
                size = tensor.nbytes
            files[-1][name] = tensor
        return [_part(own, self._metadata(own, metadata)) for own in files if own or self.ranks.first]

    def _metadata(self, own: Collection[str], metadata: Callable[[Collection[str]], dict[str, str]]) -> dict[str, str]:
        pieces = {name: self.pieces[name] for name in own if name in self.pieces}
        found = metadata([pieces[name].tensor if name in pieces else name for name in own])
        told = {"pieces": json.dumps({name: piece._asdict() for name, piece in pieces.items()})} if pieces else {}
        return found | told


def _part(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Part:
    # Wide elements first, so that every tensor is aligned to its own element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return Part(len(text).to_bytes(8, "little") + text, ordered)


def snapshot(parts: list[Part]) -> list[Part]:
    """The same with copies on the host, which training does not change."""
    return [Part(head, {name: host_copy(tensor) for name, tensor in tensors.items()}) for head, tensors in parts]


def codecs_of(optimizer: Any, names: dict[int, str]) -> dict[str, dict[str, Any]]:
    """The codec of every prefix of tensors of an optimizer's state; of its coded ones at least."""
    if not hasattr(optimizer, "state_codecs"):
        return {}
    return {
        f"{names[index]}/{prefix}": codec
        for index, prefixes in optimizer.state_codecs().items()
        for prefix, codec in prefixes.items()
    }


def codec_metadata(codecs: dict[str, dict[str, Any]], tensors: Collection[str]) -> dict[str, str]:
    """What a reader without this library needs to decode these tensors: their prefixes' codecs, and the tables."""
    if not codecs:
        return {}
    prefixes = {prefix for name in tensors for prefix in prefixes_of(name)}
    used = {prefix: codec for prefix, codec in codecs.items() if prefix in prefixes}
    tables: dict[str, dict[str, list[float]]] = {}
    for name, bits in sorted({table for codec in used.values() for table in _codebooks(codec)}):
        tables.setdefault(name, {})[str(bits)] = code_table(name, bits) or codebook(name, bits).tolist()
    return {"codecs": json.dumps(used), "codebooks": json.dumps(tables)}


def prefixes_of(name: str) -> Iterator[str]:
    """ "w/left.root.codes" to "w/left.root", "w/left"."""
    parameter, _, key = name.rpartition("/")
    while key := key.rpartition(".")[0]:
        yield f"{parameter}/{key}"


def _codebooks(codec: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, bits) of every code table that a codec, or one within it, uses."""
    if codec.get("codebook") is not None:
        yield codec["codebook"], codec["bits"]
    for part in codec.values():
        if isinstance(part, dict):
            yield from _codebooks(part)
