"""SOAP: Adam in the eigenbases of Shampoo's factors, with factors and bases in low-bit storage."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack
from lowbit_optim.kernels.first_order import keys
from lowbit_optim.linalg import full_precision
from lowbit_optim.optimizers.first_order import moment_form
from lowbit_optim.optimizers.second_order import SecondOrder, keywords
from lowbit_optim.optimizers.shampoo import ShampooPreconditioner
from lowbit_optim.preconditioners.buckets import Due, Forms
from lowbit_optim.preconditioners.eigenbases import EigenbasisPreconditioner
from lowbit_optim.preconditioners.kronecker import Group, Root, working_dtype
from lowbit_optim.storage import Quantization

State = dict[Tensor, dict[str, Any]]


class SOAPPreconditioner(EigenbasisPreconditioner, ShampooPreconditioner):
    """Turns gradients into the eigenbases, turns steps back, and lets the bases follow the statistics."""

    def blocking(self, parameter: Tensor, group: Group) -> Blocking | None:
        """One block: moments live in the eigenbasis, which padding would not fit."""
        cut = super().blocking(parameter, group)
        return cut if cut is not None and cut.count == 1 else None

    def _due(self, step: int, group: Group, forms: Forms) -> Due:
        """The first gradient makes the bases; they turn after the base's step: see ``finish``."""
        return Due(step == 1 or step % group["statistics_frequency"] == 0, False, True)

    def apply(self, left: Root, gradient: Tensor, right: Root, temporary: Tensor) -> tuple[Tensor, list[Tensor]]:
        torch.bmm(left[0].mT, gradient, out=temporary)
        return torch.bmm(temporary, right[0], out=gradient), []

    @torch.no_grad()
    def finish(self, groups: list[Group], state: State, kept: dict[Tensor, Tensor | None]) -> None:
        """After the base's step: steps are turned back and added, and bases turn where that is due.

        Args:
            kept: of each unit what its parameter was before; None after its first gradient.
        """
        with full_precision():
            places = [(parameter, group) for group in groups for parameter in group["params"]]
            for index, (parameter, group) in enumerate(places):
                if parameter in kept:
                    self._finish(index, parameter, group, state[parameter], kept[parameter])

    def _finish(self, index: int, parameter: Tensor, group: Group, state: dict[str, Any], kept: Tensor | None) -> None:
        cut, dtype, steps = self.blocking(parameter, group), working_dtype(parameter), int(state["step"])
        assert cut is not None
        forms, stack = self.forms(group, cut), Stack([state], [1])
        old = [basis.clone() for basis in forms.roots(stack, 0, 1, dtype)]  # not those that turn
        if kept is not None:
            step = old[0] @ cut.split(parameter).to(dtype) @ old[1].mT
            decayed = kept * (1 - group["lr"] * group["weight_decay"])
            parameter.copy_(decayed + cut.merge(step).to(parameter.dtype))
        if kept is not None and steps % group["precondition_frequency"]:
            return
        orders = [self._turn(side, form, stack, dtype, kept is None) for side, form in forms.sides()]
        if kept is None:
            return
        left, right = (n.mT @ o for n, o in zip(forms.roots(stack, 0, 1, dtype), old, strict=True))
        key = keys(group.get("seed", 0), ~index, steps).moment  # other random bits than those of AdamW's own step
        mean, square = (moment_form(parameter, group, kind) for kind in ("signed", "unsigned"))
        turned = left @ cut.split(mean.read("base.exp_avg", state, parameter.shape)).to(dtype) @ right.mT
        mean.write("base.exp_avg", state, cut.merge(turned), key)
        names = ["base.exp_avg_sq"] + ["base.max_exp_avg_sq"] * ("base.max_exp_avg_sq" in state)
        for name in names:
            squares = cut.split(square.read(name, state, parameter.shape))[:, orders[0]][:, :, orders[1]]
            square.write(name, state, cut.merge(squares), key)

    def _turn(self, side: str, form: Any, stack: Stack, dtype: torch.dtype, first: bool) -> Tensor:
        state, order = form.turn(stack.read(side, 0, 1), dtype, anew=first)
        stack.write(side, 0, 1, state)
        return order[0]


class SOAP(SecondOrder):
    r"""SOAP (Vyas et al. 2024) with low-bit factors and bases.

    With :math:`Q_L, Q_R` the eigenvectors of Shampoo's L and R, a matrix W of gradient G takes the step of AdamW in
    their coordinates:

    .. math::

        G' = Q_L^T G Q_R, \quad W \leftarrow (1 - \eta \lambda) W - \eta \, Q_L \frac{M'}{\sqrt{V'} + \epsilon} Q_R^T

    with M' and V' the bias-corrected moments of G'. When the bases turn, every ``precondition_frequency`` steps by one
    step of orthogonal iteration, M' is turned with them, and V' follows the order of their columns. The first gradient
    of a parameter makes its bases and no step. Parameters of rank 0 or 1, or with a side above
    ``max_preconditioner_dim``, get AdamW alone.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate. Default 3e-3.
        betas, eps, weight_decay: of AdamW. Default (0.95, 0.95), 1e-8, 0.01.
        base_bits: of each number of AdamW's moments, as for :class:`Shampoo`. Default 32.
        bits: of each stored n x n matrix, factors and bases alike. Default 4.
        storage: how factors are kept, as for :class:`Shampoo`. Default "root".
        basis: how bases are kept: "reflector" (Householder reflectors, exactly orthogonal) or "eigen" (the
            eigenvectors, rectified; 3 bits and more). Default "reflector".
        quantization, layout, precondition, min_quant_size, workspace: as for :class:`Shampoo`.
        max_preconditioner_dim: matrices with a longer side get AdamW alone. Default 10000.
        statistics_frequency: steps between statistics updates after the first. Default 1.
        precondition_frequency: steps between turns of the bases. Default 10.
        shampoo_beta: decay of the statistics. Default 0.95.
        statistic_limit: as for :class:`Shampoo`. Default none.
        rectify_basis: Björck iterations when a basis "eigen" is read. Default 4.
        **base_kwargs: other options of ``torch.optim.AdamW``.

    Raises:
        ValueError: a setting outside its range, or two that exclude each other.
        TypeError: a keyword that neither SOAP nor AdamW knows.
    """

    preconditioner: SOAPPreconditioner
    base_stands_alone: ClassVar[bool] = False  # its moments are those of turned gradients

    def __init__(
        self,
        params: Any,
        lr: Any = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        base_bits: int = 32,
        bits: float = 4,
        storage: str = "root",
        basis: str = "reflector",
        quantization: Quantization | None = None,
        layout: str = "triangle",
        precondition: bool = True,
        max_preconditioner_dim: int = 10000,
        min_quant_size: int = 4096,
        statistics_frequency: int = 1,
        precondition_frequency: int = 10,
        shampoo_beta: float = 0.95,
        statistic_limit: float = math.inf,
        rectify_basis: int = 4,
        workspace: int = 256 * 2**20,
        **base_kwargs: Any,
    ) -> None:
        settings = keywords(locals(), "betas", "eps", "weight_decay") | {"graft": False}
        base = {"betas": betas, "eps": eps, "weight_decay": weight_decay, **base_kwargs}
        super().__init__(params, SOAPPreconditioner(), settings, "adamw", base)

    def _step_base(self) -> None:
        """AdamW's step from zero, in the coordinates that its gradients have been turned into."""
        before: dict[Tensor, Tensor] = {}
        first = {}
        for parameter, group in self._parameters():
            if parameter.grad is None or self.preconditioner.blocking(parameter, group) is None:
                continue
            before[parameter] = parameter.detach().clone()
            if int(self.state[parameter]["step"]) == 1:  # a step of zero, for a state like any other afterwards
                first[parameter] = parameter.grad
                parameter.grad = torch.zeros_like(parameter.grad)
            parameter.detach().zero_()
        try:
            super()._step_base()
        except BaseException:
            for parameter, value in before.items():
                parameter.detach().copy_(value)
            raise
        finally:
            for parameter, gradient in first.items():
                parameter.grad = gradient
        for parameter in first:
            parameter.detach().copy_(before[parameter])
            self.state[parameter]["base.step"].zero_()
        kept = {parameter: None if parameter in first else value for parameter, value in before.items()}
        self.preconditioner.finish(self.param_groups, self.state, kept)
