"""The memory of an optimizer that is planned: everything is rehearsed on the meta device, and nothing is allocated."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_optim.distributed import Placement
from lowbit_optim.optimizers.adabk import AdaBK
from lowbit_optim.optimizers.caspr import CASPR
from lowbit_optim.optimizers.ekfac import EKFAC
from lowbit_optim.optimizers.first_order import FirstOrder
from lowbit_optim.optimizers.kfac import KFAC, KFACPreconditioner
from lowbit_optim.optimizers.report import KINDS, report, state_bytes
from lowbit_optim.optimizers.second_order import SecondOrder
from lowbit_optim.optimizers.settings import LOW_BIT_BASES, base_name
from lowbit_optim.optimizers.shampoo import Shampoo
from lowbit_optim.optimizers.soap import SOAP
from lowbit_optim.optimizers.state import BASE, given_back
from lowbit_optim.peak import Tracker, collected
from lowbit_optim.preconditioners.kronecker import KroneckerPreconditioner
from lowbit_optim.roots import forced_route

__all__ = ["Estimate", "estimate", "report", "state_bytes"]

SECOND_ORDER: dict[str, type[SecondOrder]] = {
    "shampoo": Shampoo,
    "caspr": CASPR,
    "kfac": KFAC,
    "adabk": AdaBK,
    "ekfac": EKFAC,
    "soap": SOAP,
}
ADAMW_8BIT = "adamw8bit"
OPTIMIZERS = (*LOW_BIT_BASES, *SECOND_ORDER, ADAMW_8BIT)
SHARDINGS = ("ddp", "fsdp2")

Layout = dict[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True)
class Estimate:
    """What an optimizer will take, in bytes.

    Attributes:
        kinds: of its state, by kind as in ``state_bytes`` (without "total").
        parameters: how many numbers it trains.
        workspace: what the worst step takes beside the state, and gives back: temporaries, and tables that are kept.
        ranks: of the state, on each rank; one number without sharding.

    Example:
        >>> from lowbit_optim import estimate
        >>> planned = estimate([(1024, 1024)], "shampoo", bits=2)
        >>> planned.parameters, planned.state, len(planned.ranks)
        (1048576, 8937252, 1)
        >>> planned.peak == max(planned.ranks) + planned.workspace
        True
    """

    kinds: dict[str, int]
    parameters: int
    workspace: int
    ranks: tuple[int, ...]

    @property
    def state(self) -> int:
        """Bytes of the whole state."""
        return sum(self.kinds.values())

    @property
    def bytes_per_parameter(self) -> float:
        """Of the whole state."""
        return self.state / max(1, self.parameters)

    @property
    def peak(self) -> int:
        """Bytes of state and temporaries of the worst step, on the rank that has most."""
        return max(self.ranks) + self.workspace


def estimate(
    model: Any,
    optimizer: str | type[Optimizer] = "shampoo",
    *,
    world_size: int = 1,
    sharding: str | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.float32,
    **keywords: Any,
) -> Estimate:
    """What an optimizer's state and its steps will take, without allocating anything.

    The optimizer is made for parameters on the meta device and takes a few steps there: one that makes its state, and
    ones with statistics and roots and without. So the state is that of the real optimizer to the last byte. The
    workspace is what its operators return; what an operator allocates inside itself (a solver's buffers) is not seen.
    Fused steps of moments in codes, and those of "adamw8bit", have no temporaries.

    Args:
        model: an ``nn.Module`` on any device, whose trainable parameters count (K-FAC, AdaBK and EKFAC want it);
            shapes, or a dict of names and shapes; or param groups, as of ``lowbit_optim.param_groups``.
        optimizer: "adamw", "sgd", "adagrad", "shampoo", "caspr", "kfac", "adabk", "ekfac", "soap", "adamw8bit" (that of
            bitsandbytes, from its layout, which need not be installed), or a class. Default "shampoo".
        world_size: processes. Default 1.
        sharding: how they share the state. None: every rank has everything. "ddp": each block's preconditioner lives on
            one rank, as with ``process_group``; moments are everywhere. "fsdp2": the same, and moments are cut along
            the first dim, as parameters are; so are the temporaries of first-order steps. The workspace is that of one
            process, without buffers of communication. Default None.
        device: that it will run on, or its type. On "cuda" torch's own optimizers work on all parameters at once
            (foreach), with temporaries of that size, unless ``foreach=False`` or ``fused=True``. Default "cuda".
        dtype: of parameters that are given as shapes. Default float32.
        **keywords: the optimizer's own: ``bits``, ``base`` ("adamw8bit", too), ``base_bits``, ``workspace`` ...

    Raises:
        ValueError: an unknown optimizer or sharding, a world size below 1; a setting that the optimizer refuses.
        TypeError: a keyword that the optimizer does not know; something that is neither a module nor shapes; an
            optimizer of another library whose step does not run on the meta device.

    Example:
        >>> from lowbit_optim import estimate
        >>> planned = estimate({"weight": (1024, 1024)}, "shampoo", bits=2, base_bits=4)
        >>> round(planned.bytes_per_parameter, 2)
        1.59
        >>> round(estimate({"weight": (1024, 1024)}, "adamw", bits=32).bytes_per_parameter, 2)
        8.0
    """
    if sharding not in (None, *SHARDINGS):
        raise ValueError(f"sharding is {sharding!r}; it must be None, {' or '.join(map(repr, SHARDINGS))}")
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size is {world_size!r}; it must be a positive integer")
    device = torch.device(device).type
    kind = _class_of(optimizer)
    if keywords.get("base") == ADAMW_8BIT:
        keywords["base"] = _AdamW8bit
    module, groups = _on_meta(model, dtype)
    if issubclass(kind, KFAC):
        if module is None:
            raise TypeError(f"{kind.__name__} looks at layers: give the nn.Module, not shapes")
        keywords = {"model": module, **keywords}
    planned = _made(kind, groups, keywords)
    engine, base = _rehearse(planned, device)
    kinds = state_bytes(planned)
    state = kinds.pop("total")
    workspace = max(engine, state + (base - state) // (world_size if sharding == "fsdp2" else 1)) - state
    return Estimate(
        kinds={name: kinds[name] for name in KINDS},
        parameters=sum(p.numel() for p in _parameters(planned)),
        workspace=workspace,
        ranks=_ranks(planned, world_size, sharding),
    )


class _AdamW8bit(Optimizer):
    """Stands for that of bitsandbytes, whose layout is known and whose steps allocate nothing."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})


def _adamw8bit_layout(parameter: Tensor) -> Layout:
    """A byte for each number of both moments and a scale for each 256, from 4096 numbers on; two tables for all."""
    moments = dict.fromkeys(("state1", "state2"), (parameter.shape, torch.float32))
    if parameter.numel() < 4096:
        return moments
    blocks = torch.Size([-(-parameter.numel() // 256)])
    layout = {name: (shape, torch.uint8) for name, (shape, _) in moments.items()}
    layout |= dict.fromkeys(("absmax1", "absmax2"), (blocks, torch.float32))
    return layout | {name: (torch.Size([256]), torch.float32) for name in ("qmap1", "qmap2")}


def _is_adamw8bit(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, _AdamW8bit) or base_name(type(optimizer)) == "bitsandbytes.AdamW8bit"


def _class_of(optimizer: str | type[Optimizer]) -> type[Optimizer]:
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        return optimizer
    if optimizer in SECOND_ORDER:
        return SECOND_ORDER[str(optimizer)]
    if optimizer in LOW_BIT_BASES:
        return LOW_BIT_BASES[str(optimizer)]
    if optimizer == ADAMW_8BIT:
        return _AdamW8bit
    raise ValueError(f"unknown optimizer {optimizer!r}; it must be a class or one of {', '.join(OPTIMIZERS)}")


def _made(kind: type[Optimizer], groups: list[dict[str, Any]], keywords: dict[str, Any]) -> Optimizer:
    """The optimizer over parameters on the meta device."""
    known = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()) and (unknown := keywords.keys() - known.keys()):
        raise TypeError(
            f"{kind.__name__} got the unknown keyword {', '.join(map(repr, sorted(unknown)))}. "
            f"It knows {', '.join(name for name in known if name != 'params')}"
        )
    return kind(groups, **keywords)


def _on_meta(model: Any, dtype: torch.dtype) -> tuple[nn.Module | None, list[dict[str, Any]]]:
    """Param groups of what ``estimate`` was given; the module, too, if it was one, with its parameters."""
    if isinstance(model, nn.Module):
        copies = {id(p): nn.Parameter(_like(p), p.requires_grad) for p in model.parameters()}
        module = copy.deepcopy(model, copies | {id(b): _like(b) for b in model.buffers()})
        return module, [{"params": [(name, p) for name, p in module.named_parameters() if p.requires_grad]}]
    if isinstance(model, Mapping):
        return None, [{"params": [(str(name), _parameter(shape, dtype)) for name, shape in model.items()]}]
    if not isinstance(model, Iterable) or isinstance(model, str):
        raise TypeError(f"{model!r} is neither an nn.Module nor shapes, nor param groups")
    given = list(model)
    if given and all(isinstance(group, Mapping) and "params" in group for group in given):
        return None, [{**group, "params": _group(group["params"], dtype)} for group in given]
    return None, [{"params": [_parameter(shape, dtype) for shape in given]}]


def _group(params: Any, dtype: torch.dtype) -> list[Any]:
    """Parameters of a group, of tensors or shapes, with names where they have any."""
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, Mapping):
        params = params.items()
    made = []
    for given in params:
        named = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)
        parameter = _parameter(given[1] if named else given, dtype)
        made.append((given[0], parameter) if named else parameter)
    return made


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _parameter(shape: Any, dtype: torch.dtype) -> nn.Parameter:
    if isinstance(shape, Tensor):
        return nn.Parameter(_like(shape))
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise TypeError(f"{shape!r} is no shape: a tuple of integers")
    return nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _rehearse(optimizer: Optimizer, device: str) -> tuple[int, int]:
    """Take three steps on the meta device: the first, one with statistics and roots, one without.

    Returns:
        The most bytes that are there at one time, state included: outside of first-order steps, and in them.
    """
    parameters = _parameters(optimizer)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    for group in optimizer.param_groups:
        if device == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True
        for key in ("statistics_frequency", "precondition_frequency"):
            if key in group:
                group[key] = 2
        if "start_preconditioning_step" in group:
            group["start_preconditioning_step"] = 1
    tracker = Tracker()
    in_base = [0]

    def watch(base_step: Callable[[], Any]) -> None:
        before, tracker.peak = tracker.peak, tracker.live
        base_step()
        in_base[0], tracker.peak = max(in_base[0], tracker.peak), before

    step = _step_of(optimizer, device, watch)
    tracker.add(optimizer.state.values())  # what is known by its layout
    tracker.leave_out([*parameters, *(p.grad for p in parameters)])
    try:
        for _ in range(3):
            _collect(optimizer)
            tracker.add(collected(optimizer))
            with tracker, forced_route("products" if device == "cuda" else "eigh"):
                step()
    except (NotImplementedError, RuntimeError) as error:
        raise TypeError(
            f"{type(optimizer).__name__} cannot be estimated: its step does not run on the meta device ({error})"
        ) from error
    tracker.add(optimizer.state.values())
    return (tracker.peak, in_base[0]) if isinstance(optimizer, SecondOrder) else (0, tracker.peak)


def _step_of(optimizer: Optimizer, device: str, in_base: Callable[[Callable[[], Any]], None]) -> Callable[[], Any]:
    """The step of an optimizer, without what a fused step does.

    Args:
        device: the kind that it is planned for.
        in_base: is given the step of the base, to take it.
    """
    if not isinstance(optimizer, SecondOrder):
        return _unfused(optimizer, optimizer, optimizer.step, prefix="")
    assert optimizer.base is not None
    optimizer._watch = lambda troubles: None  # type: ignore[assignment]
    _shorten(optimizer.preconditioner, device)
    base_step = _unfused(optimizer.base, optimizer, optimizer._step_base, prefix=BASE)
    optimizer._step_base = lambda: in_base(base_step)  # type: ignore[method-assign]
    return optimizer.step


def _unfused(first_order: Optimizer, whole: Optimizer, step: Callable[[], Any], prefix: str) -> Callable[[], Any]:
    """The step of a first-order optimizer, alone or the base of the whole; a fused one leaves only state behind."""
    if isinstance(first_order, FirstOrder):
        vars(first_order)["_step_ours"] = lambda ours: [first_order.create(p, group) for _, p, group in ours]
    elif _is_adamw8bit(first_order):
        if isinstance(whole, SecondOrder):
            whole.init_state()
        _fill(whole, prefix)
        return lambda: None
    return step


def _shorten(preconditioner: KroneckerPreconditioner, device: str) -> None:
    """Of every bucket only the largest part, and its first slice: the others take no more memory, but time."""
    preconditioner.workspace.meta = device
    parts, slices = preconditioner.parts, preconditioner.slices
    vars(preconditioner).update(
        parts=lambda *run: sorted(parts(*run), key=lambda part: -sum(part.counts))[:1],
        slices=lambda *run: islice(slices(*run), 1),
    )


def _fill(optimizer: Optimizer, prefix: str) -> None:
    """Make the state of AdamW8bit, on the meta device; its tables are there once for all parameters."""
    tables: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = {}
            for name, (shape, dtype) in _adamw8bit_layout(parameter).items():
                own[name] = tables.get(name, torch.empty(shape, dtype=dtype, device="meta"))
                if name.startswith("qmap"):
                    tables[name] = own[name]
            optimizer.state[parameter].update(given_back(own) if prefix else own)


def _collect(optimizer: Optimizer) -> None:
    """What the hooks of K-FAC would have collected for a step with statistics."""
    preconditioner = getattr(optimizer, "preconditioner", None)
    if not isinstance(preconditioner, KFACPreconditioner):
        return
    optimizer._prepare()  # type: ignore[attr-defined]
    for layer in preconditioner._layer_of.values():
        if not layer.wanted():
            continue
        cut, module = layer.blocking, layer.module()
        orders = {"inputs": cut.columns, "gradients": cut.rows}
        if isinstance(module, nn.Embedding):
            orders = {"inputs": cut.rows, "gradients": cut.columns}
        weight = layer.weight
        assert weight is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        empty: dict[str, Any] = {"dtype": dtype, "device": "meta"}
        layer.sums = {k: (torch.empty((), **empty), torch.empty(cut.count, n, n, **empty)) for k, n in orders.items()}
        layer.examples = layer.rows = 1


def _ranks(optimizer: Optimizer, world_size: int, sharding: str | None) -> tuple[int, ...]:
    """Bytes of the state on each rank."""
    if sharding is None:
        return (state_bytes(optimizer)["total"],) * world_size
    held = [0] * world_size
    placement = Placement(world_size)
    units: list[tuple[Tensor, int, int]] = []
    weights: dict[Tensor, int] = {}  # bytes of what is placed, for each block or, where a unit has one owner, of all
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = optimizer.state.get(parameter, {})
            placed: set[str] = set()
            cut = optimizer.preconditioner.blocking(parameter, group) if isinstance(optimizer, SecondOrder) else None
            if cut is not None and isinstance(optimizer, SecondOrder):
                count = cut.count if optimizer.preconditioner.divisible else 1
                units.append((parameter, count, (cut.rows**3 + cut.columns**3) * cut.count // count))
                with_factors = (
                    ("left.", "right.", "moment.") if optimizer.base_stands_alone else ("left.", "right.", BASE)
                )
                placed = {key for key in own if key.startswith(with_factors)}
                weights[parameter] = sum(own[key].nbytes for key in placed) // count
            for key in own.keys() - placed:
                cuts = sharding == "fsdp2" and (key.startswith(BASE) or not isinstance(optimizer, SecondOrder))
                for rank in range(world_size):
                    held[rank] += _part(own[key], parameter, rank, world_size) if cuts else own[key].nbytes
    placement.place(units)
    for parameter, weight in weights.items():
        for rank, (first, last) in enumerate(placement[parameter]):
            held[rank] += (last - first) * weight
    return tuple(held)


def _part(value: Tensor, parameter: Tensor, rank: int, world_size: int) -> int:
    """Bytes that a rank has of a tensor whose first dim is the parameter's; of any other all of it."""
    if not value.dim() or not parameter.dim() or len(value) != len(parameter):
        return value.nbytes
    rows = math.ceil(len(value) / world_size)
    mine = max(0, min(rows, len(value) - rank * rows))
    return value.nbytes // max(1, len(value)) * mine
