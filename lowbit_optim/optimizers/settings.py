"""What the keywords of a second-order optimizer may be."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from lowbit_optim.optimizers.adagrad import Adagrad
from lowbit_optim.optimizers.adamw import AdamW
from lowbit_optim.optimizers.first_order import FirstOrder
from lowbit_optim.optimizers.moments import check_group_of_moments
from lowbit_optim.optimizers.sgd import SGD
from lowbit_optim.preconditioners.kronecker import KroneckerPreconditioner
from lowbit_optim.storage import Quantization
from lowbit_optim.storage.budget import BITS, ONE_PERIOD
from lowbit_optim.storage.small_floats import MOMENT_BITS

BASES: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}
LOW_BIT_BASES: dict[str, type[FirstOrder]] = {"adamw": AdamW, "sgd": SGD, "adagrad": Adagrad}


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _number(accepts: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Real) and not isinstance(value, bool) and accepts(float(value))


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


_fraction = _number(lambda x: 0 <= x < 1)
_POSITIVE = ("a positive integer", _integer(1))
_NATURAL = ("an integer of at least 0", _integer(0))
_SWITCH = ("True or False", _boolean)

# keyword: (the rule in words, the rule)
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bits": (f"one of {', '.join(map(str, BITS))}", _number(lambda x: x in BITS)),
    "base_bits": (f"one of {', '.join(map(str, MOMENT_BITS))}", lambda x: _integer(1)(x) and x in MOMENT_BITS),
    "quantization": ("a Quantization or None", lambda x: x is None or isinstance(x, (Quantization, tuple, list))),
    "precondition": _SWITCH,
    "max_preconditioner_dim": _POSITIVE,
    "min_quant_size": _NATURAL,
    "statistics_frequency": _POSITIVE,
    "precondition_frequency": ("None or a positive integer", lambda x: x is None or _integer(1)(x)),
    "start_preconditioning_step": _POSITIVE,
    "shampoo_beta": ("None or in [0, 1)", lambda x: x is None or _fraction(x)),
    "factor_decay": ("in [0, 1)", _fraction),
    "matrix_eps": ("in (0, 1)", _number(lambda x: 0 < x < 1)),
    "damping": ("above 0 and finite", _number(lambda x: 0 < x < math.inf)),
    "damping_rule": ("'relative' or 'absolute'", lambda x: x in ("relative", "absolute")),
    "initial_scale": ("at least 0 and finite", _number(lambda x: 0 <= x < math.inf)),
    "statistic_limit": ("above 0", _number(lambda x: x > 0)),
    "root_power": _POSITIVE,
    "basis": ("'reflector' or 'eigen'", lambda x: x in ("reflector", "eigen")),
    "rectify_basis": _NATURAL,
    "rectify_update": _NATURAL,
    "rectify_root": _NATURAL,
    "orthogonal_iterations": _POSITIVE,
    "graft": _SWITCH,
    "apply_dtype": ("None or 'bfloat16'", lambda x: x in (None, "bfloat16")),
    "stagger": _SWITCH,
    "workspace": _POSITIVE,
}


# What says how state is kept; not every optimizer has every one of them.
KEPT_AS = (
    "storage",
    "bits",
    "quantization",
    "layout",
    "max_preconditioner_dim",
    "min_quant_size",
    "root_power",
    "damping_rule",
    "basis",
    "base_bits",
)
# What a state dict must share with the optimizer that loads it; its other settings come with it, as in any optimizer.
STORED = ("base", "bits", "storage", "quantization", "layout", "root_power", "damping_rule", "basis", "base_bits")


def check_group(group: Mapping[str, Any], preconditioner: KroneckerPreconditioner, low_bit_base: bool) -> None:
    """Raise ValueError if a group's settings, or two of them together, cannot be.

    Args:
        low_bit_base: whether the base is one of this library's.
    """
    if group.get("differentiable"):
        raise ValueError("differentiable=True: gradients are preconditioned in place, which autograd cannot go through")
    for key, (rule, holds) in RULES.items():
        if key in group and not holds(group[key]):
            raise ValueError(f"{key} is {group[key]!r}; it must be {rule}")
    if low_bit_base:
        check_group_of_moments(group)
    elif group["base_bits"] != 32:
        raise ValueError(
            f"a param group has base_bits={group['base_bits']}, but the base is {group['base']}: give base_bits to the "
            "constructor, with base='adamw', 'sgd' or 'adagrad', and base_bits=32 to the groups that want it"
        )
    if group.get("stagger") and group["storage"] not in ONE_PERIOD:
        raise ValueError(
            f"stagger=True, but storage {group['storage']!r} has another period for roots: leave stagger out, or take "
            f"storage {' or '.join(map(repr, ONE_PERIOD))}, whose roots come with the statistics"
        )
    refresh = group["precondition_frequency"]
    # Any order would do: asking for a form refuses unknown storages, layouts and codebooks, and bits they cannot hold.
    form = preconditioner.form({**group, "quantization": plain(group["quantization"])}, 64)
    if form.one_period and refresh not in (None, group["statistics_frequency"]):
        raise ValueError(
            f"precondition_frequency is {refresh}, but storage {group['storage']!r} has one period, "
            f"statistics_frequency ({group['statistics_frequency']}): leave precondition_frequency out"
        )


def plain(value: Any) -> Any:
    """A setting as param groups hold it: ``torch.load(weights_only=True)`` takes no class, and no number of numpy's."""
    if isinstance(value, Quantization):
        return astuple(value)
    if isinstance(value, np.generic):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def kept_as(key: str, value: Any) -> Any:
    """A setting as ``plain``, to be compared: older versions' codes had fewer fields."""
    return astuple(Quantization(*plain(value))) if key == "quantization" and value else plain(value)


def base_name(base: type[Optimizer]) -> str:
    """Package and class, as param groups keep it: modules inside a package move, and AdamW alone could be anybody's."""
    return f"{base.__module__.partition('.')[0]}.{base.__qualname__}"


def base_class(base: str | type[Optimizer], bits: Any) -> type[Optimizer]:
    """The optimizer class that ``base`` names or is, with moments of ``bits``; ValueError if there is none."""
    if isinstance(base, str) and base in BASES:
        return BASES[base] if bits == 32 else LOW_BIT_BASES[base]
    if bits != 32 and not (isinstance(base, type) and issubclass(base, FirstOrder)):
        raise ValueError(
            f"base_bits is {bits!r}, but base is {base!r}: only {', '.join(map(repr, BASES))} and the first-order "
            "optimizers of lowbit_optim have base_bits; leave it out, and give the base its own keywords"
        )
    if isinstance(base, type) and issubclass(base, Optimizer) and not _wants_more_gradients(base):
        return base
    raise ValueError(
        f"base is {base!r}; it must be one of {', '.join(map(repr, BASES))} or a subclass of torch.optim.Optimizer "
        "that steps without a closure"
    )


def _wants_more_gradients(base: type[Optimizer]) -> bool:
    """Whether a step asks for a closure (LBFGS), or for gradients at two points, as SAM's two halves of a step do."""
    parameters = list(inspect.signature(base.step).parameters.values())[1:]
    asks = any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return asks or hasattr(base, "first_step")


def check_base_keywords(
    optimizer: str, base: type[Optimizer], keywords: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise TypeError if the base does not know one of the keywords that the optimizer does not know either."""
    known = inspect.signature(base).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    unknown = keywords.keys() - known.keys()
    if unknown:
        raise TypeError(
            f"{optimizer} got the unknown keyword {', '.join(map(repr, sorted(unknown)))}. "
            f"It knows base, {', '.join(sorted(settings))}. "
            f"Its base {base.__name__} knows {', '.join(k for k in known if k != 'params')}"
        )
