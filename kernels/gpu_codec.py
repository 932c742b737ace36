# mypy: disable-error-code="no-untyped-def"
"""The codec in Triton, for CUDA and ROCm: the same codes, scales and numbers as ``reference``, bit for bit.

Along rows, a program takes some whole blocks, ``NUMBERS`` numbers or one block: 16 for each thread, four loads of 16
bytes, so that enough is under way even where the search of a scale leaves registers for few threads. Where the last
block of a row is short, its end is masked. Tables of values and boundaries are read through the first-level cache,
where they stay; one of 16 values is half a line of it.

A triangle is decoded in square tiles of ``SIDE``: each code is read once, a tile is transposed in shared memory, and
both halves of the matrix are written along rows. (To decode a tile of the upper half from the codes would be to read
down columns of the triangle, a line of cache for each byte.)

What makes the bits equal is said in ``gpu``. If TRITON_INTERPRET=1 is in the environment before triton is imported, the
same code runs on the CPU, slowly.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_optim.kernels.gpu import greatest, narrow, widen
from lowbit_optim.kernels.reference import FIT_CANDIDATES, SCALE_GROUP, packed_bytes

NUMBERS = 2048
SIDE = tl.constexpr(64)
GROUP = tl.constexpr(SCALE_GROUP)
_CANDIDATES = tl.constexpr(len(FIT_CANDIDATES))
_FIRST, _APART = tl.constexpr(FIT_CANDIDATES[0]), tl.constexpr(FIT_CANDIDATES[0] - FIT_CANDIDATES[1])
_ROUND = tl.constexpr(2.0**23)  # the float32 x + 2^23 is an integer, the nearest one or of two the even one

# Triton compiles anew for a number that is 1 or a multiple of 16; not for these, which align nothing.
_PLAIN = ("rows", "per_row", "groups", "tiles")


# ---- places ----------------------------------------------------------------------------------------------------------


@triton.jit
def _blocks(rows, n, per_row, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Of each of the program's blocks the row, its number in the row, both int64, and its numbers' count, at most 0
    beyond the last row; [TILE]. 32 bits are enough to count blocks."""
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, column = (block // per_row).to(tl.int64), (block % per_row).to(tl.int64)
    return row, column, tl.where(row < rows, tl.minimum(n - column * WIDTH, WIDTH), 0).to(tl.int32)


@triton.jit
def _corner(p):
    """Row r and column c of number p of a strict lower triangle, counted along rows: p = r (r - 1) / 2 + c, c < r.

    Up to row 2^22 the root in float32 may make r one too large, and never too small. Where the product overflows, the
    difference is right again.
    """
    r = (tl.sqrt_rn(p.to(tl.float32) * 8 + 1) * 0.5 + 0.5).to(p.dtype)
    c = p - (r >> 1) * ((r - 1) | 1)
    return tl.where(c < 0, r - 1, r), tl.where(c < 0, c + r - 1, c)


@triton.jit
def _numbers(
    x, rows, n, per_row, order, TILE: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr
):
    """The numbers of the program's blocks, float32 [TILE, WIDTH], zeros where there are none; and where there are."""
    row, column, count = _blocks(rows, n, per_row, TILE, WIDTH)
    row, first, within = row[:, None], (column * WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = within < count[:, None]
    if LAYOUT == "triangle":
        r, c = _corner((first if WIDE else first.to(tl.int32)) + within)
        numbers = widen(tl.load(x + row * order * order + (r.to(tl.int64) * order + c), inside, other=0))
    else:
        numbers = widen(tl.load(x + (row * n + first) + within, inside, other=0))
    if LAYOUT == "square":
        numbers = tl.where(within == (row.to(tl.int32) % n - first).to(tl.int32), 0.0, numbers)
    return numbers, inside


@triton.jit
def _words(codes, rows, n, per_row, row_bytes, BITS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Of the program's words, as many codes as fill whole bytes, the addresses, and which bytes of those of the blocks
    they start at; of the blocks, how many bytes they have, [TILE, 1]."""
    CODES: tl.constexpr = 8 if BITS == 3 else 4 if BITS == 6 else 8 // BITS
    row, column, _ = _blocks(rows, n, per_row, TILE, WIDTH)
    first = column * (WIDTH * BITS // 8)
    left = tl.where(row < rows, tl.minimum(row_bytes - first, WIDTH * BITS // 8), 0).to(tl.int32)
    within = tl.arange(0, WIDTH // CODES)[None, :] * (CODES * BITS // 8)
    return codes + (row * row_bytes + first)[:, None] + within, within, left[:, None]


# ---- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scale(place, group, inside, DOUBLE: tl.constexpr):
    """The scales at these addresses, float32; if coded, with the addresses of their groups' maxima."""
    scale = tl.load(place, inside, other=0)
    if DOUBLE:
        scale = tl.div_rn(scale.to(tl.float32), 255.0) * tl.load(group, inside, other=0)
    return scale


@triton.jit
def _nearest(units, boundaries, BITS: tl.constexpr):
    """For each number the code of the nearest value, int32: how many boundaries are below. Of many, half are tried."""
    code = tl.zeros(units.shape, tl.int32)
    if BITS <= 4:
        for i in tl.static_range(2**BITS - 1):
            code += (units > tl.load(boundaries + i)).to(tl.int32)
    else:
        for i in tl.static_range(BITS - 1, -1, -1):
            code += tl.where(units > tl.load(boundaries + (code + (2**i - 1))), 2**i, 0)
    return code


@triton.jit
def _halving_sum(x, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of each row: the upper half is added to the lower one until one number is left."""
    for i in tl.static_range(1, 13):
        if WIDTH >> i:
            x = tl.sum(x.reshape(TILE, 2, WIDTH >> i), 1)
    return x.reshape(TILE)


@triton.jit
def _fit(
    x, inside, values, boundaries,
    BITS: tl.constexpr, FITTED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The scale of each block, float32 [TILE], before it is coded."""
    largest = greatest(x)
    if FITTED:
        units = tl.div_rn(x, tl.where(largest > 0, largest, 1.0)[:, None])
        best, least = tl.full([TILE], 1.0, tl.float32), tl.full([TILE], float("inf"), tl.float32)
        for i in range(_CANDIDATES):
            fraction = _FIRST - i * _APART
            value = tl.load(values + _nearest(tl.div_rn(units, fraction), boundaries, BITS))
            residual = tl.where(inside, units - value * fraction, 0.0)
            error = _halving_sum(residual * residual, TILE, WIDTH)
            best, least = tl.where(error < least, fraction, best), tl.where(error < least, error, least)
        largest *= best
    return largest


@triton.jit(do_not_specialize=_PLAIN)
def _measure(
    x, values, boundaries, scales, rows, n, per_row, order,
    BITS: tl.constexpr, FITTED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scales that are to be coded."""
    numbers, inside = _numbers(x, rows, n, per_row, order, TILE, WIDTH, LAYOUT, WIDE)
    row, column, count = _blocks(rows, n, per_row, TILE, WIDTH)
    scale = _fit(numbers, inside, values, boundaries, BITS, FITTED, TILE, WIDTH)
    tl.store(scales + (row * per_row + column), scale, count > 0)


@triton.jit(do_not_specialize=_PLAIN)
def _quantize_scales(measured, scales, maxima, per_row, groups):
    """A program codes one group."""
    row, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    block = group * GROUP + tl.arange(0, GROUP)
    scale = tl.load(measured + (row * per_row + block), block < per_row, other=0.0)
    largest = greatest(scale[None, :])
    units = tl.div_rn(scale, tl.where(largest > 0, largest, 1.0)) * 255
    tl.store(scales + (row * per_row + block), ((units + _ROUND) - _ROUND).to(tl.uint8), block < per_row)
    tl.store(maxima + (row * groups + group) + tl.arange(0, 1), largest)


# ---- codes -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_PLAIN)
def _quantize(
    x, values, boundaries, codes, scales, maxima, rows, n, per_row, groups, row_bytes, order,
    BITS: tl.constexpr, FITTED: tl.constexpr, DOUBLE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Codes and scales; with ``DOUBLE`` the scales are there."""
    numbers, inside = _numbers(x, rows, n, per_row, order, TILE, WIDTH, LAYOUT, WIDE)
    row, column, count = _blocks(rows, n, per_row, TILE, WIDTH)
    scale_place = scales + (row * per_row + column)
    if DOUBLE:
        scale = _scale(scale_place, maxima + (row * groups + column // GROUP), count > 0, True)
    else:
        scale = _fit(numbers, inside, values, boundaries, BITS, FITTED, TILE, WIDTH)
        tl.store(scale_place, scale, count > 0)
    each = scale[:, None]
    units = tl.where(each > 0, tl.div_rn(numbers, tl.where(each > 0, each, 1.0)), 0.0)
    word = tl.where(inside, _nearest(units, boundaries, BITS), 0)
    for i in tl.static_range(3):
        if (BITS << i) % 8:  # no whole bytes yet: join two neighbours
            low, high = tl.split(word.reshape(TILE, (WIDTH >> i) // 2, 2))
            word = low | (high << (BITS << i))
    place, byte, left = _words(codes, rows, n, per_row, row_bytes, BITS, TILE, WIDTH)
    for i in tl.static_range(3 if BITS == 3 or BITS == 6 else 1):
        tl.store(place + i, (word >> (8 * i)).to(tl.uint8), byte + i < left)


@triton.jit(do_not_specialize=_PLAIN)
def _dequantize(
    codes, scales, maxima, values, out, rows, n, per_row, groups, row_bytes,
    BITS: tl.constexpr, DOUBLE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    place, byte, left = _words(codes, rows, n, per_row, row_bytes, BITS, TILE, WIDTH)
    word = tl.load(place, byte < left, other=0)
    if BITS == 3 or BITS == 6:
        word = word.to(tl.int32) | (tl.load(place + 1, byte + 1 < left, other=0).to(tl.int32) << 8)
        word |= tl.load(place + 2, byte + 2 < left, other=0).to(tl.int32) << 16
    for i in tl.static_range(2, -1, -1):
        if (BITS << i) % 8:  # two or more codes: part the upper half from the lower
            word = tl.interleave(word, word >> (BITS << i))
    row, column, count = _blocks(rows, n, per_row, TILE, WIDTH)
    group = maxima + (row * groups + column // GROUP)
    scale = _scale(scales + (row * per_row + column), group, count > 0, DOUBLE)
    numbers = tl.load(values + (word & (2**BITS - 1)).to(tl.int32)) * scale[:, None]
    first, within = column * WIDTH, tl.arange(0, WIDTH)[None, :]
    numbers = narrow(numbers, out.dtype.element_ty)
    tl.store(out + (row * n + first)[:, None] + within, numbers, within < count[:, None])


@triton.jit(do_not_specialize=_PLAIN)
def _dequantize_triangle(
    codes, scales, maxima, values, diagonal, out, tiles, per_row, groups, row_bytes, order,
    BITS: tl.constexpr, DOUBLE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix's lower half and its mirror image. Offsets have 64 bits; those inside of a tile's row, 32."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    top, left = _corner(tl.program_id(0) % tiles)
    top, left = (top - 1) * SIDE, left * SIDE  # tiles on the diagonal count
    within = tl.arange(0, SIDE)[None, :]
    row, column = top + tl.arange(0, SIDE)[:, None], left + within
    inside = (row < order) & (column < row)
    wide = row.to(tl.int64)
    p = (wide >> 1) * ((wide - 1) | 1) + left  # of the first number of each row of the tile

    bit = ((p * BITS) & 7).to(tl.int32) + within * BITS
    place = codes + (matrix * row_bytes + ((p * BITS) >> 3)) + (bit >> 3)
    code = tl.load(place, inside, other=0).to(tl.int32)
    if BITS == 3 or BITS == 6:  # a code may lie in two bytes
        code |= tl.load(place + 1, inside & ((bit & 7) + BITS > 8), other=0).to(tl.int32) << 8
    code = (code >> (bit & 7)) & (2**BITS - 1)

    first, block = p // WIDTH, ((p % WIDTH).to(tl.int32) + within) // WIDTH
    group = ((first % GROUP).to(tl.int32) + block) // GROUP
    scale_place = scales + (matrix * per_row + first) + block
    scale = _scale(scale_place, maxima + (matrix * groups + first // GROUP) + group, inside, DOUBLE)
    numbers = narrow(tl.load(values + code) * scale, out.dtype.element_ty)

    mirrored = tl.trans(numbers)
    out += matrix * order * order
    if top == left:
        given = narrow(widen(tl.load(diagonal + (matrix * order + row), row < order, other=0)), out.dtype.element_ty)
        numbers = tl.where(column < row, numbers, tl.where(column > row, mirrored, given))
    else:
        row_of_mirrored, column_of_mirrored = left + tl.arange(0, SIDE)[:, None], top + within
        upper = out + row_of_mirrored.to(tl.int64) * order + column_of_mirrored
        tl.store(upper, mirrored, column_of_mirrored < order)
    tl.store(out + wide * order + column, numbers, (row < order) & (column < order))


# ---- the four functions of the specification -------------------------------------------------------------------------


def quantize_blockwise(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.quantize_blockwise`` of contiguous float32, bfloat16 or float16."""
    rows, n = x.shape
    return _encode(x, rows, n, "rows", values, boundaries, bits, block_size, fitted, double)


def quantize_symmetric(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.quantize_symmetric`` of contiguous float32, bfloat16 or float16."""
    k, order, _ = x.shape
    rows, n = (k, order * (order - 1) // 2) if layout == "triangle" else (k * order, order)
    parts = _encode(x, rows, n, layout, values, boundaries, bits, block_size, fitted, double)
    codes, scales, maxima = (part if layout == "triangle" else part.view(k, order, part.shape[-1]) for part in parts)
    return codes, scales, maxima


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
    """``reference.dequantize_blockwise`` to float32, bfloat16 or float16; all tensors are contiguous."""
    rows, blocks, groups = len(codes), scales.shape[-1], maxima.shape[-1]
    out = codes.new_empty((rows, n), dtype=dtype) if out is None else out
    if out.numel():
        grid, tile = _tiling(rows * blocks, block_size)
        with torch.cuda.device_of(out):
            tensors, sizes = (codes, scales, maxima, values, out), (rows, n, blocks, groups, codes.shape[-1])
            _dequantize[grid](*tensors, *sizes, BITS=bits, DOUBLE=groups > 0, **tile)
    return out


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
    """``reference.dequantize_symmetric`` to float32, bfloat16 or float16; all tensors are contiguous."""
    k, order = diagonal.shape
    out = codes.new_empty((k, order, order), dtype=dtype) if out is None else out
    if layout == "square":
        codes, scales, maxima = (part.flatten(0, 1) for part in (codes, scales, maxima))
        rows = out.view(k * order, order)
        dequantize_blockwise(codes, scales, maxima, values, bits, block_size, order, dtype, rows)
        out.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    elif out.numel():
        side = triton.cdiv(order, SIDE.value)
        tiles = side * (side + 1) // 2
        how = {"BITS": bits, "DOUBLE": maxima.shape[-1] > 0, "WIDTH": block_size}
        with torch.cuda.device_of(out):
            tensors = (codes, scales, maxima, values, diagonal, out)
            sizes = (tiles, scales.shape[-1], maxima.shape[-1], codes.shape[-1], order)
            _dequantize_triangle[(k * tiles,)](*tensors, *sizes, **how, num_warps=8, enable_fp_fusion=False)
    return out


def _encode(
    x: Tensor,
    rows: int,
    n: int,
    layout: str,
    values: Tensor,
    boundaries: Tensor,
    bits: int,
    block_size: int,
    fitted: bool,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and maxima of rows of n numbers."""
    blocks = triton.cdiv(n, block_size)
    groups = triton.cdiv(blocks, SCALE_GROUP) if double else 0
    codes = x.new_empty((rows, packed_bytes(n, bits)), dtype=torch.uint8)
    scales = x.new_empty((rows, blocks), dtype=torch.uint8 if double else torch.float32)
    maxima = x.new_empty((rows, groups), dtype=torch.float32)
    if codes.numel():
        grid, tile = _tiling(rows * blocks, block_size)
        how = tile | {"BITS": bits, "FITTED": fitted, "LAYOUT": layout, "WIDE": n >= 2**31}
        with torch.cuda.device_of(x):
            if double:
                measured = torch.empty_like(scales, dtype=torch.float32)
                _measure[grid](x, values, boundaries, measured, rows, n, blocks, x.shape[-1], **how)
                _quantize_scales[(rows * groups,)](measured, scales, maxima, blocks, groups, enable_fp_fusion=False)
            tensors, sizes = (x, values, boundaries, codes, scales, maxima), (rows, n, blocks, groups)
            _quantize[grid](*tensors, *sizes, codes.shape[-1], x.shape[-1], DOUBLE=double, **how)
    return codes, scales, maxima


def _tiling(blocks: int, block_size: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid for so many blocks, and how each of its programs runs."""
    tile = max(1, NUMBERS // block_size)
    warps = 4 * max(1, block_size // NUMBERS)
    options = {"TILE": tile, "WIDTH": block_size, "num_warps": warps, "enable_fp_fusion": False}
    return (triton.cdiv(blocks, tile),), options
