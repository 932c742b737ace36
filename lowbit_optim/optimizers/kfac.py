"""K-FAC over any first-order optimizer, with its factors in low-bit storage."""

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_optim.blocking import Blocking, Stack
from lowbit_optim.optimizers.second_order import SecondOrder, keywords
from lowbit_optim.optimizers.stats import LEFT_TO_BASE
from lowbit_optim.preconditioners.buckets import SIDES, Bucket
from lowbit_optim.preconditioners.kronecker import Group, KroneckerPreconditioner, Statistics
from lowbit_optim.preconditioners.layers import Hook, Layer, add_batches, layers_of
from lowbit_optim.presets import DEFAULT_BITS
from lowbit_optim.shards import is_dtensor
from lowbit_optim.storage import Quantization
from lowbit_optim.storage.factors import State

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("lowbit_optim")

# Keywords that are not settings of param groups.
OF_THE_WHOLE = ("model", "sharing", "grad_scale")

_UNHOOKED = "a copied, unpickled or closed optimizer has no hooks: call attach(model)"

_BLIND = (
    "no hook saw a backward pass though there are gradients, so factors are not updated. A model that torch.compile "
    "has compiled before never calls hooks that come later: construct the optimizer first, or call "
    "torch._dynamo.reset(). This is said once."
)


_ALONE = (
    "torch.distributed is initialized, but %s has no process_group, and its model is neither DistributedDataParallel "
    "nor of DTensors: the factors are of this process's batches alone. If processes train one model together, give "
    "process_group=torch.distributed.group.WORLD."
)


class KFACPreconditioner(KroneckerPreconditioner):
    """Martens and Grosse 2015: (G + damping)^(-1) dW (A + damping)^(-1), of input and output-gradient statistics.

    Its layers are those of the model that it was attached to last; a copy or a pickle of it is attached to none.
    """

    form_keywords: ClassVar[dict[str, str]] = {"decay": "factor_decay", "eps": "damping"}
    default_precondition_frequency: ClassVar[int] = 2000
    divisible: ClassVar[bool] = False  # the blocks of a layer share a damping, or bases
    on_shards: ClassVar[bool] = False  # the factors of a layer are of whole inputs and outputs

    def __init__(self, sharing: str) -> None:
        super().__init__()
        if sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing is {sharing!r}; it must be 'expand' or 'reduce'")
        self.sharing = sharing
        self.grad_scale: Callable[[], float | Tensor] | None = None
        self.layers: list[Layer] = []
        self.others: dict[str, str] = {}
        self.batches: list[Any] = []  # the process groups whose batches are one
        self.handles: list[Any] = []
        self._layer_of: dict[Tensor, Layer] = {}
        self._loss_scale: float | Tensor = 1.0
        self._warned = False

    def attach(self, model: nn.Module, grad_scale: Callable[[], float | Tensor] | None) -> None:
        """Hook into a model's layers, instead of those of the model before."""
        layers, others = layers_of(model, self.sharing == "reduce")
        if not layers:
            raise ValueError("the model has no Linear, Conv or small Embedding layer whose factors could be kept")
        self.close()
        self.layers, self.others, self.grad_scale = layers, others, grad_scale
        for layer in layers:
            module = layer.module()
            assert module is not None
            self.handles.append(Hook(layer).add_to(module))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __getstate__(self) -> dict[str, Any]:
        return {"sharing": self.sharing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def prepare(self, groups: list[Group], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Parameters may have been swapped, added or frozen, so nothing about them is kept from the last time."""
        group_of = {parameter: group for group in groups for parameter in group["params"]}
        self._layer_of = {}
        for layer in self.layers:
            weight, bias = layer.weight, layer.bias
            if weight is None or weight not in group_of:
                layer.wanted = _never
                continue
            if layer.joint is None or "left.failures" not in state.get(weight, {}):  # then it has a shape already
                trains = bias is not None and bias.requires_grad and bias in group_of
                layer.joint = bool(trains and layer.own_bias and group_of[bias]["precondition"])
            layer.sharded = (weight, bias) if is_dtensor(weight) else None
            layer.wanted = _due_next(layer, group_of[weight], state)
            self._layer_of[weight] = layer

    def unit(self, parameter: Tensor) -> tuple[Tensor, ...]:
        layer = self._layer_of[parameter]
        return (parameter, layer.bias) if layer.joint and layer.bias is not None else (parameter,)

    def blocking(self, parameter: Tensor, group: Group) -> Blocking | None:
        layer = self._layer_of.get(parameter)
        return layer.blocking if layer is not None and group["precondition"] else None

    def cuts(self, parameter: Tensor, group: Group) -> list[Blocking | None]:
        assert self.team is not None
        return [self.blocking(parameter, group)] * self.team.size

    def statistics(self, part: Bucket, start: int, stop: int, gradient: Tensor, magnitude: Tensor) -> Statistics:
        pieces = list(Stack(part.states, part.counts).pieces(start, stop))
        both: list[Any] = []
        for side in SIDES:
            found = []
            for i, lo, hi in pieces:
                m, size = self._layer_of[part.units[i][0]].statistic(side, self._loss_scale)
                found.append((m[lo:hi], size[lo:hi]))
            both.append([torch.cat(x).to(part.device, part.dtype) for x in zip(*found, strict=True)])
        return tuple(both)

    def dampings(
        self, part: Bucket, states: list[State], statistics: Statistics | tuple[None, None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """G + sqrt(lambda) / pi I and A + pi sqrt(lambda) I, pi^2 = (tr A / dim A) / (tr G / dim G)."""
        if part.forms.left.ridge != "absolute":
            return None, None
        left, right = (
            factor.mean_eigenvalue(state, part.dtype) if given is None else factor.mean_after(state, *given)
            for (_, factor), state, given in zip(part.forms.sides(), states, statistics, strict=True)
        )
        ratio = (right / left).sqrt()
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
        root = part.forms.left.eps**0.5
        return root / ratio, root * ratio

    @torch.no_grad()
    def step(self, groups: list[Group], state: dict[Tensor, dict[str, Any]]) -> Tensor | None:
        if self.grad_scale is not None:
            self._loss_scale = self.grad_scale()
        due = [layer for weight, layer in self._layer_of.items() if weight.grad is not None and layer.wanted()]
        if due and not any(layer.rows for layer in due) and not self._warned:
            self._warned = True
            logger.warning(_BLIND)
        for group in self.batches:
            add_batches(due, group)
        troubles = super().step(groups, state)
        self.clear()
        return troubles

    def clear(self) -> None:
        """Forget what hooks have collected since the last step."""
        for layer in self.layers:
            layer.clear()


def _due_next(layer: Layer, group: Group, state: Mapping[Tensor, dict[str, Any]]) -> Callable[[], bool]:
    def due() -> bool:
        weight = layer.weight  # which may have been swapped
        if weight is None or not weight.requires_grad or not group["precondition"]:
            return False
        steps = int(state[weight]["step"]) if weight in state else 0
        return (steps + 1) % group["statistics_frequency"] == 0

    return due


def _never() -> bool:
    return False


def _none() -> None:
    return None


def _check_members(parameters: list[Tensor], model: nn.Module) -> None:
    own = set(model.parameters())
    for parameter in parameters:
        if parameter not in own:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not one of the model's")


class KFAC(SecondOrder):
    r"""K-FAC with low-bit factors in front of a first-order optimizer.

    For every Linear, Conv1d, Conv2d, Conv3d and small Embedding layer of ``model``, with inputs x (and a last 1 for the
    bias), gradients g of its outputs, :math:`\beta` = ``factor_decay`` and p = ``root_power``:

    .. math::

        R \leftarrow \beta R + (1 - \beta) \, E[x x^T], \quad L \leftarrow \beta L + (1 - \beta) \, E[g g^T], \quad
        \hat G = (L + \lambda_L I)^{-1/p} \, G \, (R + \lambda_R I)^{-1/p}, \quad
        \tilde G = \hat G \, \|G\|_F / \|\hat G\|_F

    G being the gradient of the weight with that of the bias as its last column. g is the gradient of the loss that is
    trained on: the empirical Fisher matrix. Everything else is left to the base optimizer; ``treatments()`` says what.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate, handed to the base. Default 1e-3.
        model: the module whose layers they are of. Hooks are added to it; ``close()`` removes them.
        base: "adamw", "sgd", "adagrad" or a ``torch.optim.Optimizer`` class. Default "adamw".
        base_bits: of each number of the base's moments: 32 (torch's own optimizer), or 8 or 4 (:class:`AdamW`,
            :class:`SGD` or :class:`Adagrad` of this library). Default 32.
        bits, storage, quantization, layout, precondition, min_quant_size: as for :class:`Shampoo`.
        start_preconditioning_step, statistic_limit, graft, apply_dtype, workspace: as for :class:`Shampoo`.
        rectify_update, rectify_root: as for :class:`Shampoo`. Default 0, 0.
        statistics_frequency: steps between statistics updates (T1). Default 200.
        precondition_frequency: steps between root updates (T2) of storages with two periods. Default None: 2000.
        factor_decay: decay of the statistics. Default 0.9.
        damping: lambda. Default 0.1.
        damping_rule: "relative": lambda times the largest eigenvalue of the factor. "absolute": pi sqrt(lambda) for R
            and sqrt(lambda) / pi for L, pi^2 the quotient of their mean eigenvalues (Martens and Grosse 2015). Default
            "relative".
        root_power: p of the exponent -1/p. Default 1.
        sharing: what the positions of a sequence or image are. "expand": rows of their own. "reduce": inputs are
            averaged and gradients summed over them. Default "expand".
        grad_scale: called when gradients arrive; what the loss was multiplied with, as ``GradScaler.get_scale``.
            Needed with graft=False or absolute damping; else it keeps a scale that changes from weighing statistics.
            Default None: 1.
        orthogonal_iterations: QR iterations per update of storage "eigen". Default 2.
        process_group, replicate, exchange_dtype: as for :class:`Shampoo`. Statistics are those of the batches of all
            processes of the group, also with ``replicate``; without one, of a ``DistributedDataParallel`` model's.
            Their batches must be of one size.
        shards: "whole".
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError: a setting outside its range, a model without a supported layer, a parameter that is not the model's;
            model, sharing or grad_scale in a param group.
        TypeError: no model; a keyword that neither K-FAC nor its base knows.

    Example:
        >>> import torch
        >>> from lowbit_optim import KFAC
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
        >>> optimizer = KFAC(model.parameters(), lr=1e-3, model=model, statistics_frequency=10)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.treatments()["0.weight"]
        'KFAC: 64 x 65, root, 2 bits'
    """

    preconditioner: KFACPreconditioner

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        *,
        model: nn.Module | None = None,
        base: str | type[Optimizer] = "adamw",
        base_bits: int = 32,
        bits: float = DEFAULT_BITS,
        storage: str = "root",
        quantization: Quantization | None = None,
        layout: str = "triangle",
        precondition: bool = True,
        min_quant_size: int = 4096,
        statistics_frequency: int = 200,
        precondition_frequency: int | None = None,
        start_preconditioning_step: int = 1,
        factor_decay: float = 0.9,
        damping: float = 0.1,
        damping_rule: str = "relative",
        statistic_limit: float = 4.0,
        root_power: int = 1,
        rectify_update: int = 0,
        rectify_root: int = 0,
        orthogonal_iterations: int = 2,
        graft: bool = True,
        apply_dtype: str | None = None,
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
        self._begin(params, KFACPreconditioner(sharing), settings, base, base_kwargs, model, grad_scale)

    def _begin(
        self,
        params: Any,
        preconditioner: KFACPreconditioner,
        settings: dict[str, Any],
        base: str | type[Optimizer],
        base_kwargs: dict[str, Any],
        model: nn.Module | None,
        grad_scale: Callable[[], float | Tensor] | None,
    ) -> None:
        """The constructor, of whatever settings; for EKFAC, too, whose settings are others."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {model!r}; {type(self).__name__} needs the module whose layers it preconditions")
        self._model: Callable[[], nn.Module | None] = _none
        self._scales_loss = grad_scale is not None
        super().__init__(params, preconditioner, settings, base, base_kwargs)
        self.attach(model, grad_scale)
        if not preconditioner.batches and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            logger.warning(_ALONE, type(self).__name__)

    def attach(self, model: nn.Module, grad_scale: Callable[[], float | Tensor] | None = None) -> None:
        """Hook into a model; needed after copying or unpickling, which leave hooks and ``grad_scale`` behind.

        Raises:
            ValueError: the model has no supported layer, a parameter of the optimizer is not the model's, or
                ``grad_scale`` was given to the constructor and is not now.

        Example:
            >>> import copy
            >>> import torch
            >>> from lowbit_optim import KFAC
            >>> model = torch.nn.Linear(64, 64)
            >>> optimizer = KFAC(model.parameters(), model=model)
            >>> model, optimizer = copy.deepcopy((model, optimizer))
            >>> optimizer.attach(model)
            >>> model(torch.ones(1, 64)).sum().backward()
            >>> optimizer.step()
        """
        if self._scales_loss and grad_scale is None:
            raise ValueError("this optimizer was made with grad_scale: give attach one too")
        for group in self.param_groups:
            _check_members(group["params"], model)
        self.preconditioner.attach(model, grad_scale)
        self._model = weakref.ref(model)
        self._prepare()

    def close(self) -> None:
        """Remove the hooks from the model; what is left can be saved, but not step.

        Example:
            >>> import torch
            >>> from lowbit_optim import KFAC
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
            >>> optimizer = KFAC(model.parameters(), model=model)
            >>> optimizer.close()
            >>> model(torch.ones(1, 64)).sum().backward()
            >>> optimizer.step()
            Traceback (most recent call last):
                ...
            RuntimeError: a copied, unpickled or closed optimizer has no hooks: call attach(model)
        """
        self.preconditioner.close()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, of parameters of the model; every keyword but model, sharing and grad_scale may be set in it.

        Args:
            param_group: {"params": parameters or (name, parameter) pairs, keyword: value, ...}.

        Raises:
            ValueError: a parameter that is not the model's, one of these three keywords, and as for :class:`Shampoo`.

        Example:
            >>> import torch
            >>> from lowbit_optim import KFAC
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
            >>> optimizer = KFAC(model[0].parameters(), lr=1e-3, model=model)
            >>> optimizer.add_param_group({"params": model[1].parameters(), "damping": 0.01})
            >>> [group["damping"] for group in optimizer.param_groups]
            [0.1, 0.01]
        """
        if alien := param_group.keys() & OF_THE_WHOLE:
            raise ValueError(
                f"a param group has the key {', '.join(map(repr, sorted(alien)))}, which is a setting of the whole "
                f"optimizer: give it to {type(self).__name__}(...) itself"
            )
        model = self._model()
        if model is not None:
            given = param_group["params"]
            param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
            _check_members([p[1] if isinstance(p, tuple) else p for p in param_group["params"]], model)
        super().add_param_group(param_group)
        self._prepare()

    def _prepare(self) -> None:
        model = self._model()
        self.preconditioner.batches = self._distribution.batches([parameter for parameter, _ in self._parameters()])
        if not self.preconditioner.batches and isinstance(model, nn.parallel.DistributedDataParallel):
            self.preconditioner.batches = [model.process_group]
        super()._prepare()

    def _check_groups(self, state_dict: Mapping[str, Any]) -> None:
        if not self.preconditioner.layers:
            raise ValueError(f"{_UNHOOKED} before loading a state dict")
        super()._check_groups(state_dict)

    def _check_step(self) -> None:
        if not self.preconditioner.handles:
            raise RuntimeError(_UNHOOKED)
        super()._check_step()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_model": _none, "_scales_loss": self._scales_loss}

    def treatments(self) -> dict[str, str]:
        """How each parameter of the model is treated, by its name there.

        Example:
            >>> import torch
            >>> from lowbit_optim import KFAC
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
            >>> optimizer = KFAC(model.parameters(), model=model)
            >>> for name, treatment in optimizer.treatments().items():
            ...     print(name, "->", treatment)
            ...
            1.weight -> no layer that has Kronecker factors
            1.bias -> no layer that has Kronecker factors
            0.weight -> KFAC: 64 x 65, root, 2 bits
            0.bias -> a column of the weight
        """
        self._prepare()
        treated = self._treatments()
        treatments = dict(self.preconditioner.others)
        for layer in self.preconditioner.layers:
            for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
                if parameter is not None:
                    where = f"{layer.name}.{name}" if layer.name else name
                    treatments[where] = treated.get(parameter, "no parameter of this optimizer")
        return treatments

    def _treatments(self) -> dict[Tensor, str]:
        if not self.preconditioner.layers:
            raise RuntimeError(_UNHOOKED)
        treated = super()._treatments()
        for layer in self.preconditioner.layers:
            weight, bias = layer.weight, layer.bias
            if layer.joint and weight in treated and treated[weight] != LEFT_TO_BASE and bias is not None:
                treated[bias] = "a column of the weight"
        return treated

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any torch optimizer; what the hooks have collected for the coming step is dropped, too.

        Args:
            set_to_none: gradients become None instead of zeros. Default True.

        Example:
            >>> import torch
            >>> from lowbit_optim import KFAC
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
            >>> optimizer = KFAC(model.parameters(), model=model)
            >>> model(torch.ones(1, 64)).sum().backward()
            >>> optimizer.zero_grad()
            >>> model[0].weight.grad is None
            True
        """
        super().zero_grad(set_to_none)
        self.preconditioner.clear()
