"""The state of an optimizer of this library at other bits, or in another storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_optim.conversion.saved import ConversionError, Own, Saved, base_of, decoded, encoded, preconditioners
from lowbit_optim.linalg import each, eigh, full_precision, matrix_power
from lowbit_optim.optimizers.first_order import FirstOrder
from lowbit_optim.optimizers.settings import KEPT_AS, LOW_BIT_BASES, check_group
from lowbit_optim.optimizers.state import BASE, check_tensors, given_back
from lowbit_optim.preconditioners.buckets import SIDES, Bucket, Forms
from lowbit_optim.preconditioners.kronecker import Group, KroneckerPreconditioner
from lowbit_optim.storage.basis import Basis
from lowbit_optim.storage.budget import ONE_PERIOD, STORAGES
from lowbit_optim.storage.factors import Direct, Factor, State, put, take
from lowbit_optim.storage.moment import Moment
from lowbit_optim.storage.spiked import Spiked

_ROOM = 2**24  # numbers of the matrices that are converted together

Codecs = dict[int, dict[str, dict[str, Any]]]
Turns = tuple[Tensor, Tensor]  # for each side the new basis transposed times the old one, [k, n, n]


@dataclass(frozen=True)
class Choices:
    """What is asked for.

    Args:
        bits: of factors, or of the moments of a first-order optimizer.
        storage: of factors. None: as it was, but "root" instead of "dense" below 32 bits.
        base_bits: of the moments under a preconditioner. None: as they were.
    """

    bits: float
    storage: str | None = None
    base_bits: int | None = None


@torch.no_grad()
def converted(saved: Saved, choices: Choices) -> tuple[Saved, Codecs]:
    """The same optimizer as it is asked for, and its ``state_codecs()``. Nothing of ``saved`` is changed.

    Raises:
        ConversionError: bits or a storage that cannot be, or state that is not of the settings beside it.
    """
    if saved.first_order:
        return _first_order(saved, choices)
    with full_precision():
        return _second_order(saved, choices)


def _first_order(saved: Saved, choices: Choices) -> tuple[Saved, Codecs]:
    if choices.storage is not None or choices.base_bits is not None:
        raise ConversionError(f"{saved.kind} has moments alone: give --bits, without --storage and --base-bits")
    bits = _whole(choices.bits)
    numbers = {index: decoded(saved, index, group) for index, group in saved.places() if index in saved.state}
    made = encoded(saved, numbers, saved.kind, [bits] * len(saved.groups))
    state_dict = made.state_dict()
    state: dict[int, Own] = {index: dict(own) for index, own in state_dict["state"].items()}
    for index, group in saved.places():
        if index in state and group["bits"] == bits:  # not coded twice
            state[index] = dict(saved.state[index])
    groups = [
        {**after, "params": before["params"]}
        for before, after in zip(saved.groups, state_dict["param_groups"], strict=True)
    ]
    return Saved(saved.kind, groups, state, saved.parameters, saved.notes), _codecs(made, state)


def _second_order(saved: Saved, choices: Choices) -> tuple[Saved, Codecs]:
    preconditioner = preconditioners()[saved.kind]
    bits = [choices.base_bits or group["base_bits"] for group in saved.groups]
    recoded = bits != [group["base_bits"] for group in saved.groups]
    base = base_of(saved, bits) if recoded else saved.groups[0]["base"]
    new = Saved(saved.kind, [], {}, saved.parameters, saved.notes)
    codecs: Codecs = {}
    turns: dict[int, Turns] = {}
    for group, base_bits in zip(saved.groups, bits, strict=True):
        changed = _regrouped(new, group, preconditioner, choices, {"base": base, "base_bits": base_bits})
        new.groups.append(changed)
        for index in group["params"]:
            if index not in saved.state:
                continue
            own = new.state[index] = dict(saved.state[index])
            if any(key.startswith("left.") for key in own):
                wide = saved.parameters[index].dtype == torch.float64
                try:
                    factors, codecs[index], turned = _factors(own, wide, group, changed, preconditioner)
                except (ValueError, KeyError, IndexError) as error:
                    raise ConversionError(f"parameter {index}: {error}") from error
                own = {k: v for k, v in own.items() if not k.startswith(tuple(f"{side}." for side in SIDES))}
                new.state[index] = own | factors
                if turned is not None:
                    turns[index] = turned
    if saved.kind != "lowbit_optim.SOAP":  # whose moments live in the bases
        turns = {}
    if recoded or turns or base.startswith("lowbit_optim."):
        _with_base(saved, new, (base, bits), recoded, turns, codecs)
    return new, codecs


def _whole(bits: float) -> Any:
    """4 for 4.0, as a group would have it."""
    return int(bits) if bits == int(bits) else bits


# ---- settings --------------------------------------------------------------------------------------------------------


def _regrouped(
    new: Saved,
    group: Group,
    preconditioner: KroneckerPreconditioner,
    choices: Choices,
    base: Mapping[str, Any],
) -> Group:
    """A group's settings with what is asked for, and what has to go with it."""
    bits, storage = _whole(choices.bits), choices.storage or group["storage"]
    if storage not in STORAGES:
        raise ConversionError(f"unknown storage {storage!r}; the storages are {', '.join(STORAGES)}")
    if storage == "dense" and bits != 32 and choices.storage is None:
        storage = "root"
    changed = {**group, "bits": bits, "storage": storage, **base}
    if group["quantization"] and bits != group["bits"]:
        changed["quantization"] = None
        new.note(f"quantization={tuple(group['quantization'])} was that of {group['bits']} bits; it is None now")
    if group["layout"] == "square" and _form(preconditioner, changed) is None:
        changed["layout"] = "triangle"
        new.note(f"layout='square' is 'triangle' now: storage {storage!r} has no other at {bits} bits")
    if group.get("stagger") and storage not in ONE_PERIOD:
        changed["stagger"] = False
        new.note(f"stagger=True is False now: roots of storage {storage!r} have a period of their own")
    _keep_period(new, group, changed, preconditioner)
    try:
        check_group(changed, preconditioner, changed["base"].startswith("lowbit_optim."))
    except (ValueError, KeyError) as error:
        raise ConversionError(str(error)) from error
    if "kept_as" in changed:
        changed["kept_as"] = tuple(changed.get(key) for key in KEPT_AS)
    return changed


def _form(preconditioner: KroneckerPreconditioner, group: Group) -> Any:
    """That of a factor, or None if the settings cannot be."""
    try:
        return preconditioner.form(group, 64)
    except ValueError:
        return None


def _keep_period(new: Saved, group: Group, changed: Group, preconditioner: KroneckerPreconditioner) -> None:
    """Let roots come as often as before, if the storage can have that."""
    form, period = _form(preconditioner, changed), group["precondition_frequency"]
    if not isinstance(form, Factor):  # bases turn when they are told to
        return
    if form.one_period and period not in (None, group["statistics_frequency"]):
        changed["precondition_frequency"] = None
        new.note(
            f"precondition_frequency={period} is None now: roots of storage {changed['storage']!r} come with the "
            f"statistics, every {group['statistics_frequency']} steps"
        )
    elif period is None and group["storage"] in ONE_PERIOD and changed["storage"] not in ONE_PERIOD:
        changed["precondition_frequency"] = group["statistics_frequency"]
        new.note(f"precondition_frequency=None is {group['statistics_frequency']} now: as often as roots came before")


# ---- factors ---------------------------------------------------------------------------------------------------------


def _factors(
    own: Own, wide: bool, group: Group, changed: Group, preconditioner: KroneckerPreconditioner
) -> tuple[State, dict[str, dict[str, Any]], Turns | None]:
    """Both factors of a parameter, and EKFAC's moment.

    Args:
        own: the parameter's state.
        wide: whether the parameter is float64.

    Returns:
        (the tensors, how they are coded, how the bases turned; None where they did not).
    """
    states = {side: take(side, own) for side in SIDES}
    wide = wide or any(part.dtype == torch.float64 for state in states.values() for part in state.values())
    dtype = torch.float64 if wide else torch.float32
    coded = preconditioner.form(group, _ROOM)  # of any factor that is not too small for codes
    coded = coded.factor if isinstance(coded, Basis) else coded
    orders = {side: _order(state, coded) for side, state in states.items()}
    old, new = (
        Forms(preconditioner.form(settings, orders["left"]), preconditioner.form(settings, orders["right"]))
        for settings in (group, changed)
    )
    for side, form in old.sides():
        expected = form.init(len(states[side]["updates"]), orders[side], dtype, "meta")
        if states[side].keys() != expected.keys():
            wrong = ", ".join(sorted(states[side].keys() ^ expected.keys()))
            raise ValueError(f"its {side} factor and the settings do not have the same tensors: {wrong}")
        layout = {name: (part.shape, part.dtype) for name, part in expected.items()}
        check_tensors(f"its {side} factor", states[side], layout)
    part = Bucket(old, True, False, False, _ROOM, dtype, dtype)
    dampings = preconditioner.dampings(part, list(states.values()), (None, None))
    factors: State = {}
    turns = []
    for (side, before), (_, after), damping in zip(old.sides(), new.sides(), dampings, strict=True):
        state, turn = _factor(before, after, states[side], orders[side], dtype, damping)
        factors |= put(side, state)
        turns.append(turn)
    turned = None
    if any(turn is not None for turn in turns):
        left, right = (
            torch.eye(order, dtype=dtype).expand(len(states["left"]["updates"]), -1, -1) if turn is None else turn
            for turn, order in zip(turns, orders.values(), strict=True)
        )
        turned = left, right
        if moment := take("moment", own):
            follow = Moment(group["factor_decay"], group["damping"])
            factors |= put("moment", follow.turn(moment, left, right))
    return factors, {side: form.describe() for side, form in new.sides()}, turned


def _order(state: State, coded: Any) -> int:
    """n of a factor, which its tensors tell; ``coded`` is its form, if it has codes."""
    if "rest" in state and isinstance(coded, Spiked):  # which has fewer eigenvalues
        return coded.order(state)
    for name, part in state.items():
        if name in ("statistic", "eigenvalues") or name.endswith(".diagonal"):
            return part.shape[-1]
    raise ValueError(f"a factor has the tensors {', '.join(sorted(state))}, which no storage has")


def _factor(
    old: Any, new: Any, state: State, order: int, dtype: torch.dtype, damping: Tensor | None
) -> tuple[State, Tensor | None]:
    """A factor's state in another form, and how its basis turned."""
    if old == new:
        return state, None
    if not isinstance(old, Basis):
        return _held(old, new, state, order, dtype, damping), None
    kept = state if old.factor == new.factor else _held(old.factor, new.factor, state, order, dtype, None)
    kept = {name: part for name, part in kept.items() if name in new.init(1, order, dtype, "meta")}
    kept |= {"turns": state["turns"]} | put("basis", take("basis", state))
    if (old.vectors, old.rectifications) == (new.vectors, new.rectifications):
        return kept, None
    basis = old.root(state, dtype)
    kept = {name: part for name, part in kept.items() if not name.startswith("basis.")}
    kept |= put("basis", new.vectors.encode(basis))
    return kept, new.root(kept, dtype).mT @ basis


def _held(old: Factor, new: Factor, state: State, order: int, dtype: torch.dtype, damping: Tensor | None) -> State:
    """The statistics of blocks in another form, with their roots; a few blocks at a time."""
    run, blocks = max(1, _ROOM // order**2), len(state["updates"])
    found = []
    for i in range(0, blocks, run):
        own = {name: part[i : i + run] for name, part in state.items()}
        found.append(_held_together(old, new, own, order, dtype, None if damping is None else damping[i : i + run]))
    return {name: torch.cat([own[name] for own in found]) for name in found[0]}


def _held_together(
    old: Factor, new: Factor, state: State, order: int, dtype: torch.dtype, damping: Tensor | None
) -> State:
    a = old.statistic(state, dtype)
    if isinstance(old, Direct) and old.codec.codec is not None:  # rounding made it indefinite
        values, vectors, _ = eigh(a)
        a = matrix_power(values.clamp(min=0), vectors, 1.0)
    had = state["updates"] > 0
    held, fresh = new.holding(a, damping), new.init(len(a), order, dtype, a.device)
    if bool((had & (held["failures"] > 0)).any()):
        raise ValueError("a statistic cannot be decomposed, or is too large or too small for the new form")
    kept = {name: torch.where(each(had, part), part, fresh[name]) for name, part in held.items()}
    return kept | {name: state[name] for name in ("updates", "previous_norm", "failures")}


# ---- moments ---------------------------------------------------------------------------------------------------------


def _with_base(
    saved: Saved,
    new: Saved,
    base: tuple[str, list[int]],
    recoded: bool,
    turns: Mapping[int, Turns],
    codecs: Codecs,
) -> None:
    """Give ``new`` the base's moments: recoded, turned with the bases, or as they were; and their codecs.

    Args:
        base: the class, and the bits of each group.
    """
    numbers = {index: decoded(saved, index, group) for index, group in saved.places() if index in saved.state}
    for index, (left, right) in turns.items():
        if "exp_avg" in numbers[index]:
            moment = numbers[index]["exp_avg"]
            matrix = moment.reshape(left.shape[-1], right.shape[-1]).to(left.dtype)
            numbers[index]["exp_avg"] = (left[0] @ matrix @ right[0].mT).reshape(moment.shape).to(moment.dtype)
    made = encoded(saved, numbers, *base)
    for index, own in made.state_dict()["state"].items():
        taken = given_back(own)
        if recoded:
            new.state[index] = {k: v for k, v in new.state[index].items() if not k.startswith(BASE)} | taken
        elif index in turns:  # nothing else is coded twice
            new.state[index] |= {k: v for k, v in taken.items() if k.split(".")[1] == "exp_avg"}
    for index, of_moments in _codecs(made, new.state).items():
        codecs.setdefault(index, {}).update(given_back(of_moments))
    if recoded:
        ours = set(made.own) if isinstance(made, FirstOrder) else set()
        only_ours = {key for kind in LOW_BIT_BASES.values() for key in kind.own} - {"bits", "min_quant_size"} - ours
        for group, of_base in zip(new.groups, made.param_groups, strict=True):
            for key in only_ours:
                group.pop(key, None)
            group.update({key: value for key, value in of_base.items() if key not in group and key != "params"})


def _codecs(made: Optimizer, state: Mapping[int, Own]) -> Codecs:
    if not isinstance(made, FirstOrder):
        return {}
    return {index: codecs for index, codecs in made.state_codecs().items() if index in state}
