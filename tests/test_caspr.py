"""CASPR against its equation in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_optim import CASPR, Shampoo, presets
from tests import contract, oracles
from tests.contract import random, same


def caspr(start, grads, lr, T1, T2, momentum=0.0, beta=0.95, eps=1e-6):
    """W <- W - lr M, M <- momentum M + D |G| / |D|, D = (L^(-1/2) G + 2 L^(-1/4) G R^(-1/4) + G R^(-1/2)) / 4.

    L and R are means of G G^T and G^T G with weights beta^age.
    """
    w, buffer, history = start.copy(), 0.0, []
    sums, weights = [0.0, 0.0], 0.0
    roots = [np.eye(n) for n in start.shape]
    for t, g in enumerate(grads, start=1):
        if t % T1 == 0:
            sums = [beta * total + m for total, m in zip(sums, (g @ g.T, g.T @ g), strict=True)]
            weights = beta * weights + 1
        if t % T2 == 0:
            roots = [oracles.inverse_root(total / weights, 4, eps) for total in sums]
        left, right = roots
        d = (left @ left @ g + 2 * left @ g @ right + g @ right @ right) / 4
        buffer = momentum * buffer + d * np.linalg.norm(g) / np.linalg.norm(d)
        w = w - lr * buffer
        history.append(w)
    return history


def follow(optimizer, start, grads, dtype=torch.float64, **settings):
    settings = {"lr": 0.1, "base": "sgd", **settings, "statistics_frequency": 2}
    return contract.follow(partial(optimizer, **settings), start, grads, dtype)


def deviation(history, expected):
    """The largest error of any step, relative to the distance moved until then from zero."""
    return max(np.linalg.norm(p - q) / np.linalg.norm(q) for p, q in zip(history, expected, strict=True))


GRADS = list(np.linspace(0.1, 3.0, 48) * random(20, 70, 48, dtype=torch.float64).numpy())
ZERO = np.zeros((70, 48))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_32_bits_follow_the_equation(momentum, dtype, limit):
    expected = caspr(ZERO, GRADS, 0.1, 2, 4, momentum)
    settings = {"bits": 32, "precondition_frequency": 4, "momentum": momentum}
    assert deviation(follow(CASPR, ZERO, GRADS, dtype, **settings), expected) < limit


# Measured, and half more. (Statistics here are of rank 48 at first, of 70: the hardest that can be.)
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.06), (4, 0.21)])
def test_low_bits_stay_near(bits, limit):
    history = follow(CASPR, ZERO, GRADS, bits=bits, min_quant_size=0)
    assert deviation(history, caspr(ZERO, GRADS, 0.1, 2, 2)) < limit


def test_it_is_not_shampoo_but_takes_its_state():
    shampoo = Shampoo([nn.Parameter(random(70, 48))], lr=0.1, statistics_frequency=1)
    other = CASPR([nn.Parameter(random(70, 48))], lr=0.1, statistics_frequency=1)
    for optimizer in (shampoo, other):
        (parameter,) = optimizer.param_groups[0]["params"]
        for seed in range(3):
            parameter.grad = random(70, 48, seed=seed)
            optimizer.step()
    first, second = (optimizer.param_groups[0]["params"][0] for optimizer in (shampoo, other))
    assert not torch.equal(first, second)
    other.load_state_dict(shampoo.state_dict())
    assert same(other.state_dict(), shampoo.state_dict())


def test_the_published_settings():
    history = follow(CASPR, ZERO, GRADS, **{**presets.WANG2024, "precondition_frequency": 4})
    assert deviation(history, caspr(ZERO, GRADS, 0.1, 2, 4)) < 0.5
