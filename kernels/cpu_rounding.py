"""Rounding of whole matrices on the CPU, compiled by numba: ``rounding.descend``, with the same bits."""

from functools import partial
from typing import Any

from numpy import float32 as f32
from numpy import uint8 as u8
from torch import Tensor

from lowbit_optim.kernels.cpu import Scratch, kernel, run


def descend(
    codes: Tensor,
    kept: Tensor,
    scales: Tensor,
    r: Tensor,
    weight: Tensor,
    values: Tensor,
    boundaries: Tensor,
    block_size: int,
    sweeps: int,
) -> None:
    """``rounding.descend`` of contiguous tensors on the CPU, a matrix per thread."""
    tables = values.numpy(), boundaries.numpy()
    arrays = [tensor.detach().numpy() for tensor in (codes, kept, scales, r, weight)]
    run([partial(_matrix, tuple(a[i] for a in arrays), tables, block_size, sweeps) for i in range(len(codes))], _none)


def _none() -> Scratch:
    return ()


@kernel
def _matrix(arrays: Any, tables: Any, block_size: int, sweeps: int, scratch: Any) -> int:
    codes, kept, scales, r, weight = arrays
    values, boundaries = tables
    n = len(weight)
    for _ in range(sweeps):
        place = 0
        for i in range(n):
            for j in range(i):
                scale, old = scales[place // block_size], kept[place]
                steep = f32(weight[i, i] + weight[j, j])
                if scale > f32(0) and steep > f32(0):
                    quotient = f32(f32(old - f32(f32(r[i, j] + r[j, i]) / steep)) / scale)
                    code = 0
                    for b in range(len(boundaries)):
                        code += quotient > boundaries[b]
                    new = f32(values[code] * scale)
                    change = f32(new - old)
                    if change != f32(0):
                        codes[place], kept[place] = u8(code), new
                        for column in range(n):
                            r[i, column] += f32(change * weight[j, column])
                        for column in range(n):
                            r[j, column] += f32(change * weight[i, column])
                place += 1
    return 0
