"""What the storage benchmarks share: test matrices and streams of statistics in float64, forms, and their errors."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowbit_optim.presets import WANG2024
from lowbit_optim.storage.budget import BITS, form
from lowbit_optim.storage.factors import Factor, State
from lowbit_optim.storage.root import Scaled

DECAY = 0.95
WIDTHS = tuple(bits for bits in BITS if bits <= 8)
PAPER = {key: WANG2024[key] for key in ("initial_scale", "statistic_limit")}


def orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [n, n]."""
    return torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q


def two_level(order: int, large: int, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], ``large`` of them 1 and the rest 1 / ratio, and random eigenvectors [n, n]."""
    values = torch.ones(order, dtype=torch.float64)
    values[large:] = 1 / ratio
    return values, orthogonal(order, generator)


def log_spaced(order: int) -> Tensor:
    """Eigenvalues [n] from 1 to 1 / 3e4."""
    return torch.logspace(0, -math.log10(3e4), order, dtype=torch.float64)


def power_law(order: int) -> Tensor:
    """Eigenvalues [n], 1 / i^2."""
    return torch.arange(1, order + 1, dtype=torch.float64) ** -2.0


def spiked(order: int) -> Tensor:
    """Eigenvalues [n]: a twentieth of them from 1 to 0.1, the rest flat at 1e-3."""
    values = torch.full((order,), 1e-3, dtype=torch.float64)
    values[: order // 20] = torch.logspace(0, -1, order // 20, dtype=torch.float64)
    return values


SPECTRA = {"log-spaced": log_spaced, "power law": power_law, "spiked": spiked}


def uneven(order: int, spread: float = 2.0) -> Tensor:
    """Scales [n] of rows, spread evenly over so many powers of ten, in no order."""
    where = torch.rand(order, generator=torch.Generator().manual_seed(order), dtype=torch.float64)
    return 10 ** (spread * (where - 1))


def statistics(
    levels: Tensor, columns: int, seeds: range, updates: int, scales: Tensor | None = None
) -> Iterator[Tensor]:
    """M_t = G G^T [seeds, n, n] with G = C^(1/2) Z / sqrt(columns), Z normal, C of eigenvalues ``levels`` [n].

    With ``scales`` [n], the rows of G are multiplied with them.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    order = len(levels)
    root = torch.stack([orthogonal(order, g) for g in generators]) * levels.sqrt()
    if scales is not None:
        root = root * scales[:, None]
    for _ in range(updates):
        noise = torch.stack([torch.randn(order, columns, generator=g, dtype=torch.float64) for g in generators])
        gradient = root @ noise / math.sqrt(columns)
        yield gradient @ gradient.mT


def power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    """V diag(lambda)^exponent V^T."""
    return (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT


def low_bit(storage: str, bits: float, **shared: Any) -> Factor:
    """The form that ``Shampoo(storage=..., bits=...)`` keeps large factors in."""
    return form(storage, bits, None, "triangle", True, **shared)


def of_the_paper(storage: str, **shared: Any) -> Factor:
    """The form "eigen" of Wang et al. 2024, or with "direct" the one that they call naive."""
    return form(storage, 4, WANG2024["quantization"], "square", True, **PAPER, **shared)


def fourth_root(factor: Factor, state: State) -> Tensor:
    """A^(-1/4) as the form gives it back."""
    return factor.root(state, torch.float32).double()


def advance(factor: Factor, state: State, m: Tensor, magnitude: float = 1.0) -> State:
    """One update, and a refresh where the form has one."""
    state = factor.update(state, m.float(), torch.full((len(m),), magnitude, device=m.device))
    return state if factor.one_period else factor.refresh(state, torch.float32)


def averages(stream: Iterable[Tensor], initial_scale: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Each statistic with the float64 average that a form with that initial scale aims at."""
    weight, a = float(initial_scale > 0), torch.zeros((), dtype=torch.float64)
    for m in stream:
        if initial_scale and a.dim() == 0:
            a = initial_scale * torch.eye(m.shape[-1], dtype=m.dtype).expand_as(m)
        weight = DECAY * weight + 1 - DECAY
        a = a + (1 - DECAY) / weight * (m - a)
        yield m, a


def exact_root(a: Tensor, factor: Factor) -> Tensor:
    """A^(-1/4) by the form's own rule: those of one period raise eigenvalues to eps lambda_max, the others add that."""
    values, vectors = torch.linalg.eigh(a)
    floor = factor.eps * values.amax(-1, keepdim=True)
    return power(values.maximum(floor) if isinstance(factor, Scaled) else values.clamp(min=0) + floor, vectors, -1 / 4)


def relative_error(got: Tensor, exact: Tensor) -> Tensor:
    """NRE: the Frobenius norm of the difference over that of the exact matrix, [...]."""
    return torch.linalg.matrix_norm(got - exact) / torch.linalg.matrix_norm(exact)


def angle(got: Tensor, exact: Tensor) -> Tensor:
    """AE: the angle between the matrices as vectors, in degrees, [...]."""
    cosine = (got * exact).sum((-2, -1)) / torch.linalg.matrix_norm(got) / torch.linalg.matrix_norm(exact)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def top_ratio(factor: Factor, state: State, a: Tensor) -> Tensor:
    """The largest eigenvalue that the form gives back, over the true one."""
    return torch.linalg.eigvalsh(factor.statistic(state, torch.float64))[..., -1] / torch.linalg.eigvalsh(a)[..., -1]


def bits_per_element(factor: Factor, order: int) -> float:
    """Bits of everything that a form keeps of one factor, over the elements of its square."""
    state = factor.init(1, order, torch.float32, "meta")
    return 8 * sum(t.numel() * t.element_size() for t in state.values()) / order**2
