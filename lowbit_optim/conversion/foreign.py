"""State dicts of other libraries as those of this library's 32-bit optimizers.

Each layout is described in docs/convert.md, and read here from plain tensors, lists and numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_optim.conversion.saved import (
    FIRST_ORDER,
    ConversionError,
    Own,
    Saved,
    Told,
    decoded,
    encoded,
    parameters_of,
)
from lowbit_optim.linalg import full_precision, trace
from lowbit_optim.optimizers.caspr import CASPR
from lowbit_optim.optimizers.settings import LOW_BIT_BASES, base_name
from lowbit_optim.optimizers.shampoo import Shampoo
from lowbit_optim.optimizers.soap import SOAP
from lowbit_optim.optimizers.state import given_back
from lowbit_optim.storage.factors import put

LAYOUTS = (
    "torch's AdamW, Adam, SGD and Adagrad, AdamW8bit of bitsandbytes, SOAP as its authors wrote it, and Shampoo with "
    "'statistics' (see docs/convert.md)"
)
NESTED = ("optimizer", "optimizer_state_dict", "optim")  # where training checkpoints have it
COORDINATES = ("eigenbasis", "parameter")
SECOND_ORDER: dict[str, type[Shampoo]] = {"shampoo": Shampoo, "caspr": CASPR}  # that moments can be put under

OF_FACTORS = ("GG", "Q", "statistics", "preconditioners")

_BNB_NESTED = "__bnb_optimizer_quant_state__"
_BNB_BLOCKS = (256, 2048)  # numbers that share a scale, now and before version 0.44
_OF_TORCH = {"adamw": {"betas", "amsgrad"}, "sgd": {"momentum", "dampening"}, "adagrad": {"lr_decay"}}
_OF_ADAMW = ("lr", "initial_lr", "betas", "eps", "weight_decay")
# Of the paper's Shampoo, where a group does not say.
_SHAMPOO = {
    "statistics_frequency": ("stat_compute_steps", 100),
    "precondition_frequency": ("prec_compute_steps", 500),
    "start_preconditioning_step": ("start_prec_step", 1),
    "shampoo_beta": ("stat_decay", 0.95),
    "matrix_eps": ("matrix_eps", 1e-6),
    "initial_scale": ("matrix_eps", 1e-6),
    "max_preconditioner_dim": ("prec_maxorder", 1200),
}
_SOAP_SWITCHES = {"merge_dims": False, "precondition_1d": False, "normalize_grads": False, "correct_bias": True}


def read(loaded: Any, soap_moments: str, told: Told) -> Saved:
    """The optimizer in what a file of torch.save holds, or in a checkpoint of ours that has one of torch.

    Args:
        loaded: a state dict, or a dict that has one under one of ``NESTED``.
        soap_moments: one of ``COORDINATES``: in which SOAP's "exp_avg" is. It is in the eigenbases in the authors'
            present code, and in those of the parameter in their first; a state dict does not tell.
        told: what else is known of the parameters.

    Raises:
        ConversionError: a layout that is not known, or state that is not of its layout.
    """
    state, groups, notes = unpacked(loaded)
    keys = {key for own in state.values() for key in own}
    options = {key for group in groups for key in group}
    if "kept_as" in options or any(str(key).endswith(".codes") for key in keys):
        raise ConversionError(
            "it is a state dict of an optimizer of this library, and does not say of which: save it with "
            "save_checkpoint(folder, optimizer=optimizer), and convert that folder"
        )
    try:
        if "GG" in keys:
            saved = _soap(state, groups, told, soap_moments)
        elif "statistics" in keys:
            saved = _shampoo(state, groups, told)
        elif keys & {_BNB_NESTED, "state1"}:
            saved = _torch("adamw", *_bitsandbytes(state, groups), told)
        else:
            kinds = [name for name, needed in _OF_TORCH.items() if needed <= options]
            if len(kinds) != 1:
                raise ConversionError(
                    f"the state has the keys {_listed(keys)}, and the groups {_listed(options)}: that is no layout "
                    f"that is known. Known are those of {LAYOUTS}"
                )
            saved = _torch(kinds[0], state, groups, told)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ConversionError(f"the state is not as its layout says ({type(error).__name__}: {error})") from error
    saved.notes[:0] = notes
    return saved


def under(saved: Saved, optimizer: str) -> Saved:
    """A first-order optimizer as the base of a second-order one of 32 bits, whose factors start anew.

    Raises:
        ConversionError: it is no first-order optimizer, or the other is none of ``SECOND_ORDER``.
    """
    if not saved.first_order:
        raise ConversionError(f"--optimizer puts moments under a preconditioner, and {saved.kind} has one already")
    if optimizer not in SECOND_ORDER:
        raise ConversionError(f"--optimizer is {optimizer!r}; it must be one of {', '.join(SECOND_ORDER)}")
    key = FIRST_ORDER[saved.kind]
    numbers = {index: decoded(saved, index, group) for index, group in saved.places() if index in saved.state}
    if key == "sgd":  # which does not count its steps in torch
        numbers = {index: {k: v for k, v in own.items() if k != "step"} for index, own in numbers.items()}
    ours = LOW_BIT_BASES[key].own
    groups = [{k: v for k, v in group.items() if k not in ours} for group in saved.groups]
    made = SECOND_ORDER[optimizer](_parameter_groups(saved.groups, saved.parameters, {}), base=key, bits=32)
    made.load_base_state_dict({"state": numbers, "param_groups": groups})
    saved.note("the factors start anew")
    return _of(made, saved.parameters, saved.notes)


# ---- what is there ---------------------------------------------------------------------------------------------------


def unpacked(loaded: Any) -> tuple[dict[int, Own], list[dict[str, Any]], list[str]]:
    """State and groups by the parameters' places, and what is to be said of it."""
    notes = []
    if isinstance(loaded, Mapping) and not {"state", "param_groups"} <= loaded.keys():
        for key in NESTED:
            if isinstance(loaded.get(key), Mapping) and {"state", "param_groups"} <= loaded[key].keys():
                others = _listed(loaded.keys() - {key})
                notes.append(f"the state dict is that under {key!r}; what is beside it is left out ({others})")
                loaded = loaded[key]
                break
    if not isinstance(loaded, Mapping) or not {"state", "param_groups"} <= loaded.keys():
        found = f"the keys {_listed(loaded)}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise ConversionError(
            f"it holds {found}, and no optimizer's state dict, which has 'state' and 'param_groups', by itself or "
            f"under {', '.join(map(repr, NESTED))}. Known layouts are those of {LAYOUTS}"
        )
    given, listed = loaded["state"], loaded["param_groups"]
    try:
        place = {index: i for i, index in enumerate(index for group in listed for index in group["params"])}
        groups = [{**group, "params": [place[index] for index in group["params"]]} for group in listed]
        state = {place[index]: dict(own) for index, own in given.items() if own}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"'state' and 'param_groups' are not of each other ({error!r})") from error
    return state, groups, notes


def _listed(keys: Iterable[Any]) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:12]) + f" and {len(names) - 12} more" * (len(names) > 12) or "none"


def _parameter_groups(
    groups: Sequence[Mapping[str, Any]], parameters: Mapping[int, Tensor], options: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Groups for a constructor, each with its options."""
    return [
        {"params": [parameters[i] for i in group["params"]], **options.get(place, {})}
        for place, group in enumerate(groups)
    ]


def _of(made: Any, parameters: dict[int, Tensor], notes: list[str]) -> Saved:
    """What a live optimizer saves."""
    state_dict = made.state_dict()
    return Saved(base_name(type(made)), state_dict["param_groups"], state_dict["state"], parameters, notes)


# ---- first order -----------------------------------------------------------------------------------------------------


def _torch(key: str, state: dict[int, Own], groups: list[dict[str, Any]], told: Told) -> Saved:
    """That of torch's optimizer, under ours."""
    kind = base_name(LOW_BIT_BASES[key])
    state = {index: {k: v for k, v in own.items() if v is not None} for index, own in state.items()}
    saved = Saved(kind, groups, state, parameters_of(groups, state, told))
    for group in groups:
        if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
            saved.note("the weight decay was Adam's, added to gradients; here it is AdamW's, apart from them")
    made = encoded(saved, state, kind, [32] * len(groups))
    return _of(made, saved.parameters, saved.notes)


def _bitsandbytes(state: dict[int, Own], groups: list[dict[str, Any]]) -> tuple[dict[int, Own], list[dict[str, Any]]]:
    """AdamW's state as torch has it, from codes or numbers."""
    found: dict[int, Own] = {}
    for index, own in state.items():
        own = {**own, **own.get(_BNB_NESTED, {})}
        if "state2" not in own or own["state1"].shape != own["state2"].shape:
            raise ConversionError(
                f"parameter {index} has the keys {_listed(own.keys() - {_BNB_NESTED})}; of bitsandbytes AdamW and Adam "
                "can be read, which have state1 and state2 of one shape"
            )
        moments = {"exp_avg": _bnb_moment(own, "1"), "exp_avg_sq": _bnb_moment(own, "2")}
        found[index] = {"step": torch.tensor(float(own["step"])), **moments}
    options = [{k: group[k] for k in (*_OF_ADAMW, "params") if k in group} for group in groups]
    return found, [{**group, "betas": tuple(group["betas"][:2])} for group in options]


def _bnb_moment(own: Own, which: str) -> Tensor:
    """A moment in float32: as it is, or qmap[code] times the largest magnitude of its block."""
    codes: Tensor = own[f"state{which}"]
    if codes.dtype != torch.uint8:
        return codes.float()
    if f"absmax{which}" not in own:
        raise ConversionError("its codes have one scale for a whole tensor (block_wise=False), which is not read")
    scales, table = own[f"absmax{which}"], own[f"qmap{which}"]
    sizes = [size for size in _BNB_BLOCKS if -(-codes.numel() // size) == scales.numel()]
    if not sizes:
        raise ConversionError(f"{codes.numel()} codes have {scales.numel()} scales; blocks are of 256 or 2048 numbers")
    of_each = scales.float().repeat_interleave(sizes[0])[: codes.numel()]
    return (table.float()[codes.flatten().long()] * of_each).view(codes.shape)


# ---- second order ----------------------------------------------------------------------------------------------------


def _shampoo(state: dict[int, Own], groups: list[dict[str, Any]], told: Told) -> Saved:
    """Statistics of all blocks, row by row of the grid, left and right of each, and the base's moments."""
    renamed = {i: {"momentum_buffer" if k == "momentum" else k: v for k, v in own.items()} for i, own in state.items()}
    key = "adamw" if any("exp_avg" in own for own in renamed.values()) else "sgd"
    parameters = parameters_of(groups, renamed, told)
    settings = {
        place: {ours: group.get(theirs, default) for ours, (theirs, default) in _SHAMPOO.items()}
        for place, group in enumerate(groups)
    }
    made = Shampoo(_parameter_groups(groups, parameters, settings), base=key, bits=32, statistic_limit=math.inf)
    made.init_state()
    saved = _of(made, parameters, [])
    kept_keys = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    moments = {i: {k: own[k] for k in kept_keys if k in own} for i, own in renamed.items()}
    options = [{k: v for k, v in group.items() if k in (*_OF_ADAMW, "momentum", "nesterov")} for group in groups]
    for group, given in zip(saved.groups, options, strict=True):
        group |= given
    for index, group in saved.places():
        if index not in renamed:
            saved.state.pop(index)
            continue
        own, given, kept = saved.state[index], renamed[index], moments[index]
        steps = int(given["step"])
        own["step"] = torch.tensor(steps)
        own |= given_back(kept | ({"step": torch.tensor(float(steps))} if key == "adamw" else {}))
        cut = made.preconditioner.blocking(parameters[index], group)
        if cut is None:
            continue
        form, orders = made.preconditioner.forms(group, cut), (cut.rows, cut.columns)
        wanted = [(n, n) for _ in range(cut.count) for n in orders]
        statistics, roots = given["statistics"], given.get("preconditioners") or []
        if [tuple(x.shape) for x in statistics] != wanted:
            saved.note(
                f"the factors of parameter {index} start anew: they are of {[len(x) for x in statistics]} rows, and "
                f"its blocks here are {cut.count} of {cut.rows} x {cut.columns}"
            )
            continue
        for place, (side, factor) in enumerate(form.sides()):
            a = torch.stack(list(statistics[place::2])).float()
            held = factor.holding(a)
            held["statistic"] = a
            held["updates"] = torch.full_like(held["updates"], steps // group["statistics_frequency"])
            if [tuple(x.shape) for x in roots] == wanted:
                held["root"] = torch.stack(list(roots[place::2])).float()
            own |= put(side, held)
    return saved


def _soap(state: dict[int, Own], groups: list[dict[str, Any]], told: Told, moments: str) -> Saved:
    """GG and Q, a matrix for each dim, and moments."""
    if moments not in COORDINATES:
        raise ConversionError(f"--soap-moments is {moments!r}; it must be one of {', '.join(COORDINATES)}")
    parameters = parameters_of(groups, state, told)
    settings = {place: _soap_settings(group) for place, group in enumerate(groups)}
    made = SOAP(_parameter_groups(groups, parameters, settings), bits=32)
    made.init_state()
    saved = _of(made, parameters, [])
    for group, given in zip(saved.groups, groups, strict=True):
        if "initial_lr" in given:
            group["initial_lr"] = given["initial_lr"]
        for key, default in _SOAP_SWITCHES.items():
            if given.get(key, default) != default:
                saved.note(f"{key}={given[key]} is not carried over: SOAP has no such option here")
    for index, group in saved.places():
        own = saved.state.pop(index)
        if index in state:
            cut = made.preconditioner.blocking(parameters[index], group)
            orders = () if cut is None else (cut.rows, cut.columns)
            given = state[index]
            sizes = tuple(len(x) for x in given["GG"] if len(x))
            bases = tuple(len(x) for x in given["Q"] or () if len(x))
            if (sizes, bases) == (orders, orders):
                saved.state[index] = own | _soap_state(given, group, made, cut, moments)
            else:
                saved.note(
                    f"parameter {index} of shape {list(parameters[index].shape)} starts anew: it has bases of orders "
                    f"{list(sizes)}, and {list(orders)} here"
                )
    return saved


def _soap_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    names = {"max_precond_dim": "max_preconditioner_dim", "precondition_frequency": "precondition_frequency"}
    options = {k: group[k] for k in _OF_ADAMW if k in group and k != "initial_lr"}
    beta = group.get("shampoo_beta", -1)
    settings = {ours: group[theirs] for theirs, ours in names.items() if theirs in group}
    return options | settings | {"shampoo_beta": beta if beta >= 0 else group["betas"][1]}


def _soap_state(given: Own, group: dict[str, Any], made: SOAP, cut: Any, moments: str) -> Own:
    """A parameter's state. Their first gradient is not counted; their statistics are not divided by 1 - beta^t."""
    steps = int(given["step"])
    mean = given["exp_avg"]
    own: Own = {"step": torch.tensor(steps + 1), "nonfinite": torch.tensor(0)}
    if cut is not None:
        left, right = (q.to(torch.promote_types(q.dtype, torch.float32)) for q in given["Q"])
        if moments == "parameter":
            with full_precision():
                mean = (left.mT @ cut.split(mean.to(left.dtype))[0] @ right).reshape(mean.shape).to(mean.dtype)
        count = steps + 1
        forms: Any = made.preconditioner.forms(group, cut)  # of bases
        for (side, form), a, q in zip(forms.sides(), given["GG"], (left, right), strict=True):
            a = (a.to(q.dtype) / (1 - group["shampoo_beta"] ** count))[None]
            state = form.init(1, len(q), q.dtype, "cpu") | {"statistic": a} | put("basis", form.vectors.encode(q[None]))
            state["updates"] += count
            state["turns"] += 1 + steps // group["precondition_frequency"]
            state["previous_norm"] = trace(a).sqrt().float()
            own |= put(side, state)
    base = {"step": torch.tensor(float(steps)), "exp_avg": mean.clone(), "exp_avg_sq": given["exp_avg_sq"].clone()}
    return own | given_back(base)
