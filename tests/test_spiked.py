"""What the spiked form promises beside what every form does (test_forms)."""

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_optim import Quantization, Shampoo
from lowbit_optim.linalg import left_product, right_product
from lowbit_optim.presets import WANG2024
from lowbit_optim.storage.spiked import Spiked
from tests import oracles
from tests.factors import advance, distance, make, spectral


def spiked(a, count, power, eps=1e-6):
    """The inverse root of a spiked matrix and, of the trace of A, the matrix itself; in numpy from the equations."""
    values, vectors = np.linalg.eigh(a)
    values = np.maximum(values, eps * values[-1])
    roots = values ** (-1 / power)
    roots[:-count] = roots[:-count].mean()
    kept = roots**-power
    kept *= np.trace(a) / kept.sum()
    return (vectors * roots) @ vectors.T, (vectors * kept) @ vectors.T


@pytest.mark.parametrize("power", [1, 2, 4])
def test_root_and_statistic_against_the_oracle(power):
    a, _ = spectral(np.geomspace(1, 1e-4, 48), np.random.default_rng(0))
    factor = Spiked(vectors=None, share=0.25, power=power)
    state = factor.init(1, 48, torch.float64, "cpu")
    state = advance(factor, state, torch.from_numpy(a)[None])
    assert state["eigenvalues"].shape == (1, 16)  # a quarter, as a multiple of eight
    root, statistic = spiked(a, 16, power)
    assert distance(factor.root(state, torch.float64)[0].numpy(), root) < 1e-5
    assert distance(factor.statistic(state, torch.float64)[0].numpy(), statistic) < 1e-5


def test_averages_go_on_from_what_was_kept():
    rng = np.random.default_rng(1)
    first, second = (spectral(np.geomspace(1, 1e-3, 32), rng)[0] for _ in range(2))
    factor = Spiked(vectors=None, share=0.5, decay=0.9)
    state = factor.init(1, 32, torch.float64, "cpu")
    for m in (first, second):
        state = advance(factor, state, torch.from_numpy(m)[None])
    _, kept = spiked(first, 16, 4)
    share = 0.1 / (1 - 0.9**2)
    root, _ = spiked((1 - share) * kept + share * second, 16, 4)
    assert distance(factor.root(state, torch.float64)[0].numpy(), root) < 1e-5


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_products_in_factors_are_those_with_the_root(bits):
    factor = make("spiked", bits)
    state = factor.init(2, 96, torch.float32, "cpu")
    m = torch.stack([torch.from_numpy(x[0]).float() for x in oracles.ema_root_stream(96, 32, 2, 1e2)])
    state = advance(factor, state, m)
    root, scale = factor.scaled_root(state, torch.float64)
    factored, same_scale = factor.factored_root(state, torch.float64)
    x = torch.randn(2, 96, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scale, same_scale)
    torch.testing.assert_close(left_product(factored, x, torch.empty_like(x)), root @ x)
    y = x.mT.contiguous()
    torch.testing.assert_close(right_product(y, factored, torch.empty_like(y)), y @ root)
    torch.testing.assert_close(right_product(y, factored, y.clone(), add=True), y + y @ root)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_any_order_is_known_from_the_state(bits, share):
    factor = Spiked(vectors=Quantization(bits, "linear", 64, double=True), share=share)
    for order in range(1, 40):
        state = factor.init(1, order, torch.float32, "cpu")
        assert factor.root(state, torch.float32).shape == (1, order, order)
        assert factor.count(order) >= share * order


def test_small_factors_are_kept_whole_as_the_root_form_keeps_them():
    parameter = nn.Parameter(torch.zeros(80, 16))
    optimizer = Shampoo([parameter], storage="spiked", bits=1)
    optimizer.init_state()
    own = optimizer.state[parameter]
    assert {"left.eigenvectors.codes", "right.root.values"} <= own.keys()
    assert optimizer.stats()[0]["treatment"].startswith("Shampoo: 80 x 16")


@pytest.mark.parametrize("order", [64, 128, 384])
def test_one_bit_takes_less_than_an_eighth_and_a_half_of_the_paper(order):
    ours, paper = (
        sum(part.nbytes for part in factor.init(1, order, torch.float32, "cpu").values())
        for factor in (make("spiked", 1), make("eigen", 4, WANG2024["quantization"], "square"))
    )
    assert ours <= 0.14 * paper
