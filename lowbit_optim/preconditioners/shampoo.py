"""Shampoo: L = sum G G^T, R = sum G^T G, and the preconditioned gradient L^(-1/4) G R^(-1/4)."""

from torch import Tensor

from lowbit_optim.preconditioners.kronecker import KroneckerPreconditioner


class ShampooPreconditioner(KroneckerPreconditioner):
    """Gupta, Koren, Singer 2018, with moving averages in the place of sums."""

    def statistics(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient @ gradient.mT, gradient.mT @ gradient

    def apply(self, left: Tensor, gradient: Tensor, right: Tensor) -> Tensor:
        return left @ gradient @ right
