"""SOAP against its algorithm in float64, and the bytes of its state."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_optim import SOAP
from tests import contract
from tests.contract import random


def soap(start, grads, lr, beta, betas, eps, weight_decay, frequency):
    """Vyas et al. 2024: the first gradient makes Q by eigh and no step; then Adam in the basis, and Q <- QR(A Q).

    Columns of Q and of Adam's second moment are sorted by their Rayleigh quotients before each turn; the first moment
    is turned with the basis.
    """
    w = start.copy()
    factors, bases = [0.0, 0.0], None
    m, v, count, history = np.zeros_like(w), np.zeros_like(w), 0, []
    for t, g in enumerate(grads, 1):
        new = (g @ g.T, g.T @ g)
        if t > 1:
            left, right = bases
            turned = left.T @ g @ right
            count += 1
            m = betas[0] * m + (1 - betas[0]) * turned
            v = betas[1] * v + (1 - betas[1]) * turned**2
            step = (m / (1 - betas[0] ** count)) / (np.sqrt(v / (1 - betas[1] ** count)) + eps)
            w = w * (1 - lr * weight_decay) - lr * left @ step @ right.T
        factors = [beta * a + (1 - beta) * n for a, n in zip(factors, new, strict=True)]
        if t == 1:
            bases = [np.linalg.eigh(a)[1][:, ::-1] for a in factors]
        elif t % frequency == 0:
            outside = bases[0] @ m @ bases[1].T
            orders = [np.argsort(-np.diag(q.T @ a @ q), kind="stable") for a, q in zip(factors, bases, strict=True)]
            v = v[orders[0]][:, orders[1]]
            bases = [np.linalg.qr(a @ q[:, o])[0] for a, q, o in zip(factors, bases, orders, strict=True)]
            m = bases[0].T @ outside @ bases[1]
        history.append(w.copy())
    return history


ADAM = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPE = (16, 16)  # of full rank: an eigenbasis of a null space is anything


def gradients(steps, shape=SHAPE):
    """Full-rank at once, with a spectrum that tells eigenvectors apart."""
    rows, columns = np.logspace(0, -1, shape[0])[:, None], np.logspace(0, -1, shape[1])
    return [rows * columns * random(*shape, seed=s, dtype=torch.float64).numpy() for s in range(steps)]


def follow(grads, dtype=torch.float64, **settings):
    settings = {**ADAM, "precondition_frequency": 4, **settings}
    return contract.follow(partial(SOAP, **settings), np.ones(grads[0].shape), grads, dtype)


def deviation(history, expected, skip=0):
    pairs = zip(history[skip:], expected[skip:], strict=True)
    return max(np.linalg.norm(p - q) / np.linalg.norm(q - 1) for p, q in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_32_bits_follow_the_algorithm(dtype):
    grads = gradients(20)
    expected = soap(np.ones(SHAPE), grads, beta=0.95, frequency=4, **ADAM)
    assert deviation(follow(grads, dtype, bits=32), expected, skip=1) < (1e-5 if dtype == torch.float64 else 1e-2)


def test_the_first_gradient_makes_no_step():
    first, *_ = follow(gradients(1), bits=32)
    assert (first == 1).all()


# Measured, and half more.
@pytest.mark.parametrize(
    ("bits", "basis", "limit"),
    [(8, "reflector", 0.012), (4, "reflector", 0.09), (4, "eigen", 0.17), (2, "reflector", 0.5)],
)
def test_low_bits_stay_near(bits, basis, limit):
    grads = gradients(20)
    expected = soap(np.ones(SHAPE), grads, beta=0.95, frequency=4, **ADAM)
    assert deviation(follow(grads, bits=bits, basis=basis, min_quant_size=0)[-1:], expected[-1:]) < limit


@pytest.mark.parametrize(("settings", "limit"), [({}, 2.1), ({"basis": "eigen"}, 2.1), ({"bits": 32}, 16.01)])
def test_bytes_of_factors_and_bases(settings, limit):
    """Per parameter of a 1024 x 1024 matrix."""
    parameter = nn.Parameter(torch.zeros(1024, 1024))
    optimizer = SOAP([parameter], **settings)
    optimizer.init_state()
    own = optimizer.state[parameter].items()
    size = sum(part.nbytes for key, part in own if key.startswith(("left.", "right."))) / parameter.numel()
    assert 0.98 * limit - 0.1 < size < limit


def test_a_zero_gradient_first_is_no_failure():
    parameter = nn.Parameter(torch.ones(SHAPE))
    optimizer = SOAP([parameter], **ADAM, min_quant_size=0)
    for step, scale in enumerate((0.0, 1.0, 1.0)):
        parameter.grad = scale * random(*SHAPE, seed=step)
        optimizer.step()
    assert not optimizer.state[parameter]["left.failures"].any()
    assert torch.isfinite(parameter).all()


def test_what_cannot_be_is_refused():
    parameter = nn.Parameter(torch.ones(SHAPE))
    with pytest.raises(ValueError, match="'svd'"):
        SOAP([parameter], basis="svd")
    with pytest.raises(ValueError, match=r"basis 'eigen' cannot have 2 bits.*'reflector'"):
        SOAP([parameter], basis="eigen", bits=2)
    with pytest.raises(TypeError, match="root_power"):
        SOAP([parameter], root_power=2)


@pytest.mark.parametrize("frequency", [1, 3])
def test_the_first_gradient_makes_the_bases_however_rare_statistics_are(frequency):
    parameter = nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    optimizer = SOAP([parameter], bits=32, statistics_frequency=frequency)
    gradient = random(*SHAPE, dtype=torch.float64)
    parameter.grad = gradient.clone()
    optimizer.step()
    group, own = optimizer.param_groups[0], optimizer.state[parameter]
    state = {key.removeprefix("left."): part for key, part in own.items() if key.startswith("left.")}
    q = optimizer.preconditioner.form(group, SHAPE[0]).root(state, torch.float64)[0]
    turned = q.T @ gradient @ gradient.T @ q
    torch.testing.assert_close(turned, torch.diag(turned.diagonal()), rtol=0, atol=1e-9)
