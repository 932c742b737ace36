"""What is converted: the state dict of an optimizer of this library, and what it tells of the parameters."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_optim.optimizers.caspr import CASPRPreconditioner
from lowbit_optim.optimizers.ekfac import EKFACPreconditioner
from lowbit_optim.optimizers.first_order import FirstOrder
from lowbit_optim.optimizers.kfac import KFACPreconditioner
from lowbit_optim.optimizers.moments import moment_bits
from lowbit_optim.optimizers.settings import BASES, LOW_BIT_BASES, base_name
from lowbit_optim.optimizers.shampoo import ShampooPreconditioner
from lowbit_optim.optimizers.soap import SOAPPreconditioner
from lowbit_optim.optimizers.state import lent
from lowbit_optim.preconditioners.kronecker import KroneckerPreconditioner
from lowbit_optim.storage.small_floats import SmallFloats

Own = dict[str, Any]
Told = tuple[Mapping[int, Tensor], Mapping[int, Sequence[int]]]  # tensors and shapes of parameters, by their places

FIRST_ORDER = {base_name(kind): key for key, kind in LOW_BIT_BASES.items()}
_BASES = FIRST_ORDER | {base_name(kind): key for key, kind in BASES.items()}
_MOMENTS = {key: kind.moments for key, kind in LOW_BIT_BASES.items()}


def preconditioners() -> dict[str, KroneckerPreconditioner]:
    """By the class of the optimizer, as checkpoints name it; they know forms, and no layers."""
    kfac = KFACPreconditioner("expand")
    return {
        "lowbit_optim.Shampoo": ShampooPreconditioner(),
        "lowbit_optim.CASPR": CASPRPreconditioner(),
        "lowbit_optim.SOAP": SOAPPreconditioner(),
        "lowbit_optim.KFAC": kfac,
        "lowbit_optim.AdaBK": kfac,
        "lowbit_optim.EKFAC": EKFACPreconditioner("expand"),
    }


class ConversionError(Exception):
    """What is wrong with the command line or with what is to be converted, for the user to read."""


@dataclass
class Saved:
    """The state of an optimizer of this library, as in a checkpoint.

    Args:
        kind: package and class, as checkpoints name it.
        groups, state: of the state dict; "params" are the keys of ``state``.
        parameters: tensors of the parameters' shapes and dtypes, without memory of their own; of what is not known, of
            shape [0].
        notes: what was not carried over, or not as it was, for the user.
    """

    kind: str
    groups: list[dict[str, Any]]
    state: dict[int, Own]
    parameters: dict[int, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def first_order(self) -> bool:
        """Whether it is one of ``FIRST_ORDER``."""
        return self.kind in FIRST_ORDER

    def places(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, group) of each parameter."""
        return ((index, group) for group in self.groups for index in group["params"])

    def base(self, group: Mapping[str, Any]) -> str | None:
        """ "adamw", "sgd" or "adagrad": which optimizer the moments are of; None for a class of the user's."""
        return _BASES.get(self.kind if self.first_order else group["base"])

    def moments(self, index: int) -> Own:
        """What the first-order optimizer, or the base, keeps of a parameter, under its own names."""
        own = self.state.get(index, {})
        return dict(own) if self.first_order else lent(own)

    def note(self, text: str) -> None:
        """Say it once."""
        if text not in self.notes:
            self.notes.append(text)


def stand_in(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of that shape and dtype, whose numbers share one place in memory."""
    return torch.zeros((), dtype=dtype).expand(tuple(shape))


def parameters_of(groups: list[dict[str, Any]], state: Mapping[int, Own], told: Told) -> dict[int, Tensor]:
    """Stand-ins of all parameters: of those that are known, or else of what their shapes and moments tell."""
    known, shapes = told
    found = {}
    for group in groups:
        for index in group["params"]:
            own = state.get(index, {})
            own = lent(own) or own
            shape, dtype = shapes.get(index), torch.float32
            for name in (name for names in _MOMENTS.values() for name in names):
                if isinstance(moment := own.get(name), Tensor):
                    shape, dtype = moment.shape if shape is None else shape, moment.dtype
            if index in known:
                shape, dtype = known[index].shape, known[index].dtype
            found[index] = stand_in((0,) if shape is None else shape, dtype)
    return found


def decoded(saved: Saved, index: int, group: Mapping[str, Any]) -> Own:
    """The moments of a parameter as torch's optimizer has them: numbers in the place of codes."""
    own, shape = saved.moments(index), saved.parameters[index].shape
    numbers = {key: value for key, value in own.items() if "." not in key and key != "nonfinite"}
    for name, kind in _MOMENTS[saved.base(group) or ""].items():
        if f"{name}.codes" in own:
            form = SmallFloats(kind, moment_bits(group))
            wanted = form.layout(name, shape)
            if any(own[key].shape != size or own[key].dtype != dtype for key, (size, dtype) in wanted.items()):
                raise ConversionError(f"{name} of parameter {index} is not that of a parameter of shape {list(shape)}")
            numbers[name] = form.read(name, own, shape)
    return {key: value for key, value in numbers.items() if value is not None}


def base_of(saved: Saved, bits: list[int]) -> str:
    """The class of the base, as groups name it, that has moments of these bits.

    Raises:
        ConversionError: it is a class of the user's.
    """
    key = saved.base(saved.groups[0])
    if key is None:
        raise ConversionError(
            f"the base is {saved.groups[0]['base']}, and only moments of {', '.join(BASES)} have other bits: leave "
            "--base-bits out"
        )
    return base_name(BASES[key] if set(bits) == {32} else LOW_BIT_BASES[key])


def encoded(saved: Saved, numbers: Mapping[int, Own], kind: str, bits: list[int]) -> Optimizer:
    """The first-order optimizer, or the base, with these moments.

    Args:
        saved: whose groups and parameters it has.
        numbers: the state of each parameter, as ``decoded``.
        kind: one of the classes that have names, as groups name it.
        bits: of each group.

    Raises:
        ConversionError: bits that moments cannot have, or an option that those of few bits do not have.
    """
    made_as: Any = {base_name(k): k for classes in (BASES, LOW_BIT_BASES) for k in classes.values()}[kind]
    groups = []
    for group, own in zip(saved.groups, bits, strict=True):
        options = {k: v for k, v in group.items() if k not in ("bits", "base_bits", "base", "kept_as")}
        groups.append(options | ({"bits": own} if issubclass(made_as, FirstOrder) else {}))
    known = inspect.signature(made_as).parameters.keys()
    of_tensors = [
        {k: v for k, v in group.items() if k in known} | {"params": [saved.parameters[i] for i in group["params"]]}
        for group in groups
    ]
    try:
        made: Optimizer = made_as(of_tensors)
        made.load_state_dict({"state": dict(numbers), "param_groups": groups})
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConversionError(str(error)) from error
    for index, own in made.state_dict()["state"].items():
        before = saved.moments(index)
        if "nonfinite" in own and "nonfinite" in before:
            own["nonfinite"] = before["nonfinite"]
        if "momentum_buffer" in own and "nonfinite" not in own:
            own.pop("step", None)  # torch's SGD does not count
    return made
