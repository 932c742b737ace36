"""What the tests of factors share."""

import numpy as np
import torch

from lowbit_optim.storage.budget import form
from tests import oracles


def make(storage="root", bits=4, quantization=None, layout="triangle", quantized=True, **settings):
    """A form as ``Shampoo`` asks for it."""
    return form(storage, bits, quantization, layout, quantized, **settings)


def advance(factor, state, m, magnitude=1.0):
    """An update and, where the form has two periods, a refresh."""
    state = factor.update(state, m, torch.as_tensor(magnitude, dtype=m.dtype, device=m.device).expand(len(m)))
    return state if factor.one_period else factor.refresh(state, m.dtype)


def distance(got, exact):
    """The relative error in the Frobenius norm, of one numpy matrix."""
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def spectral(values, rng):
    """A symmetric matrix with these eigenvalues, and its eigenvectors, in numpy."""
    u = oracles.random_orthogonal(len(values), rng)
    a = (u * values) @ u.T
    return (a + a.T) / 2, u


def relative(x, exact):
    """``distance`` of a tensor."""
    return distance(x.double().numpy(), exact)
