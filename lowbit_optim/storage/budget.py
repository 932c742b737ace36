"""What ``bits`` and ``storage`` mean: from the budget that a user thinks in to the form that a factor is kept in.

``bits`` counts code bits per element of each stored n x n matrix. A symmetric matrix spends them on one triangle, so at
bits=4 its codes have 8 bits; eigenvectors are a full square and have codes of ``bits`` bits. A spiked matrix spends
fewer than 4 on fewer eigenvectors of 4-bit codes.
"""

from typing import Any

import torch

from lowbit_optim.storage.blockwise import Codec, Quantization
from lowbit_optim.storage.cholesky import Cholesky
from lowbit_optim.storage.eigen import Eigen, Reflectors, Rows
from lowbit_optim.storage.factors import Dense, Direct, Factor
from lowbit_optim.storage.root import Logarithm, Root
from lowbit_optim.storage.spiked import Spiked
from lowbit_optim.storage.symmetric import Symmetric

_FORMS: dict[str, type[Factor]] = {
    "dense": Dense,
    "direct": Direct,
    "eigen": Eigen,
    "reflector": Eigen,
    "cholesky": Cholesky,
    "cholesky-feedback": Cholesky,
    "root": Root,
    "logarithm": Logarithm,
    "spiked": Spiked,
}
STORAGES = tuple(_FORMS)
ONE_PERIOD = tuple(name for name, kind in _FORMS.items() if kind.one_period)  # statistic and root are one

# Of the tables with a zero, which dead units need, those of least error. From 6 bits on fitting gains little.
_TRIANGLE: dict[float, Codec] = {
    16: torch.float32,
    8: torch.bfloat16,
    4: Quantization(8, "linear", 64, double=True),
    3: Quantization(6, "linear", 64, double=True),
    2: Quantization(4, "nf", 64, double=True, scale="fitted"),
    1.5: Quantization(3, "nf", 64, double=True, scale="fitted"),
    1: Quantization(2, "nf", 64, double=True, scale="fitted"),
}
_SQUARE: dict[float, Codec] = {
    16: torch.bfloat16,
    8: Quantization(8, "linear", 64, double=True),
    4: Quantization(4, "nf", 64, double=True, scale="fitted"),
    3: Quantization(3, "nf", 64, double=True, scale="fitted"),
}
# Codes of 4 bits in "root" triangles are chosen together: finer ones gain little, and fewer bits did not train better.
_ROOT = _TRIANGLE | {2: Quantization(4, "nf", 64, double=True, scale="fitted", rounding="adaptive")}
BITS = (32, *_TRIANGLE)
_SPIKES = _SQUARE[4]  # of a spiked matrix under 4 bits, which has bits / 4 of its eigenvectors

# beta where None is given, if not 0.95. Each update rounds the average again, and that has to be forgotten, too.
_DECAY: dict[float, float] = {1: 0.8}


def basis_vectors(basis: str, bits: float, quantization: Quantization | None, quantized: bool) -> Rows | Reflectors:
    """How an eigenbasis is kept: "reflector" spends ``bits`` on one triangle, "eigen" on the square.

    Raises:
        ValueError: an unknown basis, or bits that "eigen" cannot have.
    """
    if basis not in ("reflector", "eigen"):
        raise ValueError(f"unknown basis {basis!r}; the bases are reflector, eigen")
    if basis == "eigen" and not quantization and bits != 32 and bits not in _SQUARE:
        raise ValueError(f"basis 'eigen' cannot have {bits} bits: give bits=3 or more, or basis='reflector'")
    codecs = _TRIANGLE if basis == "reflector" else _SQUARE
    codec = (quantization or codecs[bits]) if quantized and bits != 32 else None
    return Reflectors(codec) if basis == "reflector" and bits != 32 else Rows(codec)


def form(
    storage: str,
    bits: float,
    quantization: Quantization | None,
    layout: str,
    quantized: bool,
    *,
    decay: float | None = 0.95,
    rectify_update: int = 1,
    rectify_root: int = 4,
    orthogonal_iterations: int = 1,
    **shared: Any,
) -> Factor:
    """The form of one factor.

    Args:
        storage: one of ``STORAGES``.
        bits: one of ``BITS``; 32 is ``Dense`` whatever the storage.
        quantization: how codes are made, in the place of what ``bits`` says (unless that is 32).
        layout: "triangle" or "square": what is kept of symmetric matrices.
        quantized: False keeps the form but no codes: numbers stay in at least float32, as small factors do.
        decay: of ``Factor``; None is what suits the bits, and 0.95 without codes or with given ones.
        rectify_update, rectify_root, orthogonal_iterations: of ``Eigen``.
        **shared: the keywords of ``Factor``.

    Raises:
        ValueError: an unknown storage, bits or layout, or bits or a layout that the storage cannot have.
    """
    if storage not in STORAGES:
        raise ValueError(f"unknown storage {storage!r}; the storages are {', '.join(STORAGES)}")
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}; it must be one of {', '.join(map(str, BITS))}")
    if storage == "dense" and bits != 32:
        raise ValueError(f"storage 'dense' holds 32 bits, not {bits}; 'root' holds every smaller number")
    if storage == "eigen" and not quantization and bits != 32 and bits not in _SQUARE:
        raise ValueError(
            f"storage 'eigen' cannot keep eigenvectors in {bits} bits: give bits=3 or more, or storage='root'"
        )
    if layout == "square" and storage.startswith(("reflector", "cholesky", "spiked")):
        raise ValueError(f"storage {storage!r} keeps no squares: leave layout='square' out, or take storage='eigen'")
    if decay is None:
        decay = _DECAY.get(bits, 0.95) if quantized and not quantization else 0.95
    shared["decay"] = decay
    adaptive = quantization is not None and quantization.rounding == "adaptive" and bits != 32
    if adaptive and (storage != "root" or layout != "triangle"):
        raise ValueError(
            f"storage {storage!r} in layout {layout!r} cannot round adaptively: take rounding='nearest', or "
            "storage='root' in triangles"
        )
    codecs = _SQUARE if layout == "square" else _ROOT if storage == "root" else _TRIANGLE
    if not quantization and bits != 32 and bits not in codecs:
        raise ValueError(
            f"layout {layout!r} cannot keep a matrix in {bits} bits: give bits=3 or more, or layout='triangle'"
        )
    triangle = (quantization or _TRIANGLE.get(bits)) if quantized else None
    symmetric = Symmetric((quantization or codecs.get(bits)) if quantized else None, layout)
    if bits == 32:
        return Dense(**shared)
    if storage == "eigen":
        rows = Rows((quantization or _SQUARE[bits]) if quantized else None)
        rectifications: Any = {"rectify_update": rectify_update, "rectify_root": rectify_root}
        return Eigen(vectors=rows, codec=symmetric, iterations=orthogonal_iterations, **rectifications, **shared)
    if storage == "reflector":
        none: Any = {"rectify_update": 0, "rectify_root": 0}
        return Eigen(vectors=Reflectors(triangle), codec=symmetric, iterations=orthogonal_iterations, **none, **shared)
    if storage.startswith("cholesky"):
        return Cholesky(codec=Symmetric(triangle), feedback=storage == "cholesky-feedback", **shared)
    if storage == "spiked" and quantized:
        vectors = quantization or (_SQUARE[bits] if bits >= 4 else _SPIKES)
        return Spiked(vectors=vectors, share=min(1.0, bits / 4), **shared)
    if storage == "spiked":  # a small matrix is kept whole, and takes least as a triangle
        storage = "root"
    one_matrix: Any = _FORMS[storage]
    return one_matrix(codec=symmetric, **shared)
