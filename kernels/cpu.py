"""The first-order steps in one pass over memory, compiled by numba: the bits of ``first_order``, which specifies them.

A block of ``BLOCK`` numbers at a time is staged through buffers that stay in the first-level cache, by short loops over
all of the block, which LLVM turns into vector instructions. For these loops: integers are cast back to 32 bits after
every operation, because numba computes in 64; codes are decoded and encoded by the bits of floats, without tables; the
largest of non-negative floats is found by their bits, because a maximum of floats has an order; and there is no
``fastmath``, so that every operation rounds as IEEE 754 says.

Threads are those of an executor, because numba's own abort in a forked child or when two threads call them.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import int64 as i64
from numpy import uint32 as u32
from numpy import uint64 as u64
from numpy.typing import NDArray
from torch import Tensor

from lowbit_optim.kernels.first_order import BLOCK, EXPONENT_FRACTION, Moment, Step, largest

Array = NDArray[Any]

CHUNK = 1024  # blocks that a thread takes at a time
MAX = f32(np.finfo(f32).max)
TOP_4, TOP_8 = (f32(largest(*EXPONENT_FRACTION["signed", bits])) for bits in (4, 8))
FRACTION_4, FRACTION_8 = (EXPONENT_FRACTION["signed", bits][1] for bits in (4, 8))
LINES_4, LINES_8 = (2 ** EXPONENT_FRACTION["signed", bits][0] - 2 for bits in (4, 8))
UNSIGNED_FRACTION_4, UNSIGNED_FRACTION_8 = (EXPONENT_FRACTION["unsigned", bits][1] for bits in (4, 8))


def _njit(function: Callable[..., Any], forceinline: bool = False) -> Any:
    """Compiled at the first call, and kept on disk where numba finds a place to keep it."""
    options = {"nogil": True, "error_model": "numpy", "forceinline": forceinline}  # numpy: no check of divisors
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # "no locator available": a read-only install
        return numba.njit(**options)(function)


_inline = partial(_njit, forceinline=True)  # a call costs as much as a loop over a block


# ---- a block ---------------------------------------------------------------------------------------------------------
# Blocks of an array are named by an unsigned offset: a slice would be counted as a reference to the array, atomically,
# and a signed index is asked whether it is negative.


@_inline
def _widen(numbers: Array, start: int, count: int, shift: int, out: Array) -> None:
    """Bits of float32 (shift 0) or bfloat16 (16) to float32, zeros behind them."""
    if count < BLOCK:
        for i in range(BLOCK):
            out[i] = f32(0)
    for i in range(count):
        out[i] = f32(u32(u32(numbers[u64(start) + u64(i)]) << u32(shift & 31)).view(f32))


@_inline
def _hash(key: int, start: int, out: Array) -> None:
    """The random bits of the numbers from the index start."""
    for i in range(BLOCK):
        x = u32(u32(u32(u32(start) + u32(i)) * u32(0x9E3779B1)) + u32(key))
        x = u32(u32(x ^ u32(x >> u32(16))) * u32(0x85EBCA6B))
        x = u32(u32(x ^ u32(x >> u32(13))) * u32(0xC2B2AE35))
        out[i] = u32(x ^ u32(x >> u32(16)))


@_inline
def _narrow(x: Array, stochastic: bool, random: Array, shift: int, numbers: Array, start: int, count: int) -> None:
    """float32 to bits of float32 (shift 0) or bfloat16 (16), rounded at random or to the nearest, ties to even.

    A number that is not one is not rounded to infinity or around it: the low half of its bits is 0.
    """
    if shift == 0:
        for i in range(count):
            numbers[u64(start) + u64(i)] = f32(x[i]).view(u32)
    else:
        for i in range(count):
            bits = u32(f32(x[i]).view(u32))
            nearest = u32(u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))
            rounding = u32(random[i] & u32(0xFFFF)) if stochastic else nearest
            numbers[u64(start) + u64(i)] = u32(u32(bits + rounding) >> u32(16))


@_inline
def _unpack(packed: Array, start: int, count: int, bits: int, codes: Array) -> None:
    """Two codes a byte, low nibble first, or one; zeros behind them."""
    if count < BLOCK:
        for i in range(BLOCK):
            codes[i] = np.uint8(0)
    if bits == 4:
        for i in range((count + 1) // 2):
            byte = packed[u64(start) + u64(i)]
            codes[u64(2 * i)] = np.uint8(byte & np.uint8(15))
            codes[u64(2 * i + 1)] = np.uint8(byte >> np.uint8(4))
    else:
        for i in range(count):
            codes[i] = packed[u64(start) + u64(i)]


@_inline
def _pack(codes: Array, bits: int, packed: Array, start: int, count: int) -> None:
    if bits == 4:
        for i in range((count + 1) // 2):
            packed[u64(start) + u64(i)] = np.uint8(codes[u64(2 * i)] | np.uint8(codes[u64(2 * i + 1)] << np.uint8(4)))
    else:
        for i in range(count):
            packed[u64(start) + u64(i)] = codes[i]


@_inline
def _decode_signed(codes: Array, bits: int, scale: f32, out: Array) -> None:
    """From 2^f on, a code's exponent and fraction are those of a float, but for the exponent's bias."""
    f = FRACTION_4 if bits == 4 else FRACTION_8
    to_sign, shift = u32(32 - bits), u32(23 - f)
    bias, subnormal, sign = u32((126 + f) << 23), u32(1 << f), u32(0x80000000)
    magnitude = u32((1 << (bits - 1)) - 1)
    for i in range(BLOCK):
        code = u32(codes[i])
        k = u32(code & magnitude)
        normal = u32(u32(k << u32(shift & u32(31))) + bias)
        small = u32(f32(i32(k)).view(u32))
        value = u32((small if k < subnormal else normal) | u32(u32(code << u32(to_sign & u32(31))) & sign))
        out[i] = f32(u32(value).view(f32)) * scale


@_inline
def _decode_unsigned(codes: Array, bits: int, scale: f32, out: Array) -> None:
    f = UNSIGNED_FRACTION_4 if bits == 4 else UNSIGNED_FRACTION_8
    lowest, shift = u32((127 << f) - (1 << bits) + 1), u32(23 - f)
    for i in range(BLOCK):
        out[i] = f32(u32(u32(u32(codes[i]) + lowest) << u32(shift & u32(31))).view(f32)) * scale


@_inline
def _largest(x: Array) -> f32:
    """The largest magnitude."""
    top = u32(0)
    for i in range(BLOCK):
        magnitude = u32(f32(x[i]).view(u32) & u32(0x7FFFFFFF))
        if magnitude > top:
            top = magnitude
    return f32(u32(top).view(f32))


@_inline
def _encode_signed(x: Array, bits: int, random: Array, codes: Array) -> f32:
    """Codes into codes; the scale.

    The least of the specification's lines is the one that begins at the number's power of two.
    """
    f, lines, top = (FRACTION_4, LINES_4, TOP_4) if bits == 4 else (FRACTION_8, LINES_8, TOP_8)
    scale = f32(_largest(x) / top)
    empty = not scale > f32(0)
    divisor = f32(1) if empty else scale
    limit = f32(0) if empty else f32((1 << (bits - 1)) - 1)
    first, last, step = i32(127 + f), i32(lines), f32(1 << f)
    sign = u32(1 << (bits - 1))
    for i in range(BLOCK):
        number = f32(x[i])
        units = f32(abs(number) / divisor)
        line = i32(i32(u32(u32(units.view(u32)) >> u32(23))) - first)
        line = i32(0) if line < i32(0) else line
        line = last if line > last else line
        slope = f32(u32(u32(i32(127) - line) << u32(23)).view(f32))
        place = units * slope + f32(line) * step
        place = place + f32(i32(u32(random[i] >> u32(8)))) * f32(2.0**-24)
        place = place if place < limit else limit
        below = sign if number < f32(0) else u32(0)
        codes[i] = u32(u32(i32(place)) | below)
    return scale


@_inline
def _encode_unsigned(x: Array, bits: int, random: Array, codes: Array) -> f32:
    f = UNSIGNED_FRACTION_4 if bits == 4 else UNSIGNED_FRACTION_8
    lowest, shift, highest = i32((127 << f) - (1 << bits) + 1), i32(23 - f), i32((1 << bits) - 1)
    dither = u32((1 << (23 - f)) - 1)
    scale = _largest(x)
    divisor = scale if scale > f32(0) else f32(1)
    for i in range(BLOCK):
        units = i32(f32(f32(x[i]) / divisor).view(i32))
        place = i32(i32(units + i32(random[i] & dither)) >> i32(shift & i32(31)))
        code = i32(place - lowest)
        code = i32(0) if code < i32(0) else code
        codes[i] = u32(highest if code > highest else code)
    return scale


@_inline
def _finite(gradient: Array, sign: f32) -> int:
    """sign * gradient with zeros where it is not finite; how many numbers that are."""
    bad = u32(0)
    for i in range(BLOCK):
        number = f32(gradient[i])
        good = u32(number.view(u32) & u32(0x7FFFFFFF)) < u32(0x7F800000)
        gradient[i] = number * sign if good else f32(0)
        bad = u32(bad + u32(not good))
    return i64(bad)


# ---- moments of a block ----------------------------------------------------------------------------------------------


@_inline
def _read(
    signed: bool, bits: int, values: Array, packed: Array, scales: Array, place: Any, codes: Array, out: Array
) -> None:
    row, block, start, count, n = place
    if bits == 32:
        _widen(values, start, count, 0, out)
        return
    _unpack(packed, row * ((n * bits + 7) // 8) + block * (BLOCK * bits // 8), count, bits, codes)
    scale = scales[u64(row * ((n + BLOCK - 1) // BLOCK) + block)]
    if signed:
        _decode_signed(codes, bits, scale, out)
    else:
        _decode_unsigned(codes, bits, scale, out)
    if count < BLOCK:  # it is encoded as if zeros followed
        for i in range(BLOCK):
            out[i] = out[i] if i < count else f32(0)


@_inline
def _write(
    signed: bool,
    bits: int,
    values: Array,
    packed: Array,
    scales: Array,
    place: Any,
    x: Array,
    key: int,
    random: Array,
    codes: Array,
) -> None:
    row, block, start, count, n = place
    if bits == 32:
        _narrow(x, False, random, 0, values, start, count)
        return
    _hash(key, start, random)
    scale = _encode_signed(x, bits, random, codes) if signed else _encode_unsigned(x, bits, random, codes)
    _pack(codes, bits, packed, row * ((n * bits + 7) // 8) + block * (BLOCK * bits // 8), count)
    scales[u64(row * ((n + BLOCK - 1) // BLOCK) + block)] = scale


# ---- rules -----------------------------------------------------------------------------------------------------------


@_inline
def _place(index: int, n: int) -> Any:
    """Row, block of the row, first number, how many there are, n."""
    blocks = (n + BLOCK - 1) // BLOCK
    row = index // blocks
    block = index - row * blocks
    return row, block, row * n + block * BLOCK, min(BLOCK, n - block * BLOCK), n


@_njit
def _adamw(
    first: int, last: int, n: int, parameter: Array, gradient: Array, shifts: Any, moments: Any, keys: Any, s: Any
) -> int:
    (mbits, mvalues, mcodes, mscales), (vbits, vvalues, vcodes, vscales) = moments
    sign, beta1, rest1, beta2, rest2, decay, step_size, root_correction, eps, stochastic = s
    p, g, m, v = np.empty(BLOCK, f32), np.empty(BLOCK, f32), np.empty(BLOCK, f32), np.empty(BLOCK, f32)
    random, codes = np.empty(BLOCK, u32), np.empty(BLOCK, np.uint8)
    bad = 0
    for index in range(first, last):
        place = _place(index, n)
        _widen(parameter, place[2], place[3], shifts[0], p)
        _widen(gradient, place[2], place[3], shifts[1], g)
        bad += _finite(g, sign)
        _read(True, mbits, mvalues, mcodes, mscales, place, codes, m)
        _read(False, vbits, vvalues, vcodes, vscales, place, codes, v)
        for i in range(BLOCK):
            m[i] = m[i] * beta1 + g[i] * rest1
        for i in range(BLOCK):
            squared = g[i] * g[i]
            squared = MAX if squared > MAX else squared
            v[i] = v[i] * beta2 + squared * rest2
        for i in range(BLOCK):
            p[i] = p[i] * decay - m[i] / (np.sqrt(v[i]) * root_correction + eps) * step_size
        _write(True, mbits, mvalues, mcodes, mscales, place, m, keys[1], random, codes)
        _write(False, vbits, vvalues, vcodes, vscales, place, v, keys[2], random, codes)
        if stochastic:
            _hash(keys[0], place[2], random)
        _narrow(p, stochastic, random, shifts[0], parameter, place[2], place[3])
    return bad
