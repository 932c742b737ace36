"""The tensors of one safetensors file: written one at a time, tied ones once, codecs of low-bit state in the header."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

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


def storable(tensor: torch.Tensor) -> bool:
    # The bytes of a subclass (DTensor, a quantized wrapper) are not its value.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.dtype in DTYPE_NAMES


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order as a 1-D uint8 tensor on the CPU, sharing memory when it can."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)


def raw_view(tensor: torch.Tensor) -> memoryview:
    return raw_bytes(tensor).numpy().data


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Equal for tied tensors: the same elements of the same memory. None for an empty tensor, which has no memory."""
    if tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


class Stored(NamedTuple):
    """Stands for a tensor that is in a safetensors file, under this name."""

    name: str


class Pool:
    """The tensors of one file: tied ones once, under the name that came first."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[Any, str] = {}

    def put(self, name: str, value: Any) -> Any:
        """Keep a tensor and return what stands for it in trainer.json; anything else is returned as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if not storable(value):
            raise TypeError(
                f"{self.kind} tensor {name!r} is a {type(value).__qualname__} ({value.dtype}, {value.layout}, "
                f"{value.device}); a checkpoint holds dense tensors of {', '.join(map(str, DTYPE_NAMES))}"
            )
        key = memory_key(value)
        first = name if key is None else self.names.setdefault(key, name)
        if first == name:
            if name in self.tensors:
                raise ValueError(f"two {self.kind} tensors would be stored as {name!r}; rename the parameter")
            self.tensors[name] = value
        return Stored(first)

    def chunks(self, metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
        """The safetensors file, one tensor at a time: length of the header, the header (JSON), the data."""
        # Wide elements first, so that every tensor is aligned to its own element size.
        ordered = sorted(self.tensors.items(), key=lambda item: -item[1].element_size())
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, tensor in ordered:
            start, end = end, end + tensor.numel() * tensor.element_size()
            dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            yield raw_view(tensor)


def codec_metadata(optimizer: Any, names: dict[int, str]) -> dict[str, str]:
    """What a reader without this library needs to decode the state: the codec of each prefix, and the tables."""
    if not hasattr(optimizer, "state_codecs"):
        return {}
    codecs = {
        f"{names[index]}/{prefix}": codec
        for index, prefixes in optimizer.state_codecs().items()
        for prefix, codec in prefixes.items()
    }
    tables: dict[str, dict[str, list[float]]] = {}
    for name, bits in {used for codec in codecs.values() for used in _codebooks(codec)}:
        tables.setdefault(name, {})[str(bits)] = code_table(name, bits) or codebook(name, bits).tolist()
    return {"codecs": json.dumps(codecs), "codebooks": json.dumps(tables)}


def _codebooks(codec: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, bits) of every code table that a codec, or one within it, uses."""
    if codec.get("codebook") is not None:
        yield codec["codebook"], codec["bits"]
    for part in codec.values():
        if isinstance(part, dict):
            yield from _codebooks(part)
