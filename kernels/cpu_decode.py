"""Codes to numbers, compiled by numba."""

from typing import Any

import numpy as np
from numpy import float32 as f32
from numpy import uint8 as u8
from numpy import uint64 as u64

from lowbit_optim.kernels.cpu import NO_BITS, Array, Scratch, inline, kernel, narrow
from lowbit_optim.kernels.cpu_bits import unpack
from lowbit_optim.kernels.cpu_encode import LARGEST_BLOCK, SQUARE
from lowbit_optim.kernels.reference import SCALE_GROUP

RUN = 1024  # numbers of a row that are decoded at a time
STRIP = 64  # rows of a matrix that are decoded before their other triangle is written


@inline
def _decode(parts: Any, how: Any, row: int, start: int, stop: int, codes: Array, out: Array) -> None:
    """The numbers from start, a multiple of 8, to stop - 1 of a coded row."""
    packed, scales, scale_codes, maxima, values, pairs = parts
    bits, block_size, double, row_length = how
    blocks = (row_length + block_size - 1) // block_size
    groups = (blocks + SCALE_GROUP - 1) // SCALE_GROUP
    row_bytes = (row_length * bits + 7) // 8
    if bits == 4:  # all of them first, two at a time
        first, whole = row * row_bytes + start // 2, (stop - start) // 2
        here, wide = packed[first : first + (stop - start + 1) // 2], out[: 2 * whole].view(u64)
        for i in range(whole):
            wide[i] = pairs[here[i]]
        if 2 * whole < stop - start:
            out[2 * whole] = values[here[whole] & u8(15)]
    at = start
    while at < stop:
        block = at // block_size
        end = min((block + 1) * block_size, stop)
        if double:
            code = f32(scale_codes[row * blocks + block])
            scale = f32(f32(code / f32(255)) * maxima[row * groups + block // SCALE_GROUP])
        else:
            scale = f32(scales[row * blocks + block])
        begin, count = row * row_bytes + at * bits // 8, end - at
        here, numbers = packed[begin : begin + (count * bits + 7) // 8], out[at - start : end - start]
        if bits == 8:
            for i in range(count):
                numbers[i] = values[here[i]] * scale
        elif bits == 4:
            for i in range(count):
                numbers[i] = numbers[i] * scale
        else:
            unpack(here, bits, codes)
            for i in range(count):
                numbers[i] = values[codes[i]] * scale
        at = end


@inline
def _put(x: Array, target: Any, first: int) -> None:
    """Write numbers where the first one belongs."""
    wide, floats, halves = target
    if wide:
        out = floats[first : first + len(x)]
        for i in range(len(x)):
            out[i] = x[i]
    else:
        narrow(x, 16, False, NO_BITS, halves[first : first + len(x)])


@kernel
def dequantize_rows(
    parts: Any, diagonal: Array, layout: int, how: Any, target: Any, first: int, last: int, scratch: Any
) -> int:
    """Runs of numbers, the first to the last - 1."""
    wide, floats, _ = target
    x, codes = scratch
    n = how[3]
    runs = (n + RUN - 1) // RUN
    for index in range(first, last):
        row = index // runs
        start = (index - row * runs) * RUN
        stop = min(start + RUN, n)
        place, column, count = row * n + start, row % n - start, stop - start
        out = floats[place : place + count] if wide else x[:count]
        _decode(parts, how, row, start, stop, codes, out)
        if layout == SQUARE and 0 <= column < count:
            out[column] = diagonal[row]
        if not wide:
            _put(out, target, place)
    return 0


@kernel
def dequantize_triangles(
    parts: Any, diagonal: Array, n: int, how: Any, target: Any, first: int, last: int, scratch: Any
) -> int:
    """Strips of matrices, the first to the last - 1: their rows up to the diagonal, and the same columns above it."""
    wide, floats, _ = target
    x, codes, column = scratch
    strips = (n + STRIP - 1) // STRIP
    for index in range(first, last):
        matrix = index // strips
        top = (index - matrix * strips) * STRIP
        bottom = min(top + STRIP, n)
        begin = top * (top - 1) // 2
        ahead = begin % 8
        _decode(parts, how, matrix, begin - ahead, bottom * (bottom - 1) // 2, codes, x)
        below = x[ahead:]
        for i in range(top, bottom):
            start, place, corner = i * (i - 1) // 2 - begin, (matrix * n + i) * n, matrix * n + i
            _put(below[start : start + i], target, place)
            _put(diagonal[corner : corner + 1], target, place + i)
        for j in range(bottom - 1):
            row = max(top, j + 1)
            count, place = bottom - row, (matrix * n + j) * n + row
            right = floats[place : place + count] if wide else column[:count]
            at, length = u64(row * (row - 1) // 2 - begin + j), u64(row)  # unsigned: others may be negative
            for i in range(count):
                right[i] = below[at]
                at, length = u64(at + length), u64(length + u64(1))
            if not wide:
                _put(right, target, place)
    return 0


def row_scratch() -> Scratch:
    """What ``dequantize_rows`` works in."""
    return np.empty(RUN, f32), np.empty(LARGEST_BLOCK + 8, u8)


def strip_scratch(n: int) -> Scratch:
    """What ``dequantize_triangles`` works in for matrices of order n."""
    return np.empty(STRIP * n + 8, f32), np.empty(LARGEST_BLOCK + 8, u8), np.empty(STRIP, f32)
