# mypy: disable-error-code="no-untyped-def"
"""The fused first-order steps in Triton, for CUDA and ROCm: one pass over memory, the same bits as ``first_order``.

A program takes ``TILE`` blocks of ``BLOCK`` numbers; where the last block of a row is short, its end is masked. What
makes the bits equal: divisions and roots are those of IEEE (``div_rn``, ``sqrt_rn``), products and sums are not fused
(``enable_fp_fusion=False``), subnormal numbers are kept (Triton flushes them in its approximate functions only), and
bfloat16 is converted here, by bits.

If TRITON_INTERPRET=1 is in the environment before triton is imported, the same code runs on the CPU, slowly.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_optim.kernels import first_order
from lowbit_optim.kernels.first_order import Moment, Step
from lowbit_optim.kernels.reference import packed_bytes

BLOCK = tl.constexpr(first_order.BLOCK)
TILE = tl.constexpr(8)
_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_LARGE = tl.constexpr(2.0**100)
_LARGEST_4, _LARGEST_8 = tl.constexpr(first_order.largest(4)), tl.constexpr(first_order.largest(8))
(_, (_d1, _b1), (_d2, _b2), (_d3, _b3), (_d4, _b4)) = first_order.LINES[4]
_D1, _D2, _D3, _D4 = tl.constexpr(_d1), tl.constexpr(_d2), tl.constexpr(_d3), tl.constexpr(_d4)
_B1, _B2, _B3, _B4 = tl.constexpr(_b1), tl.constexpr(_b2), tl.constexpr(_b3), tl.constexpr(_b4)
_KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)  # as torch's clamp does

# Triton compiles anew for a number that is 1, or a number or an address that is a multiple of 16; not for these.
_PLAIN = ("bad", "rows", "parameter_key", "moment_key")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@triton.jit
def widen(x):
    """Numbers as float32."""
    if x.dtype == tl.bfloat16:
        numbers = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        numbers = x.to(tl.float32)
    return numbers


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 numbers in another dtype: to nearest, halves to even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        numbers = _cut(x, bits + 0x7FFF + ((bits >> 16) & 1))
    else:
        numbers = x.to(dtype)
    return numbers


@triton.jit
def _cut(x, bits):
    """The upper halves of bits, the sum of those of x and of less than 2^16, as bfloat16."""
    upper = tl.where(x == x, bits >> 16, 0x7FC0)  # the sum would make some NaN infinite or zero
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def greatest(x):
    """The greatest magnitude of each row, or NaN: above zero, numbers are in the order of their bits."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _blocks():
    """The numbers of the program's blocks, [TILE]; 32 bits are enough for 2^38 numbers, and divide faster."""
    return tl.program_id(0) * TILE + tl.arange(0, TILE)


@triton.jit
def _places(rows, size, WIDTH: tl.constexpr):
    """Offsets of the program's blocks in rows of this size, ``WIDTH`` a block, and which of them are inside."""
    per_row = tl.cdiv(size, WIDTH)
    row = (_blocks() // per_row)[:, None]
    column = (_blocks() % per_row)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return row.to(tl.int64) * size + column, (row < rows) & (column < size)


@triton.jit
def _load(data, rows, n):
    """Numbers of the parameter's shape, float32 [TILE, BLOCK]; zeros outside."""
    place, inside = _places(rows, n, BLOCK)
    return widen(tl.load(data + place, inside, other=0))


@triton.jit
def _random(key, place):
    x = place.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


# ---- codes -----------------------------------------------------------------------------------------------------------


@triton.jit
def _signed(codes, BITS: tl.constexpr):
    """What signed codes, int32, stand for."""
    k = codes & (2 ** (BITS - 1) - 1)
    if BITS == 4:
        units = tl.maximum(tl.maximum(k, k * _D1 - _B1), k * _D2 - _B2)
        units = tl.maximum(tl.maximum(units, k * _D3 - _B3), k * _D4 - _B4)
    else:
        i = tl.maximum((k >> 4) - 1, 0)  # the line on which k lies
        units = (k - (i << 4)) << i
    return units.to(tl.float32) * tl.where(codes == k, 1.0, -1.0)  # zeros have signs, too


@triton.jit
def _decode(data, scales, rows, n, half, SIGNED: tl.constexpr, BITS: tl.constexpr):
    """The numbers of a moment, float32 [TILE, BLOCK]; anything outside. A row of 4-bit codes takes ``half`` bytes."""
    F: tl.constexpr = 1 if BITS == 4 else 4  # bits of fraction of unsigned codes
    if BITS == 32:
        x = _load(data, rows, n)
    else:
        if BITS == 4:
            place, inside = _places(rows, half, BLOCK // 2)
            pairs = tl.load(data + place, inside, other=0)
            codes = tl.interleave(pairs & 15, pairs >> 4).to(tl.int32)
        else:
            place, inside = _places(rows, n, BLOCK)
            codes = tl.load(data + place, inside, other=0).to(tl.int32)
        if SIGNED:
            x = _signed(codes, BITS)
        else:
            x = ((codes + ((127 << F) - (2**BITS - 1))) << (23 - F)).to(tl.float32, bitcast=True)
        block = _blocks()
        x *= tl.load(scales + block, block < rows * tl.cdiv(n, BLOCK), other=0.0)[:, None]
    return x


@triton.jit
def _store(data, scales, codes, scale, rows, n, half, BITS: tl.constexpr):
    """Codes, int32 [TILE, BLOCK], and scales, [TILE], into a moment."""
    place, inside = _places(rows, n, BLOCK)
    codes = codes.to(tl.uint8)
    if BITS == 4:
        low, high = tl.split(codes.reshape(TILE, BLOCK // 2, 2))
        place, inside = _places(rows, half, BLOCK // 2)
        codes = low | (high << 4)
    tl.store(data + place, codes, inside)
    block = _blocks()
    tl.store(scales + block, scale, block < rows * tl.cdiv(n, BLOCK))


@triton.jit
def _keep(data, scales, x, rows, n, half, feedback, BITS: tl.constexpr):
    """Put a signed moment's new numbers, float32 [TILE, BLOCK], into it; returns x + feedback (x - what is kept)."""
    place, inside = _places(rows, n, BLOCK)
    if BITS == 32:
        tl.store(data + place, x, inside)
        step = x
    else:
        x = tl.where(inside, x, 0.0)
        scale = tl.div_rn(greatest(x), _LARGEST_4 if BITS == 4 else _LARGEST_8)
        each = scale[:, None]
        units = tl.where(each > 0, tl.div_rn(tl.abs(x), tl.where(each > 0, each, 1.0)), 0.0)
        if BITS == 4:
            lies = tl.minimum(tl.minimum(units, units * (1 / _D1) + _B1 / _D1), units * (1 / _D2) + _B2 / _D2)
            lies = tl.minimum(tl.minimum(lies, units * (1 / _D3) + _B3 / _D3), units * (1 / _D4) + _B4 / _D4)
        else:
            lies = units
            for i in tl.static_range(1, 7):
                lies = tl.minimum(lies, units * 2.0**-i + (i << 4))
        codes = tl.minimum((lies + 0.5).to(tl.int32), 2 ** (BITS - 1) - 1)
        codes |= (x < 0).to(tl.int32) << (BITS - 1)
        _store(data, scales, codes, scale, rows, n, half, BITS)
        step = x + (x - _signed(codes, BITS) * each) * feedback
    return step


@triton.jit
def _encode(data, scales, x, key, rows, n, half, BITS: tl.constexpr):
    """Put an unsigned moment's new numbers, float32 [TILE, BLOCK], into it."""
    F: tl.constexpr = 1 if BITS == 4 else 4
    place, inside = _places(rows, n, BLOCK)
    if BITS == 32:
        tl.store(data + place, x, inside)
    else:
        x = tl.where(inside, x, 0.0)
        scale = greatest(x)
        each = scale[:, None]
        units = tl.where(each > 0, tl.div_rn(x, tl.where(each > 0, each, 1.0)), 0.0)
        lies = (units.to(tl.uint32, bitcast=True) + (_random(key, place) & ((1 << (23 - F)) - 1))) >> (23 - F)
        codes = lies.to(tl.int32) - ((127 << F) - (2**BITS - 1))
        codes = tl.minimum(tl.maximum(codes, 0), 2**BITS - 1)
        _store(data, scales, codes, scale, rows, n, half, BITS)


# ---- parts of a step -------------------------------------------------------------------------------------------------


@triton.jit
def _finite(gradient, bad, rows, n, sign):
    """The gradient with zeros where it is not finite; adds how many numbers that are to ``bad``."""
    g = _load(gradient, rows, n) * sign
    good = tl.abs(g) < float("inf")
    count = tl.sum(tl.sum(1 - good.to(tl.int32), 1), 0)
    tl.atomic_add(bad, count.to(tl.int64), mask=count > 0, sem="relaxed")
    return tl.where(good, tl.clamp(g, -_LARGE, _LARGE), 0.0)


@triton.jit
def _write(parameter, x, key, rows, n, stochastic: tl.constexpr):
    """Round x to the parameter's dtype; bfloat16 at random if ``stochastic``."""
    place, inside = _places(rows, n, BLOCK)
    dtype: tl.constexpr = parameter.dtype.element_ty
    if stochastic and dtype == tl.bfloat16:
        numbers = _cut(x, x.to(tl.uint32, bitcast=True) + (_random(key, place) & 0xFFFF))
    else:
        numbers = narrow(x, dtype)
    tl.store(parameter + place, numbers, inside)


# ---- rules -----------------------------------------------------------------------------------------------------------
# Arguments: the parameter, its gradient and the count of bad numbers; data and scales of each moment; the sizes; keys;
# the settings of the rule in first_order; bits of each moment.


@triton.jit(do_not_specialize=_PLAIN)
def _adamw(
    parameter, gradient, bad, mean, mean_scales, square, square_scales, rows, n, half, parameter_key, moment_key,
    sign, beta1, share1, beta2, share2, decay, step_size, root_correction, eps, feedback, stochastic: tl.constexpr,
    FIRST_BITS: tl.constexpr, SECOND_BITS: tl.constexpr,
):  # fmt: skip
    g = _finite(gradient, bad, rows, n, sign)
    m = _decode(mean, mean_scales, rows, n, half, True, FIRST_BITS) * beta1 + g * share1
    v = _decode(square, square_scales, rows, n, half, False, SECOND_BITS) * beta2 + tl.minimum(g * g, _MAX) * share2
    step = _keep(mean, mean_scales, m, rows, n, half, feedback, FIRST_BITS)
    update = tl.div_rn(step, tl.sqrt_rn(v) * root_correction + eps)
    new = _load(parameter, rows, n) * decay - update * step_size
    _encode(square, square_scales, v, moment_key, rows, n, half, SECOND_BITS)
    _write(parameter, new, parameter_key, rows, n, stochastic)


@triton.jit(do_not_specialize=_PLAIN)
def _sgd(
    parameter, gradient, bad, momentum_buffer, scales, rows, n, half, parameter_key, moment_key,
    sign, weight_decay, momentum, share, nesterov: tl.constexpr, lr, feedback, stochastic: tl.constexpr,
    FIRST_BITS: tl.constexpr,
):  # fmt: skip
    p = _load(parameter, rows, n)
    g = _finite(gradient, bad, rows, n, sign) + p * weight_decay
    m = _decode(momentum_buffer, scales, rows, n, half, True, FIRST_BITS) * momentum + g * share
    m = tl.clamp(m, -_LARGE, _LARGE, _KEEP_NAN)
    step = _keep(momentum_buffer, scales, m, rows, n, half, feedback, FIRST_BITS)
    update = g + step * momentum if nesterov else step
    _write(parameter, p - update * lr, parameter_key, rows, n, stochastic)


@triton.jit(do_not_specialize=_PLAIN)
def _adagrad(
    parameter, gradient, bad, sum, scales, rows, n, half, parameter_key, moment_key,
    sign, weight_decay, step_size, eps, stochastic: tl.constexpr,
    FIRST_BITS: tl.constexpr,
):  # fmt: skip
    p = _load(parameter, rows, n)
    g = _finite(gradient, bad, rows, n, sign) + p * weight_decay
    s = _decode(sum, scales, rows, n, half, False, FIRST_BITS) + g * g
    s = tl.minimum(s, _MAX, _KEEP_NAN)
    _encode(sum, scales, s, moment_key, rows, n, half, FIRST_BITS)
    new = p - tl.div_rn(g, tl.sqrt_rn(s) + eps) * step_size
    _write(parameter, new, parameter_key, rows, n, stochastic)


_RULES = {"adamw": _adamw, "sgd": _sgd, "adagrad": _adagrad}


def take(steps: Sequence[Step]) -> list[Tensor]:
    """``first_order.take`` without a host synchronisation; all tensors of a step are contiguous, on one device."""
    devices = {s.parameter.device for s in steps}
    counts = {d: torch.zeros(len(steps), dtype=torch.int64, device=d) for d in devices}
    result = [counts[s.parameter.device][i] for i, s in enumerate(steps)]
    for s, bad in zip(steps, result, strict=True):
        if s.parameter.numel():
            with torch.cuda.device_of(s.parameter):
                _launch(s, bad)
    return result


def _launch(step: Step, bad: Tensor) -> None:
    rows, n = step.parameter.shape
    # A scalar of another type would be another kernel to compile.
    settings: dict[str, Any] = {k: v if isinstance(v, bool) else float(v) for k, v in step.settings.items()}
    if step.rule == "adamw":  # differences of float64, as in the specification
        settings |= {"share1": 1 - settings["beta1"], "share2": 1 - settings["beta2"]}
    bits = {name: m.bits for name, m in zip(("FIRST_BITS", "SECOND_BITS"), step.moments, strict=False)}
    keys = [key - (key >> 31 << 32) for key in step.keys]  # as signed numbers, which all have one type
    grid = (triton.cdiv(rows * triton.cdiv(n, BLOCK.value), TILE.value),)
    _RULES[step.rule][grid](
        *(step.parameter, step.gradient, bad, *(t for m in step.moments for t in _tensors(m))),
        *(rows, n, packed_bytes(n, 4), *keys),
        **settings,
        **bits,
        enable_fp_fusion=False,
    )


def _tensors(moment: Moment) -> tuple[Tensor | None, Tensor | None]:
    return (moment.codes, moment.scales) if moment.values is None else (moment.values, None)
