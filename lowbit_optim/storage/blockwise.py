"""A tensor as packed codes and block scales: one small class that says how, and no tensor subclass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_optim import kernels
from lowbit_optim.kernels.reference import SCALE_GROUP, computed_in
from lowbit_optim.linalg import full_precision
from lowbit_optim.storage.codebooks import cell_errors, codebook, table

# Rows shorter than this keep their numbers: the scale and the padding would cost more than the codes save.
MIN_ROW = 32

SCALES = ("absmax", "fitted")
ROUNDINGS = ("nearest", "adaptive")
SWEEPS = 3  # of adaptive rounding; the first does most

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Quantization:
    """How numbers become codes: the nearest table value to x / s, with one scale s per block of a row.

    Args:
        bits: bits per code: 2, 3, 4, 6 or 8. Default 4.
        codebook: the table's name, one of ``storage.codebooks.CODEBOOKS``. Default "linear-2", the paper's.
        block_size: numbers of a row that share a scale, a power of two from 16 to 4096. Default 64.
        double: keep the scales in 8 bits, each 256 of a row sharing one float32; else in float32. Default False.
        scale: "absmax", the block's largest magnitude, or "fitted", the fraction of it that leaves the least squared
            error. Default "absmax".
        rounding: "nearest", each number to the nearest code, or "adaptive", those of a symmetric matrix together, so
            that its product with what it is applied to comes out right: the triangles of storage "root" only. It takes
            as many bytes. Default "nearest".

    Raises:
        ValueError: a value outside of these.

    Example:
        >>> import torch
        >>> from lowbit_optim import Quantization
        >>> quantization = Quantization(bits=4, codebook="linear", block_size=16)
        >>> x = torch.tensor([[7.0, -3.0, 0.4, 0.0]])
        >>> parts = quantization.encode(x)
        >>> quantization.decode(parts, 4)
        tensor([[ 7., -3.,  0.,  0.]])
    """

    bits: int = 4
    codebook: str = "linear-2"
    block_size: int = 64
    double: bool = False
    scale: str = "absmax"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        codebook(self.codebook, self.bits)  # refuses unknown names and bits
        if self.block_size not in (16 << k for k in range(9)):
            raise ValueError(f"block_size is {self.block_size!r}; it must be a power of two from 16 to 4096")
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}; the scales are {', '.join(SCALES)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"unknown rounding {self.rounding!r}; the roundings are {', '.join(ROUNDINGS)}")
        if not isinstance(self.double, bool):
            raise ValueError(f"double is {self.double!r}; it must be True or False")

    def encode(self, x: Tensor) -> Parts:
        """Quantize along the last dim.

        Args:
            x: floating [..., n], finite. float64 is divided and compared in float64, every other dtype in float32.

        Returns:
            "codes" uint8 [..., ceil(n * bits / 8)], "scales" float32 [..., blocks]; with ``double`` the scales are
            uint8 and "scale_maxima" float32 [..., ceil(blocks / 256)] stands beside them.

        Example:
            >>> import torch
            >>> from lowbit_optim import Quantization
            >>> quantization = Quantization(bits=4, codebook="linear", block_size=16)
            >>> parts = quantization.encode(torch.ones(2, 40))
            >>> {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
            {'codes': (torch.uint8, (2, 20)), 'scales': (torch.float32, (2, 3))}
        """
        rows = _codable(x).reshape(x.shape[:-1].numel(), x.shape[-1])
        parts = self._named(kernels.quantize_blockwise(rows, *self._how(rows)))
        return {name: part.reshape(*x.shape[:-1], part.shape[-1]) for name, part in parts.items()}

    def encode_symmetric(self, x: Tensor, layout: str, weight: Tensor | None = None) -> Parts:
        """Quantize what is off the diagonal of symmetric matrices.

        Args:
            x: floating [k, n, n], finite.
            layout: "triangle" or "square", as of ``Symmetric``.
            weight: W, symmetric positive semidefinite [k, n, n]: with adaptive rounding and layout "triangle" the codes
                are those that make tr(E W E) small, E being what they are off. Default None: each is the nearest.

        Returns:
            The parts that ``encode`` makes of rows [k, n (n - 1) / 2] ("triangle") or [k, n, n] ("square").

        Example:
            >>> import torch
            >>> from lowbit_optim import Quantization
            >>> quantization = Quantization(bits=4, codebook="linear", block_size=16)
            >>> x = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
            >>> parts = quantization.encode_symmetric(x, "triangle")
            >>> {name: tuple(part.shape) for name, part in parts.items()}
            {'codes': (1, 1), 'scales': (1, 1)}
        """
        x = _codable(x)
        parts = kernels.quantize_symmetric(x, *self._how(x), layout)
        if weight is not None and self.rounding == "adaptive" and layout == "triangle":
            tables = table(self.codebook, self.bits, torch.float32, x.device)
            with full_precision():
                codes = kernels.round_triangles(x, weight, *parts, *tables, self.bits, self.block_size, SWEEPS)
            parts = (codes, *parts[1:])
        return self._named(parts)

    def decode(self, parts: Parts, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that ``encode`` kept.

        Args:
            parts: what ``encode`` returned.
            n: numbers in a row, which packed codes do not tell.
            dtype: float32, float64 or bfloat16. Default float32.

        Returns:
            [..., n] in ``dtype``.

        Example:
            >>> import torch
            >>> from lowbit_optim import Quantization
            >>> quantization = Quantization(bits=4, codebook="linear", block_size=16)
            >>> parts = quantization.encode(torch.tensor([7.0, 0.6]))
            >>> quantization.decode(parts, 2)
            tensor([7., 1.])
        """
        return self._look_up(
            parts, n, table(self.codebook, self.bits, computed_in(dtype), parts["codes"].device).values, dtype
        )

    def decode_symmetric(
        self, parts: Parts, diagonal: Tensor, layout: str, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """The matrices that ``encode_symmetric`` kept the rest of.

        Args:
            parts: what ``encode_symmetric`` returned.
            diagonal: [k, n].
            layout: that they were encoded in.
            dtype: float32, float64 or bfloat16.
            out: [k, n, n] in ``dtype``, to be written and returned instead of a new tensor. Default None.

        Returns:
            [k, n, n] in ``dtype``.

        Example:
            >>> import torch
            >>> from lowbit_optim import Quantization
            >>> quantization = Quantization(bits=4, codebook="linear", block_size=16)
            >>> x = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
            >>> parts = quantization.encode_symmetric(x, "triangle")
            >>> quantization.decode_symmetric(parts, x.diagonal(dim1=1, dim2=2), "triangle", torch.float32)
            tensor([[[2., 7.],
                     [7., 3.]]])
        """
        values = table(self.codebook, self.bits, computed_in(dtype), diagonal.device).values
        coded = self._split(parts)
        return kernels.dequantize_symmetric(*coded, diagonal, values, self.bits, self.block_size, layout, dtype, out)

    def rounding_error(self, parts: Parts, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """How far ``decode`` is off, estimated: the root mean square of each number's error, [..., n] in ``dtype``.

        It is that of numbers spread evenly over the cells of their codes.

        Args:
            parts, n, dtype: as for ``decode``; dtype float32 or float64.

        Example:
            >>> import torch
            >>> from lowbit_optim import Quantization
            >>> quantization = Quantization(bits=4, codebook="linear", block_size=16)
            >>> parts = quantization.encode(torch.tensor([7.0, 3.4]))
            >>> quantization.rounding_error(parts, 2)
            tensor([0.2887, 0.2887])
        """
        return self._look_up(parts, n, cell_errors(self.codebook, self.bits, dtype, parts["codes"].device), dtype)

    def _look_up(self, parts: Parts, n: int, values: Tensor, dtype: torch.dtype) -> Tensor:
        """For each code its entry of ``values``, times the scale, [..., n] in ``dtype``."""
        lead = parts["codes"].shape[:-1]
        codes, scales, maxima = (part.reshape(lead.numel(), part.shape[-1]) for part in self._split(parts))
        rows = kernels.dequantize_blockwise(codes, scales, maxima, values, self.bits, self.block_size, n, dtype)
        return rows.reshape(*lead, n)

    def _how(self, x: Tensor) -> tuple[Tensor, Tensor, int, int, bool, bool]:
        """The arguments that say how x becomes codes."""
        tables = table(self.codebook, self.bits, computed_in(x.dtype), x.device)
        return *tables, self.bits, self.block_size, self.scale == "fitted", self.double

    def _named(self, parts: tuple[Tensor, Tensor, Tensor]) -> Parts:
        codes, scales, maxima = parts
        return {"codes": codes, "scales": scales} | ({"scale_maxima": maxima} if self.double else {})

    def _split(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and maxima."""
        codes, scales = parts["codes"], parts["scales"]
        maxima = parts["scale_maxima"] if self.double else scales.new_empty((*codes.shape[:-1], 0), dtype=torch.float32)
        return codes, scales, maxima

    def zeros(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Parts:
        """The parts of zeros (a zero scale decodes to zeros whatever the codes are).

        Args:
            shape: of the numbers, [..., n].
            device: of the parts. Default the CPU.

        Example:
            >>> from lowbit_optim import Quantization
            >>> parts = Quantization(bits=4, codebook="linear", block_size=16).zeros((2, 40))
            >>> {name: tuple(part.shape) for name, part in parts.items()}
            {'codes': (2, 20), 'scales': (2, 3)}
        """
        *lead, n = shape
        blocks = -(-n // self.block_size)
        scale_dtype = torch.uint8 if self.double else torch.float32
        parts = {
            "codes": torch.zeros(*lead, kernels.packed_bytes(n, self.bits), dtype=torch.uint8, device=device),
            "scales": torch.zeros(*lead, blocks, dtype=scale_dtype, device=device),
        }
        if self.double:
            parts["scale_maxima"] = torch.zeros(*lead, -(-blocks // SCALE_GROUP), device=device)
        return parts


def _codable(x: Tensor) -> Tensor:
    """x in a dtype that kernels take: bfloat16 as it is, others in at least float32."""
    return x if x.dtype == torch.bfloat16 else x.to(torch.promote_types(x.dtype, torch.float32))


# How numbers are kept: as codes, rounded to a dtype, or as they are in at least float32.
Codec = Quantization | torch.dtype | None


def encode(x: Tensor, codec: Codec) -> Parts:
    """Floating [..., n] to the parts of a ``Quantization``, or to "values" of a dtype."""
    if isinstance(codec, Quantization):
        return codec.encode(x)
    return {"values": x.to(codec or torch.promote_types(x.dtype, torch.float32), copy=True)}


def decode(parts: Parts, codec: Codec, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What ``encode`` kept of rows of n numbers, [..., n] in ``dtype`` (float32 or float64)."""
    if isinstance(codec, Quantization):
        return codec.decode(parts, n, dtype)
    return parts["values"].to(dtype)


def rounding_error(parts: Parts, codec: Codec, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """How far ``decode`` is off, estimated: the root mean square of each number's error, [..., n] in ``dtype``."""
    if isinstance(codec, Quantization):
        return codec.rounding_error(parts, n, dtype)
    x = parts["values"].to(dtype)
    if codec is None:
        return torch.zeros_like(x)
    spacing = torch.exp2(torch.frexp(x).exponent - 1.0) * torch.finfo(codec).eps
    return torch.where(x == 0, 0.0, spacing / 12**0.5)


def zeros(shape: Sequence[int], codec: Codec, dtype: torch.dtype, device: torch.device | str = "cpu") -> Parts:
    """The parts of zeros of ``shape``; ``dtype`` is what ``encode`` would be given."""
    if isinstance(codec, Quantization):
        return codec.zeros(shape, device)
    return {"values": torch.zeros(shape, dtype=codec or torch.promote_types(dtype, torch.float32), device=device)}


def encode_tensor(x: Tensor, codec: Codec) -> Parts:
    """Encode a tensor of any shape along the rows of its (first dim, rest) view.

    Rows under 32 numbers, and so every 1-D tensor, stay in at least float32, whatever the codec is.

    Args:
        x: floating, of any shape, finite.
        codec: a ``Quantization``; a dtype to round to; None for at least float32.

    Returns:
        The parts of ``Quantization.encode``, or "values" in the dtype; two-dimensional, with a row for each row.

    Example:
        >>> import torch
        >>> from lowbit_optim.storage import Quantization, encode_tensor
        >>> parts = encode_tensor(torch.ones(4, 8, 8), Quantization(bits=4))
        >>> {name: tuple(part.shape) for name, part in parts.items()}
        {'codes': (4, 32), 'scales': (4, 1)}
    """
    count, length = rows_of(x.shape)
    return encode(x.reshape(count, length), codec if length >= MIN_ROW else None)


def decode_tensor(parts: Parts, codec: Codec, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that ``encode_tensor`` kept.

    Args:
        parts: what ``encode_tensor`` returned.
        codec: that it was given.
        shape: of the tensor.
        dtype: float32 or float64. Default float32.

    Returns:
        The numbers, of ``shape`` in ``dtype``.

    Example:
        >>> import torch
        >>> from lowbit_optim.storage import Quantization, decode_tensor, encode_tensor
        >>> x = torch.ones(4, 8, 8)
        >>> parts = encode_tensor(x, Quantization(bits=4))
        >>> torch.equal(decode_tensor(parts, Quantization(bits=4), x.shape), x)
        True
    """
    length = rows_of(shape)[1]
    return decode(parts, codec if length >= MIN_ROW else None, length, dtype).reshape(shape)


def rows_of(shape: torch.Size) -> tuple[int, int]:
    """Rows and their length in the (first dim, rest) view; sharding the first dim never changes a row."""
    return (shape[0], shape[1:].numel()) if shape else (1, 1)
