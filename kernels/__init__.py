"""The codec's and the first-order steps' arithmetic. Which backend runs is decided here and nowhere else."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowbit_optim.kernels import first_order
from lowbit_optim.kernels.first_order import Step
from lowbit_optim.kernels.reference import dequantize_blockwise, packed_bytes, quantize_blockwise

__all__ = ["Step", "dequantize_blockwise", "packed_bytes", "quantize_blockwise", "take_steps"]

Take = Callable[[Sequence[Step]], list[Tensor]]


def take_steps(steps: Sequence[Step]) -> list[Tensor]:
    """Take every step, in place; for each how many numbers of its gradient were not finite, int64 []."""
    batches: dict[Take, list[int]] = {}
    for i, step in enumerate(steps):
        batches.setdefault(_backend(step.parameter.device.type, step.parameter.dtype), []).append(i)
    bad: dict[int, Tensor] = {}
    for take, batch in batches.items():
        bad.update(zip(batch, take([steps[i] for i in batch]), strict=True))
    # What backends write torch has not seen.
    increment_version(
        [x for s in steps for x in (s.parameter, *(t for m in s.moments for t in m[1:])) if x is not None]
    )
    return [bad[i] for i in range(len(steps))]


@cache
def _backend(device: str, dtype: torch.dtype) -> Take:
    """Imported when it is first needed: compilers take a second."""
    low = dtype in (torch.float32, torch.bfloat16, torch.float16)
    module = {"cpu": "cpu", "cuda": "gpu"}.get(device)
    if low and module:
        try:
            take: Take = import_module(f"lowbit_optim.kernels.{module}").take
            return take
        except ImportError as error:  # of numba, of triton
            logging.getLogger("lowbit_optim").warning("steps on %s are slow: %s", device, error)
    return first_order.take
