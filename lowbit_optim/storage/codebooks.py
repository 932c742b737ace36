"""Named code tables: the values that a low-bit code can stand for.

A table holds at most 2**bits values in [-1, 1], ascending; a block of numbers is divided by its scale and each quotient
is replaced by the nearest value. Every table is defined in float64 and rounded once to the dtype that it is used in.

Tables padded at the end repeat their last value, so that every bit pattern decodes to something; nearest-value
rounding never chooses a repeated one.

Example:
    >>> from lowbit_optim.storage import CODEBOOKS
    >>> CODEBOOKS
    ('linear', 'linear-2', 'dynamic', 'nf', 'lloyd-max')
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4, 6, 8)


def _linear(bits: int) -> list[float]:
    """k / (2^(b-1) - 1), evenly spaced and symmetric, zero included."""
    largest = 2 ** (bits - 1) - 1
    return [k / largest for k in range(-largest, largest + 1)]


def _linear2(bits: int) -> list[float]:
    """sign(u) u^2 of u = -1 + 2j / (2^b - 1), with the code just below zero set to zero (Wang et al. 2024, eq. 3)."""
    levels = [-1 + 2 * j / (2**bits - 1) for j in range(2**bits)]
    table = [math.copysign(u * u, u) for u in levels]
    table[2 ** (bits - 1) - 1] = 0.0
    return table


def _dynamic(bits: int) -> list[float]:
    """The dynamic tree: sign, E leading zeros that select 10^-E, and the b - 2 - E bits left for the fraction."""
    table = [0.0, 1.0]
    for exponent in range(bits - 1):
        count = 2 ** (bits - 2 - exponent)
        for k in range(count):
            value = (0.1 + 0.9 * (k + 0.5) / count) * 10.0**-exponent
            table += [value, -value]
    return sorted(table)


def _normal_float(bits: int) -> list[float]:
    """Quantiles of the normal distribution with an exact zero, scaled to [-1, 1] (QLoRA's NormalFloat)."""
    half = 2 ** (bits - 1)
    tail = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(tail + (0.5 - tail) * k / half) for k in range(half)]
    negative = [-quantile(tail + (0.5 - tail) * k / (half - 1)) for k in range(half - 1)]
    return sorted(value / positive[0] for value in [*positive, 0.0, *negative])


def _lloyd_max(bits: int) -> list[float]:
    """The 2^b levels of least mean squared error for a normal variable, scaled to [-1, 1]; none of them is zero."""
    normal = NormalDist()
    half = 2 ** (bits - 1)
    # Panter and Dite: at high resolution the best levels lie at quantiles of the density's cube root.
    levels = [normal.inv_cdf(0.5 + (k + 0.5) / (2 * half)) * math.sqrt(3) for k in range(half)]
    for _ in range(10_000):
        edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
        density = [normal.pdf(edge) for edge in edges]
        mass = [0.5 * math.erfc(edge / math.sqrt(2)) for edge in edges]
        means = [(density[k] - density[k + 1]) / (mass[k] - mass[k + 1]) for k in range(half)]
        moved = max(abs(a - b) for a, b in zip(levels, means, strict=True))
        levels = means
        if moved < 1e-10:
            break
    return sorted(sign * level / levels[-1] for level in levels for sign in (-1, 1))


_TABLES: dict[str, Callable[[int], list[float]]] = {
    "linear": _linear,
    "linear-2": _linear2,
    "dynamic": _dynamic,
    "nf": _normal_float,
    "lloyd-max": _lloyd_max,
}
#: The names of all tables.
CODEBOOKS = tuple(_TABLES)


@lru_cache
def _values(name: str, bits: int) -> tuple[float, ...]:
    if name not in _TABLES:
        raise ValueError(f"unknown codebook {name!r}; the codebooks are {', '.join(CODEBOOKS)}")
    if bits not in BITS:
        raise ValueError(f"a codebook of {bits!r} bits does not exist; codes have {', '.join(map(str, BITS))} bits")
    values = _TABLES[name](bits)
    return (*values, *[values[-1]] * (2**bits - len(values)))


def codebook(name: str, bits: int) -> Tensor:
    """The values of a named table, float64 [2**bits], ascending.

    Args:
        name: one of ``CODEBOOKS``: "linear", "linear-2", "dynamic", "nf" (NormalFloat), "lloyd-max".
        bits: one of ``BITS``: 2, 3, 4, 6, 8.

    Raises:
        ValueError: an unknown name or number of bits.

    Example:
        >>> from lowbit_optim.storage import codebook
        >>> codebook("linear", 3)
        tensor([-1.0000, -0.6667, -0.3333,  0.0000,  0.3333,  0.6667,  1.0000,  1.0000],
               dtype=torch.float64)
    """
    return torch.tensor(_values(name, bits), dtype=torch.float64, device="cpu")


class Table(NamedTuple):
    """A code table as the kernels want it: on a device, in the dtype of the computation."""

    values: Tensor  # [2**bits]
    boundaries: Tensor  # [2**bits - 1], between neighbouring values; a quotient on one belongs to the lower code


@lru_cache
def table(name: str, bits: int, dtype: torch.dtype, device: torch.device) -> Table:
    """A named table, made in float64 on the CPU and rounded once; kept, so that no step waits for a copy."""
    values = codebook(name, bits)
    # None between a value and its repetition: the first of equal values is the lower code, and has them all.
    boundaries = ((values[:-1] + values[1:]) / 2).where(values[:-1] < values[1:], torch.inf)
    return Table(values.to(dtype).to(device), boundaries.to(dtype).to(device))


@lru_cache
def cell_errors(name: str, bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each code the root mean square distance to its value of numbers spread evenly over its cell, [2**bits].

    Cells end at the boundaries, the outermost at -1 and 1.
    """
    values, boundaries = table(name, bits, torch.float64, torch.device("cpu"))
    low = torch.cat([values[:1].clamp(max=-1), boundaries]).clamp(max=1)
    high = torch.cat([boundaries, boundaries.new_ones(1)]).clamp(max=1)
    width = (high - low).where(low < high, 1.0)  # the cell of a repeated value is empty
    squares = ((high - values) ** 3 + (values - low) ** 3) / (3 * width)
    return squares.sqrt().to(dtype).to(device)
