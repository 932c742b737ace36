"""What the numba kernels share: how they are compiled, what they read and write, and the threads that run them.

A block of numbers at a time is staged through buffers that stay in the first-level cache, by short loops over all of
the block that LLVM turns into vector instructions. For their sake integers are cast back to 32 bits after every
operation (numba computes in 64). Without ``fastmath`` every operation rounds as IEEE 754 says.

Threads are those of an executor: numba's own abort in a forked child, or when two threads call them at once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numpy import float32 as f32
from numpy import uint8 as u8
from numpy import uint32 as u32
from numpy.typing import NDArray
from torch import Tensor

from lowbit_optim.kernels.threads import executor

Array = NDArray[Any]
Scratch = tuple[Array, ...]
Job = Callable[[Scratch], int]

NO_BITS, NO_CODES, NO_SCALES = np.empty(0, u32), np.empty(0, u8), np.empty(0, f32)


def kernel(function: Callable[..., Any], forceinline: bool = False) -> Any:
    """Compiled at the first call, and kept on disk where numba finds a place for it.

    What is kept is compiled anew when the kernel's own file changes: touch it when what it inlines from another does.

    ``_nrt=False``: nothing is allocated, and arrays are not counted as references, which at every slice and call costs
    more than the arithmetic of a block.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "forceinline": forceinline}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # "no locator available": a read-only install
        return numba.njit(**options)(function)


inline = partial(kernel, forceinline=True)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@inline
def widen(numbers: Array, shift: int, out: Array) -> None:
    """Bits of float32 (shift 0) or bfloat16 (16) to float32."""
    for i in range(len(numbers)):
        out[i] = f32(u32(u32(numbers[i]) << u32(shift & 31)).view(f32))


@inline
def narrow(x: Array, shift: int, stochastic: bool, random: Array, numbers: Array) -> None:
    """float32 to bits of float32 (shift 0) or bfloat16 (16), rounded at random or to the nearest, ties to even."""
    if shift == 0:
        for i in range(len(numbers)):
            numbers[i] = f32(x[i]).view(u32)
    else:
        for i in range(len(numbers)):
            bits = u32(f32(x[i]).view(u32))
            nearest = u32(u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))
            rounding = u32(random[i] & u32(0xFFFF)) if stochastic else nearest
            rounded = u32(u32(bits + rounding) >> u32(16))
            numbers[i] = rounded if x[i] == x[i] else u32(0x7FC0)  # the sum would make some NaN infinite or zero


def bits_of(x: Tensor) -> tuple[int, Array]:
    """The bits that are missing to float32, and the numbers' own, as a kernel takes them."""
    if x.dtype == torch.bfloat16:
        return 16, x.view(-1).view(torch.uint16).numpy()
    return 0, x.float().view(-1).view(torch.uint32).numpy()


# ---- threads ---------------------------------------------------------------------------------------------------------


def pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of pieces of this size of so many things."""
    return ((first, min(first + size, count)) for first in range(0, count, size))


def run(jobs: Sequence[Job], scratch: Callable[[], Scratch]) -> list[int]:
    """Do jobs on torch's number of threads, this one among them; each thread makes itself one ``scratch``.

    Returns:
        What each job returned.
    """
    left = deque(enumerate(jobs))
    results = [0] * len(jobs)
    helpers = min(torch.get_num_threads(), len(jobs)) - 1
    futures = [executor().submit(_work, left, results, scratch) for _ in range(helpers)]
    try:
        _work(left, results, scratch)
    finally:  # nobody writes when this returns, whatever happened
        left.clear()
        for future in futures:
            if not future.cancel():
                future.result()
    return results


def _work(left: deque[tuple[int, Job]], results: list[int], scratch: Callable[[], Scratch]) -> None:
    own = scratch()
    while True:
        try:
            number, job = left.popleft()
        except IndexError:
            return
        results[number] = job(own)
