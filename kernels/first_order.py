"""The executable specification of the fused first-order steps, in plain torch: every backend must give the same bits.

A moment x of a parameter, viewed as rows of n numbers, is kept as float32 numbers or as codes: blocks of ``BLOCK``
numbers of a row (the last may be short) share a scale, and a code is a small float in units of it. From one step to the
next a moment changes by less than the spacing of its codes, so that rounding to the nearest one alone would hold it
where it is for ever.

* A signed moment is rounded to the nearest code, and what rounding takes from it, e, goes into the parameter's step at
  once, ``feedback`` times: with the weight beta + beta^2 + ... = beta / (1 - beta) that e would have had in all later
  steps. Nothing is lost then, some of it only comes early. (Rounded at random, it would be right in the mean, and the
  parameter would walk at random.)
* An unsigned moment is rounded up or down at random, such that the mean is x.

* A signed moment has codes of a sign (the highest bit) and a magnitude k, which stands for max (d k - b) over the
  ``LINES`` (d, b): 0 1 5 13 29 61 93 125 (4 bits), or floats of 3 bits exponent and 4 bits fraction (8 bits). They lie
  closer together towards zero, and zero is zero. The scale is the block's largest magnitude over the largest of them.
* An unsigned moment has codes that are floats of ``FRACTION`` bits of fraction, in units of the block's largest number:
  the largest code is 1, and the others are the floats next below it. None is zero, for Adam divides by the root of this
  moment. What is smaller than the smallest is raised to it.
* A block of zeros has scale 0 and decodes to zeros.

Arithmetic is IEEE float32, one rounding for each operation, in the order written here; nothing is contracted, and
scalars are rounded to float32 first. Random
bits are a hash of a key, which the caller makes of the seed, the parameter and the step, and of the number's index in
its parameter: no state, the same on every backend, and the same in a resumed run.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_optim.kernels.reference import pack, packed_bytes, unpack

BLOCK = 128
# Every d is a power of two, so that coding divides without rounding.
LINES = {
    4: ((1, 0), (4, 3), (8, 11), (16, 35), (32, 99)),
    8: ((1, 0), (2, 32), (4, 128), (8, 384), (16, 1024), (32, 2560), (64, 6144)),
}
FRACTION = {4: 1, 8: 4}
_WORD = 0xFFFFFFFF
_SPREAD = 0x9E3779B1
_MAX = torch.finfo(torch.float32).max
_LARGE = 2.0**100


class Moment(NamedTuple):
    """A moment of a parameter as rows: float32 ``values`` [rows, n], or ``codes`` and ``scales`` of some bits."""

    bits: int  # 4, 8, or 32 for values
    values: Tensor | None = None  # float32 [rows, n]
    codes: Tensor | None = None  # uint8 [rows, packed_bytes(n, bits)]
    scales: Tensor | None = None  # float32 [rows, ceil(n / BLOCK)]


class Keys(NamedTuple):
    """For each use of random bits in one step of one parameter a number of 32 bits."""

    parameter: int
    moment: int


# ---- random bits -----------------------------------------------------------------------------------------------------


def keys(seed: int, parameter: int, step: int) -> Keys:
    """The keys of a step (counted from 1) of the parameter of this number."""
    mixed = _mix64(_mix64(_mix64(seed) ^ parameter) ^ step)
    return Keys(*(_mix64(mixed + use) & _WORD for use in range(2)))


def shifted(keys: Keys, by: int) -> Keys:
    """The keys for a part of a parameter, whose first number has the index ``by`` in it."""
    return Keys(*((key + by * _SPREAD) & _WORD for key in keys))


def _mix64(x: int) -> int:
    """The finalizer of SplitMix64."""
    word = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def random_bits(key: int, shape: torch.Size, device: torch.device) -> Tensor:
    """32 random bits for each number of a parameter [rows, n], int64: MurmurHash3's finalizer of key and index."""
    index = torch.arange(shape.numel(), device=device).view(shape) & _WORD
    x = (index * _SPREAD + key) & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


# ---- codes -----------------------------------------------------------------------------------------------------------


def largest(bits: int) -> float:
    """What the largest signed code stands for."""
    return max(d * (2.0 ** (bits - 1) - 1) - b for d, b in LINES[bits])


def encode_signed(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """float32 [rows, n] to codes and scales."""
    blocks = _blocks(x)
    # Divided by a tensor: by a number torch divides on CUDA as it multiplies with its inverse.
    scales = blocks.abs().amax(-1) / torch.tensor(largest(bits), device=x.device)
    # A scale that underflowed belongs to numbers too small to matter.
    each = scales.unsqueeze(-1)
    units = torch.where(each > 0, blocks.abs() / torch.where(each > 0, each, 1.0), 0.0)
    place = units  # where the number lies between the codes: code k is at k
    for d, b in LINES[bits][1:]:
        place = torch.minimum(place, units / d + b / d)
    codes = (place + 0.5).floor().clamp(max=2.0 ** (bits - 1) - 1).to(torch.uint8)
    codes |= (blocks < 0).to(torch.uint8) << (bits - 1)
    return _pack_blocks(codes, bits, x.shape[-1]), scales


def encode_unsigned(x: Tensor, bits: int, random: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, n], none negative, to codes and scales."""
    f = FRACTION[bits]
    blocks = _blocks(x)
    scales = blocks.amax(-1)
    each = scales.unsqueeze(-1)
    units = torch.where(each > 0, blocks / torch.where(each > 0, each, 1.0), 0.0)
    dither = _blocks(random & ((1 << (23 - f)) - 1))
    places = (units.view(torch.int32).long() + dither) >> (23 - f)
    codes = (places - _lowest(bits)).clamp(0, 2**bits - 1).to(torch.uint8)
    return _pack_blocks(codes, bits, x.shape[-1]), scales


def _lowest(bits: int) -> int:
    """Sign, exponent and fraction of code 0 as a float32 has them, such that the largest code is 1."""
    f = FRACTION[bits]
    return (127 << f) - (2**bits - 1)


def code_values(kind: str, bits: int) -> Tensor:
    """What each code stands for in units of the scale, float32 [2**bits]."""
    if kind == "unsigned":
        return ((torch.arange(2**bits) + _lowest(bits)) << (23 - FRACTION[bits])).int().view(torch.float32)
    k = torch.arange(2 ** (bits - 1), dtype=torch.float32)
    magnitudes = torch.stack([k * d - b for d, b in LINES[bits]]).amax(0)
    return torch.cat([magnitudes, -magnitudes])


def decode(moment: Moment, kind: str, n: int) -> Tensor:
    """The numbers of a moment, float32 [rows, n]: code values times scales."""
    if moment.values is not None:
        return moment.values
    assert moment.codes is not None
    assert moment.scales is not None
    values = code_values(kind, moment.bits).to(moment.codes.device)[unpack(moment.codes, moment.bits, n).int()]
    return (_blocks(values) * moment.scales.unsqueeze(-1)).flatten(-2)[..., :n]


def write(moment: Moment, kind: str, x: Tensor, key: int) -> None:
    """Put new numbers, float32 [rows, n], into a moment; the key is for those that are rounded at random."""
    if moment.values is not None:
        moment.values.copy_(x)
        return
    assert moment.codes is not None
    assert moment.scales is not None
    if kind == "signed":
        codes, scales = encode_signed(x, moment.bits)
    else:
        codes, scales = encode_unsigned(x, moment.bits, random_bits(key, x.shape, x.device))
    moment.codes.copy_(codes)
    moment.scales.copy_(scales)


def zeros(rows: int, n: int, bits: int, device: torch.device | str) -> Moment:
    """The moment before the first step."""
    if bits == 32:
        return Moment(bits, values=torch.zeros(rows, n, device=device))
    codes = torch.zeros(rows, packed_bytes(n, bits), dtype=torch.uint8, device=device)
    return Moment(bits, codes=codes, scales=torch.zeros(rows, math.ceil(n / BLOCK), device=device))


def _blocks(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _pack_blocks(codes: Tensor, bits: int, n: int) -> Tensor:
    return pack(codes.flatten(-2)[..., :n], bits)


# ---- steps -----------------------------------------------------------------------------------------------------------


def _sqrt(x: Tensor) -> Tensor:
    """The square root rounded once: torch's own in float32 is, on the CPU, MKL's, whose last bit is often another."""
    return x.double().sqrt().float()


def write_parameter(parameter: Tensor, x: Tensor, key: int | None) -> None:
    """Round x, float32 [rows, n], to the parameter's dtype; bfloat16 at random, unless the key is None."""
    if parameter.dtype == torch.bfloat16 and key is not None:
        random = random_bits(key, x.shape, x.device) & 0xFFFF
        rounded = ((x.view(torch.int32).long() + random) & ~0xFFFF).int().view(torch.float32)
        x = torch.where(x.isnan(), x, rounded)
    parameter.copy_(x)


def finite(gradient: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """sign * gradient in float32 with zeros where it is not finite; how many numbers that are, int64 [].

    What is finite ends at 2^100, for what is made of it is not to overflow.
    """
    gradient = gradient.float() * sign
    good = torch.isfinite(gradient)
    return torch.where(good, gradient.clamp(-_LARGE, _LARGE), 0.0), (~good).sum()


def _keep(moment: Moment, m: Tensor, feedback: float) -> Tensor:
    """Put a signed moment's new numbers into it; returns m + feedback e, e being what rounding takes from m."""
    write(moment, "signed", m, 0)
    return m + (m - decode(moment, "signed", m.shape[-1])) * feedback


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    mean: Moment,
    square: Moment,
    keys: Keys,
    *,
    sign: float,
    beta1: float,
    beta2: float,
    decay: float,
    step_size: float,
    root_correction: float,
    eps: float,
    feedback: float,
    stochastic: bool,
) -> Tensor:
    """AdamW on rows, in place.

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        p = decay p - step_size (m + feedback e) / (root_correction sqrt(v) + eps)

    Args:
        parameter: [rows, n], float32, bfloat16 or float16.
        gradient: [rows, n], any of these.
        sign: -1 to maximize.
        decay: 1 - lr weight_decay.
        step_size: lr / (1 - beta1^t).
        root_correction: (1 - beta2^t)^(-1/2).
        feedback: beta1 (1 - beta1^t) / (1 - beta1).
        stochastic: round bfloat16 parameters at random.

    Returns:
        How many numbers of the gradient were not finite, and counted as zero: int64 [].
    """
    n = parameter.shape[-1]
    g, bad = finite(gradient, sign)
    m = decode(mean, "signed", n) * beta1 + g * (1 - beta1)
    v = decode(square, "unsigned", n) * beta2 + g.square().clamp(max=_MAX) * (1 - beta2)
    step = _keep(mean, m, feedback)
    write(square, "unsigned", v, keys.moment)
    update = step / (_sqrt(v) * root_correction + eps)
    new = parameter.float() * decay - update * step_size
    write_parameter(parameter, new, keys.parameter if stochastic else None)
    return bad


def sgd_step(
    parameter: Tensor,
    gradient: Tensor,
    momentum_buffer: Moment,
    keys: Keys,
    *,
    sign: float,
    weight_decay: float,
    momentum: float,
    share: float,
    nesterov: bool,
    lr: float,
    feedback: float,
    stochastic: bool,
) -> Tensor:
    """SGD with momentum on rows, in place; arguments and result as of ``adamw_step``.

        g = g + weight_decay p,  m = momentum m + share g
        p = p - lr (g + momentum (m + feedback e) if nesterov else m + feedback e)

    Args:
        share: 1 - dampening; 1 in the first step.
        feedback: momentum / (1 - momentum).
    """
    n = parameter.shape[-1]
    g, bad = finite(gradient, sign)
    p = parameter.float()
    g = g + p * weight_decay
    m = (decode(momentum_buffer, "signed", n) * momentum + g * share).clamp(-_LARGE, _LARGE)
    step = _keep(momentum_buffer, m, feedback)
    update = g + step * momentum if nesterov else step
    write_parameter(parameter, p - update * lr, keys.parameter if stochastic else None)
    return bad


def adagrad_step(
    parameter: Tensor,
    gradient: Tensor,
    sum: Moment,
    keys: Keys,
    *,
    sign: float,
    weight_decay: float,
    step_size: float,
    eps: float,
    stochastic: bool,
) -> Tensor:
    """Adagrad on rows, in place; arguments and result as of ``adamw_step``.

    g = g + weight_decay p,  s = s + g^2,  p = p - step_size g / (sqrt(s) + eps)
    """
    n = parameter.shape[-1]
    g, bad = finite(gradient, sign)
    p = parameter.float()
    g = g + p * weight_decay
    s = (decode(sum, "unsigned", n) + g.square()).clamp(max=_MAX)
    write(sum, "unsigned", s, keys.moment)
    write_parameter(parameter, p - g / (_sqrt(s) + eps) * step_size, keys.parameter if stochastic else None)
    return bad


class Step(NamedTuple):
    """One step of one parameter: which rule, and its arguments."""

    rule: str  # "adamw", "sgd" or "adagrad"
    parameter: Tensor  # [rows, n], contiguous
    gradient: Tensor  # [rows, n], contiguous
    moments: tuple[Moment, ...]
    keys: Keys
    settings: dict[str, Any]  # the keywords of the rule


def take(steps: Sequence[Step]) -> list[Tensor]:
    """Take every step, in place; for each how many numbers of its gradient were not finite."""
    rules: dict[str, Callable[..., Tensor]] = {"adamw": adamw_step, "sgd": sgd_step, "adagrad": adagrad_step}
    return [rules[s.rule](s.parameter, s.gradient, *s.moments, s.keys, **s.settings) for s in steps]
