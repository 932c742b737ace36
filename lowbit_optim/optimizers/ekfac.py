"""EKFAC over any first-order optimizer, with factors and eigenbases in low-bit storage."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_optim.blocking import Blocking, Stack
from lowbit_optim.linalg import each
from lowbit_optim.optimizers.kfac import KFAC, OF_THE_WHOLE, KFACPreconditioner
from lowbit_optim.optimizers.second_order import keywords
from lowbit_optim.preconditioners.buckets import Bucket, Due, Forms, Turn
from lowbit_optim.preconditioners.eigenbases import EigenbasisPreconditioner
from lowbit_optim.preconditioners.kronecker import Group
from lowbit_optim.storage import Quantization
from lowbit_optim.storage.factors import without_scale
from lowbit_optim.storage.moment import Moment

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class EKFACPreconditioner(EigenbasisPreconditioner, KFACPreconditioner):
    """George et al. 2018: Q_G (Q_G^T dW Q_A / (m + damping max m)) Q_A^T, m the second moment of Q_G^T dW Q_A."""

    form_keywords: ClassVar[dict[str, str]] = {"decay": "factor_decay"}

    def forms(self, group: Group, cut: Blocking) -> Forms:
        return super().forms(group, cut)._replace(moment=Moment(group["factor_decay"], group["damping"]))

    def precondition(
        self, part: Bucket, stack: Stack, start: int, stop: int, gradient: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The moment takes in every gradient; a unit without any bases yet stays as it is."""
        moment = part.forms.moment
        assert moment is not None
        left, right = part.forms.roots(stack, start, stop, part.dtype)
        turned = left.mT @ gradient @ right
        state = moment.update(stack.read("moment", start, stop), turned, magnitude)
        stack.write("moment", start, stop, state)
        divided, exponents = moment.divide(state, turned)
        divided, scale = without_scale(divided, divided)
        half = torch.exp2((exponents // 2).clamp(-120, 120).to(scale.dtype))  # the whole might overflow
        real = _have_bases(part)[start:stop]
        factors = [factor.where(real, 1.0) for factor in (scale, half, half)]
        return torch.where(each(real, gradient), left @ divided @ right.mT, gradient), factors

    def _due(self, step: int, group: Group, forms: Forms) -> Due:
        turn = group["precondition_frequency"] or group["statistics_frequency"]
        return Due(step % group["statistics_frequency"] == 0, step % turn == 0, True)

    def _update(self, part: Bucket, stack: Stack, turn: Turn, gradient: Tensor, magnitude: Tensor) -> Tensor:
        if not turn.refresh:
            return super()._update(part, stack, turn, gradient, magnitude)
        moment, start, stop = part.forms.moment, turn.first, turn.last
        assert moment is not None
        old = [basis.clone() for basis in part.forms.roots(stack, start, stop, part.dtype)]  # not those that turn
        failed = super()._update(part, stack, turn, gradient, magnitude)
        new = part.forms.roots(stack, start, stop, part.dtype)
        left, right = (n.mT @ o for n, o in zip(new, old, strict=True))
        stack.write("moment", start, stop, moment.turn(stack.read("moment", start, stop), left, right))
        return failed


def _have_bases(part: Bucket) -> Tensor:
    """For each block whether any block of its unit has both bases, bool [k].

    Divided and undivided blocks are in different units, and share one norm.
    """
    turns = torch.cat([state["left.turns"].minimum(state["right.turns"]) for state in part.states])
    most = turns.new_zeros(len(part.states)).scatter_reduce_(0, part.owner, turns, "amax")
    return (most > 0)[part.owner]


class EKFAC(KFAC):
    r"""EKFAC (George et al. 2018) with low-bit factors and eigenbases in front of a first-order optimizer.

    With L and R the averages of :class:`KFAC`, of the same layers, and :math:`Q_L, Q_R` their eigenvectors, the
    gradient G of a weight (with its bias as the last column) is divided number by number in their coordinates, by the
    average m of its squares there:

    .. math::

        G' = Q_L^T G Q_R, \quad m \leftarrow \beta m + (1 - \beta) \, G'^2, \quad
        \hat G = Q_L \frac{G'}{m + \lambda \max m} Q_R^T, \quad \tilde G = \hat G \, \|G\|_F / \|\hat G\|_F

    with :math:`\beta` = ``factor_decay`` and :math:`\lambda` = ``damping``; m is divided by :math:`1 - \beta^t` after t
    gradients. It is of gradients of whole batches, as in the variant that the paper calls EKFAC-ra. Where m is a
    product of eigenvalues of L and R, up to a factor, this is K-FAC but for the damping.

    L and R are decomposed every ``precondition_frequency`` steps. m then follows the bases as if the numbers of G' had
    been uncorrelated; with :math:`S = Q_{L,new}^T Q_L` and :math:`T = Q_{R,new}^T Q_R`:

    .. math::

        m_{ab} \leftarrow \sum_{ij} S_{ai}^2 \, m_{ij} \, T_{bj}^2

    Until a weight has its first bases its base runs alone, up to rounding, and m is the average of the squares of G
    itself. m is kept in float32 (float64 for float64 parameters): 4 bytes per parameter, whatever ``bits`` are.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate, handed to the base. Default 1e-3.
        model: the module whose layers they are of. Hooks are added to it; ``close()`` removes them.
        base: "adamw", "sgd", "adagrad" or a ``torch.optim.Optimizer`` class. Default "adamw".
        base_bits: of each number of the base's moments: 32 (torch's own optimizer), or 8 or 4 (:class:`AdamW`,
            :class:`SGD` or :class:`Adagrad` of this library). Default 32.
        bits: of each stored n x n matrix, factors and bases alike. Default 4.
        storage, quantization, layout, precondition, min_quant_size, statistic_limit, graft, workspace: as for
            :class:`Shampoo`.
        basis, rectify_basis: as for :class:`SOAP`.
        statistics_frequency: steps between statistics updates. Default 200.
        precondition_frequency: steps between decompositions. Default None: ``statistics_frequency``.
        factor_decay: decay of L and R at each statistic, and of m at each step. Default 0.9.
        damping: lambda, relative to the largest m of a layer (of a group of a convolution). Default 0.001.
        sharing: as for :class:`KFAC`.
        grad_scale: as for :class:`KFAC`. Needed where the scale of the loss changes: bases are those of averages, in
            which statistics of another scale have another weight. Default None: 1.
        process_group, replicate, shards, exchange_dtype: as for :class:`KFAC`.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError: a setting outside its range, two that exclude each other, a model without a supported layer, a
            parameter that is not the model's.
        TypeError: no model; a keyword that neither EKFAC nor its base knows.

    Example:
        >>> import torch
        >>> from lowbit_optim import EKFAC
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
        >>> optimizer = EKFAC(model.parameters(), lr=1e-3, model=model, statistics_frequency=10)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.treatments()["0.weight"]
        'EKFAC: 64 x 65, root, 4 bits'
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        *,
        model: nn.Module | None = None,
        base: str | type[Optimizer] = "adamw",
        base_bits: int = 32,
        bits: float = 4,
        storage: str = "root",
        basis: str = "reflector",
        quantization: Quantization | None = None,
        layout: str = "triangle",
        precondition: bool = True,
        min_quant_size: int = 4096,
        statistics_frequency: int = 200,
        precondition_frequency: int | None = None,
        factor_decay: float = 0.9,
        damping: float = 1e-3,
        statistic_limit: float = 4.0,
        rectify_basis: int = 4,
        graft: bool = True,
        workspace: int = 256 * 2**20,
        sharing: str = "expand",
        grad_scale: Callable[[], float | Tensor] | None = None,
        process_group: "ProcessGroup | None" = None,
        replicate: bool = False,
        shards: str = "whole",
        exchange_dtype: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        settings = keywords(locals(), *OF_THE_WHOLE)
        self._begin(params, EKFACPreconditioner(sharing), settings, base, base_kwargs, model, grad_scale)
