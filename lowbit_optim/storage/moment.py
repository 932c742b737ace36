"""The second moment of gradients in two eigenbases: what EKFAC keeps beside them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_optim.linalg import each
from lowbit_optim.storage.factors import State, share


@dataclass(frozen=True)
class Moment:
    """m, the moving average of the squares of each number of Q_L^T G Q_R.

    Kept as its root, whose squares may overflow or underflow, in float32 (float64 for float64 parameters): 4 bytes a
    number.

    Args:
        decay: beta of the average, which has weights beta^age since the first gradient that is not zero.
        damping: relative to the largest m of a block.
    """

    decay: float
    damping: float

    def init(self, blocks: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """The state before the first gradient: "rms" [k, r, c], and "updates", int32 [k]."""
        rms = torch.zeros(blocks, rows, columns, dtype=dtype, device=device)
        return {"rms": rms, "updates": torch.zeros(blocks, dtype=torch.int32, device=device)}

    def update(self, state: State, gradient: Tensor, magnitude: Tensor) -> State:
        """Take in magnitude * gradient, [k] and [k, r, c], in the coordinates of the bases."""
        old = state["rms"].to(gradient.dtype)
        unit = old.amax((1, 2)).maximum(magnitude)
        updates = state["updates"] + ((state["updates"] > 0) | (gradient != 0).flatten(1).any(1))
        new = each(share(self.decay, updates, gradient.dtype), gradient)
        squares = (1 - new) * (old / each(unit, old)).square()
        squares += new * (gradient * each(magnitude / unit, gradient)).square()
        return state | {"rms": _root(squares, unit), "updates": updates}

    def turn(self, state: State, left: Tensor, right: Tensor) -> State:
        """Follow the bases: m_ab <- sum_ij left_ai^2 m_ij right_bj^2.

        Those are the second moments of the same gradients in the new coordinates if they are uncorrelated in the old.

        Args:
            left, right: the new basis transposed times the old one, [k, r, r] and [k, c, c].
        """
        rms = state["rms"].to(left.dtype)
        unit = _largest(rms)
        squares = left.square() @ (rms / each(unit, rms)).square() @ right.square().mT
        return state | {"rms": _root(squares, unit)}

    def divide(self, state: State, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """gradient / (m + damping max m) as (X [k, r, c], e int32 [k]), X 2^e."""
        rms = state["rms"].to(gradient.dtype)
        unit = _largest(rms)
        mantissa, exponent = torch.frexp(unit)
        share_of_largest = (rms / each(unit, rms)).square()
        quotient = gradient / ((share_of_largest + self.damping) * each(mantissa.square(), rms))
        return torch.where(gradient == 0, 0.0, quotient), -2 * exponent  # 0 / 0 at a damping below what float32 can say


def _largest(rms: Tensor) -> Tensor:
    """Of each block, [k]; 1 where that is zero."""
    largest = rms.amax((1, 2))
    return torch.where(largest > 0, largest, 1.0)


def _root(squares: Tensor, unit: Tensor) -> Tensor:
    """The root of what is in units of unit^2."""
    return (squares.sqrt() * each(unit, squares)).clamp(max=torch.finfo(squares.dtype).max)
