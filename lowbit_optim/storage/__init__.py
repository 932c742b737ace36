"""Low-bit storage of tensors and of Kronecker factors. It knows no optimizer."""

from lowbit_optim.storage.blockwise import Quantization, decode_tensor, encode_tensor
from lowbit_optim.storage.codebooks import CODEBOOKS, codebook
from lowbit_optim.storage.symmetric import Symmetric

__all__ = ["CODEBOOKS", "Quantization", "Symmetric", "codebook", "decode_tensor", "encode_tensor"]
