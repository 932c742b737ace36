"""Batched matrix functions against numpy in float64, and what happens when a decomposition fails."""

import math

import numpy as np
import pytest
import torch

from lowbit_optim.linalg import (
    eigh,
    full_precision,
    orthogonal_iteration,
    rectify,
    symmetrize,
)
from lowbit_optim.roots import inverse_root
from tests import oracles
from tests.factors import relative, spectral

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


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_matrices_as_threads_at_once_are_decomposed_as_one_after_the_other(threads, count):
    a = torch.stack([symmetrize(torch.randn(70, 70, generator=torch.Generator().manual_seed(i))) for i in range(count)])
    a[0, 0, 0] = math.nan if count == 5 else 1.0  # the others must not suffer
    threads(1)
    alone = eigh(a)
    for number in (2, 3, 40):
        threads(number)
        for one, other in zip(eigh(a)[:2], alone[:2], strict=True):
            one, other = (x[alone[2]].abs() for x in (one, other))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if number == 40 else 0)  # 40: LAPACK's threads
        assert eigh(a)[2].tolist() == alone[2].tolist() == [count != 5] + [True] * (count - 1)
        assert torch.get_num_threads() == number


def test_a_failed_decomposition_leaves_torch_its_threads(threads, monkeypatch):
    def fail(a):
        raise torch.linalg.LinAlgError

    threads(2)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert not eigh(torch.eye(4).expand(3, -1, -1))[2].any()
    assert torch.get_num_threads() == 2
