"""Moments of first-order optimizers as codes that are small floats in units of block scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_optim import kernels
from lowbit_optim.kernels.first_order import BLOCK, Moment, code_values, decode, write
from lowbit_optim.storage.blockwise import MIN_ROW, rows_of

MOMENT_BITS = (32, 8, 4)

# With the bits of exponent and fraction of a float; at 4 bits a signed one has its own spacing.
_CODEBOOKS = {("signed", 4): "signed-4", ("signed", 8): "e3m4", ("unsigned", 4): "e3m1", ("unsigned", 8): "e4m4"}
Layout = dict[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True)
class SmallFloats:
    """How a moment of a parameter is kept: codes of ``bits`` bits, or float32 numbers.

    The parameter is viewed as (first dim, rest), and no block of numbers with one scale crosses a row of that view.

    Args:
        kind: "signed" (an average of gradients) or "unsigned" (of their squares: no code is zero).
        bits: one of ``MOMENT_BITS``.
    """

    kind: str
    bits: int

    @property
    def codebook(self) -> str:
        """The name of its code table."""
        return _CODEBOOKS[self.kind, self.bits]

    def layout(self, name: str, shape: torch.Size) -> Layout:
        """Names, shapes and dtypes of the tensors that keep the moment of a parameter of ``shape``."""
        if self.bits == 32:
            return {name: (shape, torch.float32)}
        rows, n = rows_of(shape)
        codes, scales = kernels.packed_bytes(n, self.bits), -(-n // BLOCK)
        return {
            f"{name}.codes": (torch.Size((rows, codes)), torch.uint8),
            f"{name}.scales": (torch.Size((rows, scales)), torch.float32),
        }

    def view(self, name: str, own: Mapping[str, Any], rows: tuple[int, int]) -> Moment:
        """The moment in a parameter's state as the kernels want it, as rows of numbers, sharing memory.

        Args:
            rows: of a moment in codes, ``rows_of`` the parameter's shape; else any that has as many numbers.
        """
        if self.bits == 32:
            return Moment(32, values=own[name].view(rows))
        return Moment(self.bits, codes=own[f"{name}.codes"], scales=own[f"{name}.scales"])

    def read(self, name: str, own: Mapping[str, Any], shape: torch.Size) -> Tensor:
        """The moment, of the parameter's ``shape``: float32, or as it is if it is kept as numbers."""
        if self.bits == 32:
            values: Tensor = own[name]
            return values
        rows = rows_of(shape)
        return decode(self.view(name, own, rows), self.kind, rows[1]).view(shape)

    def write(self, name: str, own: Mapping[str, Any], x: Tensor, key: int) -> None:
        """Put x, of the parameter's shape, into a parameter's state.

        Args:
            key: determines how an unsigned moment is rounded at random.
        """
        if self.bits == 32:
            own[name].copy_(x)
            return
        rows = rows_of(x.shape)
        write(self.view(name, own, rows), self.kind, x.float().reshape(rows), key)

    def describe(self) -> dict[str, Any]:
        """The codec as JSON-able values."""
        return {"codebook": self.codebook, "bits": self.bits, "block_size": BLOCK}


def has_codes(shape: torch.Size, dtype: torch.dtype, min_quant_size: int) -> bool:
    """Whether a parameter's moments become codes when few bits are asked for.

    Those of small parameters, of short rows, for which scales would cost more than codes save, and of float64 do not.
    """
    large = shape.numel() >= min_quant_size and rows_of(shape)[1] >= MIN_ROW
    return large and dtype in (torch.float32, torch.bfloat16, torch.float16)


def code_table(name: str, bits: int) -> list[float] | None:
    """What the codes of a codebook of moments stand for, in units of the scale; None if it is none of them."""
    kinds = [kind for (kind, b), codebook in _CODEBOOKS.items() if (codebook, b) == (name, bits)]
    return code_values(kinds[0], bits).tolist() if kinds else None
