"""Householder reflectors, Cholesky factors and exponentials of a batch, against explicit products in float64."""

import pytest
import torch

from lowbit_optim.linalg import cholesky, exponential, householder, reflect


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[-1]))


@pytest.mark.parametrize("order", [1, 2, 7, 65])
def test_reflect_is_the_product_of_the_reflections(order):
    """Orthogonal for any triangle, however large its numbers are: so rounding them can do no harm."""
    v = 3 * random(2, order, order).tril(-1)
    expected = torch.eye(order, dtype=torch.float64).repeat(2, 1, 1)
    for i in range(order):
        column = v[:, :, i] + torch.eye(order, dtype=torch.float64)[i]
        outer = column[:, :, None] * column[:, None, :] / column.square().sum(-1)[:, None, None]
        expected = expected @ (torch.eye(order, dtype=torch.float64) - 2 * outer)
    u = reflect(v)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(u.mT @ u, torch.eye(order, dtype=torch.float64).expand_as(u), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 7, 65])
def test_householder_keeps_an_orthogonal_matrix_up_to_signs(order):
    u = torch.linalg.qr(random(3, order, order)).Q
    v = householder(u)
    assert torch.equal(v, v.tril(-1))
    assert v.abs().amax() <= 1
    again = reflect(v)
    torch.testing.assert_close(again * (again * u).sum(-2, keepdim=True).sign(), u, rtol=0, atol=1e-12)


def test_cholesky_multiplies_to_the_matrix_and_its_ridge():
    g = random(2, 40, 60)
    a = g @ g.mT
    c, ok = cholesky(a, 1e-3)
    ridge = 1e-3 * a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(40, dtype=torch.float64)
    assert ok.all()
    assert torch.equal(c, c.tril())
    torch.testing.assert_close(c @ c.mT, a + ridge, rtol=1e-12, atol=1e-12)


def test_cholesky_of_zero_of_the_indefinite_and_of_what_is_not_finite():
    """Zero has a zero factor, a negative eigenvalue within the firmer ridge is forgiven, beyond it is a failure."""
    eye = torch.eye(5, dtype=torch.float64)
    slightly, clearly, infinite = eye.clone(), eye.clone(), eye.clone()
    slightly[0, 0], clearly[0, 0], infinite[0, 0] = -1e-5, -1.0, torch.inf
    c, ok = cholesky(torch.stack([0 * eye, slightly, clearly, infinite]), 1e-6)
    assert ok.tolist() == [True, True, False, False]
    assert torch.equal(c[0], 0 * eye)
    torch.testing.assert_close(c[1] @ c[1].T, slightly, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reach", [0.3, 3.45, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_is_that_of_the_eigenvalues(reach, dtype):
    """To 1e-4 of each eigenvalue, around any mean; float32 adds its rounding, which is relative to the largest."""
    u = torch.linalg.qr(random(2, 40, 40)).Q
    values = reach * torch.linspace(-1, 1, 40, dtype=torch.float64) + torch.tensor(
        [[-20.0], [5.0]], dtype=torch.float64
    )
    x = (u * values.unsqueeze(-2)) @ u.mT
    got = u.mT @ exponential(x.to(dtype), reach).double() @ u
    limit = 1e-4 * values.exp() + torch.finfo(dtype).eps * 100 * values.amax(-1, keepdim=True).exp()
    error = got - torch.diag_embed(values.exp())
    assert (error.diagonal(dim1=-2, dim2=-1).abs() < limit).all()
    assert (torch.linalg.matrix_norm(error, 2) < limit.amax(-1)).all()
