"""Shampoo over any first-order optimizer, with its factors in low-bit storage."""

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lowbit_optim.optimizers.second_order import SecondOrder, keywords
from lowbit_optim.preconditioners.buckets import Bucket
from lowbit_optim.preconditioners.kronecker import KroneckerPreconditioner, Statistics
from lowbit_optim.presets import DEFAULT_BITS
from lowbit_optim.storage import Quantization

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShampooPreconditioner(KroneckerPreconditioner):
    """Gupta, Koren, Singer 2018, with moving averages in the place of sums."""

    def statistics(self, part: Bucket, start: int, stop: int, gradient: Tensor, magnitude: Tensor) -> Statistics:
        return (gradient @ gradient.mT, magnitude), (gradient.mT @ gradient, magnitude)


class Shampoo(SecondOrder):
    r"""Shampoo with low-bit factors in front of a first-order optimizer.

    For each matrix block G of a parameter's gradient, with :math:`\beta` = ``shampoo_beta``, p = ``root_power``:

    .. math::

        L \leftarrow \beta L + (1 - \beta) G G^T, \quad R \leftarrow \beta R + (1 - \beta) G^T G, \quad
        \hat G = L^{-1/p} G R^{-1/p}, \quad \tilde G = \hat G \, \|G\|_F / \|\hat G\|_F

    with L and R divided by :math:`1 - \beta^t` after t statistics, as Adam's moments are,
    and :math:`\tilde G` takes the gradient's place in the base optimizer. The norms are those of the whole parameter.
    A parameter is viewed as a (first dim, rest) matrix without its dims of size 1; parameters of rank 0 or 1, and
    groups with ``precondition=False``, get the base optimizer alone. Gradients are preconditioned in place.
    Parameters may be float32, bfloat16 or float16, whose factors are worked on in float32, or float64.

    Every keyword can be set per param group. What says how state is kept (bits, storage, quantization, layout,
    max_preconditioner_dim, min_quant_size, root_power) must stay as it is once a parameter has taken a step.
    ``state_dict()`` holds plain tensors and numbers under flat names.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate, handed to the base. Default 1e-3.
        base: "adamw", "sgd", "adagrad" or a ``torch.optim.Optimizer`` class. Default "adamw".
        base_bits: of each number of the base's moments: 32 (torch's own optimizer), or 8 or 4 (:class:`AdamW`,
            :class:`SGD` or :class:`Adagrad` of this library). Default 32.
        bits: code bits per element of each stored n x n matrix: 32, 16, 8, 4, 3, 2, 1.5 or 1. A symmetric matrix spends
            them on one triangle, "spiked" under 4 on so many eigenvectors fewer. 32 keeps everything dense in float32
            (float64 for float64 parameters). Default 2.
        storage: what is kept of a factor: "root" (only the inverse root, which is the statistic as well), "logarithm"
            (only the logarithm: steadier at few bits, dearer in every step), "spiked" (a bits/4 part of the
            eigenvectors, the rest flat: for 1 bit), "eigen" (the paper's rectified
            eigenvectors; 3 bits and more), "reflector" (eigenvectors as Householder reflectors), "cholesky" and
            "cholesky-feedback" (a Cholesky factor, without and with error feedback), "direct" (the matrices
            themselves), "dense" (bits=32). Default "root".
        quantization: a ``Quantization`` that says how codes are made, instead of ``bits`` (unless bits is 32).
        layout: "triangle" or "square" (the paper's; 3 bits and more): what is kept of a symmetric matrix. Default
            "triangle".
        precondition: False leaves the group to the base optimizer. Default True.
        max_preconditioner_dim: longer sides are split into equal blocks. Default 1200.
        min_quant_size: a factor with fewer elements keeps its form, but in float32. Default 4096.
        statistics_frequency: steps between statistics updates (T1). Default 100.
        precondition_frequency: steps between root updates (T2). Storages "root", "logarithm" and "spiked" have one
            period, ``statistics_frequency``, and take None or that number only (with bits=32 any). Default None: that
            period for them, else 500. The first root comes with the first such step: until then the base runs alone.
        start_preconditioning_step: before this step of a parameter the base optimizer runs alone. Default 1.
        shampoo_beta: decay of the statistics. Default None: 0.95, but 0.8 for factors in codes of bits=1, for what
            rounding leaves in an average has to decay, too.
        matrix_eps: ridge relative to a factor's largest eigenvalue. Default 1e-6.
        initial_scale: factors start as this times I, and are not divided by 1 - beta^t; at 0, the default, they start
            with the first statistic that is not zero.
        statistic_limit: a statistic with tr(M) > statistic_limit max(tr(A), tr(M before it)) is scaled down to tr(A),
            so that one spike does not own A (not with an initial_scale). Default 4.
        root_power: p of the exponent -1/p. Default 4.
        rectify_update, rectify_root: Björck iterations t1, t2 of storage "eigen". Default 1, 4.
        orthogonal_iterations: QR iterations per update of storage "eigen". Default 1.
        graft: give the preconditioned gradient the norm of the gradient. Default True.
        apply_dtype: "bfloat16" applies roots to gradients in bfloat16; statistics and roots are computed as without it.
            Default None: float32 (float64 for float64 parameters).
        stagger: let blocks take turns: each updates its factors at a step of its own of the ``statistics_frequency``
            steps, so that no step does the work of all. For storages "root", "logarithm" and "spiked".
            Default False.
        workspace: bytes of temporary tensors to aim at. Default 256 MiB.
        process_group: processes that train with equal gradients (DDP) and share the work: each block's factors are on
            one of them. Then ``state_dict()`` and ``load_state_dict()`` are for all of them together. Default None:
            every process by itself; parameters that are DTensors (FSDP2) bring their processes along.
        replicate: True: every process of the group has all factors, and does all the work. Default False.
        shards: of parameters that are DTensors: "whole" cuts blocks from whole parameters and brings their gradients
            together where their factors are; results do not depend on the number of processes. "local" cuts them from
            each process's own shard, and nothing but norms is exchanged. Default "whole".
        exchange_dtype: "bfloat16" sends gradients and results to other processes in bfloat16. Default None: as they
            are worked on.
        **base_kwargs: options of the base optimizer (betas, weight_decay, momentum, ...).

    Raises:
        ValueError: a setting outside its range, or two that exclude each other.
        TypeError: a keyword that neither Shampoo nor its base knows; complex parameters; at ``step``, sparse gradients.

    Example:
        >>> import torch
        >>> from lowbit_optim import Shampoo
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Shampoo(model.named_parameters(), lr=1e-3, weight_decay=0.05, statistics_frequency=10)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.stats()["weight"]["treatment"]
        'Shampoo: 64 x 64, root, 2 bits'
    """

    preconditioner_class: ClassVar[type[ShampooPreconditioner]] = ShampooPreconditioner

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        *,
        base: str | type[Optimizer] = "adamw",
        base_bits: int = 32,
        bits: float = DEFAULT_BITS,
        storage: str = "root",
        quantization: Quantization | None = None,
        layout: str = "triangle",
        precondition: bool = True,
        max_preconditioner_dim: int = 1200,
        min_quant_size: int = 4096,
        statistics_frequency: int = 100,
        precondition_frequency: int | None = None,
        start_preconditioning_step: int = 1,
        shampoo_beta: float | None = None,
        matrix_eps: float = 1e-6,
        initial_scale: float = 0.0,
        statistic_limit: float = 4.0,
        root_power: int = 4,
        rectify_update: int = 1,
        rectify_root: int = 4,
        orthogonal_iterations: int = 1,
        graft: bool = True,
        apply_dtype: str | None = None,
        stagger: bool = False,
        workspace: int = 256 * 2**20,
        process_group: "ProcessGroup | None" = None,
        replicate: bool = False,
        shards: str = "whole",
        exchange_dtype: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, self.preconditioner_class(), keywords(locals()), base, base_kwargs)
