"""What there is to know of blocks of gradients beside their directions: whether they are finite, and their norms."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_optim.linalg import each, largest_magnitude, power_of_two

Counts = Sequence[int]  # blocks of each unit in a stack


class Measures(NamedTuple):
    """Of preconditioned blocks, each [k]: they are ``weight`` times the numbers in the stack."""

    bad: Tensor  # bool; whether the gradient was not finite, and counts as zero
    magnitude: Tensor  # by what the gradient was divided
    before: Tensor  # sum of squares of the gradient, in units of magnitude^2
    after: Tensor  # sum of squares of the numbers in the stack
    weight: Tensor


def owners(counts: Counts, device: torch.device) -> Tensor:
    """For each block of a stack the index of its unit, int64 [sum(counts)]."""
    return _owners(tuple(counts), device)


@lru_cache(maxsize=4096)
def _owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], dtype=torch.int64, device=device)


@lru_cache(maxsize=4096)
def _lengths(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device)


def of_units(x: Tensor, counts: Counts) -> Tensor:
    """The sums over the blocks of each unit, [k] to [units]."""
    # Not index_add_, whose order of summation changes from run to run on CUDA; unsafe: lengths unchecked, no host sync.
    return torch.segment_reduce(x, "sum", lengths=_lengths(tuple(counts), x.device), unsafe=True)


def squares(blocks: Tensor) -> Tensor:
    """The sum of squares of each block, [k], in float64 where the device has it.

    Row by row first: how a sum of more is rounded would depend on how many blocks there are.
    """
    norms = torch.linalg.vector_norm(blocks, dim=2)
    return (norms if blocks.device.type == "mps" else norms.double()).square().sum(1)


def moderate_squares(blocks: Tensor) -> Tensor | None:
    """The sums of squares, if all blocks are finite and none needs to be divided."""
    found = squares(blocks)
    return found if blocks.is_meta or bool(((found > 1e-18) & (found < 1e18)).all()) else None


def clear(x: Tensor, bad: Tensor) -> None:
    """Zero where ``bad`` is, whatever is there, in a tenth of the time of ``masked_fill_``."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    x.view(bits).bitwise_and_(bad.to(bits) - 1)


def not_finite(gradient: Tensor) -> Tensor:
    """Whether any of it is not, bool []."""
    largest = largest_magnitude(gradient, ()) if gradient.numel() else gradient.new_zeros(())
    return ~torch.isfinite(largest)


def clear_bad(blocks: Tensor) -> Tensor:
    """Zero the blocks that are not finite; returns their largest magnitudes before, [k]."""
    largest = largest_magnitude(blocks, (1, 2))
    clear(blocks, each(~torch.isfinite(largest), blocks))
    return largest


def divide(blocks: Tensor, largest: Tensor) -> Tensor:
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


def graft(counts: Counts, measures: Measures) -> Tensor:
    """By what the numbers of each block are to be multiplied so that each unit has the norm of its gradient, [k]."""
    _, magnitude, before, after, weight = measures
    gradient_unit, result_unit = (_largest(x, counts) for x in (magnitude.to(before.dtype), weight))
    before = of_units(before * (magnitude / gradient_unit).square(), counts)
    after = of_units(after * (weight / result_unit).square(), counts)
    ratio = torch.where(after > 0, before / after, 0.0).sqrt()[owners(counts, before.device)]
    return weight / result_unit * ratio * gradient_unit


def bounded_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of blocks as numbers that a dtype can hold."""
    return weight.clamp(max=torch.finfo(dtype).max).to(dtype)


def _largest(x: Tensor, counts: Counts) -> Tensor:
    """From a number of each block the largest of its unit, [k]; 1 where that is zero."""
    owner = owners(counts, x.device)
    largest = x.new_zeros(len(counts)).scatter_reduce_(0, owner, x, "amax")
    return torch.where(largest > 0, largest, 1.0)[owner]
