"""Adagrad with a sum of squares of 32, 8 or 4 bits."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim import shards
from lowbit_optim.optimizers.first_order import FirstOrder, Group
from lowbit_optim.optimizers.moments import moment_form


class Adagrad(FirstOrder, torch.optim.Adagrad):
    r"""Adagrad with a sum of squares of few bits.

    .. math::

        g \leftarrow g + \lambda w, \quad s \leftarrow s + g^2, \quad
        w \leftarrow w - \frac{\eta}{1 + (t - 1) \eta_d} \, \frac{g}{\sqrt{s} + \epsilon}

    with :math:`\eta_d` = ``lr_decay``. At ``bits`` 8 or 4 the sum is codes of that size, 1.03 or 0.53 bytes a
    parameter, rounded at random, as :class:`AdamW` describes: to the nearest, what is added would soon be lost. Which
    parameters keep 32 bits, and how bfloat16 ones are rounded, is said there, too.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate. Default 1e-2.
        lr_decay, weight_decay: default 0.
        initial_accumulator_value: the sum before the first step. Default 0.
        eps: epsilon. Default 1e-10.
        bits, min_quant_size, seed, stochastic_rounding: as for :class:`AdamW`.
        foreach, maximize, differentiable, fused: of torch's Adagrad; differentiable only with ``bits=32``.

    Raises:
        ValueError: bits that a moment cannot have, or an option that needs ``bits=32``.

    Example:
        >>> import torch
        >>> from lowbit_optim import Adagrad, state_bytes
        >>> model = torch.nn.Linear(64, 64, bias=False)
        >>> optimizer = Adagrad(model.parameters(), lr=1e-3, bits=4)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> state_bytes(optimizer)["moments"] / model.weight.numel()
        0.5
    """

    rule: ClassVar[str] = "adagrad"
    moments: ClassVar[dict[str, str]] = {"sum": "unsigned"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        bits: int = 8,
        min_quant_size: int = 4096,
        seed: int = 0,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._construct(params, locals())
        self.state.clear()  # torch makes sums now, in the parameters' dtype, and those that are not there when it steps

    def create(self, parameter: Tensor, group: Group) -> dict[str, Any]:
        new = not self.state[parameter]
        own = super().create(parameter, group)
        if new and group["initial_accumulator_value"]:
            start = torch.full_like(shards.local(parameter), group["initial_accumulator_value"], dtype=torch.float32)
            moment_form(parameter, group, "unsigned").write("sum", shards.here(own), start.contiguous(), 0)
        return own

    def _rule_settings(self, group: Group, count: int) -> dict[str, Any]:
        return {
            "weight_decay": group["weight_decay"],
            "step_size": group["lr"] / (1 + (count - 1) * group["lr_decay"]),
            "eps": group["eps"],
        }
