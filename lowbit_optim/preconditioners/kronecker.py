"""The shared engine of the Kronecker-factored preconditioners.

A gradient's way through it: blocks of all same-shaped parameters in one stack; first the statistics of those whose turn
it is into their factors, then, in smaller parts, the factors' roots onto the blocks, the norm of each parameter's
gradient back, and into ``param.grad`` again. A subclass says what the statistics are and how two roots act on a block.

What is preconditioned as one matrix is a unit: a parameter, or a layer's weight with its bias as the last column. A
unit's state is that of its first parameter.
"""

import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack, blocking
from lowbit_optim.distributed import Runs, Team, Unit
from lowbit_optim.linalg import full_precision, left_product, powers, right_product
from lowbit_optim.preconditioners.buckets import (
    SIDES,
    Bucket,
    Due,
    Forms,
    Settings,
    Turn,
    Work,
    bucketed,
    parts,
    slices,
    staggered,
)
from lowbit_optim.preconditioners.measures import (
    Measures,
    bounded_weight,
    clear,
    clear_bad,
    divide,
    graft,
    moderate_squares,
    not_finite,
    squares,
)
from lowbit_optim.preconditioners.shared import shared_step
from lowbit_optim.preconditioners.workspace import Workspace
from lowbit_optim.shards import local, placed
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
B = TypeVar("B", bound=Bucket)
Statistics = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Root = tuple[Any, Tensor]  # X, a tensor or ``Spikes``, and s, of s X


@lru_cache
def _form(order: int, min_quant_size: int, quantization: tuple[Any, ...] | None, **settings: Any) -> Factor:
    return form(
        quantization=Quantization(*quantization) if quantization else None,
        quantized=order * order >= min_quant_size,
        **settings,
    )


def _factors(
    cut: Blocking, count: int, forms: Forms, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of so many blocks before the first update, by their names in a parameter's state."""
    for (side, factor), order in zip(forms.sides(), (cut.rows, cut.columns), strict=True):
        yield from put(side, factor.init(count, order, dtype, device)).items()
    if forms.moment is not None:
        yield from put("moment", forms.moment.init(count, cut.rows, cut.columns, dtype, device)).items()


@lru_cache
def _factor_layout(cut: Blocking, forms: Forms, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in _factors(cut, cut.count, forms, dtype, "meta")}


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

    divisible: ClassVar[bool] = True  # the blocks of a unit may have different owners
    on_shards: ClassVar[bool] = True  # blocks may be cut from a shard as from a whole parameter

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.team: Team | None = None
        self._runs: dict[Tensor, Runs] = {}
        self.placed = 0  # tells who owns which blocks; to look at all ranks of all units in every step takes long

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What an older version did not have.
        vars(self).update({"workspace": Workspace(), "team": None, "_runs": {}, "placed": 0, **state})

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
            left, right: (X, s), [k, r, r] or [k, c, c], perhaps in factors, and [k]: the root is s X.
            gradient: the blocks [k, r, c] in the dtype of the roots; may be overwritten.
            temporary: room for as much.

        Returns:
            (Y [k, r, c], factors, each [k]): the preconditioned blocks are their product times Y.
        """
        left_product(left[0], gradient, out=temporary)
        return right_product(temporary, right[0], out=gradient), [left[1], right[1]]

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
            x, scale = factor.factored_root(state, part.dtype, out)
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
        if self.team is not None:
            return self.cuts(parameter, group)[self.team.rank]
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
        """Shape and dtype of every tensor of a parameter of the group in a state dict."""
        counters = dict.fromkeys(("step", "nonfinite"), (torch.Size(), torch.int64))
        cut = self.blocking(parameter, group)
        if cut is None:
            return counters
        if self.team is not None:
            cuts = self.cuts(parameter, group)
            layouts = [_factor_layout(c, self.forms(group, c), working_dtype(parameter)) for c in cuts if c is not None]
            return counters | self.team.state.layout(layouts)
        return counters | _factor_layout(cut, self.forms(group, cut), working_dtype(parameter))

    def init_state(self, parameter: Tensor, group: Group) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        counters = {
            "step": torch.zeros((), dtype=torch.int64, device="cpu"),
            "nonfinite": torch.zeros((), dtype=torch.int64, device=parameter.device),
        }
        return counters | self._own_factors(parameter, group, parameter.device)

    def _own_factors(self, parameter: Tensor, group: Group, device: torch.device | str) -> dict[str, Tensor]:
        """The factors of the blocks that are worked on here, before the first update."""
        cut = self.blocking(parameter, group)
        if cut is None:
            return {}
        first, last = (0, cut.count) if self.team is None else self.runs(parameter)[self.team.rank]
        return dict(_factors(cut, last - first, self.forms(group, cut), working_dtype(parameter), device))

    def shown(self, parameter: Tensor, group: Group, own: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state as it stands in a state dict: factors of blocks on all ranks are DTensors there."""
        factors = self._factors_in(own)
        if self.team is None or not factors:
            return own
        group = {**group, "precondition": True}
        return own | self.team.state.shown(
            factors, self._factors_in(self.layout(parameter, group)), self.runs(parameter)
        )

    def taken(self, parameter: Tensor, group: Group, given: dict[str, Any]) -> dict[str, Any]:
        """The inverse of ``shown``; whole tensors are taken, too."""
        factors = self._factors_in(given)
        if self.team is None:
            return given | {name: placed(x, parameter) for name, x in factors.items()}
        if not factors:
            return given
        own = self._own_factors(parameter, {**group, "precondition": True}, "meta")
        layout = {name: (part.shape, part.dtype) for name, part in own.items()}
        others = {name: value for name, value in given.items() if name not in factors}
        return others | self.team.state.taken(factors, layout, self.runs(parameter))

    def bring_back(self, team: Team, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to bring preconditioned blocks to where they are needed; the result waits for it."""
        return team.deliver(units, blocks)

    @staticmethod
    def _factors_in(own: Mapping[str, Any]) -> dict[str, Any]:
        """Of a parameter's state what has a row for each block."""
        return {name: own[name] for name in sorted(own) if name.startswith(("left.", "right.", "moment."))}

    def prepare(self, groups: list[Group], state: Mapping[Tensor, dict[str, Any]]) -> None:  # noqa: B027
        """Look at the groups and the state as they are now; called before anything else is asked."""

    def place(self, groups: list[Group]) -> None:
        """Say who owns which blocks; where a team shares them, all ranks must call it together."""
        if self.team is None:
            return
        before, self._runs = list(self._runs.values()), {}
        for preconditioned in (True, False):  # those that may be one day after those that are
            units = {}
            for group in groups:
                if group["precondition"] == preconditioned:
                    for parameter in group["params"]:
                        cuts = self.cuts(parameter, {**group, "precondition": True})
                        if cuts[self.team.rank] is not None:
                            units[parameter] = cuts
            self._runs |= self.team.place(units, divisible=self.divisible)
        runs = list(self._runs.values())
        if runs != before:
            self.placed = zlib.crc32(repr(runs).encode())

    def cuts(self, parameter: Tensor, group: Group) -> list[Blocking | None]:
        """How the unit that begins with a parameter is cut on each rank of the team."""
        assert self.team is not None
        return self.team.cuts(parameter, group["max_preconditioner_dim"])

    def runs(self, parameter: Tensor) -> Runs:
        """Which blocks of a parameter's unit each rank of the team owns."""
        return self._runs[parameter]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # teams and their placements are the optimizer's

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
            works = self._works(groups, state)
            joined = {parameter for work in works for parameter in work.unit}
            alone = [p for group in groups for p in group["params"] if p.grad is not None and p not in joined]
            troubles = self._guard(alone, state)
            if self.team is not None:
                troubles += shared_step(self, self.team, works)
            else:
                for bucket in bucketed(works):
                    troubles += [self.update_part(part) for part in self.parts(bucket.due(), bucket.workspace)]
                    room = self.workspace.room(bucket.device, bucket.workspace)
                    troubles += [self._apply_part(part) for part in self.parts(bucket, room)]
        return torch.stack([t.to(troubles[0].device) for t in troubles]).sum(0) if troubles else None

    def _guard(self, parameters: list[Tensor], state: dict[Tensor, dict[str, Any]]) -> list[Tensor]:
        """Zero the gradients of parameters without blocks that are not finite; returns their troubles, int64 [2]."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        bad = [not_finite(gradient) for gradient in gradients]
        if self.team is not None and bad:  # all ranks do the same, though some may have seen nothing bad
            bad = list(self.team.largest(torch.stack(bad).int()).bool().unbind())
        for parameter, gradient, own in zip(parameters, gradients, bad, strict=True):
            clear(gradient, own)
            state[parameter]["nonfinite"] += own
        return [torch.stack([own, torch.zeros_like(own)]).long() for own in bad]

    def parts(self, bucket: B, room: int) -> Iterable[B]:
        """Whole units whose gradients fit in the room together, one part after the other."""
        return parts(bucket, room)

    def slices(self, start: int, stop: int, each: int, room: int) -> Iterable[tuple[int, int]]:
        """Runs of the blocks start to stop - 1, of ``each`` bytes, that fit in the room: (first, last + 1)."""
        return slices(start, stop, each, room)

    def _works(self, groups: list[Group], state: dict[Tensor, dict[str, Any]]) -> list[Work]:
        """Count the step, and say what it asks of each unit. Anew every time: parameters and settings may change."""
        works = []
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
                run, count = (0, cut.count), cut.count if self.team is None else self.runs(parameter)[-1][1]
                in_turns = bool(group.get("stagger")) and count > 1
                if group.get("stagger"):
                    each = cut.rows**3 + cut.columns**3
                    run = staggered(cost_before, each, cut.count, total[period], period, step)
                if not (due.update or due.refresh):
                    run = (0, 0)
                dtype = working_dtype(parameter)
                apply_dtype = _applied_in(group, dtype)
                settings = Settings(
                    forms, due.precondition, in_turns, group["graft"], group["workspace"], dtype, apply_dtype
                )
                turn = Turn(*run, due.update, due.refresh)
                works.append(Work(self.unit(parameter), cut, own, turn, settings))
        return works

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

    def update_part(self, part: Bucket) -> Tensor:
        """Update the factors of all blocks whose turn it is; returns the troubles, int64 [2]."""
        gradient = self.gathered(part)
        magnitude = divide(gradient, clear_bad(gradient))
        troubles = torch.zeros(2, dtype=torch.int64, device=part.device)
        stack, room = Stack(part.states, part.counts), part.workspace - gradient.nbytes - self.workspace.kept("roots")
        for turn in part.runs():
            for start, stop in self.slices(turn.first, turn.last, part.update_bytes, room):
                own = turn._replace(first=start, last=stop)
                troubles[1] += self._update(part, stack, own, gradient[start:stop], magnitude[start:stop])
        return troubles

    def _apply_part(self, part: Bucket) -> Tensor:
        """Precondition the gradients of a part; returns the troubles, int64 [2]."""
        gradient = self.gathered(part)
        measures, plain = self.preconditioned(part, gradient)
        bad = torch.zeros_like(measures.bad[0], dtype=torch.int64) if plain else part.count_bad(measures.bad)
        if not part.precondition:
            part.scatter(gradient, measures.magnitude)
            return torch.stack([bad, torch.zeros_like(bad)])
        weight = graft(part.counts, measures) if part.graft else measures.weight
        part.scatter(gradient, bounded_weight(weight, part.dtype), bounded=plain and part.graft)
        return torch.stack([bad, torch.zeros_like(bad)])

    def preconditioned(self, part: Bucket, gradient: Tensor) -> tuple[Measures, bool]:
        """Precondition blocks, [k, r, c], in place, up to their weights.

        Returns:
            (what is known of the blocks; whether all were finite and moderate from the start).
        """
        magnitude = torch.ones_like(gradient[:, 0, 0])
        bad = torch.zeros_like(magnitude, dtype=torch.bool)
        # To look at the numbers, other devices would have to be waited for.
        before = moderate_squares(gradient) if self.workspace.on_cpu(part.device) else None
        plain = before is not None
        if before is None:
            largest = clear_bad(gradient)
            bad = ~torch.isfinite(largest)
            magnitude = divide(gradient, largest) if part.precondition else magnitude
            before = squares(gradient)
        weight = magnitude.to(before.dtype, copy=True)
        if not part.precondition:
            return Measures(bad, magnitude, before, before, weight), plain
        stack = Stack(part.states, part.counts)
        room = self.workspace.room(part.device, part.workspace) - gradient.nbytes
        for start, stop in self.slices(0, len(gradient), part.apply_bytes, room):
            blocks = gradient[start:stop]
            result, factors = self.precondition(part, stack, start, stop, blocks, magnitude[start:stop])
            if result.data_ptr() != blocks.data_ptr():
                blocks.copy_(result)
            for factor in factors:
                weight[start:stop] *= factor
        return Measures(bad, magnitude, before, squares(gradient) if part.graft else before, weight), plain

    def gathered(self, part: Bucket) -> Tensor:
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


def _as_others(part: Bucket, stack: Stack, side: str, factor: Factor, start: int, scale: Tensor) -> Tensor:
    """The numbers of roots, [k], those of blocks that have had no statistic yet as of their unit's other blocks.

    The root of such a block is I times this number: without a scale of its own it must not outweigh the others. They
    are known by their last statistics, A = tr(M) / n I.
    """
    order, own = part.block[SIDES.index(side)], slice(start, start + len(scale))
    mean_norm = part.mean_norms(stack, side).to(scale.dtype)
    mean_norm = torch.where(mean_norm > 0, mean_norm / order**0.5, 1.0)
    others = powers(mean_norm, -2 / factor.power).clamp(1e-30, 1e30)[part.owner[own]]
    have = stack.read(side, start, start + len(scale), ("updates",))["updates"] > 0
    return torch.where(have, scale, others)
