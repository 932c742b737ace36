"""What preconditioners share that work in the eigenbases of their factors."""

from typing import Any

from torch import Tensor

from lowbit_optim.preconditioners.buckets import Bucket
from lowbit_optim.preconditioners.kronecker import Group, KroneckerPreconditioner, Statistics
from lowbit_optim.storage.basis import Basis
from lowbit_optim.storage.blockwise import Quantization
from lowbit_optim.storage.budget import basis_vectors
from lowbit_optim.storage.eigen import Rows
from lowbit_optim.storage.factors import State


class EigenbasisPreconditioner(KroneckerPreconditioner):
    """Keeps a coded eigenbasis beside each factor, which stands where the factor's root would."""

    def form(self, group: Group, order: int) -> Any:
        factor = super().form(group, order)
        quantized = order * order >= group["min_quant_size"]
        quantization = Quantization(*group["quantization"]) if group["quantization"] else None
        vectors = basis_vectors(group["basis"], group["bits"], quantization, quantized)
        return Basis(order, factor, vectors, group["rectify_basis"] if isinstance(vectors, Rows) and quantized else 0)

    def dampings(
        self, part: Bucket, states: list[State], statistics: Statistics | tuple[None, None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """None: a ridge changes no eigenvector."""
        return None, None
