"""Inverse roots and inverse powers of symmetric matrices, by eigendecomposition or by matrix products alone.

On the CPU an eigendecomposition costs about as much as six products of its order, and nothing beats it. On a GPU it
runs through a batch one by one and leaves the device idle, while products run stacked; so there the same functions are
had by a coupled iteration of products, and only the matrices where that fails are decomposed.

The iteration for A^(-1/p), A scaled to a largest eigenvalue of 1, is X <- X T, M <- T^p M with T = a I - b M, from
X = I and M = A; it keeps M = X^p A, and ends with M = I. Newton's would be a = 1 + 1/p, b = 1/p in every step, which
raises the smallest eigenvalues of M by 2.4 a step (p = 4). Here a and b are, step by step, those that bring the
eigenvalues of M, known to lie in some [l, u], closest together: that is 12 a step until they are near 1, and as quick
as Newton there.

Eigenvalues below l stay behind, and the root of 0 is the product of all a. So the iteration clamps, softly: with l such
that this product is floor^(-1/p), it yields max(lambda, floor)^(-1/p) at 0 and from about 4 floor on, and up to 11 %
less between them (p = 4).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor

from lowbit_optim.linalg import (
    add_to_diagonal,
    compose,
    damped,
    each,
    eigh,
    finite,
    largest_eigenvalue,
    matrix_power,
    powers,
    symmetrize,
    trace,
)

ROUTES = ("eigh", "products")
_forced: ContextVar[str | None] = ContextVar("lowbit_optim_route", default=None)

_TOLERANCE = 1e-6  # of the eigenvalues of a root, relative
_MARGIN = 1.25  # by which the largest eigenvalue may be larger than the power iteration says
_SHARE = 0.02  # see _minimax
_EXCESS = 2.0  # by which a root may be larger than its clamp: rounding leaves eigenvalues of 0 slightly negative


@contextmanager
def forced_route(route: str) -> Iterator[None]:
    """Inside, and in this thread only: the route whatever the device, for tests and benchmarks.

    Raises:
        ValueError: not one of ``ROUTES``.
    """
    if route not in ROUTES:
        raise ValueError(f"unknown route {route!r}; the routes are {', '.join(ROUTES)}")
    token = _forced.set(route)
    try:
        yield
    finally:
        _forced.reset(token)


def route(device: torch.device) -> str:
    """Which of ``ROUTES`` matrices on this device take."""
    return _forced.get() or ("products" if device.type == "cuda" else "eigh")


def inverse_root(
    a: Tensor, p: int, eps: float, ridge: Tensor | None = None, *, clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """(A + eps lambda_max I)^(-1/p).

    By products, matrices with a negative eigenvalue beyond the ridge or the clamp are decomposed after all: one look at
    the result on the host. A ridge below float32's unit (float64's) of lambda_max acts as one of that size.

    Args:
        a: symmetric up to rounding, [k, n, n]; negative eigenvalues count as zero.
        p: order of the root.
        eps: ridge relative to the largest eigenvalue.
        ridge: [k], in the place of eps lambda_max.
        clamp: raise eigenvalues to at least eps lambda_max instead of adding it; by products softly, as above.

    Returns:
        (the roots [k, n, n], symmetric up to rounding, I for a matrix without a positive eigenvalue; ok [k]).
    """
    # Taken out first, so that eps times a tiny eigenvalue does not underflow.
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    scale = torch.where(scale > 0, scale, 1.0)
    if ridge is not None:
        ridge = ridge / scale
    if route(a.device) == "eigh":
        root, ok = _root_by_eigh(a, scale, p, eps, ridge, clamp)
    else:
        root, ok = _root_by_products(a / each(scale, a), p, eps, ridge, clamp)
        root *= each(powers(scale, -1 / p), a)
        bad = ~ok & finite(a)
        if not a.is_meta and bool(bad.any()):
            bad = bad.nonzero().flatten()
            root[bad], ok[bad] = _root_by_eigh(a[bad], scale[bad], p, eps, None if ridge is None else ridge[bad], clamp)
    return root, ok & finite(root)


def _root_by_eigh(
    a: Tensor, scale: Tensor, p: int, eps: float, ridge: Tensor | None, clamp: bool
) -> tuple[Tensor, Tensor]:
    """The roots of A whose ridge, relative or absolute, is that of A / scale."""
    values, vectors, ok = eigh(a)
    scale = scale.unsqueeze(-1)
    values = damped(values / scale, eps, ridge, clamp=clamp)
    return compose(powers(values, -0.5 / p) * powers(scale, -0.5 / p), vectors), ok


def _root_by_products(a: Tensor, p: int, eps: float, ridge: Tensor | None, clamp: bool) -> tuple[Tensor, Tensor]:
    largest = largest_eigenvalue(a)
    positive = ~(largest <= 0)  # so that what is not finite stays so
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    a = torch.where(each(positive, a), a, eye)
    largest = torch.where(positive, largest, 1.0)
    if not clamp:
        added = torch.where(positive, eps * largest if ridge is None else ridge, 0.0)
        a, largest = a + each(added, a) * eye, largest + added
    floor = max(eps if clamp or ridge is None else 0.0, torch.finfo(a.dtype).eps)
    root = _iterate(a / each(largest, a), p, _steps(p, floor, clamp))
    limit = _EXCESS * floor ** (-1 / p)
    # The first is False for what is not finite, too, and keeps the second from overflowing.
    ok = (root.abs().amax((-2, -1)) < limit) & (largest_eigenvalue(root, 10) < limit)
    return symmetrize(root) * each(powers(largest, -1 / p), root), ok


def inverse_power(
    x: Tensor, q: int, floor: float, ridge: Tensor | None = None, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """max(X, floor^(1/q) lambda_max)^-q - ridge I, with a trace that may be given.

    By products the clamp is soft and acts on |X|, at 0.7 of that: at q = 4, what is as large as floor^(1/q) lambda_max
    comes back a quarter smaller, and from twice that on exactly. (An odd q is left to eigh.)

    Args:
        x: symmetric [k, n, n], in which rounding may have made small eigenvalues smaller, or negative.
        q: the power.
        floor: relative to the largest eigenvalue, of the inverse of the power.
        ridge: [k]; eigenvalues that it would make negative become zero, or by products stay negative: at most by what
            rounding had taken from them.
        total: [k], the traces of the results, which are multiples of the powers, or of I where nothing is left of them.

    Returns:
        (the powers [k, n, n], symmetric up to rounding; ok [k]).
    """
    if route(x.device) == "eigh" or q % 2:
        values, vectors, ok = eigh(x)
        values = powers(damped(values, floor ** (1 / q), clamp=True), -q)
        if ridge is not None:
            values = (values - ridge.unsqueeze(-1)).clamp(min=0)
        return matrix_power(values if total is None else with_sum(values, total), vectors, 1.0), ok
    square = x @ x
    largest = largest_eigenvalue(square)
    largest = torch.where(largest > 0, largest, 1.0)
    inverse = _iterate(square / each(largest, square), 1, _steps(1, floor ** (2 / q) / 2, True))
    power = symmetrize(torch.linalg.matrix_power(symmetrize(inverse), q // 2)) * each(powers(largest, -q / 2), x)
    if ridge is not None:
        add_to_diagonal(power, -ridge)
    if total is not None:
        before = trace(power)
        power *= each(torch.where(before > 0, total / before, 0.0), power)
        add_to_diagonal(power, torch.where(before > 0, 0.0, total / x.shape[-1]))
    return power, finite(power)


def with_sum(values: Tensor, total: Tensor) -> Tensor:
    """Eigenvalues [k, n] >= 0 times what brings their sums to [k]; equal ones where all are zero."""
    before, total = values.sum(-1, keepdim=True), total.unsqueeze(-1)
    return torch.where(before > 0, values * (total / before), total / values.shape[-1])


def _iterate(m: Tensor, p: int, steps: tuple[tuple[float, float], ...]) -> Tensor:
    """X of the iteration, from M = A: [k, n, n]. Products: (p's, for T^p, and 2) a step, without the ends."""
    x = None
    for i, (a, b) in enumerate(steps):
        t = m * -b
        t.diagonal(dim1=-2, dim2=-1).add_(a)
        x = t if x is None else x @ t
        if i < len(steps) - 1:
            m = torch.linalg.matrix_power(t, p) @ m
    assert x is not None
    return x


def products(p: int, floor: float, clamp: bool) -> int:
    """How many matrix products ``_iterate`` takes."""
    n, for_power = len(_steps(p, floor, clamp)), p.bit_length() + p.bit_count() - 2
    return (n - 1) * (2 + for_power)


@lru_cache(maxsize=64)
def _steps(p: int, floor: float, clamp: bool) -> tuple[tuple[float, float], ...]:
    """(a, b) of every step: as few as leave the roots of all eigenvalues within l and ``_MARGIN`` exact.

    l is ``floor`` or, with ``clamp``, what makes the product of all a equal to floor^(-1/p).
    """
    for steps in count(1):
        lower = floor
        if clamp:
            low, high = math.log(floor), math.log(_MARGIN) - 1e-3
            for _ in range(60):
                middle = (low + high) / 2
                steep = math.prod(a for a, _ in _minimax(p, math.exp(middle), steps)[0]) > floor ** (-1 / p)
                low, high = (middle, high) if steep else (low, middle)
            lower = math.exp(low)
        coefficients, spread = _minimax(p, lower, steps)
        if spread < _TOLERANCE:
            return coefficients
    raise AssertionError


def _minimax(p: int, lower: float, steps: int) -> tuple[tuple[tuple[float, float], ...], float]:
    """The coefficients of so many steps from [lower, _MARGIN], and the relative error of the root that they leave.

    With t = s (c - m), m t^p is largest at c / (p + 1), and its two ends are equal for c = (k u - l) / (k - 1) with k =
    (u / l)^(1/p). But then large eigenvalues become as small as the smallest ones, and are rounded as coarsely: so c is
    as large as leaves those at u at least ``_SHARE`` of the largest. s brings the geometric middle to 1.
    """
    l, u = lower, _MARGIN  # noqa: E741
    coefficients = []
    for _ in range(steps):
        k_1 = math.expm1(math.log(u / l) / p)
        c = max(u + (u - l) / k_1, _least(p) * u) if k_1 > 1e-9 else p + 1.0
        ends, top = min(x * (c - x) ** p for x in (l, u)), c / (p + 1) * (c * p / (p + 1)) ** p
        s = (ends * top) ** (-0.5 / p)
        coefficients.append((s * c, s))
        l, u = ends * s**p, top * s**p  # noqa: E741
    return tuple(coefficients), math.log(u / l) / (2 * p)


def _least(p: int) -> float:
    """c / u at which the upper end is ``_SHARE`` of the largest."""
    low, high = 1 / (p + 1), 1.0  # of u / c
    for _ in range(60):
        middle = (low + high) / 2
        above = middle * (1 - middle) ** p > _SHARE * (p / (p + 1)) ** p / (p + 1)
        low, high = (middle, high) if above else (low, middle)
    return 1 / low
