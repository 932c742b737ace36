"""What an optimizer's state weighs, by what it is for, and the table that says so for each parameter."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbit_optim import shards
from lowbit_optim.optimizers.state import BASE, lent
from lowbit_optim.preconditioners.buckets import SIDES

KINDS = ("statistics", "roots", "bases", "moments", "scales", "counters", "other")

_COUNTERS = {"step", "nonfinite", "updates", "failures", "turns"}
_SCALES = {"scales", "scale_maxima", "ridge", "rest", "previous_norm", "absmax1", "absmax2", "qmap1", "qmap2"}
_OF_OTHERS = {"GG": "statistics", "Q": "bases"}  # SOAP, as its authors and others call them
# By the first part of a name in a factor's state. What "root", "logarithm" and "spiked" keep is statistic and root.
_OF_A_FACTOR = {
    "statistic": "statistics",
    "eigenvalues": "statistics",
    "eigenvectors": "statistics",
    "cholesky": "statistics",
    "error": "statistics",
    "root": "roots",
    "logarithm": "roots",
    "basis": "bases",
}


def kind_of(key: str, value: Tensor, parameter: Tensor) -> str:
    """Which of ``KINDS`` a tensor of a parameter's state is, by its name; of a name not known, by its shape."""
    first, *rest = key.removeprefix(BASE).split(".")
    last = rest[-1] if rest else first
    if last in _COUNTERS:
        return "counters"
    if last in _SCALES or (first in SIDES and last == "rms"):
        return "scales"
    if first in SIDES:
        return _OF_A_FACTOR.get(rest[0], "other")
    if first in _OF_OTHERS:
        return _OF_OTHERS[first]
    if first == "moment" or last == "codes" or value.shape == parameter.shape:
        return "moments"
    return "other"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors of a state's value: of lists and dicts, and those that a tensor subclass is made of."""
    for _, tensor in _named("", value):
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(tensor, name))
        else:
            yield tensor


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state's value with their names: in a dict its keys, in a list that of the list."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _named(str(key), part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _named(name, part)


def bytes_of_each(optimizer: Optimizer) -> dict[Tensor, dict[str, int]]:
    """For each parameter the bytes of its state by kind; what shares a storage counts once, where it comes first."""
    seen: set[int] = set()
    found: dict[Tensor, dict[str, int]] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        own = found[parameter] = dict.fromkeys(KINDS, 0)
        for key, value in optimizer.state.get(parameter, {}).items():
            for name, whole in _named(str(key), value):
                for storage in (tensor.untyped_storage() for tensor in tensors_in(whole)):
                    if storage._cdata not in seen:
                        seen.add(storage._cdata)
                        own[kind_of(name, whole, parameter)] += storage.nbytes()
    return found


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of a live optimizer's state, as it is now, on whatever devices; of any torch optimizer.

    Tensors that share a storage count once, and sharded ones with what this process has of them.

    Returns:
        Bytes by kind, and of them all:

        * "statistics": averages of which roots are made, in whatever form (dense, eigenvalues and eigenvectors,
          Cholesky factors with their error); what storage "spiked" keeps for both counts here;
        * "roots": inverse roots. Storages "root" and "logarithm" keep one matrix only, which is the statistic as well:
          it counts here, and "statistics" is 0;
        * "bases": eigenbases that SOAP and EKFAC keep beside the statistics;
        * "moments": of the first-order optimizer, values or codes, and EKFAC's; also whatever is not known by its name
          and has the shape of its parameter;
        * "scales": of all codes, and the traces, ridges and norms that are kept beside a factor;
        * "counters": of steps, updates and failures;
        * "other": the rest;
        * "total".

    Example:
        >>> import torch
        >>> from lowbit_optim import state_bytes
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> kinds = state_bytes(optimizer)
        >>> kinds["moments"], kinds["counters"], kinds["total"]
        (32768, 4, 32772)
    """
    kinds = dict.fromkeys(KINDS, 0)
    for own in bytes_of_each(optimizer).values():
        for kind, count in own.items():
            kinds[kind] += count
    return kinds | {"total": sum(kinds.values())}


def names_of(optimizer: Optimizer) -> list[str]:
    """The names of all parameters if the groups have them, else their indices in ``state_dict()``."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    names = [str(name) for group in optimizer.param_groups for name in group.get("param_names", ())]
    return names if len(set(names)) == count else [str(index) for index in range(count)]


def report(optimizer: Optimizer, treated: dict[Tensor, str] | None = None) -> str:
    """A table of every parameter: its shape, how it is treated, how its moments are kept, and the bytes of its state.

    Args:
        optimizer: this library's, or any other.
        treated: in words how each parameter is treated; None leaves that column out.

    Returns:
        Lines of plain text: one for each parameter, then totals by kind. Bytes are those of the state as it is: 0
        before the first step. Those of DTensors, and their bytes for each number, are of what this process has.

    Example:
        >>> import torch
        >>> from lowbit_optim.memory import report
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = torch.optim.AdamW([("weight", weight)])
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> print(report(optimizer))
        parameter  shape    moments   bytes  B/param
        ---------  -------  -------  ------  -------
        weight     64 x 64  32 bits  32,772     8.00
        <BLANKLINE>
        state      bytes  B/param
        --------  ------  -------
        moments   32,768    8.000
        counters       4    0.001
        total     32,772    8.001
    """
    weights = bytes_of_each(optimizer)
    rows = [["parameter", "shape", "preconditioner", "moments", "bytes", "B/param"]]
    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    for name, (parameter, group) in zip(names_of(optimizer), parameters, strict=True):
        count = sum(weights[parameter].values())
        shape = " x ".join(map(str, parameter.shape)) or "scalar"
        how = treated[parameter] if treated else ""
        moments, here = _moments(optimizer, parameter, group), shards.local(parameter).numel()
        rows.append([name, shape, how, moments, f"{count:,}", f"{count / max(1, here):.2f}"])
    if treated is None:
        rows = [row[:2] + row[3:] for row in rows]
    numbers = sum(shards.local(parameter).numel() for parameter, _ in parameters)
    kinds = state_bytes(optimizer)
    totals = [["state", "bytes", "B/param"]]
    totals += [[k, f"{n:,}", f"{n / max(1, numbers):.3f}"] for k, n in kinds.items() if n or k == "total"]
    return "\n".join([*aligned(rows, left=len(rows[0]) - 2), "", *aligned(totals, left=1)])


def aligned(rows: list[list[str]], left: int) -> list[str]:
    """Lines of a table under its first row, the header; the columns after the first ``left`` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [line.rstrip() for line in (lines[0], "  ".join("-" * w for w in widths), *lines[1:])]


def _moments(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> str:
    """In words how a first-order optimizer, or the base of a second-order one, keeps its moments of a parameter."""
    base = getattr(optimizer, "base", None)
    first_order, bits = (optimizer, group.get("bits")) if base is None else (base, group.get("base_bits"))
    own = optimizer.state.get(parameter, {})
    kept = {k: (v.shape, v.dtype) for k, v in (own if base is None else lent(own)).items() if isinstance(v, Tensor)}
    if hasattr(first_order, "layout"):
        kept = first_order.layout(parameter, group)
    elif not kept:
        return "not made yet"
    coded = [shape.numel() for key, (shape, _) in kept.items() if key.endswith(".codes")]
    if coded:
        return f"{8 * coded[0] // parameter.numel()} bits"
    numbers = [dtype for key, (shape, dtype) in kept.items() if shape == parameter.shape and key not in _COUNTERS]
    plain = {dtype.itemsize * 8 for dtype in numbers}
    said = f"{max(plain)} bits" if plain else "none"
    return said + _why_not(parameter, bits, group.get("min_quant_size", 0)) if plain else said


def _why_not(parameter: Tensor, bits: float | None, least: int) -> str:
    """Why moments of ``bits`` bits are kept in float32."""
    if bits is None or bits >= 32:
        return ""
    if parameter.numel() < least:
        return f": fewer than {least} elements"
    return ": a vector" if parameter.dim() < 2 else ": short rows"
