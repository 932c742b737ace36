"""What a first-order step of ours takes of a parameter: its moments as they are kept, the rows that are here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbit_optim import shards
from lowbit_optim.optimizers.state import where
from lowbit_optim.storage.blockwise import rows_of
from lowbit_optim.storage.small_floats import MOMENT_BITS, SmallFloats, has_codes

COUNTERS = ("step", "nonfinite")
# Options of torch's optimizers that moments in codes do not have.
REFUSED = {
    "amsgrad": "keeps a running maximum, which rounding at random would raise step by step",
    "capturable": "would keep the step count on the device, and the host decides how codes are rounded",
    "differentiable": "would need a gradient of rounding",
}


def moment_bits(group: Mapping[str, Any]) -> int:
    """How many bits a group asks for; as a base's group it has the bits of factors, too."""
    return group.get("base_bits", group["bits"])


def moment_form(parameter: Tensor, group: Mapping[str, Any], kind: str) -> SmallFloats:
    """How a group keeps a moment of this kind of a parameter."""
    coded = has_codes(parameter.shape, parameter.dtype, group["min_quant_size"])
    return SmallFloats(kind, moment_bits(group) if coded else 32)


def rows_to_step(parameter: Tensor, group: Mapping[str, Any]) -> tuple[int, int]:
    """How our step views what this process has of a parameter.

    Any rows would do where nothing is coded, and short ones waste a block each.
    """
    coded = moment_form(parameter, group, "signed").bits < 32
    here = shards.local(parameter).shape
    return rows_of(here) if coded else (1, here.numel())


def placed_gradient(parameter: Tensor) -> Tensor:
    """The gradient, with its rows where the parameter's are."""
    gradient = parameter.grad
    assert gradient is not None
    if shards.is_dtensor(parameter) and not shards.alike(gradient, parameter):
        assert shards.is_dtensor(gradient)
        return gradient.redistribute(parameter.device_mesh, parameter.placements)
    return gradient


def check_placed(index: int, parameter: Tensor, own: Mapping[str, Any]) -> None:
    """Raise ValueError if a DTensor of a parameter's state is not placed as the parameter is."""
    for key, value in own.items():
        if shards.is_dtensor(value) and not shards.alike(value, parameter):
            raise ValueError(
                f"{where(index, parameter)}: {key} is a DTensor that is not placed as the parameter is; load whole "
                "tensors (full_tensor(), full_state_dict=True), or with torch.distributed.checkpoint"
            )


def check_rows(index: int, parameter: Tensor) -> None:
    """Raise ValueError if a parameter is a DTensor of which no process has whole rows."""
    if shards.is_dtensor(parameter) and not shards.in_rows(parameter):
        raise ValueError(
            f"{where(index, parameter)} is a DTensor placed as {parameter.placements}; moments of few bits, and those "
            "of bfloat16 and float16 parameters, are kept in whole rows: on every dim of the mesh Shard(0) or "
            "Replicate(), as fully_shard does. Place it so; or, if it is float32, give its group bits=32"
        )


def check_step(index: int, parameter: Tensor) -> None:
    """Raise ValueError or TypeError unless a parameter and its gradient can take a step of ours."""
    assert parameter.grad is not None
    check_rows(index, parameter)
    if is_traceable_wrapper_subclass(here := shards.local(parameter)):
        raise TypeError(
            f"{where(index, parameter)} is a {type(here).__qualname__}; moments of few bits are kept of plain tensors "
            "and of DTensors of them: give its group bits=32"
        )
    if shards.mesh_of(parameter.grad) != shards.mesh_of(parameter):
        raise TypeError(
            f"{where(index, parameter)} and its gradient are not on the same device mesh, but on "
            f"{shards.mesh_of(parameter)} and {shards.mesh_of(parameter.grad)}: a DTensor's gradient is a DTensor there"
        )
    if parameter.grad.layout != torch.strided:
        raise TypeError(
            f"{where(index, parameter)} has a gradient that is {parameter.grad.layout}; moments in codes need a dense "
            "one: build the embedding with sparse=False, or give its group bits=32"
        )


def check_group_of_moments(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group's settings of moments, or two of them together, cannot be."""
    name = "base_bits" if "base_bits" in group else "bits"
    bits = moment_bits(group)
    if not isinstance(bits, int) or bits not in MOMENT_BITS:
        raise ValueError(f"{name} is {bits!r}; moments have one of {', '.join(map(str, MOMENT_BITS))} bits")
    for option, why in REFUSED.items():
        if bits < 32 and group.get(option):
            raise ValueError(f"{option}=True {why}: it needs {name}=32")
    for key in {"min_quant_size", "seed"} & group.keys():
        if not isinstance(group[key], int) or isinstance(group[key], bool) or group[key] < 0:
            raise ValueError(f"{key} is {group[key]!r}; it must be an integer of at least 0")
