"""Batched matrix functions of the preconditioners: decompositions, rectification, orthogonal iteration, powers.

Everything works on a batch of square matrices [k, n, n] in float32 or float64, and in full precision whatever the user
set for his model: TF32 and bf16 turn small eigenvalues negative. Functions that can fail return a mask ``ok`` [k] next
to their result; where it is False the result means nothing, and the caller keeps the last good value.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_optim.kernels.threads import executor

# Added to the diagonal before a decomposition, relative to its largest number: without it float32 eigh returns NaN for
# some finite symmetric matrices with many zero rows.
_RIDGE = 1e-12


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
_precision_lock = threading.Lock()
_precision_before: list[str] = []  # of the backends, while at least one thread is inside
_threads_inside = 0


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside: no autocast, and float32 matrix products in IEEE float32. The user's settings are put back after.

    Autocast is a thread's own, the precision of products the process's: the last thread that leaves puts it back.
    """
    global _threads_inside
    with _precision_lock:
        if _threads_inside == 0:
            _precision_before[:] = [_set_precision(backend, "ieee") for backend in _backends()]
        _threads_inside += 1
    devices = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    try:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)
        with _precision_lock:
            _threads_inside -= 1
            if _threads_inside == 0:
                for backend, precision in zip(_backends(), _precision_before, strict=True):
                    _set_precision(backend, precision)


def _backends() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _set_precision(backend: Any, precision: str) -> str:
    """Set a backend's precision of float32 products, and return the one before; "none" where it was inherited."""
    before: str = backend.fp32_precision
    if before == torch.backends.fp32_precision:  # type: ignore[attr-defined]
        before = "none"
    if backend.fp32_precision != precision:
        backend.fp32_precision = precision
    return before


def trace(a: Tensor) -> Tensor:
    """tr(A) of each matrix: [k, n, n] to [k]."""
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def symmetrize(a: Tensor) -> Tensor:
    """(A + A^T) / 2."""
    return torch.add(a, a.mT).div_(2)


def add_to_diagonal(a: Tensor, x: Tensor) -> Tensor:
    """A + x I, [k, n, n] and [k], in place."""
    a.diagonal(dim1=-2, dim2=-1).add_(x.unsqueeze(-1))
    return a


def finite(a: Tensor) -> Tensor:
    """Which matrices of a batch hold finite numbers only: [k, ...] to bool [k]."""
    if not a[0].numel():
        return torch.ones(len(a), dtype=torch.bool, device=a.device)
    return torch.isfinite(largest_magnitude(a, tuple(range(1, a.dim()))) if a.dim() > 1 else a)


def each(x: Tensor, like: Tensor) -> Tensor:
    """[k] to [k, 1, ...] with the dims of ``like``, to scale or choose the members of a batch."""
    return x.view(-1, *[1] * (like.dim() - 1))


def largest_magnitude(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """max |x| over these dims; not finite where any of them is not. It takes no memory, as |x| would."""
    return x.amax(dims).maximum(-x.amin(dims))


def power_of_two(x: Tensor, least: float, most: float) -> Tensor:
    """The largest power of two up to x, of x >= 0 in float32 or float64, kept between two powers of two."""
    bits, exponent = (torch.int64, 0x7FF << 52) if x.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    return (x.view(bits) & exponent).view(x.dtype).clamp(least, most)  # exact, where exp2 need not be


def powers(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0, the same number wherever it stands in x: see ``everywhere``."""
    return everywhere(lambda y: y.pow(exponent), x)


def everywhere(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) rounded once, from float64 where the device has it.

    In float32 the last bit of a power or an exponential depends on whether a number is among the first, which go into
    vector registers, or the last few of its tensor; and results must not depend on which blocks are in a stack.
    """
    return function(x) if x.device.type == "mps" else function(x.double()).to(x.dtype)


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


def householder(u: Tensor) -> Tensor:
    """The reflectors of orthogonal matrices, [k, n, n] strictly lower triangular with numbers in [-1, 1].

    Column i of V = I + the result is the vector of the i-th reflection I - 2 v v^T / ||v||^2; their product is U up to
    the signs of its columns.
    """
    return torch.geqrf(u)[0].tril(-1)


def reflect(v: Tensor) -> Tensor:
    """The product of reflections, orthogonal for any strictly lower triangular [k, n, n], as ``householder`` gives it.

    Compact WY form: U = I - V S^-1 V^T with S = striu(V^T V) + diag(V^T V) / 2.
    """
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    v = v + eye
    gram = v.mT @ v
    s = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    return eye - v @ torch.linalg.solve_triangular(s, v.mT, upper=True)


def cholesky(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lower triangular C with C C^T = A + eps tr(A) / n I, [k, n, n], and ok [k].

    Matrices for which float32 fails are tried once more with a hundred times the ridge.
    """
    mean = trace(a) / a.shape[-1]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    c, info = torch.linalg.cholesky_ex(a + each(eps * mean, a) * eye)
    firmer, firmer_info = torch.linalg.cholesky_ex(a + each(100 * eps * mean, a) * eye)
    c = torch.where(each(info == 0, a), c, firmer)
    # Before the first statistic A is zero, and so is its factor.
    return torch.where(each(mean > 0, a), c, 0.0), ((info == 0) | (firmer_info == 0) | (mean == 0)) & finite(a)


def eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [k, n], ascending, and eigenvectors [k, n, n] of symmetric matrices, guarded.

    Only what is not above the diagonal is read.
    A tiny relative ridge comes first; matrices for which the solver raises or returns something non-finite are tried
    once more, one by one, in float64. Looks at the result on the host once.

    Returns:
        (eigenvalues, eigenvectors as columns, ok [k]).
    """
    a = add_to_diagonal(a.clone(), _RIDGE * a.diagonal(dim1=-2, dim2=-1).abs().amax(-1))
    try:
        values, vectors = _eigh(a)
        ok = finite(vectors) & finite(values)
    except torch.linalg.LinAlgError:  # one failure fails the whole batch
        values, vectors = torch.zeros_like(a[..., 0]), torch.zeros_like(a)
        ok = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    if not bool(ok.all()):
        for i in (~ok & finite(a)).nonzero().flatten().tolist():
            try:
                value, vector = torch.linalg.eigh(a[i].cpu().double())  # not every device has float64
            except torch.linalg.LinAlgError:
                continue
            values[i], vectors[i] = value.to(a), vector.to(a)
            ok[i] = torch.isfinite(values[i]).all() & torch.isfinite(vectors[i]).all()
    return values, vectors, ok


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``; on the CPU every thread decomposes matrices of its own, which takes half of the time.

    LAPACK's own threads mostly wait for each other, and help only where there are many for each matrix. They are kept
    from it by torch's number of threads, of which MKL's part is the process's: other threads that decompose meanwhile
    are alone, too, and get it back here.
    """
    threads = torch.get_num_threads()
    if a.device.type != "cpu" or threads == 1 or threads >= 4 * len(a):
        return torch.linalg.eigh(a)
    values, vectors = torch.empty_like(a[..., 0]), torch.empty_like(a).mT  # as they come, column by column
    try:
        helpers = executor()
        helpers.submit(int)
    except RuntimeError:  # the interpreter is shutting down
        return torch.linalg.eigh(a)
    torch.set_num_threads(1)
    try:
        others = [helpers.submit(torch.linalg.eigh, a[i::threads]) for i in range(1, min(threads, len(a)))]
        for i, own in enumerate([torch.linalg.eigh(a[::threads]), *(other.result() for other in others)]):
            values[i::threads], vectors[i::threads] = own
    finally:
        torch.set_num_threads(threads)
    return values, vectors


def matrix_power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    """V diag(lambda)^exponent V^T, symmetric up to rounding: [k, n] and [k, n, n] to [k, n, n]."""
    return compose(powers(values, exponent / 2), vectors)


class Spikes(NamedTuple):
    """Symmetric matrices c I - H^T H of few rows H, whose products with others take fewer multiplications so.

    Attributes:
        rest: c, [k].
        half: H, [k, m, n].
    """

    rest: Tensor
    half: Tensor

    def to(self, dtype: torch.dtype) -> "Spikes":
        """In another dtype."""
        return Spikes(self.rest.to(dtype), self.half.to(dtype))


def left_product(root: Tensor | Spikes, x: Tensor, out: Tensor) -> Tensor:
    """root X, of [k, n, n] and [k, n, c], in ``out``."""
    if isinstance(root, Tensor):
        return torch.bmm(root, x, out=out)
    torch.mul(x, each(root.rest, x), out=out)
    return out.baddbmm_(root.half.mT, root.half @ x, alpha=-1)


def right_product(x: Tensor, root: Tensor | Spikes, out: Tensor, *, add: bool = False) -> Tensor:
    """X root, of [k, r, n] and [k, n, n], in ``out``, or added to it."""
    if isinstance(root, Tensor):
        return out.baddbmm_(x, root) if add else torch.bmm(x, root, out=out)
    flat = each(root.rest, x)
    out = out.addcmul_(x, flat) if add else torch.mul(x, flat, out=out)
    return out.baddbmm_(x @ root.half.mT, root.half, alpha=-1)


def compose(roots: Tensor, vectors: Tensor) -> Tensor:
    """V diag(roots)^2 V^T, symmetric up to rounding: reading a matrix across costs as much as the product.

    Args:
        roots: of the eigenvalues, [k, n].
        vectors: eigenvectors as columns, [k, n, n].
    """
    half = vectors * roots.unsqueeze(-2)
    return half @ half.mT


def exponential(x: Tensor, reach: float) -> Tensor:
    """e^X of symmetric [k, n, n]: the Taylor polynomial of degree 6 of (X - mu I) / 2^s, squared s times.

    mu, the mean of X's eigenvalues, is taken out first. A fixed number of products, 3 + s, so that nothing waits for
    the device: s is so large that the relative error stays below 1e-4 while X's eigenvalues lie within ``reach`` of mu.
    """
    squarings = max(0, math.ceil(math.log2(reach / 0.7)))
    mean = trace(x) / x.shape[-1]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    y = (x - each(mean, x) * eye) / 2**squarings
    square = y @ y
    cube = square @ y
    power = eye + y + square / 2 + cube / 6 + cube @ (y / 24 + square / 120 + cube / 720)
    for _ in range(squarings):
        power = power @ power
    return symmetrize(power) * each(everywhere(torch.exp, mean), power)


def damped(values: Tensor, eps: float, ridge: Tensor | None = None, *, clamp: bool = False) -> Tensor:
    """Eigenvalues made safe for a negative power: max(lambda, 0) + eps lambda_max, or max(lambda, eps lambda_max).

    With ``ridge`` [k] it is max(lambda, 0) + ridge. A matrix without a positive eigenvalue gets ones, so that its root
    is the identity.
    """
    largest = values.amax(-1, keepdim=True)
    added = eps * largest if ridge is None else ridge.unsqueeze(-1)
    safe = values.maximum(added) if clamp else values.clamp(min=0) + added
    return torch.where(largest > 0, safe, 1.0)


def largest_eigenvalue(a: Tensor, iterations: int = 50) -> Tensor:
    """Of symmetric positive semidefinite [k, n, n], by power iterations, [k]; 0 for a zero matrix.

    They start at the row of the largest diagonal number, and a little of everything: that row may be an eigenvector.
    """
    n = a.shape[-1]
    row = a.diagonal(dim1=-2, dim2=-1).argmax(-1)
    v = a[torch.arange(len(a), device=a.device), row].unsqueeze(-1)
    anything = torch.arange(1, n + 1, dtype=a.dtype, device=a.device).square().cos().unsqueeze(-1)
    v = v + a @ (anything / math.sqrt(n))
    for _ in range(iterations):
        v = a @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny))
    return torch.linalg.vector_norm(v, dim=(-2, -1))
