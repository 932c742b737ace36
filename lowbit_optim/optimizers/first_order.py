"""First-order optimizers with moments of few bits: torch's own step where nothing is coded, a fused one elsewhere."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from lowbit_optim import kernels, shards
from lowbit_optim.kernels.first_order import Keys, Moment, Step, keys, shifted, zeros
from lowbit_optim.optimizers.moments import (
    COUNTERS,
    REFUSED,
    check_group_of_moments,
    check_placed,
    check_rows,
    check_step,
    moment_bits,
    moment_form,
    placed_gradient,
    rows_to_step,
)
from lowbit_optim.optimizers.report import report
from lowbit_optim.optimizers.state import (
    LISTED_TWICE,
    check_groups,
    check_tensors,
    home,
    opened,
    sealed,
    to_device,
    unhooked,
    where,
)
from lowbit_optim.optimizers.watch import Watch
from lowbit_optim.storage.small_floats import Layout

Group = dict[str, Any]

_TROUBLES = (
    "%d numbers of gradients were not finite and counted as zero; state[p]['nonfinite'] counts them. This is said "
    "once.",
)


class FirstOrder(Optimizer):
    """What the first-order optimizers of this library have beside torch's own, which follows in their bases.

    A parameter whose moments are codes, or that is bfloat16 or float16, takes a fused step of ours in float32. Every
    other one takes torch's own step with all of its options. As the base of a second-order optimizer, it finds its
    ``bits`` in the groups as "base_bits".

    ``state[p]`` holds "step", each moment under the name that torch has for it (as codes: "<name>.codes" and
    "<name>.scales"), and, with a step of ours, "nonfinite": how many numbers of gradients were not finite and counted
    as zero, int64. Moments of a DTensor are DTensors, placed as it is; the two counters are the same on all ranks.
    """

    rule: ClassVar[str]  # of ``kernels.first_order``
    moments: ClassVar[dict[str, str]]  # name in the state -> "signed" or "unsigned"
    # The keywords that torch's class does not have.
    own: ClassVar[tuple[str, ...]] = ("bits", "min_quant_size", "seed", "stochastic_rounding")

    _keywords: dict[str, Any]
    _watch: Watch

    def _construct(self, params: Any, given: dict[str, Any]) -> None:
        """What a constructor does with its locals."""
        options = {key: value for key, value in given.items() if key not in ("self", "params", "__class__")}
        self._keywords = {key: options.pop(key) for key in self.own}
        self._watch = Watch(_TROUBLES)
        super().__init__(params, **options)  # torch's constructor
        self.defaults.update(self._keywords)
        self._step_supports_amp_scaling = False  # what torch's fused step does with a GradScaler, ours leaves to it

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; ``bits`` and every other keyword may be set in it.

        Args:
            param_group: {"params": parameters or (name, parameter) pairs, keyword: value, ...}.

        Raises:
            ValueError: bits that a moment cannot have, an option that moments in codes do not have, or a parameter
                that is there already; the optimizer is left as it was.

        Example:
            >>> import torch
            >>> from lowbit_optim import AdamW
            >>> body, head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)
            >>> optimizer = AdamW(body.parameters(), bits=4)
            >>> optimizer.add_param_group({"params": head.parameters(), "bits": 8})
            >>> [group["bits"] for group in optimizer.param_groups]
            [4, 8]
        """
        for key, value in self._keywords.items():
            param_group.setdefault(key, value)
        check_group_of_moments({**self.defaults, **param_group})
        super().add_param_group(param_group)
        own = self.param_groups[-1]["params"]
        if len(set(own)) < len(own):
            del self.param_groups[-1]
            raise ValueError(LISTED_TWICE)

    # ---- state -------------------------------------------------------------------------------------------------------

    def takes(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the parameter takes a step of ours."""
        low = parameter.dtype in (torch.bfloat16, torch.float16) and not any(group.get(key) for key in REFUSED)
        return low or (bool(self.kept(group)) and moment_form(parameter, group, "signed").bits < 32)

    def kept(self, group: Mapping[str, Any]) -> dict[str, str]:
        """The moments that a group has."""
        return self.moments

    def layout(self, parameter: Tensor, group: Mapping[str, Any]) -> Layout:
        """Shape and dtype of every tensor in a parameter's state; of its moments only, if it takes torch's step."""
        if not self.takes(parameter, group):
            return dict.fromkeys(self.kept(group), (parameter.shape, parameter.dtype))
        layout: Layout = {"step": (torch.Size(), torch.float32), "nonfinite": (torch.Size(), torch.int64)}
        for name, kind in self.kept(group).items():
            layout |= moment_form(parameter, group, kind).layout(name, parameter.shape)
        return layout

    def state_codecs(self) -> dict[int, dict[str, dict[str, Any]]]:
        """How the coded tensors of ``state_dict()`` are to be read: by index, by moment, the fields of the codec.

        Example:
            >>> import torch
            >>> from lowbit_optim import AdamW
            >>> optimizer = AdamW([torch.nn.Parameter(torch.ones(64, 64))], bits=4)
            >>> optimizer.state_codecs()[0]["exp_avg"]
            {'codebook': 'signed-4', 'bits': 4, 'block_size': 128}
        """
        codecs: dict[int, dict[str, dict[str, Any]]] = {}
        for index, (parameter, group) in enumerate(self._parameters()):
            forms = {name: moment_form(parameter, group, kind) for name, kind in self.kept(group).items()}
            if coded := {name: form.describe() for name, form in forms.items() if form.bits < 32}:
                codecs[index] = coded
        return codecs

    def create(self, parameter: Tensor, group: Group) -> dict[str, Any]:
        """The state of a parameter that takes a step of ours, made now if there is none."""
        own = self.state[parameter]
        if not own:
            layout = self.layout(parameter, group)
            for key in COUNTERS:
                shape, dtype = layout.pop(key)
                own[key] = torch.zeros(shape, dtype=dtype, device="cpu" if key == "step" else parameter.device)
            own.update({key: shards.zeros(shape, dtype, parameter) for key, (shape, dtype) in layout.items()})
        elif own["nonfinite"].device != parameter.device:  # the model was moved
            own.update({key: to_device(value, home(key, value, parameter, group, own)) for key, value in own.items()})
        return own

    def check_state(self, index: int, parameter: Tensor, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Raise ValueError if what is there of a parameter's state is not what its group's settings ask for."""
        if not own:
            return
        check_placed(index, parameter, own)
        layout = self.layout(parameter, group)
        if not self.takes(parameter, group):
            if wrong := [key for key in own if key.endswith((".codes", ".scales"))]:
                raise ValueError(
                    f"{where(index, parameter)} has the state {', '.join(wrong)}, but the settings of its group "
                    f"(bits={moment_bits(group)}, min_quant_size={group['min_quant_size']}) are for 32 bits: set them "
                    "back; to go on with others, make a new optimizer, which starts anew"
                )
            for key, (shape, _) in layout.items():
                if isinstance(own.get(key), Tensor) and own[key].shape != shape:
                    raise ValueError(f"{where(index, parameter)}: {key} is {list(own[key].shape)}")
            if lacks := [key for key in layout if key not in own]:
                raise ValueError(f"{where(index, parameter)}: the state lacks {', '.join(lacks)}")
            return
        if own.keys() != layout.keys():
            wrong = sorted(own.keys() ^ layout.keys())
            raise ValueError(
                f"{where(index, parameter)}: the state and the settings of its group (bits={moment_bits(group)}, "
                f"min_quant_size={group['min_quant_size']}) do not have the same tensors: {', '.join(wrong)}. Set them "
                "back; to go on with others, make a new optimizer, which starts anew"
            )
        check_tensors(where(index, parameter), own, layout)

    # ---- steps -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter with a gradient.

        Numbers of a gradient that are not finite count as zero where the step is ours; they are counted in the state
        and said once in the log. (torch's own step, for moments of 32 bits, lets them pass.)

        Args:
            closure: evaluated first, with gradients enabled; its value is returned.

        Raises:
            TypeError: a gradient that is sparse, or on another device mesh than its parameter, which takes a step of
                ours; nothing has changed then.
            ValueError: a group's settings were changed so that its state no longer fits, or a parameter that takes a
                step of ours is a DTensor cut other than into rows; nothing has changed then.

        Example:
            >>> import torch
            >>> from lowbit_optim import AdamW
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = AdamW([weight], bits=4)
            >>> weight.grad = torch.ones_like(weight)
            >>> weight.grad[0, :3] = float("inf")
            >>> optimizer.step()
            >>> int(optimizer.state[weight]["nonfinite"]), bool(weight.isfinite().all())
            (3, True)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours = []
        for index, (parameter, group) in enumerate(self._parameters()):
            if parameter.grad is not None:
                self.check_state(index, parameter, group, self.state.get(parameter, {}))
                if self.takes(parameter, group):
                    check_step(index, parameter)
                    ours.append((index, parameter, group))
        self._step_ours(ours)
        self._step_others({parameter for _, parameter, _ in ours})
        return loss

    def _step_ours(self, ours: list[tuple[int, Tensor, Group]]) -> None:
        if not ours:
            return
        steps, last, numbers = [], None, {}
        for index, parameter, group in ours:
            if group is not last:  # once for all of a group, for they may be on a device
                last, numbers = group, _numbers(group)
            steps.append(self._step_of(index, parameter, numbers))
        parameters = [parameter for _, parameter, _ in ours]
        bad = shards.total(kernels.take_steps(steps), parameters)
        for parameter, step, count in zip(parameters, steps, bad, strict=True):
            self.state[parameter]["step"] += 1
            self.state[parameter]["nonfinite"] += count
            here = shards.local(parameter)
            if not here.is_contiguous():
                here.copy_(step.parameter.view_as(here))
        increment_version([p for p in parameters if shards.is_dtensor(p)])  # torch has seen their rows change only
        total = torch.stack([count.to(bad[0].device) for count in bad]).sum()
        self._watch(total.unsqueeze(0))

    def _step_of(self, index: int, parameter: Tensor, group: Group) -> Step:
        own = self.create(parameter, group)
        count = int(own["step"]) + 1
        gradient = shards.local(placed_gradient(parameter))
        if gradient.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            gradient = gradient.float()
        rows = rows_to_step(parameter, group)
        return Step(
            self.rule,
            shards.local(parameter).detach().contiguous().view(rows),
            gradient.contiguous().view(rows),
            tuple(self._views(parameter, group, shards.here(own), rows)),
            self._keys_here(index, parameter, group, count),
            {
                "sign": -1.0 if group["maximize"] else 1.0,
                "stochastic": bool(group["stochastic_rounding"]),
                **self._rule_settings(group, count),
            },
        )

    def keys(self, index: int, group: Mapping[str, Any], count: int) -> Keys:
        """What determines the rounding in a step of the parameter of this index."""
        return keys(int(group["seed"]), index, count)

    def _keys_here(self, index: int, parameter: Tensor, group: Mapping[str, Any], count: int) -> Keys:
        """Those for the numbers that this process has of the parameter."""
        whole = self.keys(index, group, count)
        if not shards.is_dtensor(parameter) or not parameter.dim():
            return whole
        return shifted(whole, shards.first_row(parameter) * parameter.shape[1:].numel())

    def _views(self, parameter: Tensor, group: Group, own: dict[str, Any], rows: tuple[int, int]) -> Iterable[Moment]:
        kept = self.kept(group)
        for name, kind in self.moments.items():
            if name in kept:
                yield moment_form(parameter, group, kind).view(name, own, rows)
            else:  # a rule without this moment is one with a moment that starts anew
                yield zeros(*rows, 32, parameter.device)

    def _rule_settings(self, group: Group, count: int) -> dict[str, Any]:
        """The keywords of the rule in a parameter's step of this number."""
        raise NotImplementedError

    def _step_others(self, ours: set[Tensor]) -> None:
        """Torch's step, for all other parameters; those of each mesh apart, for torch's foreach does not mix them."""
        groups = self.param_groups
        others = [[p for p in group["params"] if p.grad is not None and p not in ours] for group in groups]
        step = unhooked(super().step.__func__)  # type: ignore[attr-defined]
        try:
            for mesh in dict.fromkeys(shards.mesh_of(p) for params in others for p in params):
                self.param_groups = [
                    {**group, "params": [p for p in params if shards.mesh_of(p) == mesh]}
                    for group, params in zip(groups, others, strict=True)
                ]
                step(self)
        finally:
            self.param_groups = groups

    def _parameters(self) -> list[tuple[Tensor, Group]]:
        return [(parameter, group) for group in self.param_groups for parameter in group["params"]]

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def report(self) -> str:
        """A table of every parameter's shape, how its moments are kept and their bytes, and the bytes by kind.

        Parameters that keep moments of 32 bits where fewer are asked for have the reason beside them.

        Example:
            >>> import torch
            >>> from lowbit_optim import AdamW
            >>> model = torch.nn.Linear(64, 64)
            >>> optimizer = AdamW(model.named_parameters(), bits=4)
            >>> model(torch.ones(1, 64)).sum().backward()
            >>> optimizer.step()
            >>> print(optimizer.report())
            parameter  shape    moments                            bytes  B/param
            ---------  -------  ---------------------------------  -----  -------
            weight     64 x 64  4 bits                             4,620     1.13
            bias       64       32 bits: fewer than 4096 elements    516     8.06
            <BLANKLINE>
            state     bytes  B/param
            --------  -----  -------
            moments   4,608    1.108
            scales      512    0.123
            counters     16    0.004
            total     5,136    1.235
        """
        return report(self)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError unless ``state_dict`` fits: its groups, and every tensor's name, shape and dtype.

        Example:
            >>> import torch
            >>> from lowbit_optim import AdamW
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> four, eight = AdamW([weight], bits=4), AdamW([weight], bits=8)
            >>> try:
            ...     eight.check_state_dict(four.state_dict())
            ... except ValueError as error:
            ...     print(str(error).partition(".")[0])
            ...
            the state dict has bits=4; the optimizer has 8
        """
        check_groups(state_dict, self.param_groups)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            name = "base_bits" if "base_bits" in group else "bits"
            if saved.get(name, group[name]) != group[name]:
                raise ValueError(
                    f"the state dict has {name}={saved[name]!r}; the optimizer has {group[name]!r}. Load it into an "
                    f"optimizer with the {name} that it has"
                )
            settings = {**group, **saved}
            check_group_of_moments(settings)
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                self.check_state(index, parameter, settings, state_dict["state"].get(index, {}))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict exactly: every tensor keeps its dtype and goes to its parameter's device.

        That of torch's optimizer of the same name is taken too: its moments become codes where this one has codes. For
        a parameter that is a DTensor, moments are DTensors placed as it is, or whole tensors, of which every process
        takes its rows.

        Args:
            state_dict: of an optimizer of this class, or of torch's of the same name, with the same groups.

        Raises:
            ValueError: it does not fit (see ``check_state_dict``); the optimizer is left as it was.

        Example:
            >>> import torch
            >>> from lowbit_optim import AdamW
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> torchs = torch.optim.AdamW([weight])
            >>> weight.grad = torch.ones_like(weight)
            >>> torchs.step()
            >>> optimizer = AdamW([weight], bits=4)
            >>> optimizer.load_state_dict(torchs.state_dict())
            >>> optimizer.state[weight]["exp_avg.codes"].dtype
            torch.uint8
        """

        def prepare(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            given = self._from_torch(given)
            self.check_state_dict(given)
            return sealed(self._placed(given))

        # As the last of the pre hooks, for the user's may change the state dict.
        seal = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            seal.remove()

    def _places(self, state_dict: Mapping[str, Any]) -> dict[Any, tuple[Tensor, Group]]:
        """The parameter, and its live group, of each index in a state dict."""
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=True)
        return {
            index: (parameter, group)
            for group, saved in pairs
            for parameter, index in zip(group["params"], saved["params"], strict=True)
        }

    def _placed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict that fits, with the moments placed as their parameters are."""
        state = dict(state_dict["state"])
        for index, (parameter, _) in self._places(state_dict).items():
            if own := state.get(index):
                state[index] = {k: v if k in COUNTERS else shards.placed(v, parameter) for k, v in own.items()}
        return {**state_dict, "state": state}

    def _from_torch(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict in which torch's moments are as this optimizer keeps them, and groups have all its keywords."""
        check_groups(state_dict, self.param_groups)
        groups = [
            {**{key: live[key] for key in self.own}, **saved}
            for live, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        state = dict(state_dict["state"])
        for index, (parameter, group) in self._places(state_dict).items():
            own = state.get(index)
            if own and self.takes(parameter, group) and "nonfinite" not in own:
                state[index] = self._encoded(index, parameter, group, own)
            elif own and not self.takes(parameter, group):  # as torch casts what it loads
                moments = {k: v.to(parameter.dtype) for k, v in own.items() if k != "step" and isinstance(v, Tensor)}
                state[index] = own | {k: v for k, v in moments.items() if own[k].is_floating_point()}
        return {**state_dict, "state": state, "param_groups": groups}

    def _encoded(self, index: int, parameter: Tensor, group: Group, own: Mapping[str, Any]) -> dict[str, Any]:
        """Torch's state of a parameter as it is kept here."""
        check_rows(index, parameter)
        check_placed(index, parameter, own)
        kept = self.kept(group)
        if missing := [name for name in kept if not isinstance(own.get(name), Tensor)]:
            raise ValueError(f"{where(index, parameter)}: the state dict lacks {', '.join(missing)}")
        encoded: dict[str, Any] = {
            "step": torch.tensor(float(own.get("step", 1)), device="cpu"),  # torch's SGD does not count
            "nonfinite": torch.zeros((), dtype=torch.int64),
        }
        for name, kind in kept.items():
            moment, form = own[name], moment_form(parameter, group, kind)
            if moment.shape != parameter.shape:
                raise ValueError(f"{where(index, parameter)}: its {name} in the state dict is {list(moment.shape)}")
            layout = form.layout(name, parameter.shape)
            parts = {key: shards.zeros(shape, dtype, parameter) for key, (shape, dtype) in layout.items()}
            key = self._keys_here(index, parameter, group, 0).moment
            form.write(name, shards.here(parts), shards.local(shards.placed(moment, parameter)), key)
            encoded |= parts
        return encoded

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state.get("param_groups", [])
        parameters = {parameter: group for group in groups for parameter in group["params"]}
        for parameter, own in state.get("state", {}).items():
            if parameter in parameters:
                own.update(opened(own, parameter, parameters[parameter]))
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self._keywords.items():  # what an older version did not know
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_keywords": self._keywords, "_watch": copy.copy(self._watch)}


def _numbers(group: Group) -> Group:
    """A group's settings, with numbers in the place of tensors."""
    return {key: _number(value) for key, value in group.items() if key not in ("params", "param_names")}


def _number(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_number, value))
    return value.item() if isinstance(value, Tensor) else value
