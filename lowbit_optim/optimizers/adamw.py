"""AdamW with moments of 32, 8 or 4 bits."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim.optimizers.first_order import FirstOrder, Group


class AdamW(FirstOrder, torch.optim.AdamW):
    r"""AdamW (Loshchilov and Hutter 2019) with moments of few bits.

    .. math::

        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        w \leftarrow (1 - \eta \lambda) w - \eta \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    At ``bits`` 8 or 4 both moments are codes of that size, one float32 scale for every 128 numbers of a row of the
    (first dim, rest) view: 2.06 or 1.06 bytes a parameter in the place of 8. An average that moves by less than half a
    code in a step would stay where it is for ever if it were rounded to the nearest code and no more. What rounding
    takes from m therefore goes into the step at once, with the weight :math:`\eta \beta_1 / (1 - \beta_1)` that it
    would have had in all later ones together; and v is rounded up or down at random, such that the mean is right. v has
    no code for zero, which would divide by epsilon.

    At ``bits=32``, for float64 parameters, and for parameters with fewer than ``min_quant_size`` numbers or rows under
    32 (biases, norms), this is torch's own AdamW with its state and options; its state dict can be loaded. bfloat16 and
    float16 parameters have their moments in float32 then, and take steps in float32 (but with amsgrad, capturable or
    differentiable torch's own).

    Parameters may be DTensors whose rows are divided among ranks (``fully_shard``, HSDP): moments are DTensors placed
    as they are, and codes and parameters have the same bits on any number of ranks, so that a run may go on, through
    ``torch.distributed.checkpoint``, on another. All ranks count numbers that are not finite together, in one small
    collective of a step. Columns are not divided (RowwiseParallel), nor rows that tensor parallelism has divided before
    FSDP; with ``bits=32`` a float32 parameter may be placed in any way that torch's own step takes.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate. Default 1e-3.
        betas: decay of the moments. Default (0.9, 0.999).
        eps: epsilon. Default 1e-8.
        weight_decay: lambda, decoupled. Default 0.01.
        amsgrad: only with ``bits=32``. Default False.
        bits: of each number of a moment: 32, 8 or 4. Default 8.
        min_quant_size: a parameter with fewer numbers keeps moments of 32 bits. Default 4096.
        seed: of rounding at random, which depends on it, on the parameter's place in the groups and on its step: a
            resumed run is the same bit for bit. Default 0.
        stochastic_rounding: round bfloat16 parameters at random, so that small steps are not lost. Default True.
        maximize, foreach, capturable, differentiable, fused: of torch's AdamW; capturable and differentiable only with
            ``bits=32``.

    Raises:
        ValueError: bits that a moment cannot have, or an option that needs ``bits=32``.

    Example:
        >>> import torch
        >>> from lowbit_optim import AdamW, state_bytes
        >>> model = torch.nn.Linear(64, 64, bias=False)
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, bits=4)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> state_bytes(optimizer)["moments"] / model.weight.numel()
        1.0
    """

    rule: ClassVar[str] = "adamw"
    moments: ClassVar[dict[str, str]] = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        bits: int = 8,
        min_quant_size: int = 4096,
        seed: int = 0,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._construct(params, locals())

    def _rule_settings(self, group: Group, count: int) -> dict[str, Any]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        return {
            "beta1": beta1,
            "beta2": beta2,
            "decay": 1 - lr * group["weight_decay"],
            "step_size": lr / (1 - beta1**count),
            "root_correction": (1 - beta2**count) ** -0.5,
            "eps": group["eps"],
            # Later steps, in which what is fed back is lacking, are not corrected for the bias as this one is.
            "feedback": beta1 * (1 - beta1**count) / (1 - beta1),
        }
