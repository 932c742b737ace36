"""The shared engine of the Kronecker-factored preconditioners.

A gradient's way through it: blocks of all same-shaped parameters in one stack; first the statistics of those whose turn
it is into their factors, then, in smaller parts, the factors' roots onto the blocks, the norm of each parameter's
gradient back, and into ``param.grad`` again. A subclass says what the statistics are and how two roots act on a block.

What is preconditioned as one matrix is a unit: a parameter, or a layer's weight with its bias as the last column. A
unit's state is that of its first parameter.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack, blocking
from lowbit_optim.linalg import each, full_precision, largest_magnitude, power_of_two
from lowbit_optim.preconditioners.buckets import (
    SIDES,
    Bucket,
    Due,
    Forms,
    Turn,
    lengths,
    parts,
    slices,
    staggered,
)
from lowbit_optim.preconditioners.workspace import Workspace
from lowbit_optim.storage.blockwise import Quantization
from lowbit_optim.storage.budget import ONE_PERIOD, form
from lowbit_optim.storage.factors import Factor, State, put

# Settings of a factor, and the keywords of param groups that they are.
_FORM_SETTINGS = {
    "storage": "storage",
    "bits": "bits",
    "layout": "layout",
    "power": "root_power",
    "decay": "shampoo_beta",
    "eps": "matrix_eps",
    "ridge": "damping_rule",
    "initial_scale": "initial_scale",
    "statistic_limit": "statistic_limit",
    "rectify_update": "rectify_update",
    "rectify_root": "rectify_root",
    "orthogonal_iterations": "orthogonal_iterations",
}

Group = dict[str, Any]
Statistics = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Root = tuple[Tensor, Tensor]  # X and s, of s X


@lru_cache
def _form(order: int, min_quant_size: int, quantization: tuple[Any, ...] | None, **settings: Any) -> Factor:
    return form(
        quantization=Quantization(*quantization) if quantization else None,
        quantized=order * order >= min_quant_size,
        **settings,
    )


def _factors(
    cut: Blocking, forms: Forms, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a parameter's forms before the first update, by their names in its state."""
    for (side, factor), order in zip(forms.sides(), (cut.rows, cut.columns), strict=True):
        yield from put(side, factor.init(cut.count, order, dtype, device)).items()
    if forms.moment is not None:
        yield from put("moment", forms.moment.init(cut.count, cut.rows, cut.columns, dtype, device)).items()


@lru_cache
def _factor_layout(cut: Blocking, forms: Forms, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in _factors(cut, forms, dtype, "meta")}


def working_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


class KroneckerPreconditioner(ABC):
    """Preconditions the gradients of param groups in place; keeps no state of its own.

    A group's settings are those of ``optimizers.settings``. The state of a parameter:

    * "step": int64 scalar on the CPU, steps in which the parameter had a gradient;
    * "nonfinite": int64 scalar, gradient blocks that were replaced by zeros;
    * "left.<name>", "right.<name>": the tensors of the factors' forms, stacked over the unit's blocks;
    * "moment.<name>": likewise, where ``forms`` have one.
    """

    # What its optimizer calls settings of a factor, where that is not as in Shampoo.
    form_keywords: ClassVar[dict[str, str]] = {}
    default_precondition_frequency: ClassVar[int] = 500

    def __init__(self) -> None:
        self.workspace = Workspace()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"workspace": Workspace(), **state})  # an older version had none

    @abstractmethod
    def statistics(self, part: Bucket, start: int, stop: int, gradient: Tensor, magnitude: Tensor) -> Statistics:
        """The statistics of the left and right factors of blocks start to stop.

        Args:
            gradient: the blocks' gradients divided by ``magnitude``, [k, r, c].
            magnitude: of each block, [k].

        Returns:
            For each side M, [k, r, r] and [k, c, c], and a magnitude [k]: the statistic is magnitude^2 M.
        """

    def apply(self, left: Root, gradient: Tensor, right: Root, temporary: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The preconditioned blocks from the roots.

        Args:
            left, right: (X, s), [k, r, r] or [k, c, c] and [k]: the root is s X.
            gradient: the blocks [k, r, c] in the dtype of the roots; may be overwritten.
            temporary: room for as much.

        Returns:
            (Y [k, r, c], factors, each [k]): the preconditioned blocks are their product times Y.
        """
        torch.bmm(left[0], gradient, out=temporary)
        return torch.bmm(temporary, right[0], out=gradient), [left[1], right[1]]

    def precondition(
        self, part: Bucket, stack: Stack, start: int, stop: int, gradient: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Blocks start to stop of the preconditioned gradient.

        Args:
            gradient, magnitude: as for ``statistics``; the gradient may be overwritten.

        Returns:
            (Y, factors) as ``apply`` returns them; the blocks are the factors' product times magnitude Y.
        """
        dtype, (rows, columns), count = part.apply_dtype, part.block, stop - start
        shapes = [(count, rows, rows), (count, columns, columns), (count, rows, columns)]
        *rooms, temporary = self.workspace.take("roots", part.device, dtype, *shapes)
        roots = []
        for (side, factor), out in zip(part.forms.sides(), rooms, strict=True):
            state = stack.read(side, start, stop, factor.root_needs)
            x, scale = factor.scaled_root(state, part.dtype, out)
            roots.append((x.to(dtype), scale))
        if part.in_turns:
            roots = [
                (x, _as_others(part, stack, side, factor, start, scale))
                for (x, scale), (side, factor) in zip(roots, part.forms.sides(), strict=True)
            ]
        left, right = roots
        return self.apply(left, gradient.to(dtype), right, temporary)

    def unit(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The parameters whose gradients are one matrix, if ``parameter`` is the first of them."""
        return (parameter,)

    def blocking(self, parameter: Tensor, group: Group) -> Blocking | None:
        """How the unit that begins with a parameter of the group is cut into blocks; None if there is none."""
        if not group["precondition"]:
            return None
        return blocking(tuple(parameter.shape), group["max_preconditioner_dim"])

    def form(self, group: Group, order: int) -> Factor:
        """The form in which a group keeps a factor of the given order."""
        return _form(
            order,
            group["min_quant_size"],
            tuple(group["quantization"]) if group["quantization"] else None,
            **{name: group[key] for name, key in {**_FORM_SETTINGS, **self.form_keywords}.items() if key in group},
        )

    def forms(self, group: Group, cut: Blocking) -> Forms:
        """The forms in which a group keeps the factors of a block."""
        return Forms(self.form(group, cut.rows), self.form(group, cut.columns))

    def layout(self, parameter: Tensor, group: Group) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor in the state of a parameter of the group."""
        counters = dict.fromkeys(("step", "nonfinite"), (torch.Size(), torch.int64))
        cut = self.blocking(parameter, group)
        if cut is None:
            return counters
        return counters | _factor_layout(cut, self.forms(group, cut), working_dtype(parameter))

    def init_state(self, parameter: Tensor, group: Group) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        device = parameter.device
        state = {
            "step": torch.zeros((), dtype=torch.int64, device="cpu"),
            "nonfinite": torch.zeros((), dtype=torch.int64, device=device),
        }
        cut = self.blocking(parameter, group)
        if cut is not None:
            state |= _factors(cut, self.forms(group, cut), working_dtype(parameter), device)
        return state

    def prepare(self, groups: list[Group], state: Mapping[Tensor, dict[str, Any]]) -> None:  # noqa: B027
        """Look at the groups and the state as they are now; called before anything else is asked."""

    def dampings(
        self, part: Bucket, states: list[State], statistics: Statistics | tuple[None, None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """For each side the ridge [k] of forms that want it given."""
        return None, None

    @torch._disable_dynamo  # what is due changes: it would be traced again and again
    @torch.no_grad()
    def step(self, groups: list[Group], state: dict[Tensor, dict[str, Any]]) -> Tensor | None:
        """Guard and precondition every gradient of the groups, in place.

        Returns:
            How many gradient blocks were not finite and how many decompositions failed in this step, int64 [2] on the
            first parameter's device; None if no parameter has a gradient.
        """
        with full_precision():
            buckets = self._buckets(groups, state)
            joined = {parameter for bucket in buckets for unit in bucket.units for parameter in unit}
            alone = [p for group in groups for p in group["params"] if p.grad is not None and p not in joined]
            troubles = [_guard(parameter.grad, state[parameter]) for parameter in alone]
            for bucket in buckets:
                troubles += [self._update_part(part) for part in self.parts(bucket.due(), bucket.workspace)]
                room = self.workspace.room(bucket.device, bucket.workspace)
                troubles += [self._apply_part(part) for part in self.parts(bucket, room)]
        return torch.stack([t.to(troubles[0].device) for t in troubles]).sum(0) if troubles else None

    def parts(self, bucket: Bucket, room: int) -> Iterable[Bucket]:
        """Whole units whose gradients fit in the room together, one part after the other."""
        return parts(bucket, room)

    def slices(self, start: int, stop: int, each: int, room: int) -> Iterable[tuple[int, int]]:
        """Runs of the blocks start to stop - 1, of ``each`` bytes, that fit in the room: (first, last + 1)."""
        return slices(start, stop, each, room)

    def _buckets(self, groups: list[Group], state: dict[Tensor, dict[str, Any]]) -> list[Bucket]:
        """Count the step and sort this step's parameters. Rebuilt every time: parameters and settings may change."""
        buckets: dict[Any, Bucket] = {}
        # Of all blocks with a period, and of those before the one that is looked at: they share its steps.
        total: Counter[int] = Counter()
        before: Counter[int] = Counter()
        for group in groups:
            if group.get("stagger"):
                total[group["statistics_frequency"]] += sum(_cost(self.blocking(p, group)) for p in group["params"])
        for group in groups:
            for parameter in group["params"]:
                cut, period = self.blocking(parameter, group), group["statistics_frequency"]
                cost, cost_before = _cost(cut), before[period]
                before[period] += cost if group.get("stagger") else 0
                if parameter.grad is None:
                    continue
                own = state[parameter]
                own["step"] += 1
                if cut is None:
                    continue
                forms, step = self.forms(group, cut), int(own["step"])
                due = self._due(step, group, forms)
                run, in_turns = (0, cut.count), bool(group.get("stagger")) and cut.count > 1
                if group.get("stagger"):
                    run = staggered(cost_before, cost // cut.count, cut.count, total[period], period, step)
                if not (due.update or due.refresh):
                    run = (0, 0)
                dtype = working_dtype(parameter)
                apply_dtype = _applied_in(group, dtype)
                settings = (forms, due.precondition, in_turns, group["graft"], group["workspace"], dtype, apply_dtype)
                key = (cut.rows, cut.columns, parameter.device, settings)
                bucket = buckets.setdefault(key, Bucket(*settings))
                bucket.add(self.unit(parameter), cut, own, Turn(*run, due.update, due.refresh))
        return list(buckets.values())

    def _due(self, step: int, group: Group, forms: Forms) -> Due:
        refresh = group["precondition_frequency"]
        if refresh is None:  # bits=32 stands in for the storage that was asked for, at the same steps
            one_period = group["storage"] in ONE_PERIOD
            refresh = group["statistics_frequency"] if one_period else self.default_precondition_frequency
        in_turns = group.get("stagger", False)  # some blocks may have theirs
        return Due(
            update=in_turns or step % group["statistics_frequency"] == 0,
            refresh=not forms.left.one_period and (in_turns or step % refresh == 0),
            precondition=step >= group["start_preconditioning_step"],
        )

    def _update_part(self, part: Bucket) -> Tensor:
        """Update the factors of all blocks whose turn it is; returns the troubles, int64 [2]."""
        gradient = self._gathered(part)
        magnitude = _divide(gradient, _clear_bad(gradient))
        troubles = torch.zeros(2, dtype=torch.int64, device=part.device)
        stack, room = Stack(part.states, part.counts), part.workspace - gradient.nbytes - self.workspace.kept("roots")
        for turn in part.runs():
            for start, stop in self.slices(turn.first, turn.last, part.update_bytes, room):
                own = turn._replace(first=start, last=stop)
                troubles[1] += self._update(part, stack, own, gradient[start:stop], magnitude[start:stop])
        return troubles

    def _apply_part(self, part: Bucket) -> Tensor:
        """Precondition the gradients of a part; returns the troubles, int64 [2]."""
        gradient, troubles = self._gathered(part), torch.zeros(2, dtype=torch.int64, device=part.device)
        magnitude = torch.ones_like(gradient[:, 0, 0])
        # To look at the numbers, other devices would have to be waited for.
        before = _moderate_squares(gradient) if self.workspace.on_cpu(part.device) else None
        plain = before is not None
        if before is None:
            troubles[0], magnitude, before = _tame(part, gradient)
        if not part.precondition:
            part.scatter(gradient, magnitude)
            return troubles
        stack = Stack(part.states, part.counts)
        weight = magnitude.to(before.dtype, copy=True)
        room = self.workspace.room(part.device, part.workspace) - gradient.nbytes
        for start, stop in self.slices(0, len(gradient), part.apply_bytes, room):
            blocks = gradient[start:stop]
            result, factors = self.precondition(part, stack, start, stop, blocks, magnitude[start:stop])
            if result.data_ptr() != blocks.data_ptr():
                blocks.copy_(result)
            for factor in factors:
                weight[start:stop] *= factor
        if part.graft:
            weight = _graft(part, before, magnitude, _squares(gradient), weight)
        weight = weight.clamp(max=torch.finfo(part.dtype).max).to(part.dtype)
        part.scatter(gradient, weight, bounded=plain and part.graft)
        return troubles

    def _gathered(self, part: Bucket) -> Tensor:
        """The blocks of all gradients, [k, r, c]."""
        shape = sum(part.counts), *part.block
        (gradient,) = self.workspace.take("gradient", part.device, part.dtype, shape)
        part.gather(gradient)
        return gradient

    def _update(self, part: Bucket, stack: Stack, turn: Turn, gradient: Tensor, magnitude: Tensor) -> Tensor:
        """Statistics into factors, factors into roots; returns how many blocks failed, int64 []."""
        failed = torch.zeros((), dtype=torch.int64, device=gradient.device)
        start, stop = turn.first, turn.last
        statistics = self.statistics(part, start, stop, gradient, magnitude) if turn.update else (None, None)
        states = [stack.read(side, start, stop) for side in SIDES]
        dampings = self.dampings(part, states, statistics)
        for (side, factor), state, statistic, damping in zip(
            part.forms.sides(), states, statistics, dampings, strict=True
        ):
            before = state["failures"]
            if statistic is not None:
                state = factor.update(state, *statistic, damping)
            if turn.refresh:
                state = factor.refresh(state, gradient.dtype, damping)
            failed += (state["failures"] - before).sum()
            stack.write(side, start, stop, state)
        return failed


def _cost(cut: Blocking | None) -> int:
    """Of an update of all blocks, in products of single numbers up to a factor."""
    return 0 if cut is None else cut.count * (cut.rows**3 + cut.columns**3)


def _applied_in(group: Group, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a group's roots are applied, computation being in ``dtype``."""
    return torch.bfloat16 if group.get("apply_dtype") == "bfloat16" else dtype


def _guard(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Zero the gradient of a parameter without blocks if any of it is not finite; returns its troubles, int64 [2]."""
    largest = largest_magnitude(gradient, ()) if gradient.numel() else gradient.new_zeros(())
    bad = ~torch.isfinite(largest)
    _clear(gradient, bad)
    state["nonfinite"] += bad
    return torch.stack([bad, torch.zeros_like(bad)]).long()


def _clear(x: Tensor, bad: Tensor) -> None:
    """Zero where ``bad`` is, whatever is there, in a tenth of the time of ``masked_fill_``."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    x.view(bits).bitwise_and_(bad.to(bits) - 1)


def _moderate_squares(blocks: Tensor) -> Tensor | None:
    """The sums of squares, if all blocks are finite and none needs to be divided."""
    squares = _squares(blocks)
    return squares if blocks.is_meta or bool(((squares > 1e-18) & (squares < 1e18)).all()) else None


def _tame(part: Bucket, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clear what is not finite and, if it is to be preconditioned, divide the rest.

    Returns:
        (how many blocks were not finite, int64 []; by what they are divided, [k]; the sums of their squares now, [k]).
    """
    largest = _clear_bad(gradient)
    bad = _count_nonfinite(part, ~torch.isfinite(largest))
    magnitude = _divide(gradient, largest) if part.precondition else torch.ones_like(largest)
    return bad, magnitude, _squares(gradient)


def _clear_bad(blocks: Tensor) -> Tensor:
    """Zero the blocks that are not finite; returns their largest magnitudes before, [k]."""
    largest = largest_magnitude(blocks, (1, 2))
    _clear(blocks, each(~torch.isfinite(largest), blocks))
    return largest


def _divide(blocks: Tensor, largest: Tensor) -> Tensor:
    """Divide blocks by powers of two, so that squares neither overflow nor underflow; those, [k].

    They have a floor, so that inverse roots of subnormal gradients do not overflow; and blocks of moderate numbers, in
    which nothing can, stay as they are.
    """
    largest = torch.where(torch.isfinite(largest), largest, 0.0)
    moderate = (largest == 0) | ((largest > 1e-9) & (largest < 1e9))
    most = 2.0**126 if blocks.dtype == torch.float32 else 2.0**1000
    magnitude = torch.where(moderate, 1.0, power_of_two(largest, 2.0**-99, most))
    if blocks.device.type != "cpu" or not bool(moderate.all()):
        blocks *= each(1 / magnitude, blocks)
    return magnitude


def _count_nonfinite(part: Bucket, bad: Tensor) -> Tensor:
    """Count the bad blocks of each parameter in its state; returns all of them, int64 []."""
    counts = torch.zeros(len(part.states), dtype=torch.int64, device=bad.device).index_add_(0, part.owner, bad.long())
    torch._foreach_add_([state["nonfinite"] for state in part.states], list(counts.unbind()))
    return counts.sum()


def _squares(blocks: Tensor) -> Tensor:
    """The sum of squares of each block, [k], in float64 where the device has it.

    Row by row first: how a sum of more is rounded would depend on how many blocks there are.
    """
    norms = torch.linalg.vector_norm(blocks, dim=2)
    return (norms if blocks.device.type == "mps" else norms.double()).square().sum(1)


def _of_units(x: Tensor, part: Bucket) -> Tensor:
    """The sums over the blocks of each unit, [k] to [units]."""
    # Not index_add_, whose order of summation changes from run to run on CUDA; unsafe: lengths unchecked, no host sync.
    return torch.segment_reduce(x, "sum", lengths=lengths(tuple(part.counts), x.device), unsafe=True)


def _graft(part: Bucket, before: Tensor, magnitude: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """By what each block is to be multiplied so that each unit has the norm of its gradient, [k].

    Args:
        before, magnitude: of the blocks of the gradient, the squares and what they are in units of.
        after, weight: likewise of the result.
    """
    gradient_unit, result_unit = (_largest(x, part) for x in (magnitude.to(before.dtype), weight))
    before = _of_units(before * (magnitude / gradient_unit).square(), part)
    after = _of_units(after * (weight / result_unit).square(), part)
    ratio = torch.where(after > 0, before / after, 0.0).sqrt()[part.owner]
    return weight / result_unit * ratio * gradient_unit


def _largest(x: Tensor, part: Bucket) -> Tensor:
    """From a number of each block the largest of its unit, [k]; 1 where that is zero."""
    largest = x.new_zeros(len(part.states)).scatter_reduce_(0, part.owner, x, "amax")
    return torch.where(largest > 0, largest, 1.0)[part.owner]


def _as_others(part: Bucket, stack: Stack, side: str, factor: Factor, start: int, scale: Tensor) -> Tensor:
    """The numbers of roots, [k], those of blocks that have had no statistic yet as of their unit's other blocks.

    The root of such a block is I times this number: without a scale of its own it must not outweigh the others. They
    are known by their last statistics, A = tr(M) / n I.
    """
    state = stack.read(side, 0, sum(part.counts), ("updates", "previous_norm"))
    have = (state["updates"] > 0).to(scale.dtype)
    order = part.block[SIDES.index(side)]
    mean_norm, count = (_of_units(x, part) for x in (state["previous_norm"].to(scale.dtype) * have, have))
    mean_norm = torch.where(mean_norm > 0, mean_norm / count / order**0.5, 1.0)
    others = mean_norm.pow(-2 / factor.power).clamp(1e-30, 1e30)[part.owner]
    own = slice(start, start + len(scale))
    return torch.where(have[own] > 0, scale, others[own])
