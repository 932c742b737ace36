"""AdaBK over any first-order optimizer, with its factors in low-bit storage."""

from typing import Any

from torch import nn

from lowbit_optim.optimizers.kfac import KFAC


class AdaBK(KFAC):
    r"""AdaBK (Yong, Sun, Zhang 2023) with low-bit factors: K-FAC's statistics under an inverse square root.

    .. math::

        \tilde G = \hat G \, \|G\|_F / \|\hat G\|_F, \quad
        \hat G = (L + \lambda \lambda_{max}(L) I)^{-1/2} \, G \, (R + \lambda \lambda_{max}(R) I)^{-1/2}

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate, handed to the base. Default 1e-3.
        model: the module whose layers they are of.
        damping: lambda. Default 0.001.
        root_power: p of the exponent -1/p. Default 2.
        **keywords: as :class:`KFAC`, which says what is raised, too.

    Example:
        >>> import torch
        >>> from lowbit_optim import AdaBK
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
        >>> optimizer = AdaBK(model.parameters(), lr=1e-3, model=model, statistics_frequency=10)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.treatments()["0.weight"]
        'AdaBK: 64 x 65, root, 2 bits'
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        *,
        model: nn.Module | None = None,
        damping: float = 1e-3,
        root_power: int = 2,
        **keywords: Any,
    ) -> None:
        super().__init__(params, lr, model=model, damping=damping, root_power=root_power, **keywords)
