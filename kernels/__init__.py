"""The codec's arithmetic. Everything above calls these names; which backend runs is decided here and nowhere else."""

from lowbit_optim.kernels.first_order import take as take_steps
from lowbit_optim.kernels.reference import dequantize_blockwise, packed_bytes, quantize_blockwise

__all__ = ["dequantize_blockwise", "packed_bytes", "quantize_blockwise", "take_steps"]
