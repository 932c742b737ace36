"""The codec's and the first-order steps' arithmetic. Which backend runs is decided here and nowhere else.

The codec's five functions are operators of torch, ``torch.ops.lowbit.*``, through which torch.compile traces;
``reference`` and ``rounding`` specify them. Numba serves the CPU and Triton CUDA and ROCm, in float32 and less; the
reference, which gives the same bits, serves what is left. The environment variable LOWBIT_BACKEND, "reference", "numba"
or "triton", forces one. (Whole matrices are rounded number by number, which is no work for a GPU: they visit the CPU.)
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowbit_optim.kernels import reference, rounding
from lowbit_optim.kernels.first_order import Step
from lowbit_optim.kernels.reference import SCALE_GROUP, packed_bytes

__all__ = [
    "Step",
    "dequantize_blockwise",
    "dequantize_symmetric",
    "packed_bytes",
    "quantize_blockwise",
    "quantize_symmetric",
    "round_triangles",
    "take_steps",
]

if __name__ != "lowbit_optim.kernels":  # by a library that looks for another `kernels`, from the repository's root
    raise ImportError("this package is lowbit_optim.kernels; it registers its operators once")

# ---- which backend ---------------------------------------------------------------------------------------------------

# The modules of each backend: imported when they are first needed, for compilers take a second.
BACKENDS = {
    "reference": {"codec": "reference", "rounding": "rounding", "steps": "first_order"},
    "numba": {"codec": "cpu_codec", "rounding": "cpu_rounding", "steps": "cpu_steps"},
    "triton": {"codec": "gpu_codec", "rounding": "cpu_rounding", "steps": "gpu"},
}
DEVICES = {"cpu": "numba", "cuda": "triton", "meta": "reference"}
LOW = (torch.float32, torch.bfloat16, torch.float16)


@cache
def forced() -> str | None:
    """What LOWBIT_BACKEND names; None if it is not set."""
    name = os.environ.get("LOWBIT_BACKEND") or None
    if name not in (None, *BACKENDS):
        raise ValueError(f"LOWBIT_BACKEND is {name!r}; the backends are {', '.join(BACKENDS)}")
    return name


@cache
def backend(work: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that does some work ("codec", "rounding" or "steps") on a device in the dtype of its numbers.

    Raises:
        ValueError: LOWBIT_BACKEND is no backend.
        RuntimeError: it names one that cannot do this.
    """
    name = forced()
    if name is None or device.type == "meta":  # where there is nothing to compute
        name = DEVICES.get(device.type)
        reason = "there are no kernels for it" if name is None else _obstacle(name, device)
        if reason:
            _warn(device.type, reason)
        if name is None or reason or dtype not in LOW:
            name = "reference"
    elif reason := _obstacle(name, device, dtype):
        raise RuntimeError(f"LOWBIT_BACKEND={name} cannot serve {device.type} in {dtype}: {reason}")
    try:
        return import_module(f"lowbit_optim.kernels.{BACKENDS[name][work]}")
    except ImportError as error:  # of numba, of triton
        if forced():
            raise RuntimeError(f"LOWBIT_BACKEND={name} cannot serve {device.type}: {error}") from error
        _warn(device.type, str(error))
    return import_module(f"lowbit_optim.kernels.{BACKENDS['reference'][work]}")


def _obstacle(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Why a backend cannot serve a device; "" if it can."""
    if name == "reference":
        return ""
    if dtype not in LOW:
        return "it computes in float32; unset LOWBIT_BACKEND or take 'reference'"
    if name == "numba" and device.type != "cpu":
        return "numba serves the CPU; unset LOWBIT_BACKEND or take 'reference'"
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU Triton runs in its interpreter only, with TRITON_INTERPRET=1 in the environment"
    if name == "triton" and device.type not in ("cpu", "cuda"):
        return "our Triton kernels serve CUDA and ROCm; unset LOWBIT_BACKEND or take 'reference'"
    if name == "triton" and device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"Triton wants a GPU of compute capability 8.0 or more, and this one has {major}.{minor}"
    return ""


@cache
def _warn(device: str, reason: str) -> None:
    """Once for each device and reason."""
    logging.getLogger("lowbit_optim").warning("the plain torch reference runs on %s, slowly: %s", device, reason)


# ---- first-order steps -----------------------------------------------------------------------------------------------


@torch._disable_dynamo  # as torch.compiler.disable, without importing the compiler now
def take_steps(steps: Sequence[Step]) -> list[Tensor]:
    """Take every step, in place; for each how many numbers of its gradient were not finite, int64 []."""
    batches: dict[ModuleType, list[int]] = {}
    for i, step in enumerate(steps):
        batches.setdefault(backend("steps", step.parameter.device, step.parameter.dtype), []).append(i)
    bad: dict[int, Tensor] = {}
    for module, batch in batches.items():
        bad.update(zip(batch, module.take([steps[i] for i in batch]), strict=True))
    # What backends write torch has not seen.
    increment_version(
        [x for s in steps for x in (s.parameter, *(t for m in s.moments for t in m[1:])) if x is not None]
    )
    return [bad[i] for i in range(len(steps))]


# ---- the codec: the functions ----------------------------------------------------------------------------------------


def quantize_blockwise(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of numbers to packed codes and scales: ``reference.quantize_blockwise``, on the backend of x."""
    return _quantize_blockwise(x, values, boundaries, bits, block_size, fitted, double)


def quantize_symmetric(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What is off the diagonal of matrices to packed codes and scales: ``reference.quantize_symmetric``."""
    return _quantize_symmetric(x, values, boundaries, bits, block_size, fitted, double, layout)


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
    """The inverse of ``quantize_blockwise``, [rows, n] in ``dtype``: ``reference.dequantize_blockwise``.

    Raises:
        ValueError: ``out`` has another shape or dtype.
    """
    out = _out(codes, (codes.shape[0], n), dtype, out)
    _dequantize_blockwise(codes, scales, maxima, values, bits, block_size, out)
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
    """The inverse of ``quantize_symmetric``, [k, n, n] in ``dtype``: ``reference.dequantize_symmetric``.

    Raises:
        ValueError: ``out`` has another shape or dtype.
    """
    out = _out(codes, (*diagonal.shape, diagonal.shape[-1]), dtype, out)
    _dequantize_symmetric(codes, scales, maxima, diagonal, values, bits, block_size, layout, out)
    return out


def round_triangles(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    maxima: Tensor,
    values: Tensor,
    boundaries: Tensor,
    bits: int,
    block_size: int,
    sweeps: int,
) -> Tensor:
    """Codes of symmetric matrices that make tr(E W E) small, E their error: see ``rounding``.

    Args:
        x: floating [k, n, n], finite; counts as float32.
        weight: W, symmetric positive semidefinite, floating [k, n, n].
        codes, scales, maxima: what ``quantize_symmetric`` made of x in layout "triangle"; codes to start from.
        values, boundaries: float32. They, bits and block_size are as for ``quantize_symmetric``.
        sweeps: over all numbers.

    Returns:
        New codes for the same scales, uint8 of the shape of ``codes``.
    """
    return _round_triangles(x, weight, codes, scales, maxima, values, boundaries, bits, block_size, sweeps)


def _out(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        return like.new_empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; what is decoded is {dtype} {list(shape)}")
    return out


# ---- the codec: the operators ----------------------------------------------------------------------------------------


@torch.library.custom_op("lowbit::quantize_blockwise", mutates_args=())
def _quantize_blockwise(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    codec = backend("codec", x.device, x.dtype)
    codes, scales, maxima = codec.quantize_blockwise(
        x.contiguous(), values, boundaries, bits, block_size, fitted, double
    )
    return codes, scales, maxima


@torch.library.custom_op("lowbit::quantize_symmetric", mutates_args=())
def _quantize_symmetric(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    codec = backend("codec", x.device, x.dtype)
    codes, scales, maxima = codec.quantize_symmetric(
        x.contiguous(), values, boundaries, bits, block_size, fitted, double, layout
    )
    return codes, scales, maxima


@torch.library.custom_op("lowbit::round_triangles", mutates_args=())
def _round_triangles(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    maxima: Tensor,
    values: Tensor,
    boundaries: Tensor,
    bits: int,
    block_size: int,
    sweeps: int,
) -> Tensor:
    x, weight = x.float(), weight.float().contiguous()
    rows = x.shape[-1] * (x.shape[-1] - 1) // 2
    kept = dequantize_blockwise(codes, scales, maxima, values, bits, block_size, rows, torch.float32)
    if maxima.shape[-1]:
        scales = reference.dequantize_scales(scales, maxima)
    chosen = reference.unpack(codes, bits, rows)
    r = rounding.residual(x, kept, weight)
    new = chosen.to("cpu", copy=True, memory_format=torch.contiguous_format)  # codes of 8 bits are the argument's own
    others = [t.cpu().contiguous() for t in (kept, scales, r, weight, values, boundaries)]
    backend("rounding", codes.device, torch.float32).descend(new, *others, block_size, sweeps)
    return reference.pack(new, bits).to(codes.device)


@torch.library.custom_op("lowbit::dequantize_blockwise", mutates_args=("out",))
def _dequantize_blockwise(
    codes: Tensor, scales: Tensor, maxima: Tensor, values: Tensor, bits: int, block_size: int, out: Tensor
) -> None:
    codec, whole = backend("codec", out.device, out.dtype), _written(out)
    parts = codes.contiguous(), scales.contiguous(), maxima.contiguous()
    codec.dequantize_blockwise(*parts, values, bits, block_size, out.shape[-1], whole.dtype, whole)
    if whole is not out:
        out.copy_(whole)


@torch.library.custom_op("lowbit::dequantize_symmetric", mutates_args=("out",))
def _dequantize_symmetric(
    codes: Tensor,
    scales: Tensor,
    maxima: Tensor,
    diagonal: Tensor,
    values: Tensor,
    bits: int,
    block_size: int,
    layout: str,
    out: Tensor,
) -> None:
    codec, whole = backend("codec", out.device, out.dtype), _written(out)
    parts = codes.contiguous(), scales.contiguous(), maxima.contiguous(), diagonal.contiguous()
    codec.dequantize_symmetric(*parts, values, bits, block_size, layout, whole.dtype, whole)
    if whole is not out:
        out.copy_(whole)


def _written(out: Tensor) -> Tensor:
    """What a backend writes for ``out``: contiguous, and not in float16, whose own rounding is torch's."""
    dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
    return out if out.is_contiguous() and out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)


# ---- the codec: without numbers, on the meta device and while torch.compile traces ---------------------------------


@_quantize_blockwise.register_fake
def _(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_parts(x, x.shape[:-1], x.shape[-1], bits, block_size, double)


@_quantize_symmetric.register_fake
def _(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    k, n = x.shape[0], x.shape[-1]
    if layout == "triangle":
        return _empty_parts(x, (k,), n * (n - 1) // 2, bits, block_size, double)
    return _empty_parts(x, (k, n), n, bits, block_size, double)


@_round_triangles.register_fake
def _(x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, maxima: Tensor, *how: object) -> Tensor:
    return torch.empty_like(codes)


@_dequantize_blockwise.register_fake
@_dequantize_symmetric.register_fake
def _(*arguments: object) -> None:
    return


def _empty_parts(
    like: Tensor, lead: Sequence[int], n: int, bits: int, block_size: int, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and maxima for rows of n numbers."""
    blocks = -(-n // block_size)
    groups = -(-blocks // SCALE_GROUP) if double else 0
    codes = like.new_empty((*lead, packed_bytes(n, bits)), dtype=torch.uint8)
    scales = like.new_empty((*lead, blocks), dtype=torch.uint8 if double else torch.float32)
    return codes, scales, like.new_empty((*lead, groups), dtype=torch.float32)
