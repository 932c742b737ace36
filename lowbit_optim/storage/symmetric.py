"""A symmetric matrix as a full-precision diagonal and its packed off-diagonal part."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_optim.kernels.reference import computed_in, lower
from lowbit_optim.storage.blockwise import Codec, Parts, Quantization, decode, encode, rounding_error, zeros

LAYOUTS = ("triangle", "square")


@dataclass(frozen=True)
class Symmetric:
    """How a batch of symmetric matrices [k, n, n] is kept.

    Args:
        codec: how the off-diagonal part is kept: a ``Quantization``, a floating dtype that it is rounded to, or None
            for at least float32.
        layout: "triangle" keeps the strict lower triangle as one row of n (n - 1) / 2 numbers. "square" keeps every
            off-diagonal number, row by row (the paper's way: twice the bytes, and each half has scales of its own, so
            that what comes back is only nearly symmetric). Default "triangle".
        correlations: code x_ij / sqrt(x_ii x_jj) in the place of x_ij, for positive definite matrices. It costs no
            bytes, since the diagonal is kept anyway, and spares the small rows of a matrix whose rows differ in scale,
            which share blocks with large ones. For study. Default False.

    Raises:
        ValueError: an unknown layout.

    Example:
        >>> import torch
        >>> from lowbit_optim.storage import Quantization, Symmetric
        >>> how = Symmetric(Quantization(bits=4, codebook="linear", block_size=16))
        >>> x = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
        >>> parts = how.encode(x)
        >>> sorted(parts)
        ['codes', 'diagonal', 'scales']
        >>> torch.equal(how.decode(parts), x)
        True
    """

    codec: Codec = None
    layout: str = "triangle"
    correlations: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; the layouts are {', '.join(LAYOUTS)}")

    @property
    def adaptive(self) -> bool:
        """Whether ``encode`` rounds by a weight."""
        coded = isinstance(self.codec, Quantization) and self.codec.rounding == "adaptive"
        return coded and self.layout == "triangle" and not self.correlations

    def encode(self, x: Tensor, weight: Tensor | None = None) -> Parts:
        """Symmetric [k, n, n], finite, float32 or float64, to "diagonal" [k, n] and the parts of the rest.

        The diagonal is float32, or of x's dtype where codec is None.

        Args:
            x: the matrices.
            weight: as for ``Quantization.encode_symmetric``. Default None.

        Example:
            >>> import torch
            >>> from lowbit_optim.storage import Quantization, Symmetric
            >>> how = Symmetric(Quantization(bits=4, codebook="linear", block_size=16))
            >>> x = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
            >>> {name: (part.dtype, tuple(part.shape)) for name, part in how.encode(x).items()}
            {'diagonal': (torch.float32, (1, 2)), 'codes': (torch.uint8, (1, 1)), 'scales': (torch.float32, (1, 1))}
        """
        diagonal = x.diagonal(dim1=-2, dim2=-1).to(self._diagonal_dtype(x.dtype), copy=True)
        if isinstance(self.codec, Quantization) and not self.correlations:
            return {"diagonal": diagonal, **self.codec.encode_symmetric(x, self.layout, weight)}
        if self.correlations:
            x = x / _scales(diagonal, x.dtype)
        if self.layout == "triangle":
            rest = x.flatten(-2)[:, lower(x.shape[-1], x.device)]
        else:
            rest = x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))
        return {"diagonal": diagonal, **encode(rest, self.codec)}

    def decode(self, parts: Parts, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The matrices [k, n, n] that ``encode`` kept, in ``dtype`` (float32, float64 or bfloat16).

        Args:
            parts: what ``encode`` returned.
            out: [k, n, n] in ``dtype``, to be written and returned instead of a new tensor. Default None.

        Example:
            >>> import torch
            >>> from lowbit_optim.storage import Quantization, Symmetric
            >>> how = Symmetric(Quantization(bits=4, codebook="linear", block_size=16))
            >>> x = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
            >>> how.decode(how.encode(x))
            tensor([[[2., 7.],
                     [7., 3.]]])
        """
        diagonal = parts["diagonal"]
        if isinstance(self.codec, Quantization) and not self.correlations:
            return self.codec.decode_symmetric(parts, diagonal, self.layout, dtype, out)
        rest = decode(parts, self.codec, self._row(diagonal.shape[-1]), computed_in(dtype))
        whole = self._whole(rest, diagonal.to(rest.dtype), diagonal.to(rest.dtype)).to(dtype)
        return whole if out is None else out.copy_(whole)

    def rounding_error(self, parts: Parts) -> Tensor:
        """How far ``decode`` is off, estimated: the error's Frobenius norm relative to that of the matrix, [k].

        It is that of the nearest codes. What was rounded by a weight is farther off by this norm: at 2 to 4 bits one to
        two times, and more where few eigenvalues differ from the rest.

        Args:
            parts: what ``encode`` returned.

        Example:
            >>> import torch
            >>> from lowbit_optim.storage import Quantization, Symmetric
            >>> how = Symmetric(Quantization(bits=4, codebook="linear", block_size=16))
            >>> x = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
            >>> bool(how.rounding_error(how.encode(x)) < 0.1)
            True
        """
        diagonal = parts["diagonal"].float()
        error = rounding_error(parts, self.codec, self._row(diagonal.shape[-1]))
        error = self._whole(error, diagonal, torch.zeros_like(diagonal)).norm(dim=(1, 2))
        whole = self.decode(parts).norm(dim=(1, 2))
        return error / torch.where(whole > 0, whole, 1.0)

    def identity(self, k: int, n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Parts:
        """The parts of k identity matrices of order n.

        Args:
            k, n: how many, and their order.
            dtype: what ``encode`` would be given.
            device: of the parts. Default the CPU.

        Example:
            >>> import torch
            >>> from lowbit_optim.storage import Quantization, Symmetric
            >>> how = Symmetric(Quantization(bits=4, codebook="linear", block_size=16))
            >>> torch.equal(how.decode(how.identity(1, 2, torch.float32)), torch.eye(2)[None])
            True
        """
        shape = (k, self._row(n)) if self.layout == "triangle" else (k, n, n)
        diagonal = torch.ones(k, n, dtype=self._diagonal_dtype(dtype), device=device)
        return {"diagonal": diagonal, **zeros(shape, self.codec, dtype, device)}

    def _row(self, n: int) -> int:
        """Numbers in a row of codes."""
        return n * (n - 1) // 2 if self.layout == "triangle" else n

    def _whole(self, rest: Tensor, scaling: Tensor, diagonal: Tensor) -> Tensor:
        """Symmetric matrices from their coded rest, with this diagonal; ``scaling`` is the one that is kept, [k, n]."""
        n = diagonal.shape[-1]
        if self.layout == "triangle":
            rest = rest.new_zeros(len(rest), n * n).index_copy_(1, lower(n, rest.device), rest).unflatten(1, (n, n))
            rest = rest + rest.mT
        if self.correlations:
            rest = rest * _scales(scaling, rest.dtype)
        return rest.diagonal_scatter(diagonal, dim1=-2, dim2=-1)

    def _diagonal_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.codec else dtype


def _scales(diagonal: Tensor, dtype: torch.dtype) -> Tensor:
    """sqrt(x_ii x_jj), [k, n, n]; 1 in the rows of a number that is not positive."""
    root = torch.where(diagonal > 0, diagonal, 1.0).to(dtype).sqrt()
    return root.unsqueeze(-1) * root.unsqueeze(-2)
