"""The shared engine of the Kronecker-factored preconditioners.

A gradient's way through it: blocks of all same-shaped parameters in one stack, their statistics into the factors, the
factors' roots onto the blocks, the norm of each parameter's gradient back, and into ``param.grad`` again. A subclass
says what the statistics are and how two roots act on a block.

What is preconditioned as one matrix is a unit: a parameter, or a layer's weight with its bias as the last column. A
unit's state is that of its first parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack, blocking
from lowbit_optim.linalg import each, full_precision
from lowbit_optim.storage.blockwise import Quantization
from lowbit_optim.storage.budget import ONE_PERIOD, form
from lowbit_optim.storage.factors import Factor, State, put
from lowbit_optim.storage.moment import Moment

SIDES = ("left", "right")

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


class Forms(NamedTuple):
    """The forms of the two factors of a block, and of the gradient's moment in their eigenbases where one is kept."""

    left: Factor
    right: Factor
    moment: Moment | None = None

    def sides(self) -> Iterator[tuple[str, Factor]]:
        """("left", its form), ("right", its form)."""
        return zip(SIDES, (self.left, self.right), strict=True)

    def roots(self, stack: Stack, start: int, stop: int, dtype: torch.dtype) -> list[Tensor]:
        """Both roots of blocks start to stop, [k, r, r] and [k, c, c] in ``dtype``."""
        return [form.root(stack.read(side, start, stop), dtype) for side, form in self.sides()]


class Due(NamedTuple):
    """What this step asks of a parameter."""

    update: bool
    refresh: bool
    precondition: bool


@dataclass
class Bucket:
    """Units of one step that share a block shape and every setting."""

    forms: Forms
    due: Due
    graft: bool
    workspace: int
    dtype: torch.dtype
    units: list[tuple[Tensor, ...]] = field(default_factory=list)
    blockings: list[Blocking] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.units[0][0].device

    @property
    def counts(self) -> list[int]:
        """Blocks of each unit."""
        return [cut.count for cut in self.blockings]

    @property
    def owner(self) -> Tensor:
        """For each block the index of its unit, int64 [k]."""
        return _owner(tuple(self.counts), self.device)

    def part(self, start: int, stop: int) -> "Bucket":
        """The units from start to stop."""
        lists = {name: getattr(self, name)[start:stop] for name in ("units", "blockings", "states")}
        return replace(self, **lists)

    def gather(self) -> Tensor:
        """The blocks of all gradients, [k, r, c] in ``dtype``."""
        pairs = zip(self.units, self.blockings, strict=True)
        return torch.cat([cut.split(_joint_gradient(unit)).to(self.dtype) for unit, cut in pairs])

    def scatter(self, blocks: Tensor) -> None:
        """Write the blocks into the gradients; what a gradient's dtype cannot hold becomes its largest number."""
        for unit, cut, own in zip(self.units, self.blockings, blocks.split(self.counts), strict=True):
            matrix = cut.merge(own)
            for parameter, part in zip(unit, _parts_of(matrix, unit), strict=True):
                if parameter.grad is not None:
                    limit = torch.finfo(parameter.grad.dtype).max
                    parameter.grad.copy_(part.clamp(-limit, limit).view_as(parameter))


def _joint_gradient(unit: tuple[Tensor, ...]) -> Tensor:
    """The gradient of a parameter, or of a weight and its bias as the last column: [first dim, the rest + 1]."""
    if len(unit) == 1:
        assert unit[0].grad is not None
        return unit[0].grad
    weight, bias = (torch.zeros_like(p) if p.grad is None else p.grad for p in unit)
    return torch.cat([weight.flatten(1), bias.to(weight.dtype).unsqueeze(1)], 1)


def _parts_of(matrix: Tensor, unit: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inverse of ``_joint_gradient``."""
    return (matrix,) if len(unit) == 1 else (matrix[:, :-1], matrix[:, -1])


@lru_cache
def _owner(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """For each block of a stack the index of its unit, int64 [sum(counts)]."""
    return torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)


@lru_cache
def _lengths(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device)


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

    @abstractmethod
    def statistics(self, part: Bucket, start: int, stop: int, gradient: Tensor, magnitude: Tensor) -> Statistics:
        """The statistics of the left and right factors of blocks start to stop.

        Args:
            gradient: the blocks' gradients divided by ``magnitude``, [k, r, c].
            magnitude: of each block's unit, [k].

        Returns:
            For each side M, [k, r, r] and [k, c, c], and a magnitude [k]: the statistic is magnitude^2 M.
        """

    def apply(self, left: Tensor, gradient: Tensor, right: Tensor) -> Tensor:
        """The preconditioned blocks [k, r, c] from the roots [k, r, r] and [k, c, c]."""
        return left @ gradient @ right

    def precondition(
        self, part: Bucket, stack: Stack, start: int, stop: int, gradient: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Blocks start to stop of the preconditioned gradient.

        Args:
            gradient, magnitude: as for ``statistics``.

        Returns:
            (X [k, r, c], e int32 [k]): the blocks are magnitude 2^e X.
        """
        (left, right), exponents = _without_exponents(part.forms.roots(stack, start, stop, part.dtype))
        return self.apply(left, gradient, right), exponents

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
                troubles += [self._step_part(part) for part in self.parts(bucket)]
        return torch.stack([t.to(troubles[0].device) for t in troubles]).sum(0) if troubles else None

    def parts(self, bucket: Bucket) -> Iterable[Bucket]:
        """Whole units whose gradients fit in the workspace together, one part after the other."""
        return _parts(bucket)

    def slices(self, part: Bucket, blocks: Tensor) -> Iterable[tuple[int, int]]:
        """Runs of the blocks [k, r, c] of a part whose matrices fit in the workspace: (first, last + 1)."""
        return _slices(part, blocks)

    def _buckets(self, groups: list[Group], state: dict[Tensor, dict[str, Any]]) -> list[Bucket]:
        """Count the step and sort this step's parameters. Rebuilt every time: parameters and settings may change."""
        buckets: dict[Any, Bucket] = {}
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                own = state[parameter]
                own["step"] += 1
                cut = self.blocking(parameter, group)
                if cut is None:
                    continue
                forms = self.forms(group, cut)
                due = self._due(int(own["step"]), group, forms)
                settings = (forms, due, group["graft"], group["workspace"], working_dtype(parameter))
                key = (cut.rows, cut.columns, parameter.device, settings)
                bucket = buckets.setdefault(key, Bucket(*settings))
                bucket.units.append(self.unit(parameter))
                bucket.blockings.append(cut)
                bucket.states.append(own)
        return list(buckets.values())

    def _due(self, step: int, group: Group, forms: Forms) -> Due:
        refresh = group["precondition_frequency"]
        if refresh is None:  # bits=32 stands in for the storage that was asked for, at the same steps
            one_period = group["storage"] in ONE_PERIOD
            refresh = group["statistics_frequency"] if one_period else self.default_precondition_frequency
        return Due(
            update=step % group["statistics_frequency"] == 0,
            refresh=not forms.left.one_period and step % refresh == 0,
            precondition=step >= group["start_preconditioning_step"],
        )

    def _step_part(self, part: Bucket) -> Tensor:
        """One step of a bucket that fits in the workspace; returns its troubles, int64 [2]."""
        blocks = part.gather()
        magnitude, good = _magnitudes(blocks, part)
        gradient = torch.where(each(good, blocks), blocks / each(magnitude, blocks), 0.0)
        troubles = torch.stack([_count_nonfinite(part, good), torch.zeros_like(part.owner[0])])
        result = torch.empty_like(gradient) if part.due.precondition else None
        exponents = torch.zeros_like(magnitude, dtype=torch.int32)
        stack = Stack(part.states, part.counts)
        for start, stop in self.slices(part, gradient):
            own = gradient[start:stop]
            if part.due.update or part.due.refresh:
                troubles[1] += self._update(part, stack, start, stop, own, magnitude[start:stop])
            if result is not None:
                result[start:stop], exponents[start:stop] = self.precondition(
                    part, stack, start, stop, own, magnitude[start:stop]
                )
        if result is None:
            part.scatter(torch.where(each(good, blocks), blocks, 0.0))
            return troubles
        result, exponent = _common_exponent(result, exponents, part)
        if part.graft:
            part.scatter(_graft(result, gradient, magnitude, part))
        else:
            mantissa, own = torch.frexp(magnitude)
            half = (exponent + own).to(magnitude.dtype) / 2  # the whole may overflow where their product does not
            scale = mantissa * torch.exp2(half.floor()) * torch.exp2(half.ceil())
            part.scatter(result * each(scale.clamp(max=torch.finfo(scale.dtype).max), result))
        return troubles

    def _update(self, part: Bucket, stack: Stack, start: int, stop: int, gradient: Tensor, magnitude: Tensor) -> Tensor:
        """Statistics into factors, factors into roots; returns how many blocks failed, int64 []."""
        failed = torch.zeros((), dtype=torch.int64, device=gradient.device)
        due = part.due.update
        statistics = self.statistics(part, start, stop, gradient, magnitude) if due else (None, None)
        states = [stack.read(side, start, stop) for side in SIDES]
        dampings = self.dampings(part, states, statistics)
        for (side, factor), state, statistic, damping in zip(
            part.forms.sides(), states, statistics, dampings, strict=True
        ):
            before = state["failures"]
            if statistic is not None:
                state = factor.update(state, *statistic, damping)
            if part.due.refresh:
                state = factor.refresh(state, gradient.dtype, damping)
            stack.write(side, start, stop, state)
            failed += (state["failures"] - before).sum()
        return failed


def _guard(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Zero the gradient of a parameter without blocks if any of it is not finite; returns its troubles, int64 [2]."""
    bad = ~torch.isfinite(gradient).all()
    gradient.masked_fill_(bad, 0.0)
    state["nonfinite"] += bad
    return torch.stack([bad, torch.zeros_like(bad)]).long()


def _largest(magnitude: Tensor, part: Bucket) -> Tensor:
    """From the largest magnitude of each block that of its whole parameter, [k]; 1 where that is zero."""
    largest = magnitude.new_zeros(len(part.states)).scatter_reduce_(0, part.owner, magnitude, "amax")
    return torch.where(largest > 0, largest, 1.0)[part.owner]


def _magnitudes(blocks: Tensor, part: Bucket) -> tuple[Tensor, Tensor]:
    """For each block its parameter's largest magnitude, [k], and whether the block is finite, [k].

    Divided by it, squares neither overflow nor underflow. It has a floor, so that inverse roots of subnormal gradients
    do not overflow.
    """
    own = blocks.abs().amax((1, 2))
    good = torch.isfinite(own)
    return _largest(own.where(good, 0.0), part).clamp(min=1e-30), good


def _without_exponents(roots: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Both roots of each block over one power of two, and the exponent of its square, int32 [k].

    Then their product with a gradient neither overflows nor underflows, which low powers p of small statistics would.
    """
    left, right = (torch.frexp(root.abs().amax((1, 2))).exponent for root in roots)
    exponent = ((left + right) // 2).clamp(-120, 120)
    return [root * each(torch.exp2(-exponent.to(root.dtype)), root) for root in roots], 2 * exponent


def _common_exponent(result: Tensor, exponents: Tensor, part: Bucket) -> tuple[Tensor, Tensor]:
    """``result`` with the largest exponent of each parameter's blocks taken out of all of them; that exponent, [k]."""
    lowest = torch.full((len(part.states),), -1000, dtype=exponents.dtype, device=exponents.device)
    largest = lowest.scatter_reduce_(0, part.owner, exponents, "amax")[part.owner]
    return result * each(torch.exp2((exponents - largest).to(result.dtype)), result), largest


def _count_nonfinite(part: Bucket, good: Tensor) -> Tensor:
    """Count the bad blocks of each parameter in its state; returns all of them, int64 []."""
    bad = torch.zeros(len(part.states), dtype=torch.int64, device=good.device).index_add_(0, part.owner, (~good).long())
    torch._foreach_add_([state["nonfinite"] for state in part.states], list(bad.unbind()))
    return bad.sum()


def _graft(result: Tensor, gradient: Tensor, magnitude: Tensor, part: Bucket) -> Tensor:
    """``result`` with each parameter's norm of magnitude * gradient."""
    result = result / each(_largest(result.abs().amax((1, 2)), part), result)
    before, after = (_norms(x, tuple(part.counts)) for x in (gradient, result))
    scale = magnitude * torch.where(after > 0, before / after, 0.0)[part.owner]
    return result * each(scale.clamp(max=torch.finfo(scale.dtype).max), result)


def _norms(blocks: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The Frobenius norm of each parameter's blocks together, [len(counts)]."""
    # Not index_add_, whose order of summation changes from run to run on CUDA; unsafe: lengths unchecked, no host sync.
    squares = blocks.square().sum((1, 2))
    return torch.segment_reduce(squares, "sum", lengths=_lengths(counts, blocks.device), unsafe=True).sqrt()


def _parts(bucket: Bucket) -> Iterator[Bucket]:
    """Whole parameters whose gradients, their result and a temporary fit in the workspace; at least one each time."""
    start, used = 0, 0
    for i, cut in enumerate(bucket.blockings):
        size = 3 * cut.count * cut.rows * cut.columns * bucket.dtype.itemsize
        if i > start and used + size > bucket.workspace:
            yield bucket.part(start, i)
            start, used = i, 0
        used += size
    yield bucket.part(start, len(bucket.blockings))


def _slices(bucket: Bucket, blocks: Tensor) -> Iterator[tuple[int, int]]:
    """Runs of blocks whose roots, or the matrices of their update, fit in the workspace; at least one block each."""
    count, rows, columns = blocks.shape
    matrices = 8 if bucket.due.update or bucket.due.refresh else 2
    run = max(1, bucket.workspace // (matrices * (rows * rows + columns * columns) * blocks.element_size()))
    for start in range(0, count, run):
        yield start, min(start + run, count)
