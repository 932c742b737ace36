"""Values as JSON, with tags for what JSON lacks: integer keys, tuples, inf and nan, bytes, small tensors and arrays."""

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lowbit_optim.checkpoint.tensors import DTYPE_NAMES, DTYPES, Stored, raw_view, storable

_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}


def encode(value: Any, where: str) -> Any:
    """Return `value` as JSON that `decode` turns back into the same types and bits; `where` is for the message."""
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {"$float": str(value)}
    if kind is list:
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is tuple:
        return {"$tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if kind in _MAPPINGS.values():
        pairs = [[encode(key, f"a key of {where}"), encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {f"${kind.__name__}": pairs}
    if kind is Stored:
        return {"$stored": value.name}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is torch.Tensor and storable(value):
        data = base64.b64encode(raw_view(value)).decode()
        return {"$tensor": [DTYPE_NAMES[value.dtype], list(value.shape), data]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"$scalar": encode(np.asarray(value), where)}
    if kind is np.ndarray and value.dtype.kind in "biufc":
        return {"$array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    raise TypeError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; give numbers, strings, "
        "bytes, lists, tuples, dicts, dense tensors or numeric arrays"
    )


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item) for key, item in value.items()}
    content = value[tag]
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]({decode(key): decode(item) for key, item in content})
    if tag == "$tensor":
        dtype, shape, data = content
        flat = torch.empty(0, dtype=DTYPES[dtype])  # which frombuffer does not make
        if data:
            flat = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=flat.dtype)
        return flat.reshape(shape)
    if tag == "$array":
        dtype, shape, data = content
        return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    decoders: dict[str, Callable[[Any], Any]] = {
        "$float": float,
        "$tuple": lambda items: tuple(map(decode, items)),
        "$stored": _stored,
        "$bytes": base64.b64decode,
        "$scalar": lambda array: decode(array)[()],
    }
    return decoders[tag](content)


def _stored(name: Any) -> Stored:
    if type(name) is not str:
        raise TypeError(f"the name of a stored tensor is {name!r}")
    return Stored(name)
