"""Numbers to codes, compiled by numba.

Numbers are taken a block at a time. Of few bits, a code is the number of boundaries below the quotient: as many
comparisons, which are vector instructions. Of 6 or 8 bits the quotient's leading bits name a cell of the floats in
which at most one boundary lies, and the code is that of the cell or the next one (``cells_of``); where boundaries are
evenly spaced, the nearest one is computed.

A fitted scale asks for the codes of a block at each of ``FIT_CANDIDATES``. Of few bits the quotients are not made: for
each candidate and boundary there is a largest float whose quotient is not above the boundary (``limits_of``).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import uint8 as u8
from numpy import uint32 as u32

from lowbit_optim.kernels.cpu import Array, Scratch, inline, kernel, widen
from lowbit_optim.kernels.reference import FIT_CANDIDATES, SCALE_GROUP

LARGEST_BLOCK = 4096
CANDIDATES = len(FIT_CANDIDATES)
FRACTIONS = np.array(FIT_CANDIDATES, f32)
LARGEST_BITS = u32(0x7F7FFFFF)  # of finite numbers
INFINITE_BITS = u32(0x7F800000)
ROWS, SQUARE, TRIANGLE = 0, 1, 2  # layouts


# ---- tables ----------------------------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """Cells of the floats, by sign and leading bits: positive ones by magnitude, then negative ones.

    Or ``shift`` is 0, and boundaries 0 to ``last`` are evenly spaced: (2j - last) / (last + 1), none of them in cells.
    """

    shift: int  # bits of a float that do not count
    lowest: int  # the leading bits of the first cell, which begins at zero
    last: int  # the cells of a sign but for one; the last one ends at infinity
    codes: Array  # uint8: the code of its least number
    limits: Array  # float32: the boundary inside, above which the next code begins; infinity if there is none


NO_CELLS = Cells(0, 0, 0, np.empty(0, u8), np.empty(0, f32))


@lru_cache(maxsize=64)
def cells_of(boundaries: bytes) -> Cells | None:
    """As few cells as hold at most one boundary each; None if that would be more than fit into the first-level cache.

    Args:
        boundaries: those of a table, float32, ascending.
    """
    all_ = np.frombuffer(boundaries, f32)
    last = len(all_) - 2
    if np.array_equal(all_, np.append((2 * np.arange(last + 1, dtype=f32) - f32(last)) / f32(last + 1), f32(np.inf))):
        return Cells(0, 0, last, np.empty(0, u8), np.empty(0, f32))
    magnitudes = np.abs(all_[np.isfinite(all_) & (all_ != 0)])
    ends = np.array([magnitudes.min(), magnitudes.max()], f32).view(u32) if len(magnitudes) else np.zeros(2, u32)
    for shift in range(22, 12, -1):
        lowest, highest = (int(end) >> shift for end in ends)
        lowest = max(lowest - 1, 0)  # a cell for zero, which may be a boundary
        starts = np.arange(lowest, highest + 2, dtype=np.int64) << shift
        low, high = starts, np.append(starts[1:], int(INFINITE_BITS) + 1) - 1
        low[0] = 0
        low, high = low.astype(u32).view(f32), high.astype(u32).view(f32)
        low, high = np.concatenate([low, -high]), np.concatenate([high, -low])
        below, inside = np.searchsorted(all_, low), np.searchsorted(all_, high)
        if (inside - below).max() <= 1:
            limits = np.where(inside > below, np.append(all_, f32(np.inf))[below], f32(np.inf))
            return Cells(shift, lowest, len(starts) - 1, below.astype(u8), limits.astype(f32))
        if len(starts) > 4096:
            return None
    return None


NO_LIMITS = np.empty((0, 0), f32), np.empty((0, 0), f32)


@lru_cache(maxsize=64)
def limits_of(values: bytes, boundaries: bytes) -> tuple[Array, Array]:
    """For each fraction of ``FIT_CANDIDATES`` the largest u with u / fraction <= boundary, and value * fraction.

    Args:
        values, boundaries: those of a table, float32.
    """
    fractions = np.array(FIT_CANDIDATES, f32)[:, None]
    edges = np.frombuffer(boundaries, f32)[None]
    limits = edges * fractions
    for _ in range(8):  # the quotient of a product is at most a few numbers off
        higher = np.nextafter(limits, f32(np.inf))
        limits = np.where(higher / fractions <= edges, higher, limits)
        limits = np.where(limits / fractions > edges, np.nextafter(limits, -f32(np.inf)), limits)
    return limits, np.frombuffer(values, f32)[None] * fractions


# ---- a block ---------------------------------------------------------------------------------------------------------


@inline
def _pack(codes: Array, bits: int, packed: Array) -> None:
    """Codes, one a byte and zeros behind the last, to as many bytes as there are in ``packed``."""
    size = len(packed)
    if bits == 8:
        for i in range(size):
            packed[i] = codes[i]
    elif bits == 4:
        for i in range(size):
            packed[i] = u8(codes[2 * i] | u8(codes[2 * i + 1] << u8(4)))
    elif bits == 2:
        for i in range(size):
            low = u8(codes[4 * i] | u8(codes[4 * i + 1] << u8(2)))
            packed[i] = u8(low | u8(u8(codes[4 * i + 2] << u8(4)) | u8(codes[4 * i + 3] << u8(6))))
    else:  # in words of 3 bytes
        words = size // 3
        if bits == 3:
            for word in range(words):
                x = u32(0)
                for j in range(8):
                    x = u32(x | u32(u32(codes[8 * word + j]) << u32(3 * j)))
                for j in range(3):
                    packed[3 * word + j] = u8(x >> u32(8 * j))
        else:
            for word in range(words):
                x = u32(0)
                for j in range(4):
                    x = u32(x | u32(u32(codes[4 * word + j]) << u32(6 * j)))
                for j in range(3):
                    packed[3 * word + j] = u8(x >> u32(8 * j))
        if 3 * words < size:
            x, per_word = u32(0), 24 // bits
            for j in range(per_word):
                x = u32(x | u32(u32(codes[words * per_word + j]) << u32(bits * j)))
            for j in range(size - 3 * words):
                packed[3 * words + j] = u8(x >> u32(8 * j))


@inline
def _load(source: Any, layout: int, n: int, row: int, start: int, stop: int, out: Array) -> None:
    """The numbers from start to stop - 1 of a coded row; n is the length of a row of the matrix or matrices."""
    shift, numbers = source
    if layout != TRIANGLE:
        widen(numbers[row * n + start : row * n + stop], shift, out)
        diagonal = row % n
        if layout == SQUARE and start <= diagonal < stop:
            out[diagonal - start] = f32(0)
        return
    i = int((1 + np.sqrt(1.0 + 8.0 * start)) / 2)
    while i * (i - 1) // 2 > start:
        i -= 1
    while (i + 1) * i // 2 <= start:
        i += 1
    j, at = start - i * (i - 1) // 2, 0
    while at < stop - start:
        count = min(i - j, stop - start - at)
        first = (row * n + i) * n + j
        widen(numbers[first : first + count], shift, out[at : at + count])
        i, j, at = i + 1, 0, at + count


@inline
def _largest(x: Array, count: int) -> f32:
    """The largest magnitude; of infinite ones the largest finite number."""
    top = u32(0)
    for i in range(count):
        magnitude = u32(f32(x[i]).view(u32) & u32(0x7FFFFFFF))
        if magnitude > top:
            top = magnitude
    top = LARGEST_BITS if top == INFINITE_BITS else top
    return f32(u32(top).view(f32))


@inline
def _nearest(x: Array, count: int, divisor: f32, bits: int, tables: Any, scratch: Any) -> None:
    """The codes of x / divisor."""
    boundaries, cells = tables[0], tables[1]
    codes, quotients, places = scratch[3], scratch[4], scratch[5]
    if bits == 4:
        _of_few(x, count, divisor, boundaries, 15, codes)
    elif bits == 3:
        _of_few(x, count, divisor, boundaries, 7, codes)
    elif bits == 2:
        _of_few(x, count, divisor, boundaries, 3, codes)
    elif cells[0] == 0:
        _of_even(x, count, divisor, cells[2], codes)
    else:
        _of_cells(x, count, divisor, cells, quotients, places, codes)


@inline
def _of_few(x: Array, count: int, divisor: f32, boundaries: Array, few: int, codes: Array) -> None:
    """The codes of x / divisor: how many of the boundaries, a number that LLVM knows, lie below."""
    for i in range(count):
        quotient = f32(x[i]) / divisor
        code = u32(0)
        for j in range(few):
            code = u32(code + u32(quotient > boundaries[j]))
        codes[i] = code


@inline
def _of_even(x: Array, count: int, divisor: f32, last: int, codes: Array) -> None:
    """The codes of x / divisor where boundary j, of 0 to last, is (2j - last) / (last + 1): tried is the nearest."""
    last_, half, shift = f32(last), f32(f32(last + 1) / f32(2)), f32(2**23)
    for i in range(count):
        quotient = f32(f32(x[i]) / divisor)
        place = quotient * half + last_ / f32(2)
        place = place if place > f32(0) else f32(0)
        place = place if place < last_ else last_
        rounded = f32(place + shift)  # to a whole number, in its lowest bits
        nearest = f32(rounded - shift)
        boundary = f32(f32(nearest + nearest) - last_) / f32(last_ + f32(1))
        codes[i] = u32(u32(rounded.view(u32) & u32(255)) + u32(quotient > boundary))


@inline
def _of_cells(x: Array, count: int, divisor: f32, cells: Any, quotients: Array, places: Array, codes: Array) -> None:
    """The codes of x / divisor, by cells: first vector instructions, then looking up."""
    shift, lowest, last, codes_of, limits = cells
    first, end = i32(lowest), i32(last)
    for i in range(count):
        quotient = f32(f32(x[i]) / divisor)
        quotients[i] = quotient
        whole = u32(quotient.view(u32))
        place = i32(i32(u32(u32(whole & u32(0x7FFFFFFF)) >> u32(shift & 31))) - first)
        place = i32(0) if place < i32(0) else place
        place = end if place > end else place
        places[i] = u32(place + (i32(end + i32(1)) if whole > u32(0x7FFFFFFF) else i32(0)))
    for i in range(count):
        place_ = places[i]
        codes[i] = u32(u32(codes_of[place_]) + u32(quotients[i] > limits[place_]))


@inline
def _squares(u: Array, count: int, bits: int, limits: Array, values: Array, out: Array) -> None:
    """(u - the nearest of the values)^2, with the limits between them."""
    if bits == 4:
        for i in range(count):
            nearest = f32(values[0])
            for j in range(15):
                higher = f32(values[j + 1])
                nearest = higher if u[i] > limits[j] else nearest
            residual = f32(u[i]) - nearest
            out[i] = residual * residual
    elif bits == 3:
        for i in range(count):
            nearest = f32(values[0])
            for j in range(7):
                higher = f32(values[j + 1])
                nearest = higher if u[i] > limits[j] else nearest
            residual = f32(u[i]) - nearest
            out[i] = residual * residual
    else:
        for i in range(count):
            nearest = f32(values[0])
            for j in range(3):
                higher = f32(values[j + 1])
                nearest = higher if u[i] > limits[j] else nearest
            residual = f32(u[i]) - nearest
            out[i] = residual * residual


@inline
def _halving_sum(x: Array, size: int) -> f32:
    """Of a power of two of numbers, at least 16."""
    half = size // 2
    while half > 8:
        for i in range(half):
            x[i] = x[i] + x[i + half]
        half //= 2
    for i in range(8):  # counts that LLVM knows it unrolls
        x[i] = x[i] + x[i + 8]
    for i in range(4):
        x[i] = x[i] + x[i + 4]
    for i in range(2):
        x[i] = x[i] + x[i + 2]
    return f32(x[0] + x[1])


@inline
def _fit(x: Array, count: int, block_size: int, largest: f32, bits: int, tables: Any, scratch: Any) -> f32:
    """The candidate scale of least squared error."""
    fractions, limits, multiples = tables[2], tables[3], tables[4]
    u, squares, codes = scratch[1], scratch[2], scratch[3]
    if not largest > f32(0):
        return largest
    for i in range(count):
        u[i] = x[i] / largest
    best, best_error = f32(1), f32(np.inf)
    for c in range(CANDIDATES):
        if bits <= 4:
            _squares(u, count, bits, limits[c], multiples[c], squares)
        else:
            _nearest(u, count, fractions[c], bits, tables, scratch)
            for i in range(count):
                residual = u[i] - multiples[c, codes[i]]
                squares[i] = residual * residual
        for i in range(count, block_size):
            squares[i] = f32(0)
        error = _halving_sum(squares, block_size)
        if error < best_error:
            best, best_error = f32(fractions[c]), error
    return f32(best * largest)


@inline
def _encode(x: Array, count: int, scale: f32, bits: int, tables: Any, scratch: Any, packed: Array) -> None:
    codes = scratch[3]
    if scale > f32(0):
        _nearest(x, count, scale, bits, tables, scratch)
    else:
        x[0] = f32(0)
        _nearest(x, 1, f32(1), bits, tables, scratch)
        for i in range(1, count):
            codes[i] = codes[0]
    for i in range(count, min(count + 8, len(codes))):
        codes[i] = u8(0)
    _pack(codes, bits, packed)


@kernel
def quantize(
    source: Any,
    layout: int,
    n: int,
    row_length: int,
    how: Any,
    tables: Any,
    packed: Array,
    scales: Array,
    scale_codes: Array,
    maxima: Array,
    first: int,
    last: int,
    scratch: Any,
) -> int:
    """Groups of blocks, the first to the last - 1, that would share a maximum."""
    bits, block_size, fitted, double = how
    x, group_scales = scratch[0], scratch[6]
    blocks = (row_length + block_size - 1) // block_size
    groups = (blocks + SCALE_GROUP - 1) // SCALE_GROUP
    row_bytes = (row_length * bits + 7) // 8
    for group in range(first, last):
        row = group // groups
        first_block = (group - row * groups) * SCALE_GROUP
        last_block = min(first_block + SCALE_GROUP, blocks)
        top = f32(0)
        for block in range(first_block, last_block):
            start, stop = block * block_size, min((block + 1) * block_size, row_length)
            count = stop - start
            _load(source, layout, n, row, start, stop, x)
            scale = _largest(x, count)
            if fitted:
                scale = _fit(x, count, block_size, scale, bits, tables, scratch)
            if double:
                group_scales[block - first_block] = scale
                top = top if top > scale else scale
            else:
                scales[row * blocks + block] = scale
                begin = row * row_bytes + start * bits // 8
                _encode(x, count, scale, bits, tables, scratch, packed[begin : begin + (count * bits + 7) // 8])
        if double:
            maxima[group] = top
            divisor = top if top > f32(0) else f32(1)
            for block in range(first_block, last_block):
                start, stop = block * block_size, min((block + 1) * block_size, row_length)
                count = stop - start
                # The sum is rounded to a whole number, halves to even.
                rounded = f32(f32(group_scales[block - first_block] / divisor) * f32(255)) + f32(2**23)
                code = u32(f32(rounded).view(u32) & u32(255))
                scale_codes[row * blocks + block] = code
                _load(source, layout, n, row, start, stop, x)
                scale = f32(f32(f32(code) / f32(255)) * top)
                begin = row * row_bytes + start * bits // 8
                _encode(x, count, scale, bits, tables, scratch, packed[begin : begin + (count * bits + 7) // 8])
    return 0


def scratch() -> Scratch:
    """What ``quantize`` works in."""
    x, units, squares, quotients = np.empty((4, LARGEST_BLOCK), f32)
    codes, places = np.empty(LARGEST_BLOCK + 8, u8), np.empty(LARGEST_BLOCK, u32)
    return x, units, squares, codes, quotients, places, np.empty(SCALE_GROUP, f32)
