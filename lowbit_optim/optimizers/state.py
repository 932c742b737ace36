"""A second-order optimizer's state: what of it is the base's, where its tensors belong, how they pass through torch."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Layout = Mapping[str, tuple[torch.Size, torch.dtype]]

BASE = "base."

LISTED_TWICE = (
    "a param group has the same parameter twice, and every step would count twice: list each parameter once, as "
    "model.parameters() does"
)

# What has the parameter's shape.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")

# Without these the base cannot go on; what other bases keep is not known.
_NEEDED = {"torch.AdamW": {"step", "exp_avg", "exp_avg_sq"}, "torch.Adagrad": {"step", "sum"}}


def lent(own: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parameter's state the base's, by the base's own keys."""
    return {key.removeprefix(BASE): value for key, value in own.items() if key.startswith(BASE)}


def without_base(own: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parameter's state the preconditioner's."""
    return {key: value for key, value in own.items() if not key.startswith(BASE)}


def given_back(own: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``lent``."""
    return {f"{BASE}{key}": value for key, value in own.items()}


def base_part(state_dict: Mapping[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """A state dict without the preconditioner's state, and without the settings ``ours`` of its groups."""
    state = {index: lent(own) for index, own in state_dict["state"].items()}
    return {
        "state": {index: own for index, own in state.items() if own},
        "param_groups": [{k: v for k, v in group.items() if k not in ours} for group in state_dict["param_groups"]],
    }


def check_base_part(state_dict: Mapping[str, Any], base: str, defaults: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state dict is one of the base, whose options have these defaults."""
    needed = {key for key, default in defaults.items() if default is not None and not isinstance(default, bool)}
    for group in state_dict["param_groups"]:
        if "base" in group:
            raise ValueError(
                "the state dict is that of a second-order optimizer: load_state_dict takes all of it, and "
                "base_state_dict() of that optimizer is what load_base_state_dict takes"
            )
        if missing := needed - group.keys():
            lacks = ", ".join(sorted(missing))
            raise ValueError(f"the state dict's param groups lack {lacks}: it is not of the base, {base}")
    for index, own in state_dict["state"].items():
        if own and (missing := _NEEDED.get(base, set()) - own.keys()):
            lacks = ", ".join(sorted(missing))
            raise ValueError(f"the state of parameter {index} lacks {lacks}: it is not of the base, {base}")


def where(index: int, parameter: Tensor) -> str:
    """How a message names a parameter."""
    return f"parameter {index} of shape {tuple(parameter.shape)}"


def check_moments(index: int, parameter: Tensor, own: Mapping[str, Any]) -> None:
    """Raise ValueError if the base's state of a parameter has moments of another shape."""
    for key in _MOMENTS:
        moment = own.get(key)
        if isinstance(moment, Tensor) and moment.shape != parameter.shape:
            raise ValueError(f"{where(index, parameter)}: its {key} in the state dict is {list(moment.shape)}")


def check_shards(name: str, own: Mapping[str, Any], layout: Layout) -> None:
    """Raise ValueError if factors are of blocks inside the shards of other ranks than the layout's, or of none."""
    key = "left.failures"  # a row for each rank where blocks are inside shards
    wanted_shape = layout[key][0] if key in layout else torch.Size()
    shapes: list[Any] = [getattr(own.get(key), "shape", ()), wanted_shape]
    ranks = [shape[0] if len(shape) == 2 else 0 for shape in shapes]
    if ranks[0] != ranks[1]:
        given, wanted = (f"shards='local' on {n} ranks" if n else "whole parameters" for n in ranks)
        raise ValueError(
            f"{name}: the factors in the state dict are those of {given}, the optimizer's those of {wanted}. Blocks "
            "inside shards go with the number of ranks that have them: load them there; or make a new optimizer, whose "
            "factors start anew, and keep the moments: new.load_base_state_dict(old.base_state_dict())"
        )


def check_tensors(name: str, own: Mapping[str, Any], layout: Layout) -> None:
    """Raise ValueError unless a parameter's state has the tensors of a layout in their shapes and dtypes."""
    for key, (shape, dtype) in layout.items():
        got = own[key]
        if not isinstance(got, Tensor) or got.shape != shape or got.dtype != dtype:
            got = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(f"{name}: {key} is {got}; it must be {dtype} {list(shape)}")


def rebuild(kind: type[Optimizer], attributes: dict[str, Any], groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer with the attributes of another, over these groups, without state."""
    base = kind.__new__(kind)
    vars(base).update(attributes)
    base.__setstate__({"state": defaultdict(dict), "param_groups": groups})
    return base


class Sealed:
    """A state value that ``Optimizer.load_state_dict`` passes on as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def open(self, device: torch.device) -> Any:
        """The value; a tensor as a copy on ``device``, so that two optimizers never share state."""
        return self.value.detach().to(device, copy=True) if isinstance(self.value, Tensor) else self.value


def sealed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose state torch leaves as it is: it casts every tensor to the parameter's dtype."""
    state = {index: {k: Sealed(v) for k, v in own.items()} for index, own in state_dict["state"].items()}
    return {**state_dict, "state": state}


def opened(own: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with what was sealed, where it belongs."""
    return {k: v.open(home(k, v.value, parameter, group, own)) if isinstance(v, Sealed) else v for k, v in own.items()}


def check_groups(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless a state dict has groups of as many parameters as these."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"a state dict has 'state' and 'param_groups'; this one has {sorted(state_dict)}")
    sizes, saved = ([len(g["params"]) for g in x] for x in (groups, state_dict["param_groups"]))
    if sizes != saved:
        raise ValueError(
            f"the state dict has param groups of sizes {saved}; the optimizer's are {sizes}: give it the "
            "parameters in the same groups, in the same order"
        )


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's ``step`` without its hooks, where another's step has fired the global ones already."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor on a device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def home(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any], own: Mapping[str, Any]) -> torch.device:
    """Where a tensor of a parameter's state belongs: with the parameter, but counters of steps on the CPU.

    Torch's own optimizers want theirs on the device if they are fused or capturable; ours count "nonfinite", too.
    """
    counts = key in ("step", f"{BASE}step") and isinstance(value, Tensor) and value.dim() == 0
    ours = key.replace("step", "nonfinite") in own
    on_cpu = counts and (ours or not (group.get("capturable") or group.get("fused")))
    return torch.device("cpu") if on_cpu else parameter.device
