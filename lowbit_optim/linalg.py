"""Batched matrix functions of the preconditioners: rectification, orthogonal iteration, inverse roots.

Everything works on a batch of square matrices [k, n, n] in float32 or float64, and in full precision whatever the user
set for his model: TF32 and bf16 turn small eigenvalues negative. Functions that can fail return a mask ``ok`` [k] next
to their result; where it is False the result means nothing, and the caller keeps the last good value.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Added to the diagonal before a decomposition, relative to its largest number: without it float32 eigh returns NaN for
# some finite symmetric matrices with many zero rows.
_RIDGE = 1e-12


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside: no autocast, and float32 matrix products in IEEE float32. The user's settings are put back after."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    devices = [device for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        for device in devices:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        for device in devices:
            torch.set_autocast_enabled(device, True)


def trace(a: Tensor) -> Tensor:
    """tr(A) of each matrix: [k, n, n] to [k]."""
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def symmetrize(a: Tensor) -> Tensor:
    """(A + A^T) / 2."""
    return (a + a.mT) / 2


def finite(a: Tensor) -> Tensor:
    """Which matrices of a batch hold finite numbers only: [k, ...] to bool [k]."""
    return torch.isfinite(a).flatten(1).all(1)


def _over_batch(x: Tensor) -> Tensor:
    """[k] to [k, 1, 1], to scale matrices with."""
    return x[:, None, None]


def rectify(v: Tensor, iterations: int) -> Tensor:
    """Björck's iteration towards the nearest orthogonal matrix: V <- 1.5 V - 0.5 V V^T V (Wang et al. 2024, eq. 2).

    Converges for singular values in (0, sqrt 3), quadratically near 1.
    """
    for _ in range(iterations):
        v = torch.baddbmm(v, v @ v.mT, v, beta=1.5, alpha=-0.5)
    return v


def orthogonal_iteration(a: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors by P <- QR(A P), warm-started at V (Wang et al. 2024, eq. 4).

    Args:
        a: symmetric [k, n, n].
        v: nearly orthogonal [k, n, n], the last eigenvectors as columns.
        iterations: how many products and QR factorisations.

    Returns:
        (Rayleigh quotients diag(P^T A P) [k, n], P [k, n, n] with eigenvectors as columns, ok [k]).
    """
    p = v
    for _ in range(iterations):
        p = torch.linalg.qr(a @ p).Q
    return (p * (a @ p)).sum(-2), p, finite(p)


def eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [k, n], ascending, and eigenvectors [k, n, n] of symmetric matrices, guarded.

    A tiny relative ridge comes first; matrices for which the solver raises or returns something non-finite are tried
    once more, one by one, in float64. Looks at the result on the host once.

    Returns:
        (eigenvalues, eigenvectors as columns, ok [k]).
    """
    ridge = _RIDGE * a.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
    a = a + torch.diag_embed(ridge.expand(a.shape[:-1]))
    try:
        values, vectors = torch.linalg.eigh(a)
        ok = finite(vectors) & finite(values)
    except torch.linalg.LinAlgError:  # one failure fails the whole batch
        values, vectors = torch.zeros_like(a[..., 0]), torch.zeros_like(a)
        ok = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    if not bool(ok.all()):
        for i in (~ok & finite(a)).nonzero().flatten().tolist():
            try:
                value, vector = torch.linalg.eigh(a[i].double())
            except torch.linalg.LinAlgError:
                continue
            values[i], vectors[i] = value.to(a.dtype), vector.to(a.dtype)
            ok[i] = torch.isfinite(value).all() & torch.isfinite(vector).all()
    return values, vectors, ok


def matrix_power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    """V diag(lambda)^exponent V^T, symmetric to the last bit: [k, n] and [k, n, n] to [k, n, n]."""
    half = vectors * values.pow(exponent / 2).unsqueeze(-2)
    return symmetrize(half @ half.mT)


def damped(values: Tensor, eps: float, *, clamp: bool = False) -> Tensor:
    """Eigenvalues made safe for a negative power: max(lambda, 0) + eps lambda_max, or max(lambda, eps lambda_max).

    A matrix without a positive eigenvalue gets ones, so that its root is the identity.
    """
    largest = values.amax(-1, keepdim=True)
    safe = values.maximum(eps * largest) if clamp else values.clamp(min=0) + eps * largest
    return torch.where(largest > 0, safe, 1.0)


def inverse_root(a: Tensor, p: float, eps: float, *, clamp: bool = False) -> tuple[Tensor, Tensor]:
    """(A + eps lambda_max I)^(-1/p) by eigendecomposition.

    Args:
        a: symmetric [k, n, n]; negative eigenvalues count as zero.
        p: order of the root.
        eps: ridge relative to the largest eigenvalue.
        clamp: raise eigenvalues to at least eps lambda_max instead of adding it.

    Returns:
        (the roots [k, n, n]; the identity for a matrix without a positive eigenvalue, ok [k]).
    """
    # Taken out first, so that eps times a tiny eigenvalue does not underflow.
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors, ok = eigh(a / _over_batch(scale))
    root = matrix_power(damped(values, eps, clamp=clamp), vectors, -1 / p) * _over_batch(scale.pow(-1 / p))
    return root, ok & finite(root)


def inverse_root_newton(
    a: Tensor, p: int, eps: float, *, iterations: int = 30, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(A + eps lambda_max I)^(-1/p) by the coupled Newton iteration, matrix products only.

    X_0 = z^(1/p) I, M_0 = z A with z = (1 + p) / (2 ||A||_F);  T = (1 + 1/p) I - M / p;  X <- X T;  M <- T^p M.
    A matrix whose residual max|M - I| has stopped falling keeps its best X, so no host sync decides anything. The
    largest eigenvalue comes from fifty power iterations started at the row of the largest diagonal number.

    Args:
        a: symmetric positive semidefinite [k, n, n].
        p: order of the root, a positive integer.
        eps: ridge relative to the largest eigenvalue.
        iterations: at most so many; 13 suffice at condition 1e4, 18 at 1e6.
        tolerance: a residual at which a matrix counts as converged.

    Returns:
        (the roots [k, n, n], ok [k]: residual below 1e-2, which bounds the root's relative error by about 1e-2 / p).
    """
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    positive = scale > 0
    scale = torch.where(positive, scale, 1.0)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    a = torch.where(_over_batch(positive), a / _over_batch(scale), eye)
    a = a + _over_batch(eps * _largest_eigenvalue(a)) * eye
    z = (1 + p) / (2 * torch.linalg.matrix_norm(a))
    x, m = _over_batch(z.pow(1 / p)) * eye, _over_batch(z) * a
    best, residual = x, (m - eye).abs().amax((-2, -1))
    for _ in range(iterations):
        t = (1 + 1 / p) * eye - m / p
        x, m = x @ t, torch.linalg.matrix_power(t, p) @ m
        error = (m - eye).abs().amax((-2, -1))
        better = (error < residual) & (residual > tolerance)
        best = torch.where(_over_batch(better), x, best)
        residual = torch.where(better, error, residual)
    ok = (residual < 1e-2) & finite(best)
    return symmetrize(best) * _over_batch(torch.where(positive, scale.pow(-1 / p), 1.0)), ok


def _largest_eigenvalue(a: Tensor) -> Tensor:
    row = a.diagonal(dim1=-2, dim2=-1).argmax(-1)
    v = a[torch.arange(len(a), device=a.device), row].unsqueeze(-1)
    for _ in range(50):
        v = a @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True))
    return torch.linalg.vector_norm(v, dim=(-2, -1))
