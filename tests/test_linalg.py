"""Batched matrix functions against numpy in float64, and what happens when a decomposition fails."""

import numpy as np
import pytest
import torch

from lowbit_optim.linalg import (
    eigh,
    full_precision,
    inverse_root,
    inverse_root_newton,
    orthogonal_iteration,
    rectify,
)
from tests import oracles

ROOTS = {"eigh": inverse_root, "newton": inverse_root_newton}
both_roots = pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS.keys())


def spectral(values, rng):
    """(symmetric matrix with these eigenvalues, its eigenvectors)."""
    u = oracles.random_orthogonal(len(values), rng)
    a = (u * values) @ u.T
    return (a + a.T) / 2, u


def relative(x, exact):
    return np.linalg.norm(x.double().numpy() - exact) / np.linalg.norm(exact)


# ------------------------------------------------------------------------------------------------- rectification


def test_one_rectification_maps_the_singular_values_and_keeps_the_singular_vectors():
    v = np.random.default_rng(0).standard_normal((3, 20, 20))
    v /= np.linalg.norm(v, 2, axis=(1, 2), keepdims=True)
    u, s, wt = np.linalg.svd(v)
    expected = (u * (1.5 * s - 0.5 * s**3)[:, None]) @ wt
    np.testing.assert_allclose(rectify(torch.from_numpy(v), 1), expected, atol=1e-14)
    assert torch.equal(rectify(torch.from_numpy(v), 0), torch.from_numpy(v))


def test_rectification_of_coded_eigenvectors_leaves_the_defects_of_the_design():
    """||V^T V - I||_F / sqrt n of a 4-bit orthogonal matrix: nearly the same at every order."""
    u = oracles.random_orthogonal(384, np.random.default_rng(0))
    v = torch.from_numpy(oracles.quantize_rows(u.T, oracles.linear2(4)).T)[None]
    eye = torch.eye(384, dtype=torch.float64)
    defects = [float(torch.linalg.matrix_norm(w.mT @ w - eye)) / 384**0.5 for w in (rectify(v, t) for t in range(5))]
    np.testing.assert_allclose(defects[:4], [0.152, 2.4e-2, 8.4e-4, 1.4e-6], rtol=0.15)
    assert defects[4] < 2e-11
    left, _, right = np.linalg.svd(v)
    np.testing.assert_allclose(rectify(v, 6), left @ right, atol=1e-13)  # the nearest orthogonal matrix


# ---------------------------------------------------------------------------------------------------- iteration


def test_an_orthogonal_iteration_is_a_product_and_a_qr():
    rng = np.random.default_rng(0)
    a = np.stack([spectral(np.geomspace(1, 1e-3, 12), rng)[0] for _ in range(3)])
    v = np.stack([oracles.random_orthogonal(12, rng) for _ in range(3)])
    values, p, ok = orthogonal_iteration(torch.from_numpy(a), torch.from_numpy(v), 2)
    for i in range(3):
        first, _ = oracles.qr_iteration(a[i], v[i])
        second, quotients = oracles.qr_iteration(a[i], first)
        np.testing.assert_allclose(p[i], second, atol=1e-12)
        np.testing.assert_allclose(values[i], quotients, atol=1e-13)
    assert ok.all()


def test_orthogonal_iterations_converge_to_the_eigenpairs():
    exact = 2.0 ** -np.arange(10)
    a, u = spectral(exact, np.random.default_rng(1))
    start = torch.from_numpy(oracles.random_orthogonal(10, np.random.default_rng(2)))
    values, p, _ = orthogonal_iteration(torch.from_numpy(a)[None], start[None], 60)
    np.testing.assert_allclose(values[0], exact, rtol=1e-11)
    np.testing.assert_allclose(np.abs(u.T @ p[0].numpy()), np.eye(10), atol=1e-10)


def test_an_iteration_of_something_not_finite_says_so():
    a = torch.eye(5).repeat(3, 1, 1)
    a[1, 2, 2] = torch.nan
    _, _, ok = orthogonal_iteration(a, torch.eye(5).repeat(3, 1, 1), 1)
    assert ok.tolist() == [True, False, True]


# -------------------------------------------------------------------------------------------------------- roots


@both_roots
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_inverse_root(p, condition, dtype, root):
    rng = np.random.default_rng(0)
    a = np.stack([spectral(np.geomspace(scale, scale / condition, 64), rng)[0] for scale in (1.0, 1e-3)])
    for eps in (0.0, 1e-6):
        x, ok = root(torch.from_numpy(a).to(dtype), p, eps)
        assert ok.all()
        assert x.dtype == dtype
        assert torch.equal(x, x.mT)
        # A stable method is off by its unit and the ridge, as seen from the smallest eigenvalue; Newton stops at 1e-6.
        unit = 2 * torch.finfo(dtype).eps
        limit = (unit + 1e-12) * condition / p + 20 * unit + (3e-6 if root is inverse_root_newton else 0)
        for i in range(2):
            assert relative(x[i], oracles.inverse_root(a[i], p, eps)) < limit


def test_newton_in_float32_is_as_exact_as_the_design_says():
    rng = np.random.default_rng(3)
    for condition, limit in [(1e4, 5e-5), (1e6, 3e-3)]:  # the design: 2e-5 and 1.5e-3 at order 384
        a, _ = spectral(np.geomspace(1, 1 / condition, 128), rng)
        x, _ = inverse_root_newton(torch.from_numpy(a).float()[None], 4, 0.0)
        assert relative(x[0], oracles.inverse_root(a, 4)) < limit


def test_a_clamp_raises_eigenvalues_where_a_ridge_is_added():
    a, u = spectral(np.array([1.0, 0.1, 1e-4, 0.0, -0.01]), np.random.default_rng(4))
    tensor = torch.from_numpy(a)[None]
    clamped = (u * np.array([1.0, 0.1, 1e-2, 1e-2, 1e-2]) ** -0.25) @ u.T
    np.testing.assert_allclose(inverse_root(tensor, 4, 1e-2, clamp=True)[0][0], clamped, rtol=1e-9)
    ridged = (u * np.array([1.01, 0.11, 1.01e-2, 1e-2, 1e-2]) ** -0.25) @ u.T  # negative eigenvalues count as zero
    np.testing.assert_allclose(inverse_root(tensor, 4, 1e-2)[0][0], ridged, rtol=1e-9)


@both_roots
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roots_of_any_magnitude_beside_each_other(root, dtype):
    a, _ = spectral(np.geomspace(1, 1e-2, 16), np.random.default_rng(5))
    scales = torch.tensor([1.0, 1e30, 1e-30, 0.0], dtype=torch.float64)
    batch = (scales[:, None, None] * torch.from_numpy(a)).to(dtype)
    x, ok = root(batch, 4, 1e-6)
    assert ok.all()
    exact = oracles.inverse_root(a, 4, 1e-6)
    for i in range(3):
        assert relative(x[i] * float(scales[i]) ** 0.25, exact) < 1e-5
    torch.testing.assert_close(x[3], torch.eye(16, dtype=dtype), rtol=0, atol=1e-6)


@both_roots
def test_root_of_order_one(root):
    x, ok = root(torch.tensor([[[16.0]], [[0.0]]], dtype=torch.float64), 4, 0.0)
    assert ok.all()
    np.testing.assert_allclose(x.flatten(), [0.5, 1.0], rtol=1e-6)


@both_roots
def test_one_bad_matrix_does_not_spoil_the_others(root):
    rng = np.random.default_rng(6)
    a = torch.from_numpy(np.stack([spectral(np.geomspace(1, 1e-2, 16), rng)[0] for _ in range(4)])).float()
    expected, _ = root(a, 4, 1e-6)
    a[1, 3, 4] = a[1, 4, 3] = torch.nan
    a[2, 0, 0] = torch.inf
    x, ok = root(a, 4, 1e-6)
    assert ok.tolist() == [True, False, False, True]
    torch.testing.assert_close(x[[0, 3]], expected[[0, 3]], rtol=1e-5, atol=1e-5)


def test_newton_says_where_it_did_not_converge():
    singular = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    _, ok = inverse_root_newton(torch.stack([torch.eye(3), singular]), 4, 0.0)
    assert ok.tolist() == [True, False]


# ------------------------------------------------------------------------------------------------- guarded eigh


def test_gram_matrices_of_dead_units_at_many_scales():
    """Finite matrices for which float32 eigh, on some CPUs, raises or silently returns NaN: see the guard."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 400, generator=generator).relu()
    x[:, torch.randperm(400, generator=generator)[:214]] = 0
    gram = x.T @ x
    gram = (gram + gram.T) / 2
    for k in range(20):
        a = gram * 10.0 ** (0.7 * k - 12)
        values, vectors, ok = eigh(a[None])
        assert ok.all()
        assert relative((vectors * values[:, None]) @ vectors.mT, a.double().numpy()) < 1e-5


@pytest.fixture
def broken(monkeypatch):
    """Lets a test break torch.linalg.eigh: broken(function of the real solver and its input)."""
    real = torch.linalg.eigh
    return lambda fault: monkeypatch.setattr(torch.linalg, "eigh", lambda a: fault(real, a))


def raises_in_float32(real, a):
    if a.dtype == torch.float32:
        raise torch.linalg.LinAlgError("injected")
    return real(a)


def nan_in_float32(real, a):
    values, vectors = real(a)
    if a.dtype == torch.float32:
        vectors[1, 0, 0] = torch.nan
    return values, vectors


@pytest.mark.parametrize("fault", [raises_in_float32, nan_in_float32])
def test_a_failed_solver_is_tried_again_in_float64(fault, broken):
    broken(fault)
    rng = np.random.default_rng(7)
    a = np.stack([spectral(np.geomspace(1, 1e-2, 8), rng)[0] for _ in range(3)])
    x, ok = inverse_root(torch.from_numpy(a).float(), 4, 0.0)
    assert x.dtype == torch.float32
    assert ok.all()
    for i in range(3):
        assert relative(x[i], oracles.inverse_root(a[i], 4)) < 1e-5


def test_what_fails_twice_is_reported_and_alone(broken):
    def fault(real, a):
        if a.dtype == torch.float32 or a[0, 0] > 5:
            raise torch.linalg.LinAlgError("injected")
        values, vectors = real(a)
        return values, torch.full_like(vectors, torch.nan) if a[0, 0] > 3 else vectors

    broken(fault)
    a = torch.diag_embed(torch.tensor([[1.0, 0.5], [6.0, 1.0], [2.0, 1.0], [4.0, 1.0]]))
    values, _, ok = eigh(a)
    assert ok.tolist() == [True, False, True, False]
    torch.testing.assert_close(values[ok], torch.tensor([[0.5, 1.0], [1.0, 2.0]]))


# ---------------------------------------------------------------------------------------------------- precision


@pytest.fixture
def fast_and_loose():
    """Settings of somebody who lets float32 products be rounded; put back after the test."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = chosen = "tf32", "bf16"
    yield lambda: tuple(backend.fp32_precision for backend in backends) == chosen
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


def test_full_precision_overrules_and_restores_the_users_settings(fast_and_loose):
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    assert fast_and_loose()
    with full_precision():
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        torch.testing.assert_close((x @ x).double(), exact, rtol=0, atol=1e-4)  # bf16 products: 0.3
    assert fast_and_loose()
    with pytest.raises(ZeroDivisionError), full_precision():
        _ = 1 / 0
    assert fast_and_loose()


def test_full_precision_suspends_autocast():
    x = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(ZeroDivisionError), full_precision():
            _ = 1 / 0
        assert (x @ x).dtype == torch.bfloat16
    with full_precision():
        pass
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_keeps_the_older_setting_readable(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with full_precision():
            pass
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")
    finally:
        torch.set_float32_matmul_precision(before)
