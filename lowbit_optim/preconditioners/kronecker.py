"""The shared engine of the Kronecker-factored preconditioners.

A gradient's way through it: blocks of all same-shaped parameters in one stack, their statistics into the factors, the
factors' roots onto the blocks, the norm of each parameter's gradient back, and into ``param.grad`` again. A subclass
says what the statistics are and how two roots act on a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack, blocking
from lowbit_optim.linalg import each, full_precision
from lowbit_optim.storage.blockwise import Quantization
from lowbit_optim.storage.budget import ONE_PERIOD, form
from lowbit_optim.storage.factors import Factor

SIDES = ("left", "right")
DEFAULT_PRECONDITION_FREQUENCY = 500

Group = dict[str, Any]


class Forms(NamedTuple):
    """The forms of the two factors of a block."""

    left: Factor
    right: Factor


class Due(NamedTuple):
    """What this step asks of a parameter."""

    update: bool
    refresh: bool
    precondition: bool


@dataclass
class Bucket:
    """Parameters of one step that share a block shape and every setting."""

    forms: Forms
    due: Due
    graft: bool
    workspace: int
    dtype: torch.dtype
    gradients: list[Tensor] = field(default_factory=list)
    blockings: list[Blocking] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Blocks of each parameter."""
        return [cut.count for cut in self.blockings]

    @property
    def owner(self) -> Tensor:
        """For each block the index of its parameter, int64 [k]."""
        return _owner(tuple(self.counts), self.gradients[0].device)

    def part(self, start: int, stop: int) -> "Bucket":
        """The parameters from start to stop."""
        lists = {name: getattr(self, name)[start:stop] for name in ("gradients", "blockings", "states")}
        return replace(self, **lists)

    def gather(self) -> Tensor:
        """The blocks of all gradients, [k, r, c] in ``dtype``."""
        pairs = zip(self.gradients, self.blockings, strict=True)
        return torch.cat([cut.split(gradient).to(self.dtype) for gradient, cut in pairs])

    def scatter(self, blocks: Tensor) -> None:
        """Write the blocks into the gradients; what a gradient's dtype cannot hold becomes its largest number."""
        for gradient, cut, own in zip(self.gradients, self.blockings, blocks.split(self.counts), strict=True):
            limit = torch.finfo(gradient.dtype).max
            gradient.copy_(cut.merge(own.clamp(-limit, limit)))

    def sides(self) -> Iterator[tuple[str, Factor]]:
        """("left", its form), ("right", its form)."""
        return zip(SIDES, self.forms, strict=True)


@lru_cache
def _owner(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """For each block of a stack the index of its parameter, int64 [sum(counts)]."""
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


def group_form(group: Group, order: int) -> Factor:
    """The form in which a group keeps a factor of the given order."""
    return _form(
        order,
        group["min_quant_size"],
        tuple(group["quantization"]) if group["quantization"] else None,
        storage=group["storage"],
        bits=group["bits"],
        layout=group["layout"],
        power=group["root_power"],
        decay=group["shampoo_beta"],
        eps=group["matrix_eps"],
        initial_scale=group["initial_scale"],
        statistic_limit=group["statistic_limit"],
        rectify_update=group["rectify_update"],
        rectify_root=group["rectify_root"],
        orthogonal_iterations=group["orthogonal_iterations"],
    )


def group_forms(group: Group, cut: Blocking) -> Forms:
    """The forms in which a group keeps the factors of a block."""
    return Forms(group_form(group, cut.rows), group_form(group, cut.columns))


def _factors(
    cut: Blocking, forms: Forms, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a parameter's factors before the first update, by their names in its state."""
    for side, factor, order in zip(SIDES, forms, (cut.rows, cut.columns), strict=True):
        for name, tensor in factor.init(cut.count, order, dtype, device).items():
            yield f"{side}.{name}", tensor


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
    * "left.<name>", "right.<name>": the tensors of the factors' forms, stacked over the parameter's blocks.
    """

    @abstractmethod
    def statistics(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics of the left and right factors, [k, r, r] and [k, c, c], of gradient blocks [k, r, c]."""

    @abstractmethod
    def apply(self, left: Tensor, gradient: Tensor, right: Tensor) -> Tensor:
        """The preconditioned blocks [k, r, c] from the roots [k, r, r] and [k, c, c]."""

    def blocking(self, parameter: Tensor, group: Group) -> Blocking | None:
        """How a parameter of the group is cut into blocks; None if it is left to the base optimizer."""
        if not group["precondition"]:
            return None
        return blocking(tuple(parameter.shape), group["max_preconditioner_dim"])

    def layout(self, parameter: Tensor, group: Group) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor in the state of a parameter of the group."""
        counters = dict.fromkeys(("step", "nonfinite"), (torch.Size(), torch.int64))
        cut = self.blocking(parameter, group)
        if cut is None:
            return counters
        return counters | _factor_layout(cut, group_forms(group, cut), working_dtype(parameter))

    def init_state(self, parameter: Tensor, group: Group) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        device = parameter.device
        state = {
            "step": torch.zeros((), dtype=torch.int64, device="cpu"),
            "nonfinite": torch.zeros((), dtype=torch.int64, device=device),
        }
        cut = self.blocking(parameter, group)
        if cut is not None:
            state |= _factors(cut, group_forms(group, cut), working_dtype(parameter), device)
        return state

    @torch.no_grad()
    def step(self, groups: list[Group], state: dict[Tensor, dict[str, Any]]) -> Tensor | None:
        """Guard and precondition every gradient of the groups, in place.

        Returns:
            How many gradient blocks were not finite and how many decompositions failed in this step, int64 [2] on the
            first parameter's device; None if no parameter has a gradient.
        """
        troubles = []
        with full_precision():
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and self.blocking(parameter, group) is None:
                        troubles.append(_guard(parameter.grad, state[parameter]))
            for bucket in self._buckets(groups, state):
                troubles += [self._step_part(part) for part in _parts(bucket)]
        return torch.stack([t.to(troubles[0].device) for t in troubles]).sum(0) if troubles else None

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
                forms = group_forms(group, cut)
                due = _due(int(own["step"]), group, forms)
                settings = (forms, due, group["graft"], group["workspace"], working_dtype(parameter))
                key = (cut.rows, cut.columns, parameter.device, settings)
                bucket = buckets.setdefault(key, Bucket(*settings))
                bucket.gradients.append(parameter.grad)
                bucket.blockings.append(cut)
                bucket.states.append(own)
        return list(buckets.values())

    def _step_part(self, part: Bucket) -> Tensor:
        """One step of a bucket that fits in the workspace; returns its troubles, int64 [2]."""
        blocks = part.gather()
        magnitude, good = _magnitudes(blocks, part)
        gradient = torch.where(each(good, blocks), blocks / each(magnitude, blocks), 0.0)
        troubles = torch.stack([_count_nonfinite(part, good), torch.zeros_like(part.owner[0])])
        result = torch.empty_like(gradient) if part.due.precondition else None
        exponents = torch.zeros_like(magnitude, dtype=torch.int32)
        stack = Stack(part.states, part.counts)
        for start, stop in _slices(part, gradient):
            own = gradient[start:stop]
            if part.due.update or part.due.refresh:
                troubles[1] += self._update(part, stack, start, stop, own, magnitude[start:stop])
            if result is not None:
                roots = [form.root(stack.read(side, start, stop), part.dtype) for side, form in part.sides()]
                (left, right), exponents[start:stop] = _without_exponents(roots)
                result[start:stop] = self.apply(left, own, right)
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
        statistics = self.statistics(gradient) if part.due.update else (None, None)
        for (side, factor), m in zip(part.sides(), statistics, strict=True):
            state = stack.read(side, start, stop)
            before = state["failures"]
            if m is not None:
                state = factor.update(state, m, magnitude)
            if part.due.refresh:
                state = factor.refresh(state, gradient.dtype)
            stack.write(side, start, stop, state)
            failed += (state["failures"] - before).sum()
        return failed


def _due(step: int, group: Group, forms: Forms) -> Due:
    refresh = group["precondition_frequency"]
    if refresh is None:  # bits=32 stands in for the storage that was asked for, at the same steps
        refresh = group["statistics_frequency"] if group["storage"] in ONE_PERIOD else DEFAULT_PRECONDITION_FREQUENCY
    return Due(
        update=step % group["statistics_frequency"] == 0,
        refresh=not forms.left.one_period and step % refresh == 0,
        precondition=step >= group["start_preconditioning_step"],
    )


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
