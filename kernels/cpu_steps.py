"""The first-order steps in one pass over memory, compiled by numba: the bits of ``first_order``, which specifies them.

Codes are found from the bits of floats instead of in tables, and so is the largest magnitude (a maximum of floats has
an order).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import uint8 as u8
from numpy import uint32 as u32
from torch import Tensor

from lowbit_optim.kernels.cpu import (
    NO_BITS,
    NO_CODES,
    NO_SCALES,
    Array,
    Job,
    Scratch,
    bits_of,
    inline,
    kernel,
    narrow,
    pieces,
    run,
    widen,
)
from lowbit_optim.kernels.first_order import BLOCK, FRACTION, LINES, Moment, Step, largest

CHUNK = 2048  # blocks that a thread takes at a time
MAX, LARGE = f32(np.finfo(f32).max), f32(2.0**100)
# Constants, for numba reads no dict (and keeps them, as what is inlined, in its cache: touch this file when first_order
# or cpu changes); and of the lines of 8-bit codes their number, and the codes on each.
FRACTION_4, FRACTION_8 = FRACTION[4], FRACTION[8]
LARGEST_4, LARGEST_8 = f32(largest(4)), f32(largest(8))
(_, (D1, B1), (D2, B2), (D3, B3), (D4, B4)) = LINES[4]
LAST_LINE, SIGNED_FRACTION = len(LINES[8]) - 1, (LINES[8][1][1] // LINES[8][1][0]).bit_length() - 1


# ---- a block ---------------------------------------------------------------------------------------------------------


@inline
def _widen(numbers: Array, shift: int, out: Array) -> None:
    """``widen``, and zeros behind what is less than a block."""
    if len(numbers) < BLOCK:
        out[:] = f32(0)
    widen(numbers, shift, out)


@inline
def _finite(gradient: Array, sign: f32) -> np.int64:
    """sign * gradient with zeros where it is not finite; how many numbers that are."""
    bad = u32(0)
    for i in range(BLOCK):
        number = f32(gradient[i])
        good = u32(number.view(u32) & u32(0x7FFFFFFF)) < u32(0x7F800000)
        number = LARGE if number > LARGE else number
        number = -LARGE if number < -LARGE else number
        gradient[i] = number * sign if good else f32(0)
        bad = u32(bad + u32(not good))
    return np.int64(bad)


@inline
def _hash(key: int, start: int, out: Array) -> None:
    """The random bits of the numbers from the index start on."""
    first = u32(u32(u32(start) * u32(0x9E3779B1)) + u32(key))
    for i in range(BLOCK):
        x = u32(first + u32(u32(i) * u32(0x9E3779B1)))
        x = u32(u32(x ^ u32(x >> u32(16))) * u32(0x85EBCA6B))
        x = u32(u32(x ^ u32(x >> u32(13))) * u32(0xC2B2AE35))
        out[i] = u32(x ^ u32(x >> u32(16)))


@inline
def _unpack(packed: Array, bits: int, codes: Array) -> None:
    """Two codes a byte, low nibble first, or one."""
    if bits == 4:
        for i in range(len(packed)):
            codes[2 * i] = u8(packed[i] & u8(15))
            codes[2 * i + 1] = u8(packed[i] >> u8(4))
    else:
        for i in range(len(packed)):
            codes[i] = packed[i]


@inline
def _pack(codes: Array, bits: int, packed: Array) -> None:
    if bits == 4:
        for i in range(len(packed)):
            packed[i] = u8(codes[2 * i] | u8(codes[2 * i + 1] << u8(4)))
    else:
        for i in range(len(packed)):
            packed[i] = codes[i]


@inline
def _decode_signed(codes: Array, bits: int, scale: f32, out: Array) -> None:
    """Of 8 bits, exponent and fraction of a code from 2^f on are those of a float with another bias."""
    magnitude = u32((1 << (bits - 1)) - 1)
    if bits == 4:
        for i in range(BLOCK):
            k = i32(codes[i] & magnitude)
            units = max(max(max(max(k, i32(D1 * k - B1)), i32(D2 * k - B2)), i32(D3 * k - B3)), i32(D4 * k - B4))
            sign = u32(u32(u32(codes[i]) << u32(28)) & u32(0x80000000))
            out[i] = f32(u32(u32(f32(i32(units)).view(u32)) | sign).view(f32)) * scale
    else:
        f = SIGNED_FRACTION
        first, bias = u32(1 << f), u32((126 + f) << 23)
        for i in range(BLOCK):
            code = u32(codes[i] & magnitude)
            small = u32(f32(i32(code)).view(u32))
            value = small if code < first else u32(u32(code << u32((23 - f) & 31)) + bias)
            sign = u32(u32(u32(codes[i]) << u32(24)) & u32(0x80000000))
            out[i] = f32(u32(value | sign).view(f32)) * scale


@inline
def _decode_unsigned(codes: Array, bits: int, scale: f32, out: Array) -> None:
    f = FRACTION_4 if bits == 4 else FRACTION_8
    lowest = u32((127 << f) - (1 << bits) + 1)
    for i in range(BLOCK):
        out[i] = f32(u32(u32(u32(codes[i]) + lowest) << u32((23 - f) & 31)).view(f32)) * scale


@inline
def _largest(x: Array) -> f32:
    """The largest magnitude."""
    top = u32(0)
    for i in range(BLOCK):
        magnitude = u32(f32(x[i]).view(u32) & u32(0x7FFFFFFF))
        if magnitude > top:
            top = magnitude
    return f32(u32(top).view(f32))


@inline
def _encode_signed(x: Array, bits: int, codes: Array) -> f32:
    """The scale, and codes; of 8 bits, the least of the lines is the one that the number's power of two names."""
    scale = f32(_largest(x) / (LARGEST_4 if bits == 4 else LARGEST_8))
    empty = not scale > f32(0)  # or not a number
    divisor = f32(1) if empty else scale
    limit = f32(0) if empty else f32((1 << (bits - 1)) - 1)
    sign = u32(1 << (bits - 1))
    f = SIGNED_FRACTION
    lowest, last, length = i32(127 + f), i32(LAST_LINE), f32(1 << f)
    if bits == 4:
        for i in range(BLOCK):
            units = f32(abs(f32(x[i])) / divisor)
            place = min(units, units * f32(1 / D1) + f32(B1 / D1))
            place = min(place, units * f32(1 / D2) + f32(B2 / D2))
            place = min(place, units * f32(1 / D3) + f32(B3 / D3))
            place = min(place, units * f32(1 / D4) + f32(B4 / D4))
            place = place + f32(0.5)
            codes[i] = u32(u32(i32(place if place < limit else limit)) | (sign if x[i] < f32(0) else u32(0)))
    else:
        for i in range(BLOCK):
            units = f32(abs(f32(x[i])) / divisor)
            line = i32(i32(u32(units.view(u32)) >> u32(23)) - lowest)
            line = i32(0) if line < i32(0) else line
            line = last if line > last else line
            slope = f32(u32(u32(i32(127) - line) << u32(23)).view(f32))
            place = units * slope + f32(line) * length
            place = place + f32(0.5)
            codes[i] = u32(u32(i32(place if place < limit else limit)) | (sign if x[i] < f32(0) else u32(0)))
    return scale


@inline
def _encode_unsigned(x: Array, bits: int, random: Array, codes: Array) -> f32:
    """The scale, and codes."""
    f = FRACTION_4 if bits == 4 else FRACTION_8
    lowest, highest, dither = i32((127 << f) - (1 << bits) + 1), i32((1 << bits) - 1), u32((1 << (23 - f)) - 1)
    scale = _largest(x)
    some = scale > f32(0)  # neither zero nor not a number
    divisor = scale if some else f32(1)
    for i in range(BLOCK):
        units = i32(f32(f32(x[i]) / divisor).view(i32)) if some else i32(0)
        place = i32(i32(units + i32(random[i] & dither)) >> i32((23 - f) & 31))
        code = i32(place - lowest)
        code = i32(0) if code < i32(0) else code
        codes[i] = u32(highest if code > highest else code)
    return scale


# ---- where a block lies ----------------------------------------------------------------------------------------------


@inline
def _place(index: int, n: int) -> Any:
    """Of a block in rows of n numbers: its first number, the one behind its last, row, and number in the row."""
    per_row = (n + BLOCK - 1) // BLOCK
    row = index // per_row
    column = (index - row * per_row) * BLOCK
    return row * n + column, row * n + min(column + BLOCK, n), row, column


@inline
def _bytes(bits: int, place: Any, n: int) -> tuple[int, int]:
    """Where the codes of a block begin and end."""
    start, end, row, column = place
    first = row * ((n * bits + 7) // 8) + column * bits // 8
    return first, first + ((end - start) * bits + 7) // 8


@inline
def _read(moment: Any, signed: bool, index: int, place: Any, n: int, scratch: Array, out: Array) -> None:
    bits, values, codes, scales = moment
    count = place[1] - place[0]
    if bits == 32:
        _widen(values[place[0] : place[1]], 0, out)
        return
    start, end = _bytes(bits, place, n)
    _unpack(codes[start:end], bits, scratch)
    if signed:
        _decode_signed(scratch, bits, scales[index], out)
    else:
        _decode_unsigned(scratch, bits, scales[index], out)
    if count < BLOCK:  # it is encoded as if zeros followed
        for i in range(BLOCK):
            out[i] = out[i] if i < count else f32(0)


@inline
def _keep(moment: Any, index: int, place: Any, n: int, feedback: f32, x: Array, scratch: Array, kept: Array) -> None:
    """Write a signed moment, and leave in x what the parameter's step takes: x + feedback (x - what was kept)."""
    bits, values, codes, scales = moment
    if bits == 32:
        narrow(x, 0, False, NO_BITS, values[place[0] : place[1]])
        return
    scale = _encode_signed(x, bits, scratch)
    scales[index] = scale
    start, end = _bytes(bits, place, n)
    _pack(scratch, bits, codes[start:end])
    _decode_signed(scratch, bits, scale, kept)
    for i in range(BLOCK):
        x[i] = x[i] + (x[i] - kept[i]) * feedback


@inline
def _write(moment: Any, index: int, place: Any, n: int, x: Array, key: int, random: Array, scratch: Array) -> None:
    """Write an unsigned moment."""
    bits, values, codes, scales = moment
    if bits == 32:
        narrow(x, 0, False, random, values[place[0] : place[1]])
        return
    _hash(key, place[0], random)
    scales[index] = _encode_unsigned(x, bits, random, scratch)
    start, end = _bytes(bits, place, n)
    _pack(scratch, bits, codes[start:end])


@inline
def _begin(place: Any, parameter: Any, gradient: Any, sign: f32, p: Array, g: Array) -> int:
    """Read parameter and gradient."""
    _widen(parameter[1][place[0] : place[1]], parameter[0], p)
    _widen(gradient[1][place[0] : place[1]], gradient[0], g)
    return _finite(g, sign)


@inline
def _end(place: Any, p: Array, stochastic: bool, key: int, random: Array, parameter: Any) -> None:
    shift, bits = parameter
    if shift > 0 and stochastic:
        _hash(key, place[0], random)
    narrow(p, shift, stochastic, random, bits[place[0] : place[1]])


# ---- rules: the blocks from first to last - 1; how many numbers of the gradient are not finite -----------------------


@kernel
def _adamw(
    parameter: Any, gradient: Any, moments: Any, keys: Any, settings: Any, n: int, first: int, last: int, scratch: Any
) -> int:
    stochastic, sign, beta1, rest1, beta2, rest2, decay, step_size, root_correction, eps, feedback = settings
    p, g, m, v, random, codes = scratch
    bad = 0
    for index in range(first, last):
        place = _place(index, n)
        bad += _begin(place, parameter, gradient, sign, p, g)
        _read(moments[0], True, index, place, n, codes, m)
        _read(moments[1], False, index, place, n, codes, v)
        for i in range(BLOCK):
            m[i] = m[i] * beta1 + g[i] * rest1
        for i in range(BLOCK):
            square = g[i] * g[i]
            v[i] = v[i] * beta2 + (MAX if square > MAX else square) * rest2
        _keep(moments[0], index, place, n, feedback, m, codes, g)
        for i in range(BLOCK):
            p[i] = p[i] * decay - m[i] / (np.sqrt(v[i]) * root_correction + eps) * step_size
        _write(moments[1], index, place, n, v, keys[1], random, codes)
        _end(place, p, stochastic, keys[0], random, parameter)
    return bad


@kernel
def _sgd(
    parameter: Any, gradient: Any, moments: Any, keys: Any, settings: Any, n: int, first: int, last: int, scratch: Any
) -> int:
    stochastic, nesterov, sign, weight_decay, momentum, share, lr, feedback = settings
    p, g, m, kept, random, codes = scratch
    bad = 0
    for index in range(first, last):
        place = _place(index, n)
        bad += _begin(place, parameter, gradient, sign, p, g)
        _read(moments[0], True, index, place, n, codes, m)
        for i in range(BLOCK):
            g[i] = g[i] + p[i] * weight_decay
            x = m[i] * momentum + g[i] * share
            x = LARGE if x > LARGE else x
            m[i] = -LARGE if x < -LARGE else x
        _keep(moments[0], index, place, n, feedback, m, codes, kept)
        for i in range(BLOCK):
            p[i] = p[i] - (g[i] + m[i] * momentum if nesterov else m[i]) * lr
        _end(place, p, stochastic, keys[0], random, parameter)
    return bad


@kernel
def _adagrad(
    parameter: Any, gradient: Any, moments: Any, keys: Any, settings: Any, n: int, first: int, last: int, scratch: Any
) -> int:
    stochastic, sign, weight_decay, step_size, eps = settings
    p, g, s, _, random, codes = scratch
    bad = 0
    for index in range(first, last):
        place = _place(index, n)
        bad += _begin(place, parameter, gradient, sign, p, g)
        _read(moments[0], False, index, place, n, codes, s)
        for i in range(BLOCK):
            g[i] = g[i] + p[i] * weight_decay
            x = s[i] + g[i] * g[i]
            s[i] = MAX if x > MAX else x
        for i in range(BLOCK):
            p[i] = p[i] - g[i] / (np.sqrt(s[i]) + eps) * step_size
        _write(moments[0], index, place, n, s, keys[1], random, codes)
        _end(place, p, stochastic, keys[0], random, parameter)
    return bad


# ---- steps -----------------------------------------------------------------------------------------------------------


def take(steps: Sequence[Step]) -> list[Tensor]:
    """``first_order.take`` for parameters on the CPU in float32, bfloat16 or float16."""
    jobs: list[Job] = []
    numbers: list[int] = []
    rounded: list[tuple[Tensor, Tensor]] = []
    for number, step in enumerate(steps):
        parameter = step.parameter.detach()
        if parameter.dtype == torch.float16:  # its own rounding is torch's
            rounded.append((parameter, parameter.float()))
            parameter = rounded[-1][1]
        rows, n = parameter.shape
        operands = bits_of(parameter), bits_of(step.gradient.detach()), tuple(_moment(m) for m in step.moments)
        take_blocks = partial(KERNELS[step.rule], *operands, tuple(step.keys), _settings(step), n)
        jobs += [partial(take_blocks, *piece) for piece in pieces(rows * -(-n // BLOCK), CHUNK)]
        numbers += [number] * (len(jobs) - len(numbers))
    bad = [0] * len(steps)
    for number, count in zip(numbers, run(jobs, _scratch), strict=True):
        bad[number] += count
    for parameter, x in rounded:
        parameter.copy_(x)
    return [torch.tensor(count) for count in bad]


def _scratch() -> Scratch:
    return (*(np.empty(BLOCK, f32) for _ in range(4)), np.empty(BLOCK, u32), np.empty(BLOCK, u8))


KERNELS = {"adamw": _adamw, "sgd": _sgd, "adagrad": _adagrad}


def _settings(step: Step) -> tuple[Any, ...]:
    """What the kernel of the rule unpacks: flags, and numbers rounded to float32."""
    s, flags = step.settings, [step.settings["stochastic"]]
    if step.rule == "adamw":
        numbers = [s["sign"], s["beta1"], 1 - s["beta1"], s["beta2"], 1 - s["beta2"], s["decay"], s["step_size"]]
        numbers += [s["root_correction"], s["eps"], s["feedback"]]
    elif step.rule == "sgd":
        flags.append(s["nesterov"])
        numbers = [s["sign"], s["weight_decay"], s["momentum"], s["share"], s["lr"], s["feedback"]]
    else:
        numbers = [s["sign"], s["weight_decay"], s["step_size"], s["eps"]]
    return (*map(bool, flags), *map(f32, numbers))


def _moment(moment: Moment) -> tuple[int, Array, Array, Array]:
    """Bits, values, codes, scales."""
    if moment.values is not None:
        return moment.bits, bits_of(moment.values)[1], NO_CODES, NO_SCALES
    assert moment.codes is not None
    assert moment.scales is not None
    return moment.bits, NO_BITS, moment.codes.view(-1).numpy(), moment.scales.view(-1).numpy()
