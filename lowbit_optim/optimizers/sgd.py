"""SGD with a momentum of 32, 8 or 4 bits."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim import shards
from lowbit_optim.optimizers.first_order import FirstOrder, Group


class SGD(FirstOrder, torch.optim.SGD):
    r"""SGD with a momentum of few bits.

    With :math:`\mu` = ``momentum`` and :math:`\tau` = ``dampening``, which the first step does not have:

    .. math::

        g \leftarrow g + \lambda w, \quad m \leftarrow \mu m + (1 - \tau) g, \quad
        w \leftarrow w - \eta \, (g + \mu m \text{ with nesterov, else } m)

    At ``bits`` 8 or 4 the momentum is codes of that size, 1.03 or 0.53 bytes a parameter, and what rounding takes from
    it goes into the step at once, as :class:`AdamW` describes; which parameters keep 32 bits, and how bfloat16 ones are
    rounded, is said there, too.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate. Default 1e-3.
        momentum, dampening, weight_decay: default 0.
        nesterov: default False.
        bits, min_quant_size, seed, stochastic_rounding: as for :class:`AdamW`.
        maximize, foreach, differentiable, fused: of torch's SGD; differentiable only with ``bits=32``.

    Raises:
        ValueError: bits that a moment cannot have, or an option that needs ``bits=32``.

    Example:
        >>> import torch
        >>> from lowbit_optim import SGD, state_bytes
        >>> model = torch.nn.Linear(64, 64, bias=False)
        >>> optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9, bits=4)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> state_bytes(optimizer)["moments"] / model.weight.numel()
        0.5
    """

    rule: ClassVar[str] = "sgd"
    moments: ClassVar[dict[str, str]] = {"momentum_buffer": "signed"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        bits: int = 8,
        min_quant_size: int = 4096,
        seed: int = 0,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._construct(params, locals())

    def kept(self, group: Mapping[str, Any]) -> dict[str, str]:
        return self.moments if group["momentum"] else {}

    def check_state(self, index: int, parameter: Tensor, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """As of every optimizer, but that a buffer may be there or not: the momentum may come and go."""
        there = any(key.startswith("momentum_buffer") for key in own)
        super().check_state(index, parameter, {**group, "momentum": float(there)}, own)

    def create(self, parameter: Tensor, group: Group) -> dict[str, Any]:
        own = super().create(parameter, group)
        for key, (shape, dtype) in self.layout(parameter, group).items():
            if key not in own:  # the momentum was 0 before
                own[key] = shards.zeros(shape, dtype, parameter)
        return own

    def _rule_settings(self, group: Group, count: int) -> dict[str, Any]:
        momentum = group["momentum"]
        return {
            "weight_decay": group["weight_decay"],
            "momentum": momentum,
            "share": 1 - group["dampening"] if momentum and count > 1 else 1.0,
            "nesterov": bool(group["nesterov"]),
            "lr": group["lr"],
            "feedback": momentum / (1 - momentum) if momentum < 1 else 0.0,
        }
