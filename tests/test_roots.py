"""Inverse roots and powers by both routes, against numpy in float64, and where products give up."""

import math

import numpy as np
import pytest
import torch

from lowbit_optim import roots
from lowbit_optim.linalg import largest_eigenvalue
from lowbit_optim.roots import ROUTES, forced_route, inverse_power, inverse_root, products
from tests import oracles
from tests.factors import relative, spectral


def asymmetry(x):
    """The largest difference between two twins, relative to the largest number."""
    return float(((x - x.mT).abs().amax((1, 2)) / x.abs().amax((1, 2))).max())


@pytest.fixture
def no_eigh(monkeypatch):
    """Whatever needs a decomposition fails."""

    def refuse(a):
        raise AssertionError(f"eigh of {len(a)} matrices")

    monkeypatch.setattr(roots, "eigh", refuse)


# ----------------------------------------------------------------------------------------------------- the choice


def test_the_device_chooses_the_route_and_a_test_may():
    assert roots.route(torch.device("cpu")) == "eigh"
    assert roots.route(torch.device("cuda")) == "products"
    with forced_route("products"):
        assert roots.route(torch.device("cpu")) == "products"
        with forced_route("eigh"):
            assert roots.route(torch.device("cuda")) == "eigh"
        assert roots.route(torch.device("cpu")) == "products"
    assert roots.route(torch.device("cpu")) == "eigh"
    with pytest.raises(ValueError, match=r"unknown route 'newton'; the routes are eigh, products"):
        forced_route("newton").__enter__()


# ---------------------------------------------------------------------------------------------------------- roots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_inverse_root(p, condition, dtype, route):
    rng = np.random.default_rng(0)
    a = np.stack([spectral(np.geomspace(scale, scale / condition, 64), rng)[0] for scale in (1.0, 1e-3)])
    for eps in (0.0, 1e-6) if route == "eigh" else (1e-6,):
        x, ok = inverse_root(torch.from_numpy(a).to(dtype), p, eps)
        assert ok.all()
        assert x.dtype == dtype
        assert asymmetry(x) < 4 * torch.finfo(dtype).eps
        # A stable method is off by its unit and the ridge, as seen from the smallest eigenvalue; products stop at 1e-6.
        unit = 2 * torch.finfo(dtype).eps
        limit = (unit + 1e-12) * condition / p + (20 if route == "eigh" else 200) * unit
        for i in range(2):
            assert relative(x[i], oracles.inverse_root(a[i], p, eps)) < limit + 2e-6 * (route == "products")


def test_products_of_an_ill_conditioned_matrix_are_more_exact_than_its_decomposition():
    """In float32: the small eigenvalues of a decomposition have errors of the largest one's unit."""
    a, _ = spectral(np.geomspace(1, 1e-6, 128), np.random.default_rng(3))
    exact = oracles.inverse_root(a, 4, 1e-6)
    error = {}
    for name in ROUTES:
        with forced_route(name):
            error[name] = relative(inverse_root(torch.from_numpy(a).float()[None], 4, 1e-6)[0][0], exact)
    assert error["products"] < 1e-3
    assert error["products"] < error["eigh"] / 5


def test_a_clamp_raises_eigenvalues_where_a_ridge_is_added():
    a, u = spectral(np.array([1.0, 0.1, 1e-4, 0.0, -0.01]), np.random.default_rng(4))
    tensor = torch.from_numpy(a)[None]
    expected = (u * np.array([1.0, 0.1, 1e-2, 1e-2, 1e-2]) ** -0.25) @ u.T
    np.testing.assert_allclose(inverse_root(tensor, 4, 1e-2, clamp=True)[0][0], expected, rtol=1e-9)
    ridged = (u * np.array([1.01, 0.11, 1.01e-2, 1e-2, 1e-2]) ** -0.25) @ u.T  # negative eigenvalues count as zero
    np.testing.assert_allclose(inverse_root(tensor, 4, 1e-2)[0][0], ridged, rtol=1e-9)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("ridge", [1e-1, 1e-4])
def test_a_given_ridge(p, ridge, route):
    a, _ = spectral(np.geomspace(5, 5e-7, 40), np.random.default_rng(5))
    tensor = torch.from_numpy(np.stack([a, 1e8 * a]))
    x, ok = inverse_root(tensor, p, 1e-6, torch.tensor([ridge, 1e8 * ridge], dtype=torch.float64))
    assert ok.all()
    exact = oracles.inverse_root(a + ridge * np.eye(40), p)
    for i, scale in enumerate((1, 1e8)):
        assert relative(x[i] * scale ** (1 / p), exact) < 3e-6


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_clamp_by_products_is_soft(p, no_eigh):
    """Exact well above it; at 0 what a clamp yields; monotone between."""
    values = np.array([1.0, 1e-1, 1e-2, 1e-4, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 1e-8, 0.0])
    a, u = spectral(values, np.random.default_rng(4))
    with forced_route("products"):
        x, ok = inverse_root(torch.from_numpy(a)[None], p, 1e-6, clamp=True)
    assert ok.all()
    got = np.diag(u.T @ x[0].numpy() @ u)
    np.testing.assert_allclose(got[:5], values[:5] ** (-1 / p), rtol=1e-4)
    np.testing.assert_allclose(got[-1], 1e-6 ** (-1 / p), rtol=1e-3)
    assert (np.diff(got) > 0).all()


def test_roots_of_any_magnitude_beside_each_other(route):
    a, _ = spectral(np.geomspace(1, 1e-2, 16), np.random.default_rng(5))
    scales = torch.tensor([1.0, 1e30, 1e-30, 0.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        x, ok = inverse_root((scales[:, None, None] * torch.from_numpy(a)).to(dtype), 4, 1e-6)
        assert ok.all()
        exact = oracles.inverse_root(a, 4, 1e-6)
        for i in range(3):
            assert relative(x[i] * float(scales[i]) ** 0.25, exact) < 1e-5
        torch.testing.assert_close(x[3], torch.eye(16, dtype=dtype), rtol=0, atol=1e-6)


def test_root_of_order_one(route):
    x, ok = inverse_root(torch.tensor([[[16.0]], [[0.0]]], dtype=torch.float64), 4, 1e-9)
    assert ok.all()
    np.testing.assert_allclose(x.flatten(), [0.5, 1.0], rtol=1e-6)


def test_one_bad_matrix_does_not_spoil_the_others(route):
    rng = np.random.default_rng(6)
    a = torch.from_numpy(np.stack([spectral(np.geomspace(1, 1e-2, 16), rng)[0] for _ in range(4)])).float()
    expected, _ = inverse_root(a, 4, 1e-6)
    a[1, 3, 4] = a[1, 4, 3] = torch.nan
    a[2, 0, 0] = torch.inf
    x, ok = inverse_root(a, 4, 1e-6)
    assert ok.tolist() == [True, False, False, True]
    torch.testing.assert_close(x[[0, 3]], expected[[0, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clamp", [False, True])
def test_only_indefinite_matrices_are_decomposed_beside_products(clamp, monkeypatch):
    decomposed = []
    real = roots.eigh
    monkeypatch.setattr(roots, "eigh", lambda a: decomposed.append(len(a)) or real(a))
    rng = np.random.default_rng(7)
    spectra = [np.geomspace(1, 1e-3, 24) for _ in range(5)]
    spectra[1][-1], spectra[2][-1], spectra[3][-6:] = -1e-2, -1e-5, 0.0  # the last one within rounding of definite
    matrices, vectors = zip(*(spectral(values, rng) for values in spectra), strict=True)
    with forced_route("products"):
        x, ok = inverse_root(torch.from_numpy(np.stack(matrices)).float(), 4, 1e-6, clamp=clamp)
    assert decomposed == [2]
    assert ok.all()
    for i in (0, 1, 2, 4):
        safe = spectra[i].clip(1e-6) if clamp else spectra[i].clip(0) + 1e-6
        assert relative(x[i], (vectors[i] * safe**-0.25) @ vectors[i].T) < 0.05  # eigh in float32, of an eigenvalue 0


def test_the_largest_eigenvalue_is_not_that_of_the_row_where_the_iteration_starts(no_eigh):
    """The largest diagonal number may be in an invariant subspace of its own."""
    a = torch.zeros(1, 31, 31)
    a[0, 0, 0], a[0, 1:, 1:] = 2.0, 1.0
    a[0, 1:, 1:] += 0.5 * torch.eye(30)
    torch.testing.assert_close(largest_eigenvalue(a), torch.tensor([30.5]))
    with forced_route("products"):
        x, _ = inverse_root(a, 4, 1e-6, clamp=True)
    assert relative(x[0], oracles.inverse_root(a[0].double().numpy(), 4)) < 1e-5


def test_products_of_a_root():
    """28 to 32 in float32: an eigendecomposition on a GPU costs hundreds."""
    assert products(4, 1e-6, True) == 28
    assert products(4, 1e-6, False) == 32
    assert products(1, math.sqrt(1e-6) / 2, True) == 14


# --------------------------------------------------------------------------------------------------------- powers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("q", [4, 8, 32])
def test_inverse_power(q, dtype, route):
    x, u = spectral(np.geomspace(1, 0.2, 64), np.random.default_rng(0))
    power, ok = inverse_power(torch.from_numpy(np.stack([x, 3 * x])).to(dtype), q, 1e-6 ** (q / 4))
    assert ok.all()
    assert asymmetry(power) < 4 * torch.finfo(dtype).eps
    exact = (u * np.geomspace(1, 0.2, 64) ** -q) @ u.T
    for i, scale in enumerate((1, 3)):
        assert relative(power[i] * float(scale) ** q, exact) < q * (3e-6 if dtype == torch.float32 else 2e-6)


def test_what_rounding_made_too_small_or_negative_is_clamped_when_a_power_is_read(route):
    """The largest eigenvalue that may come back is 1 / floor, by products 4 times that, whatever the sign."""
    values = np.array([1.0, 0.5, 0.2, 0.1, 1e-3, 0.0, -1e-3, -2e-2])
    x, u = spectral(values, np.random.default_rng(1))
    power, ok = inverse_power(torch.from_numpy(x)[None], 4, 1e-6)
    assert ok.all()
    got = np.diag(u.T @ power[0].numpy() @ u)
    np.testing.assert_allclose(got[:4], values[:4] ** -4.0, rtol=1e-3)
    assert (got[4:] > 1e5).all()
    assert (got[4:] < (1.0001e6 if route == "eigh" else 4.001e6)).all()


def test_a_ridge_is_taken_off_again(route):
    values = np.geomspace(1, 0.1, 12)
    x, u = spectral(values, np.random.default_rng(2))
    power, _ = inverse_power(torch.from_numpy(x)[None], 4, 1e-7, torch.tensor([0.5], dtype=torch.float64))
    assert relative(power[0], (u * (values**-4 - 0.5)) @ u.T) < 1e-5
