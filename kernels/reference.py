"""The executable specification of the low-bit codec, in plain torch: every faster backend must give the same bits.

A row of n numbers is cut into blocks of ``block_size`` (the last may be short). A block has one scale s >= 0, float32;
a number x becomes the index of the table value nearest to x / s. The rules that make codes equal everywhere:

* arithmetic is IEEE float32, or float64 for float64 input; x / s is a division, never a product with 1 / s;
* boundaries are the midpoints of neighbouring table values, taken in float64 and rounded once; a quotient on a boundary
  goes to the lower code;
* a block of zeros has scale 0 and the codes nearest to 0, and a scale of 0 decodes to zeros whatever the table holds;
* sums over a block are taken by repeated halving (``_halving_sum``), products and sums are rounded separately.

Codes are packed little-endian: code i of a row occupies the bits [i * bits, (i + 1) * bits) of the row's byte string,
so 4-bit codes go low nibble first and eight 3-bit codes fill three bytes. Zero bits fill up a row's last byte.

Symmetric matrices have twins of both directions, that read and write the matrices themselves. Of a matrix is coded, by
layout: "triangle", what lies below the diagonal, row by row, as one row of n (n - 1) / 2 numbers; or "square", its n
rows, with zeros in the place of the diagonal.

Decoded numbers are rounded once more, to the nearest, ties to even, where bfloat16 is asked for.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

# Blocks along a row whose 8-bit scales share one float32.
SCALE_GROUP = 256
# Candidate scales of the least-error fit, as fractions of the block's largest magnitude.
FIT_CANDIDATES = tuple(k / 16 for k in range(16, 5, -1))


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that a row of n codes of ``bits`` bits takes."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [..., n], to a little-endian bit string, uint8 [..., packed_bytes(n, bits)]."""
    n = codes.shape[-1]
    if bits == 8:
        return codes.contiguous()
    per_word, word_bytes = _word(bits)
    codes = pad(codes, (0, -n % per_word)).unflatten(-1, (-1, per_word)).to(torch.int32)
    shifts = torch.arange(per_word, dtype=torch.int32, device=codes.device) * bits
    words = (codes << shifts).sum(-1, dtype=torch.int32)
    byte_shifts = torch.arange(word_bytes, dtype=torch.int32, device=codes.device) * 8
    return (
        ((words.unsqueeze(-1) >> byte_shifts) & 255)
        .to(torch.uint8)
        .flatten(-2)[..., : packed_bytes(n, bits)]
        .contiguous()
    )


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of ``pack``: uint8 [..., packed_bytes(n, bits)] to the codes, uint8 [..., n]."""
    if bits == 8:
        return packed
    per_word, word_bytes = _word(bits)
    packed = pad(packed, (0, -packed.shape[-1] % word_bytes)).unflatten(-1, (-1, word_bytes)).to(torch.int32)
    byte_shifts = torch.arange(word_bytes, dtype=torch.int32, device=packed.device) * 8
    words = (packed << byte_shifts).sum(-1, dtype=torch.int32)
    shifts = torch.arange(per_word, dtype=torch.int32, device=packed.device) * bits
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :n]


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes in the smallest group of codes that fills whole bytes."""
    group = 8 // math.gcd(bits, 8)
    return group, group * bits // 8


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, and so of the tables, for numbers of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantize_blockwise(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of numbers to packed codes and scales.

    Args:
        x: float32, float64 or bfloat16 [rows, n], finite; bfloat16 counts as float32.
        values: the ascending code values, [2**bits] in the dtype of the arithmetic: float64 for float64, else float32.
        boundaries: the midpoints between them, [2**bits - 1] in the same dtype; infinite between two equal values, so
            that the second is never taken.
        bits: bits per code: 2, 3, 4, 6 or 8.
        block_size: numbers that share a scale, a power of two from 16 to 4096.
        fitted: choose each scale by least squared error over ``FIT_CANDIDATES`` instead of the largest magnitude.
        double: store the scales in 8 bits, each ``SCALE_GROUP`` of them along a row sharing one float32.

    Returns:
        (codes uint8 [rows, packed_bytes(n, bits)], scales float32 or, if double, uint8 [rows, blocks],
        maxima of the scale groups float32 [rows, ceil(blocks / SCALE_GROUP)], with zero columns unless double).
    """
    x = x.to(computed_in(x.dtype))
    n = x.shape[-1]
    blocks = pad(x, (0, -n % block_size)).unflatten(-1, (-1, block_size))
    scales = blocks.abs().amax(-1).clamp(max=torch.finfo(torch.float32).max).float()
    if fitted:
        inside = torch.arange(blocks.shape[-2] * block_size, device=x.device).view(-1, block_size) < n
        scales = _fit_scales(blocks, inside, scales, values, boundaries)
    if double:
        scales, maxima = _quantize_scales(scales)
        decoded_scales = dequantize_scales(scales, maxima)
    else:
        maxima, decoded_scales = scales.new_empty((*scales.shape[:-1], 0)), scales
    codes = _nearest(blocks, decoded_scales, boundaries).flatten(-2)[..., :n]
    return pack(codes, bits), scales, maxima


def dequantize_blockwise(
    codes: Tensor,
    scales: Tensor,
    maxima: Tensor,
    values: Tensor,
    bits: int,
    block_size: int,
    n: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The inverse of ``quantize_blockwise``: values[code] * scale.

    Args:
        codes, scales, maxima: what ``quantize_blockwise`` returned of rows of n numbers.
        values, bits, block_size: as for ``quantize_blockwise``, the values in the arithmetic's dtype of the result.
        n: numbers in a row.
        dtype: of the result: float32, float64 or bfloat16.
        out: [rows, n] in ``dtype``, to be written instead of a new tensor. Default None.

    Returns:
        [rows, n] in ``dtype``; ``out`` if it was given.
    """
    if maxima.shape[-1]:
        scales = dequantize_scales(scales, maxima)
    blocks = pad(values[unpack(codes, bits, n).int()], (0, -n % block_size)).unflatten(-1, (-1, block_size))
    rows = (blocks * scales.to(values.dtype).unsqueeze(-1)).flatten(-2)[..., :n].to(dtype)
    return rows if out is None else out.copy_(rows)


@lru_cache(maxsize=16)
def lower(n: int, device: torch.device) -> Tensor:
    """Flat positions of the strict lower triangle of an n x n matrix, row by row: int64 [n (n - 1) / 2]."""
    row, column = torch.tril_indices(n, n, -1, device=device)
    return row * n + column


def quantize_symmetric(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What is off the diagonal of matrices to packed codes and scales.

    Args:
        x: [k, n, n], finite. Of layout "triangle" only what lies below the diagonal is read.
        layout: "triangle" or "square". The other arguments are those of ``quantize_blockwise``.

    Returns:
        (codes, scales, maxima) as ``quantize_blockwise``, of rows [k] ("triangle") or [k, n] ("square").
    """
    n = x.shape[-1]
    if layout == "triangle":
        rows = x.flatten(-2)[:, lower(n, x.device)]
    else:
        rows = x.diagonal_scatter(x.new_zeros(x.shape[:-1]), dim1=-2, dim2=-1).flatten(0, 1)
    parts = quantize_blockwise(rows, values, boundaries, bits, block_size, fitted, double)
    codes, scales, maxima = (part if layout == "triangle" else part.unflatten(0, x.shape[:-1]) for part in parts)
    return codes, scales, maxima


def dequantize_symmetric(
    codes: Tensor,
    scales: Tensor,
    maxima: Tensor,
    diagonal: Tensor,
    values: Tensor,
    bits: int,
    block_size: int,
    layout: str,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The inverse of ``quantize_symmetric``, with a diagonal written in.

    Args:
        codes, scales, maxima: what ``quantize_symmetric`` returned for the same layout.
        diagonal: floating [k, n]; rounded to ``dtype``.
        values, bits, block_size: as for ``dequantize_blockwise``.
        layout: "triangle" (the result is symmetric) or "square".
        dtype: of the result: float32, float64 or bfloat16.
        out: [k, n, n] in ``dtype``, to be written instead of a new tensor. Default None.

    Returns:
        [k, n, n] in ``dtype``; ``out`` if it was given.
    """
    k, n = diagonal.shape
    whole = diagonal.new_empty((k, n, n), dtype=dtype) if out is None else out
    if layout == "triangle":
        rest = dequantize_blockwise(codes, scales, maxima, values, bits, block_size, n * (n - 1) // 2, dtype)
        row, column = lower(n, rest.device) // max(n, 1), lower(n, rest.device) % max(n, 1)
        whole[:, row, column] = rest
        whole[:, column, row] = rest
    else:
        codes, scales, maxima = (part.flatten(0, 1) for part in (codes, scales, maxima))
        rest = dequantize_blockwise(codes, scales, maxima, values, bits, block_size, n, dtype)
        whole.copy_(rest.view(k, n, n))
    whole.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return whole


def _nearest(blocks: Tensor, scales: Tensor, boundaries: Tensor) -> Tensor:
    scales = scales.to(blocks.dtype).unsqueeze(-1)
    quotients = blocks / torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.bucketize(torch.where(scales > 0, quotients, 0.0), boundaries, out_int32=True).to(torch.uint8)


def _fit_scales(blocks: Tensor, inside: Tensor, largest: Tensor, values: Tensor, boundaries: Tensor) -> Tensor:
    """Of the candidate scales of each block the one of least squared error; the larger one on a tie.

    Errors are those of x / largest, so that no square overflows or underflows.
    """
    units = blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
    best, best_error = torch.ones_like(largest), torch.full_like(largest, torch.inf, dtype=blocks.dtype)
    for fraction in FIT_CANDIDATES:
        fractions = torch.full_like(largest, fraction)
        residual = torch.where(inside, units - values[_nearest(units, fractions, boundaries).int()] * fraction, 0.0)
        error = _halving_sum(residual * residual)
        better = error < best_error
        best, best_error = torch.where(better, fractions, best), torch.where(better, error, best_error)
    return best * largest


def _halving_sum(x: Tensor) -> Tensor:
    """Sum over the last dim by adding its upper half to its lower half until one number is left."""
    x = pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, float32 [..., blocks], to round(255 s / max of the group), uint8, halves to even; and the maxima."""
    blocks = scales.shape[-1]
    groups = pad(scales, (0, -blocks % SCALE_GROUP)).unflatten(-1, (-1, SCALE_GROUP))
    maxima = groups.amax(-1)
    safe = torch.where(maxima > 0, maxima, 1.0).unsqueeze(-1)
    return (groups / safe * 255).round().to(torch.uint8).flatten(-2)[..., :blocks].contiguous(), maxima


def dequantize_scales(scales: Tensor, maxima: Tensor) -> Tensor:
    """Scales of 8 bits, [..., blocks], and the maxima of their groups to float32."""
    # Divided by a tensor: by a number torch divides on CUDA as it multiplies with its inverse.
    return (
        scales.float()
        / torch.full((), 255.0, device=scales.device)
        * maxima.repeat_interleave(SCALE_GROUP, -1)[..., : scales.shape[-1]]
    )
