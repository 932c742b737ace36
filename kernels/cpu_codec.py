"""The codec on the CPU, compiled by numba: the functions of ``reference``, which specifies it, with the same bits."""

from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from lowbit_optim.kernels import reference
from lowbit_optim.kernels.cpu import NO_CODES, NO_SCALES, Array, bits_of, pieces, run
from lowbit_optim.kernels.cpu_decode import (
    RUN,
    STRIP,
    dequantize_rows,
    dequantize_triangles,
    row_scratch,
    strip_scratch,
)
from lowbit_optim.kernels.cpu_encode import (
    FRACTIONS,
    NO_CELLS,
    NO_LIMITS,
    ROWS,
    SQUARE,
    TRIANGLE,
    Cells,
    cells_of,
    limits_of,
    quantize,
    scratch,
)
from lowbit_optim.kernels.reference import SCALE_GROUP, packed_bytes

JOB = 1 << 18  # numbers that a thread takes at a time, about
LAYOUTS = {"square": SQUARE, "triangle": TRIANGLE}
NO_DIAGONAL, NO_HALVES, NO_PAIRS = np.empty(0, np.float32), np.empty(0, np.uint16), np.empty(0, np.uint64)


def quantize_blockwise(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.quantize_blockwise`` of contiguous float32 or bfloat16 on the CPU."""
    if _cells_for(boundaries, bits) is None:
        return reference.quantize_blockwise(x, values, boundaries, bits, block_size, fitted, double)
    return _parts(x, x.shape[:1], ROWS, values, boundaries, bits, block_size, fitted, double)


def quantize_symmetric(
    x: Tensor, values: Tensor, boundaries: Tensor, bits: int, block_size: int, fitted: bool, double: bool, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.quantize_symmetric`` of contiguous float32 or bfloat16 on the CPU."""
    if _cells_for(boundaries, bits) is None:
        return reference.quantize_symmetric(x, values, boundaries, bits, block_size, fitted, double, layout)
    lead = x.shape[:1] if layout == "triangle" else x.shape[:2]
    return _parts(x, lead, LAYOUTS[layout], values, boundaries, bits, block_size, fitted, double)


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
    """``reference.dequantize_blockwise`` of contiguous tensors on the CPU, in float32 or bfloat16."""
    out = codes.new_empty((codes.shape[0], n), dtype=dtype) if out is None else out
    parts = _coded(codes, scales, maxima, values)
    _rows(parts, NO_DIAGONAL, ROWS, (bits, block_size, maxima.shape[-1] > 0, n), out)
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
    """``reference.dequantize_symmetric`` of contiguous tensors on the CPU, in float32 or bfloat16."""
    k, n = diagonal.shape
    out = codes.new_empty((k, n, n), dtype=dtype) if out is None else out
    parts, entries = _coded(codes, scales, maxima, values), diagonal.detach().float().view(-1).numpy()
    double = maxima.shape[-1] > 0
    if layout == "square":
        _rows(parts, entries, SQUARE, (bits, block_size, double, n), out)
        return out
    how = bits, block_size, double, n * (n - 1) // 2
    job = partial(dequantize_triangles, parts, entries, n, how, _target(out))
    jobs = [partial(job, *piece) for piece in pieces(k * -(-n // STRIP), max(1, JOB // (STRIP * max(n, 1))))]
    run(jobs, partial(strip_scratch, n))
    return out


def _cells_for(boundaries: Tensor, bits: int) -> Cells | None:
    return cells_of(boundaries.numpy().tobytes()) if bits > 4 else NO_CELLS


def _parts(
    x: Tensor,
    lead: torch.Size,
    layout: int,
    values: Tensor,
    boundaries: Tensor,
    bits: int,
    block_size: int,
    fitted: bool,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and maxima of rows of this leading shape."""
    n = x.shape[-1]
    length = n * (n - 1) // 2 if layout == TRIANGLE else n
    blocks = -(-length // block_size)
    groups = -(-blocks // SCALE_GROUP)
    edges = boundaries.numpy()
    cells = _cells_for(boundaries, bits)
    assert cells is not None
    limits, multiples = limits_of(values.numpy().tobytes(), edges.tobytes()) if fitted else NO_LIMITS
    codes = x.new_empty((*lead, packed_bytes(length, bits)), dtype=torch.uint8)
    scales = x.new_empty((*lead, blocks), dtype=torch.uint8 if double else torch.float32)
    maxima = x.new_empty((*lead, groups if double else 0), dtype=torch.float32)
    scale_arrays = _scales(scales)
    job = partial(
        quantize,
        bits_of(x.detach()),
        layout,
        n,
        length,
        (bits, block_size, fitted, double),
        (edges, tuple(cells), FRACTIONS, limits, multiples),
        codes.view(-1).numpy(),
        *scale_arrays,
        maxima.view(-1).numpy(),
    )
    per_job = max(1, JOB // max(1, min(length, SCALE_GROUP * block_size)))
    run([partial(job, *piece) for piece in pieces(lead.numel() * groups, per_job)], scratch)
    return codes, scales, maxima


def _rows(parts: tuple[Array, ...], diagonal: Array, layout: int, how: tuple[int, int, bool, int], out: Tensor) -> None:
    n = how[3]
    job = partial(dequantize_rows, parts, diagonal, layout, how, _target(out))
    runs = out.numel() // max(n, 1) * -(-n // RUN)
    jobs = [partial(job, *piece) for piece in pieces(runs, max(1, JOB // max(1, min(n, RUN))))]
    run(jobs, row_scratch)


def _target(out: Tensor) -> tuple[bool, Array, Array]:
    """Whether it is float32, and its numbers as such or as the bits of bfloat16."""
    if out.dtype == torch.float32:
        return True, out.view(-1).numpy(), NO_HALVES
    return False, NO_SCALES, out.view(-1).view(torch.uint16).numpy()


def _coded(codes: Tensor, scales: Tensor, maxima: Tensor, values: Tensor) -> tuple[Array, ...]:
    """What ``_decode`` reads."""
    table = values.numpy()
    return codes.view(-1).numpy(), *_scales(scales), maxima.view(-1).numpy(), table, _pairs_of(table.tobytes())


@lru_cache(maxsize=64)
def _pairs_of(table: bytes) -> Array:
    """What each byte of two 4-bit codes says, as 64 bits, from the float32 values; nothing of other tables."""
    values, byte = np.frombuffer(table, np.float32), np.arange(256)
    if len(values) != 16:
        return NO_PAIRS
    return np.stack([values[byte & 15], values[byte >> 4]], -1).view(np.uint64).ravel()


def _scales(scales: Tensor) -> tuple[Array, Array]:
    """Those in float32 and those of 8 bits, of which only one are there."""
    array = scales.view(-1).numpy()
    return (NO_SCALES, array) if scales.dtype == torch.uint8 else (array, NO_CODES)
