"""Rounding that looks at all numbers of a matrix together: the executable specification, in plain torch.

Rounding each number of a symmetric X to the nearest code leaves E = Q(X) - X small, but not E A^(1/2): X is A^(-1/q),
and what it is multiplied with lies mostly where A is large and X small. So codes are chosen to make tr(E W E) small for
a weight W instead, by coordinate descent: with all others as they are, x_ij is best kept as the code nearest to

    q_ij - (R_ij + R_ji) / (W_ii + W_jj),    R = E W.

The rules that make codes equal on every backend, given the same R and W: all arithmetic is IEEE float32, products
and sums rounded separately; R is had once, by a matrix product (whose own rounding is the device's), and then kept by
adding (new q_ij - q_ij) W_j to its row i and (new q_ij - q_ij) W_i to its row j; numbers are taken below the diagonal,
row by row. A scale of 0, or a weight W_ii + W_jj that is not positive, leaves its number as it is.
"""

import torch
from torch import Tensor

from lowbit_optim.kernels.reference import lower


def residual(x: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """R of matrices of which ``kept`` [k, n (n - 1) / 2] is what codes say of the lower triangle, float32 [k, n, n]."""
    k, n = x.shape[:2]
    below = lower(n, x.device)
    error = x.new_zeros(k, n * n).index_copy_(1, below, kept - x.flatten(1)[:, below]).unflatten(1, (n, n))
    return (error + error.mT) @ weight


def descend(
    codes: Tensor,
    kept: Tensor,
    scales: Tensor,
    r: Tensor,
    weight: Tensor,
    values: Tensor,
    boundaries: Tensor,
    block_size: int,
    sweeps: int,
) -> None:
    """Sweeps over all numbers of the lower triangles, in place.

    Args:
        codes: uint8 [k, n (n - 1) / 2], written.
        kept: what they say, float32 of the same shape, written.
        scales: of their blocks, float32 [k, blocks].
        r: R, float32 [k, n, n], written.
        weight: W, symmetric, float32 [k, n, n].
        values, boundaries: as of ``reference.quantize_blockwise``, float32.
        block_size: numbers that share a scale.
        sweeps: how many.
    """
    diagonal = weight.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        place = 0
        for i in range(weight.shape[-1]):
            for j in range(i):
                scale, old = scales[:, place // block_size], kept[:, place]
                steep = diagonal[:, i] + diagonal[:, j]
                moves = (scale > 0) & (steep > 0)
                best = old - (r[:, i, j] + r[:, j, i]) / torch.where(moves, steep, 1.0)
                code = torch.bucketize(best / torch.where(moves, scale, 1.0), boundaries)
                new = torch.where(moves, values[code] * scale, old)
                change = (new - old).unsqueeze(-1)
                r[:, i] += change * weight[:, j]
                r[:, j] += change * weight[:, i]
                codes[:, place] = torch.where(moves, code.to(torch.uint8), codes[:, place])
                kept[:, place] = new
                place += 1
