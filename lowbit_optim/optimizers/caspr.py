"""CASPR over any first-order optimizer, with its factors in low-bit storage."""

from torch import Tensor

from lowbit_optim.linalg import left_product, right_product
from lowbit_optim.optimizers.shampoo import Shampoo, ShampooPreconditioner
from lowbit_optim.preconditioners.kronecker import Root


class CASPRPreconditioner(ShampooPreconditioner):
    """Duvvuri et al. 2024: ((L^(-1/4) x I + I x R^(-1/4)) / 2)^2 on the gradient, whose cross term is Shampoo's."""

    def apply(self, left: Root, gradient: Tensor, right: Root, temporary: Tensor) -> tuple[Tensor, list[Tensor]]:
        largest = left[1].maximum(right[1])
        shares = [(scale / largest / 2).to(gradient.dtype)[:, None, None] for _, scale in (left, right)]
        for x, y in ((gradient, temporary), (temporary, gradient)):  # y <- (L x + x R) / (2 largest)
            left_product(left[0], x, out=y)
            y *= shares[0]
            x *= shares[1]
            right_product(x, right[0], out=y, add=True)
        return gradient, [largest, largest]


class CASPR(Shampoo):
    r"""CASPR with low-bit factors in front of a first-order optimizer.

    Statistics, roots, grafting, state and every keyword are those of :class:`Shampoo`, whose checkpoints it takes and
    the other way round. Only how the roots act on a matrix block G differs:

    .. math::

        J = (L^{-1/p} G + G R^{-1/p}) / 2, \quad \hat G = (L^{-1/p} J + J R^{-1/p}) / 2, \quad
        \tilde G = \hat G \, \|G\|_F / \|\hat G\|_F

    At p = 4 that is :math:`(L^{-1/2} G + 2 L^{-1/4} G R^{-1/4} + G R^{-1/2}) / 4`, with four matrix products a step
    where Shampoo has two (Duvvuri et al., ICLR 2024). The squares double the relative error of a root, so at the same
    bits it follows its 32-bit self less closely than Shampoo does.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate, handed to the base. Default 1e-3.
        **keywords: as :class:`Shampoo`, which says what is raised, too.

    Example:
        >>> import torch
        >>> from lowbit_optim import CASPR
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = CASPR(model.named_parameters(), lr=1e-3, weight_decay=0.05, statistics_frequency=10)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.stats()["weight"]["treatment"]
        'CASPR: 64 x 64, root, 2 bits'
    """

    preconditioner_class = CASPRPreconditioner
