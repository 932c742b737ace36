"""SOAP: Adam in the eigenbases of Shampoo's factors, with factors and bases in low-bit storage."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lowbit_optim.blocking import Blocking, Stack
from lowbit_optim.distributed import Runs, Team, Unit, runs_of
from lowbit_optim.kernels.first_order import keys
from lowbit_optim.linalg import full_precision
from lowbit_optim.optimizers.first_order import FirstOrder
from lowbit_optim.optimizers.moments import moment_form
from lowbit_optim.optimizers.second_order import SecondOrder, keywords
from lowbit_optim.optimizers.shampoo import ShampooPreconditioner
from lowbit_optim.optimizers.state import where
from lowbit_optim.preconditioners.buckets import Due, Forms
from lowbit_optim.preconditioners.eigenbases import EigenbasisPreconditioner
from lowbit_optim.preconditioners.kronecker import Group, Root, working_dtype
from lowbit_optim.shards import local
from lowbit_optim.storage import Quantization

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

State = dict[Tensor, dict[str, Any]]


class SOAPPreconditioner(EigenbasisPreconditioner, ShampooPreconditioner):
    """Turns gradients into the eigenbases, turns steps back, and lets the bases follow the statistics."""

    on_shards: ClassVar[bool] = False  # bases are of whole matrices

    turned: list[tuple[Sequence[Unit], Sequence[Tensor]]]  # of this step, where a team shares the work

    def step(self, groups: list[Group], state: State) -> Tensor | None:
        self.turned = []
        return super().step(groups, state)

    def blocking(self, parameter: Tensor, group: Group) -> Blocking | None:
        """One block: moments live in the eigenbasis, which padding would not fit."""
        cut = super().blocking(parameter, group)
        return cut if cut is not None and cut.count == 1 else None

    def cuts(self, parameter: Tensor, group: Group) -> list[Blocking | None]:
        return [cut if cut is not None and cut.count == 1 else None for cut in super().cuts(parameter, group)]

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
        cut = self.blocking(parameter, group)
        assert cut is not None
        bases = self.bases(parameter, group, cut, state)
        if kept is not None:
            add_step(parameter, group, kept, cut.merge(turned_back(cut.split(parameter), bases)))
        self.follow(index, parameter, group, state, bases, first=kept is None)

    def bases(self, parameter: Tensor, group: Group, cut: Blocking, state: dict[str, Any]) -> list[Tensor]:
        """Copies of both bases, [1, r, r] and [1, c, c]."""
        roots = self.forms(group, cut).roots(Stack([state], [1]), 0, 1, working_dtype(parameter))
        return [basis.clone() for basis in roots]

    def follow(
        self, index: int, parameter: Tensor, group: Group, state: dict[str, Any], old: list[Tensor], *, first: bool
    ) -> None:
        """Turn the bases where that is due, and the moments with them.

        Args:
            old: the bases as they are.
            first: whether this was the first gradient.
        """
        cut, dtype, steps = self.blocking(parameter, group), working_dtype(parameter), int(state["step"])
        assert cut is not None
        if not first and steps % group["precondition_frequency"]:
            return
        forms, stack = self.forms(group, cut), Stack([state], [1])
        orders = [self._turn(side, form, stack, dtype, first) for side, form in forms.sides()]
        if first:
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

    def shown(self, parameter: Tensor, group: Group, own: dict[str, Any]) -> dict[str, Any]:
        shown, team = super().shown(parameter, group, own), self.team
        moments = _moments_in(own)
        if team is None or shown is own or not moments:
            return shown
        runs = self._row_runs(parameter)
        layout = {name: (torch.Size((runs[-1][1], *x.shape[1:])), x.dtype) for name, x in moments.items()}
        return shown | team.state.shown(moments, layout, runs)

    def taken(self, parameter: Tensor, group: Group, given: dict[str, Any]) -> dict[str, Any]:
        taken, team = super().taken(parameter, group, given), self.team
        moments = _moments_in(given)
        if team is None or taken is given or not moments:
            return taken
        return taken | team.state.taken(moments, {}, self._row_runs(parameter))

    def _row_runs(self, parameter: Tensor) -> Runs:
        """Which rows of its moments each rank has: the owner all."""
        return runs_of((last - first) * parameter.shape[0] for first, last in self.runs(parameter))

    def bring_back(self, team: Team, units: Sequence[Unit], blocks: Sequence[Tensor]) -> Callable[[], None]:
        """Turned gradients stay with their owner, whose base steps on them."""
        self.turned.append((units, blocks))
        return lambda: None


def _moments_in(own: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parameter's state AdamW's moments."""
    return {name: own[name] for name in sorted(own) if name.startswith(("base.exp_avg", "base.max_exp_avg_sq"))}


def turned_back(step: Tensor, bases: list[Tensor]) -> Tensor:
    """A step in the coordinates of the bases, [1, r, c], in those of the parameter."""
    return bases[0] @ step.to(bases[0].dtype) @ bases[1].mT


def add_step(parameter: Tensor, group: Group, before: Tensor, step: Tensor) -> None:
    """A parameter as it was before, decayed, and a step."""
    parameter.copy_(before * (1 - group["lr"] * group["weight_decay"]) + step.to(parameter.dtype))


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
        process_group, replicate, shards, exchange_dtype: as for :class:`Shampoo`; shards "whole" only. The owner of a
            matrix has its moments, too.
        **base_kwargs: other options of ``torch.optim.AdamW``.

    Raises:
        ValueError: a setting outside its range, or two that exclude each other.
        TypeError: a keyword that neither SOAP nor AdamW knows.

    Example:
        >>> import torch
        >>> from lowbit_optim import SOAP
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = SOAP(model.named_parameters(), lr=1e-3, weight_decay=0.01)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.stats()["weight"]["treatment"]
        'SOAP: 64 x 64, root, 4 bits'
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
        process_group: "ProcessGroup | None" = None,
        replicate: bool = False,
        shards: str = "whole",
        exchange_dtype: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        settings = keywords(locals(), "betas", "eps", "weight_decay") | {"graft": False}
        base = {"betas": betas, "eps": eps, "weight_decay": weight_decay, **base_kwargs}
        super().__init__(params, SOAPPreconditioner(), settings, "adamw", base)

    def _step_base(self) -> None:
        """AdamW's step from zero, in the coordinates that its gradients have been turned into."""
        if self.preconditioner.team is not None:
            self._step_base_shared(self.preconditioner.team)
            return
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

    def _step_base_shared(self, team: Team) -> None:
        """Likewise, each parameter by its owner alone, who has its moments, on a stand-in of the whole parameter."""
        turned = self.preconditioner.turned
        places = {parameter: (index, group) for index, (parameter, group) in enumerate(self._parameters())}
        stand_ins = {}
        for units, blocks in turned:
            for unit, own in zip(units, blocks, strict=True):
                parameter, first = unit.parameters[0], int(self.state[unit.parameters[0]]["step"]) == 1
                assert parameter.grad is not None
                stand_in = torch.zeros(
                    (len(own) * parameter.shape[0], *parameter.shape[1:]), dtype=parameter.dtype, device=own.device
                )
                gradient = unit.cut.merge(own).to(parameter.grad.dtype) if len(own) else stand_in.clone()
                stand_in.grad = torch.zeros_like(gradient) if first else gradient
                stand_ins[parameter] = stand_in
                if not len(own):
                    self._keep_nothing(parameter, places[parameter][1], stand_in)
        self._step_base_on(stand_ins)
        for units, blocks in turned:
            steps = []
            for unit, own in zip(units, blocks, strict=True):
                parameter = unit.parameters[0]
                (index, group), state = places[parameter], self.state[parameter]
                first = int(state["step"]) == 1
                if first:
                    state["base.step"].zero_()
                step = torch.zeros_like(own)
                if len(own):
                    bases = self.preconditioner.bases(parameter, group, unit.cut, state)
                    step = turned_back(unit.cut.split(stand_ins[parameter]), bases)
                    self.preconditioner.follow(index, parameter, group, state, bases, first=first)
                steps.append(step)
            team.deliver(units, steps)()
            for unit in units:
                parameter = unit.parameters[0]
                if int(self.state[parameter]["step"]) > 1:
                    gradient, here = local(parameter.grad), local(parameter)  # type: ignore[arg-type]
                    add_step(here, places[parameter][1], here, gradient)

    def _check_step(self) -> None:
        super()._check_step()
        if self.preconditioner.team is not None:
            for index, (parameter, group) in enumerate(self._parameters()):
                own = self.state.get(parameter, {})
                shared = self.preconditioner.blocking(parameter, group) is not None
                if "base.step" in own and shared != ("left.failures" in own):
                    raise ValueError(
                        f"{where(index, parameter)}: precondition was changed to {group['precondition']} in a process "
                        "group, where a preconditioned parameter's moments are with its owner alone: set it back"
                    )

    def _lends_rows(self, parameter: Tensor, group: Group) -> bool:
        return self.preconditioner.team is not None and self.preconditioner.blocking(parameter, group) is not None

    def _keep_nothing(self, parameter: Tensor, group: Group, stand_in: Tensor) -> None:
        """Of a parameter of another's: moments in codes, which those of a stand-in without rows would not be."""
        if isinstance(self.base, FirstOrder) and self.base.takes(parameter, group):
            stand_in.grad = None
            for key, (shape, dtype) in self.base.layout(parameter, group).items():
                empty = torch.zeros((0, *shape[1:]) if shape else (), dtype=dtype, device=stand_in.device)
                self.state[parameter].setdefault(f"base.{key}", empty)
            self.state[parameter]["base.step"] = torch.tensor(float(self.state[parameter]["step"] - 1))
