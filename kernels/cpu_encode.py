"""Numbers to codes, compiled by numba.

Numbers are taken a run of blocks at a time, for loops over single blocks are too short to be fast. Of few bits, a code
is found by comparisons, which are vector instructions. Of 6 or 8 bits the quotient's leading bits name a cell of the
floats in which at most one boundary lies, and the code is that of the cell or the next one (``cells_of``); where
boundaries are evenly spaced, the nearest one is computed.

A fitted scale asks for the codes of its block at each of ``FIT_CANDIDATES``. Of few bits the quotients are not made:
for each candidate and boundary there is a largest float whose quotient is not above the boundary (``limits_of``).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import uint8 as u8
from numpy import uint32 as u32

from lowbit_optim.kernels.cpu import Array, Scratch, inline, kernel, widen
from lowbit_optim.kernels.cpu_bits import pack
from lowbit_optim.kernels.reference import FIT_CANDIDATES, SCALE_GROUP

LARGEST_BLOCK = RUN = 4096  # numbers; a run of whole blocks is coded at a time
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


# ---- a run of blocks -------------------------------------------------------------------------------------------------


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
def _largest(x: Array) -> f32:
    """The largest magnitude; of infinite ones the largest finite number."""
    top = u32(0)
    for i in range(len(x)):
        magnitude = u32(f32(x[i]).view(u32) & u32(0x7FFFFFFF))
        if magnitude > top:
            top = magnitude
    top = LARGEST_BITS if top == INFINITE_BITS else top
    return f32(u32(top).view(f32))


@inline
def _divide(x: Array, count: int, block_size: int, scales: Array, quotients: Array) -> None:
    """Each block by its scale; zeros where that is not positive."""
    for start in range(0, count, block_size):
        scale = f32(scales[start // block_size])
        stop = min(start + block_size, count)
        numbers, out = x[start:stop], quotients[start:stop]  # loops from 0: others are looked at for being negative
        if scale > f32(0):
            for i in range(stop - start):
                out[i] = numbers[i] / scale
        else:
            for i in range(stop - start):
                out[i] = f32(0)


@inline
def _nearest(quotients: Array, count: int, bits: int, tables: Any, scratch: Any) -> None:
    """The codes of quotients."""
    boundaries, cells = tables[0], tables[1]
    codes, places = scratch[3], scratch[5]
    if bits == 4:
        _of_sixteen(quotients, count, boundaries, codes)
    elif bits == 3:
        _of_few(quotients, count, boundaries, 7, codes)
    elif bits == 2:
        _of_few(quotients, count, boundaries, 3, codes)
    elif cells[0] == 0:
        _of_even(quotients, count, cells[2], codes)
    else:
        _of_cells(quotients, count, cells, places, codes)


@inline
def _of_sixteen(quotients: Array, count: int, b: Array, codes: Array) -> None:
    """Codes of 4 bits, by halving: each comparison picks those of the boundaries that are left."""
    b0, b1, b2, b3, b4, b5, b6, b7 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]
    b8, b9, b10, b11, b12, b13, b14 = b[8], b[9], b[10], b[11], b[12], b[13], b[14]
    for i in range(count):
        q = f32(quotients[i])
        eight = q > b7
        c0, c1, c2, c3 = b8 if eight else b0, b9 if eight else b1, b10 if eight else b2, b11 if eight else b3
        c4, c5, c6 = b12 if eight else b4, b13 if eight else b5, b14 if eight else b6
        four = q > c3
        d0, d1, d2 = c4 if four else c0, c5 if four else c1, c6 if four else c2
        two = q > d1
        one = q > (d2 if two else d0)
        high = u32(u32(u32(eight) << u32(3)) | u32(u32(four) << u32(2)))
        codes[i] = u32(high | u32(u32(u32(two) << u32(1)) | u32(one)))


@inline
def _of_few(quotients: Array, count: int, boundaries: Array, few: int, codes: Array) -> None:
    """The codes of quotients: how many of the boundaries, a number that LLVM knows, lie below."""
    for i in range(count):
        code = u32(0)
        for j in range(few):
            code = u32(code + u32(quotients[i] > boundaries[j]))
        codes[i] = code


@inline
def _of_even(quotients: Array, count: int, last: int, codes: Array) -> None:
    """The codes of quotients where boundary j, of 0 to last, is (2j - last) / (last + 1): tried is the nearest."""
    last_, half, shift = f32(last), f32(f32(last + 1) / f32(2)), f32(2**23)
    for i in range(count):
        quotient = f32(quotients[i])
        place = quotient * half + last_ / f32(2)
        place = place if place > f32(0) else f32(0)
        place = place if place < last_ else last_
        rounded = f32(place + shift)  # to a whole number, in its lowest bits
        nearest = f32(rounded - shift)
        boundary = f32(f32(nearest + nearest) - last_) / f32(last_ + f32(1))
        codes[i] = u32(u32(rounded.view(u32) & u32(255)) + u32(quotient > boundary))


@inline
def _of_cells(quotients: Array, count: int, cells: Any, places: Array, codes: Array) -> None:
    """The codes of quotients, by cells: first vector instructions, then looking up."""
    shift, lowest, last, codes_of, limits = cells
    first, end = i32(lowest), i32(last)
    for i in range(count):
        whole = u32(f32(quotients[i]).view(u32))
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
def _halving_sum(x: Array) -> f32:
    """Of a power of two of numbers, at least 16."""
    half = len(x) // 2
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
def _fit(x: Array, count: int, block_size: int, bits: int, tables: Any, scratch: Any, scales: Array) -> None:
    """Each block's largest magnitude to the candidate scale of least squared error."""
    fractions, limits, multiples = tables[2], tables[3], tables[4]
    u, squares, codes, quotients, best, errors = scratch[1], scratch[2], scratch[3], scratch[4], scratch[6], scratch[7]
    _divide(x, count, block_size, scales, u)
    whole = (count + block_size - 1) // block_size * block_size
    blocks = whole // block_size
    for block in range(blocks):
        best[block], errors[block] = f32(1), f32(np.inf)
    for c in range(CANDIDATES):
        if bits <= 4:
            _squares(u, count, bits, limits[c], multiples[c], squares)
        else:
            for i in range(count):
                quotients[i] = u[i] / fractions[c]
            _nearest(quotients, count, bits, tables, scratch)
            for i in range(count):
                residual = u[i] - multiples[c, codes[i]]
                squares[i] = residual * residual
        for i in range(count, whole):
            squares[i] = f32(0)
        for block in range(blocks):
            error = _halving_sum(squares[block * block_size : (block + 1) * block_size])
            if error < errors[block]:
                best[block], errors[block] = f32(fractions[c]), error
    for block in range(blocks):
        scales[block] = best[block] * scales[block]


@inline
def _encode(
    x: Array, count: int, block_size: int, scales: Array, bits: int, tables: Any, scratch: Any, packed: Array
) -> None:
    codes, quotients = scratch[3], scratch[4]
    _divide(x, count, block_size, scales, quotients)
    _nearest(quotients, count, bits, tables, scratch)
    for i in range(count, count + 8):
        codes[i] = u8(0)
    pack(codes, bits, packed)


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
    x, group_scales = scratch[0], scratch[8]
    blocks = (row_length + block_size - 1) // block_size
    groups = (blocks + SCALE_GROUP - 1) // SCALE_GROUP
    row_bytes = (row_length * bits + 7) // 8
    for group in range(first, last):
        row = group // groups
        first_block = (group - row * groups) * SCALE_GROUP
        begin, end = first_block * block_size, min((first_block + SCALE_GROUP) * block_size, row_length)
        in_group = (end - begin + block_size - 1) // block_size
        for start in range(begin, end, RUN):
            stop = min(start + RUN, end)
            run_scales = group_scales[(start - begin) // block_size :]
            _load(source, layout, n, row, start, stop, x)
            for at in range(0, stop - start, block_size):
                run_scales[at // block_size] = _largest(x[at : min(at + block_size, stop - start)])
            if fitted:
                _fit(x, stop - start, block_size, bits, tables, scratch, run_scales)
        first_scale = row * blocks + first_block
        if double:
            _round_scales(group_scales[:in_group], scale_codes[first_scale : first_scale + in_group], maxima, group)
        else:
            for block in range(in_group):
                scales[first_scale + block] = group_scales[block]
        for start in range(begin, end, RUN):
            stop = min(start + RUN, end)
            if end - begin > RUN:  # else it is there
                _load(source, layout, n, row, start, stop, x)
            run_scales = group_scales[(start - begin) // block_size :]
            first_byte = row * row_bytes + start * bits // 8
            run_bytes = packed[first_byte : first_byte + ((stop - start) * bits + 7) // 8]
            _encode(x, stop - start, block_size, run_scales, bits, tables, scratch, run_bytes)
    return 0


@inline
def _round_scales(scales: Array, codes: Array, maxima: Array, group: int) -> None:
    """The scales of a group to 8 bits of their maximum, and to what these say."""
    top = f32(0)
    for block in range(len(scales)):
        top = top if top > scales[block] else f32(scales[block])
    maxima[group] = top
    divisor = top if top > f32(0) else f32(1)
    for block in range(len(scales)):
        # The sum is rounded to a whole number, halves to even.
        rounded = f32(f32(scales[block] / divisor) * f32(255)) + f32(2**23)
        code = u32(f32(rounded).view(u32) & u32(255))
        codes[block] = code
        scales[block] = f32(f32(code) / f32(255)) * top


def scratch() -> Scratch:
    """What ``quantize`` works in."""
    x, units, squares, quotients = np.empty((4, RUN), f32)
    codes, places = np.empty(RUN + 8, u8), np.empty(RUN, u32)
    best, errors = np.empty((2, RUN // 16), f32)
    return x, units, squares, codes, quotients, places, best, errors, np.empty(SCALE_GROUP, f32)
