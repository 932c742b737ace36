"""What ``SecondOrder.stats`` says of each parameter, and the words for how a parameter is treated."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking
from lowbit_optim.optimizers.state import without_base
from lowbit_optim.preconditioners.buckets import SIDES, Forms
from lowbit_optim.preconditioners.kronecker import Group
from lowbit_optim.storage.factors import State, take

LEFT_TO_BASE = "base"


def treatment(optimizer: str, cut: Blocking | None, group: Group) -> str:
    """As "Shampoo: 8 blocks of 128 x 128, root, 2 bits"; "base" without blocks."""
    if cut is None:
        return LEFT_TO_BASE
    blocks = f"{cut.count} blocks of " * (cut.count > 1)
    small = [s for s, n in zip(SIDES, (cut.rows, cut.columns), strict=True) if n * n < group["min_quant_size"]]
    if group["bits"] == 32:
        kept = "32 bits"
    elif len(small) == len(SIDES):
        kept = f"{group['storage']}, uncoded"
    else:
        codes = f"codes of {group['quantization'][0]} bits" if group["quantization"] else f"{group['bits']} bits"
        kept = ", ".join([group["storage"], codes, *(f"{side} uncoded" for side in small)])
    return f"{optimizer}: {blocks}{cut.rows} x {cut.columns}, {kept}"


def parameter_stats(
    own: Mapping[str, Any], cut: Blocking | None, forms: Forms | None, workspace: int
) -> dict[str, Any]:
    """The numbers of ``SecondOrder.stats`` for a parameter's state; those that are on its device, as tensors there."""
    orders = {} if cut is None else {"left": cut.rows, "right": cut.columns}
    found: dict[str, Any] = {
        "steps": int(own.get("step", 0)),  # which is on the CPU
        "nonfinite": own.get("nonfinite", 0),
        "bytes": sum(part.nbytes for part in without_base(own).values()),
    }
    for side, form in forms.sides() if forms else dict.fromkeys(SIDES).items():
        state: State = take(side, dict(own))
        here = bool(state) and len(state["updates"]) > 0  # of a team, which shares the blocks, another may have all
        found[f"{side}.updates"] = state["updates"].min() if here else 0
        found[f"{side}.failures"] = state["failures"].sum() if state else 0
        has_one = form is not None and here
        found[f"{side}.rounding_error"] = _rounding_error(form, state, orders[side], workspace) if has_one else None
    return found


def _rounding_error(form: Any, state: State, order: int, workspace: int) -> Tensor | None:
    """Of the worst block; as many of them at a time as fit in the workspace, with temporaries."""
    run = max(1, workspace // (6 * order * order * 4))
    starts = range(0, len(state["failures"]), run)
    errors = [form.rounding_error({name: part[i : i + run] for name, part in state.items()}) for i in starts]
    return None if errors[0] is None else torch.cat(errors).max()


def to_host(stats: list[dict[str, Any]]) -> None:
    """Put numbers in the place of all tensors, in one copy."""
    places = [(own, key) for own in stats for key, value in own.items() if isinstance(value, Tensor)]
    if not places:
        return
    tensors = [own[key] for own, key in places]
    # One dtype for all: float64, which would hold both, is not on every device.
    integers = [x.float().view(torch.int32) if x.is_floating_point() else x for x in tensors]
    whole = torch.stack([x.to(integers[0].device, torch.int64) for x in integers]).cpu()
    fractions = whole.to(torch.int32).view(torch.float32)
    for (own, key), x, fraction, integer in zip(places, tensors, fractions.tolist(), whole.tolist(), strict=True):
        own[key] = fraction if x.is_floating_point() else integer
