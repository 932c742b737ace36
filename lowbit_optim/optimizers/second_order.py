"""A second-order optimizer is a preconditioner in front of a first-order optimizer, both over the same param groups."""

import copy
import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_optim.distributed import DISTRIBUTION, Distribution
from lowbit_optim.optimizers.first_order import FirstOrder
from lowbit_optim.optimizers.report import report
from lowbit_optim.optimizers.settings import (
    KEPT_AS,
    RULES,
    STORED,
    base_class,
    base_name,
    check_base_keywords,
    check_group,
    kept_as,
    plain,
)
from lowbit_optim.optimizers.state import (
    BASE,
    LISTED_TWICE,
    base_part,
    check_base_part,
    check_groups,
    check_moments,
    check_shards,
    check_tensors,
    given_back,
    home,
    lent,
    opened,
    rebuild,
    sealed,
    to_device,
    unhooked,
    where,
    without_base,
)
from lowbit_optim.optimizers.stats import parameter_stats, to_host, treatment
from lowbit_optim.optimizers.watch import Watch
from lowbit_optim.preconditioners.kronecker import Group, KroneckerPreconditioner
from lowbit_optim.shards import is_dtensor, placed


class SecondOrder(Optimizer):
    """What every second-order optimizer of this library is: guard, precondition in place, then the base's own step.

    ``state[p]`` holds plain tensors under flat names: the preconditioner's ("step", "nonfinite", "left.rms",
    "left.root.codes", ...) and the base's under "base." ("base.exp_avg", ...). The base optimizer has no state of its
    own: it is lent its part for the length of its step.
    """

    # Whether the base could go on from its state without the preconditioner.
    base_stands_alone: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        preconditioner: KroneckerPreconditioner,
        settings: dict[str, Any],
        base: str | type[Optimizer],
        base_kwargs: dict[str, Any],
    ) -> None:
        self._distribution = Distribution(**{key: settings.pop(key) for key in DISTRIBUTION if key in settings})
        if self._distribution.shards == "local" and not preconditioner.on_shards:
            raise ValueError(f"shards='local': {type(self).__name__} needs whole matrices; leave shards out")
        base_type = base_class(base, settings["base_bits"])
        check_base_keywords(type(self).__name__, base_type, base_kwargs, settings)
        self.base: Optimizer | None = None
        self.preconditioner = preconditioner
        self._settings = tuple(key for key in settings if key != "lr")
        self._watch = Watch()
        self._low_bit_base = issubclass(base_type, FirstOrder)
        super().__init__(params, {**settings, "base": base_name(base_type), **base_kwargs})
        # The base fills in its own defaults in the very same group dicts.
        self.base = base_type(self.param_groups, **{"lr": settings["lr"], **base_kwargs})
        self.defaults.update({k: v for k, v in self.base.defaults.items() if k not in self.defaults})
        for group in self.param_groups:  # once more, now that the base's keywords are known
            self._refuse_misspelt(group)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; every keyword of the constructor may be set in it.

        Args:
            param_group: {"params": parameters or (name, parameter) pairs, keyword: value, ...}.

        Raises:
            ValueError: a setting or a combination of settings that cannot be, or a parameter that is there already;
                the optimizer is left as it was.
            TypeError: complex parameters, or a key that looks like a misspelt keyword.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> body, head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)
            >>> optimizer = Shampoo(body.parameters(), lr=1e-3)
            >>> optimizer.add_param_group({"params": head.parameters(), "lr": 1e-4, "precondition": False})
            >>> [group["lr"] for group in optimizer.param_groups]
            [0.001, 0.0001]
            >>> optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], "bits": 5})
            Traceback (most recent call last):
                ...
            ValueError: bits is 5; it must be one of 32, 16, 8, 4, 3, 2, 1.5, 1
        """
        if alien := param_group.keys() & set(DISTRIBUTION):
            raise ValueError(
                f"a param group has the key {', '.join(map(repr, sorted(alien)))}, which is a setting of the whole "
                f"optimizer: give it to {type(self).__name__}(...) itself"
            )
        self._refuse_misspelt(param_group)
        group = {**self.defaults, **param_group}
        if group["base"] != self.defaults["base"]:
            raise ValueError(f"a param group has base={group['base']!r}; an optimizer has one base for all its groups")
        check_group(group, self.preconditioner, self._low_bit_base)
        param_group.update({key: plain(group[key]) for key in self._settings})
        count = len(self.param_groups)
        super().add_param_group(param_group)
        own = self.param_groups[-1]["params"]
        if len(set(own)) < len(own):
            del self.param_groups[count:]
            raise ValueError(LISTED_TWICE)
        for parameter in own:
            if parameter.is_complex():
                del self.param_groups[count:]
                raise TypeError(
                    f"a parameter is {parameter.dtype}; complex parameters are not supported: view_as_real()"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition every ``p.grad`` in place, then let the base optimizer step.

        Gradients change in place, as clipping does: clip before, and do not read them as gradients after.

        Args:
            closure: evaluated first, with gradients enabled; its value is returned.

        Raises:
            TypeError: a sparse gradient; nothing has changed then.
            ValueError: a group's settings were changed so that its state no longer fits; nothing has changed then.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = Shampoo([weight], lr=0.5, base="sgd", statistics_frequency=1)
            >>> weight.grad = torch.eye(64)
            >>> optimizer.step()
            >>> weight.detach()[0, :2]
            tensor([0.5000, 1.0000])
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        self._agree_on_step()
        with_gradients = [(p, group) for p, group in self._parameters() if p.grad is not None]
        for parameter, _ in with_gradients:
            _unfold(parameter)
        self._create_state(with_gradients)
        self._watch(self.preconditioner.step(self.param_groups, self.state))
        self._step_base()
        return loss

    def _agree_on_step(self) -> None:
        """Check what every step needs; in a process group, that all agree, and that nobody has found anything wrong."""
        team = self.preconditioner.team
        if team is None:
            self._check_step()
            return
        self.preconditioner.place(self.param_groups)
        problem: Exception | None = None
        try:
            self._check_step()
        except (TypeError, ValueError, RuntimeError) as error:
            problem = error
        known = self.defaults.keys() - {"kept_as"}
        groups = [{k: g[k] for k in known & g.keys() if not isinstance(g[k], Tensor)} for g in self.param_groups]
        described = {
            "whether a step can be taken": str(problem or "yes"),
            "the class": type(self).__name__,
            "the settings": [sorted(group.items()) for group in groups],
            "the parameters": [(tuple(p.shape), p.dtype) for p, _ in self._parameters()],
            "which of the parameters have a gradient": [int(p.grad is not None) for p, _ in self._parameters()],
            "which of them owns which blocks": self.preconditioner.placed,
            "steps": [int(self.state[p].get("step", 0)) if p in self.state else 0 for p, _ in self._parameters()],
        }
        team.agree(described, self._parameters()[0][0].device, problem)

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; in a process group every rank must call it, and factors are DTensors.

        They are sharded evenly on their first dim, the blocks, whichever rank works on which, so that
        ``torch.distributed.checkpoint`` saves them and loads them into any number of processes.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = Shampoo([weight], lr=1e-3)
            >>> weight.grad = torch.eye(64)
            >>> optimizer.step()
            >>> for name, value in optimizer.state_dict()["state"][0].items():
            ...     if name.startswith(("left.root", "base.exp_avg")):
            ...         print(name, value.dtype, tuple(value.shape))
            ...
            left.root.diagonal torch.float32 (1, 64)
            left.root.codes torch.uint8 (1, 1008)
            left.root.scales torch.uint8 (1, 32)
            left.root.scale_maxima torch.float32 (1, 1)
            base.exp_avg torch.float32 (64, 64)
            base.exp_avg_sq torch.float32 (64, 64)
        """
        whole: dict[str, Any] = super().state_dict()
        self._prepare()
        self.preconditioner.place(self.param_groups)
        if self.preconditioner.team is not None:
            for index, (parameter, group) in enumerate(self._parameters()):
                if index in whole["state"]:
                    whole["state"][index] = self.preconditioner.shown(parameter, group, whole["state"][index])
        return whole

    def init_state(self) -> None:
        """Create the preconditioner's state of every parameter now instead of at its first step.

        The base's state still comes with its first step.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = Shampoo([weight], lr=1e-3)
            >>> len(optimizer.state[weight])
            0
            >>> optimizer.init_state()
            >>> "left.root.codes" in optimizer.state[weight]
            True
        """
        self._prepare()
        self.preconditioner.place(self.param_groups)
        self._create_state(self._parameters())

    def state_codecs(self) -> dict[int, dict[str, dict[str, Any]]]:
        """How the coded tensors of ``state_dict()`` are to be read.

        Returns:
            For each parameter's index, for each factor ("left", "right") and each of the base's moments in codes
            ("base.exp_avg", ...), a JSON-able dict: the form, and the fields of its ``Quantization``.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> optimizer = Shampoo([torch.nn.Parameter(torch.ones(64, 64))], lr=1e-3)
            >>> optimizer.init_state()
            >>> left = optimizer.state_codecs()[0]["left"]
            >>> left["form"], left["codec"]["layout"]
            ('root', 'triangle')
            >>> left["codec"]["codec"]
            {'bits': 4, 'codebook': 'nf', 'block_size': 64, 'double': True, 'scale': 'fitted', 'rounding': 'adaptive'}
        """
        self._prepare()
        codecs: dict[int, dict[str, dict[str, Any]]] = {}
        for index, (parameter, group) in enumerate(self._parameters()):
            cut = self.preconditioner.blocking(parameter, group)
            if parameter in self.state and cut is not None:
                forms = self.preconditioner.forms(group, cut)
                codecs[index] = {"left": forms.left.describe(), "right": forms.right.describe()}
        if isinstance(self.base, FirstOrder):
            for index, moments in self.base.state_codecs().items():
                codecs.setdefault(index, {}).update(given_back(moments))
        return codecs

    @torch.no_grad()
    def stats(self) -> dict[str | int, dict[str, Any]]:
        """What has become of each parameter, for a log: plain strings and numbers, in one copy to the host.

        Returns:
            For each parameter, by its name if the groups have names (``model.named_parameters()``) and no two are the
            same, else by its index in ``state_dict()``:

            * "treatment": as "Shampoo: 8 blocks of 128 x 128, root, 2 bits", or "base". A factor below
              ``min_quant_size`` is "uncoded".
            * "steps": with a gradient. "nonfinite": gradient blocks that were replaced by zeros.
            * "left.updates", "right.updates": statistics in the factor, of the block with the fewest.
            * "left.failures", "right.failures": updates and refreshes that failed, over all blocks.
            * "left.rounding_error", "right.rounding_error": how far rounding has put the root off, as it is kept
              (storage "logarithm": the logarithm; "root" in K-FAC and AdaBK: A^(-1/4)), when it was written last.
              Estimated from codes and scales; relative, by Frobenius norms, of the worst block. Earlier roundings are
              in the average and do not count. None without a factor in use, and of SOAP and EKFAC.
            * "bytes": of the preconditioner's state; the base's comes on top.

            In a process group all but "steps" and "nonfinite" is of this process's blocks.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = Shampoo([("weight", weight)], lr=1e-3, statistics_frequency=1)
            >>> weight.grad = torch.full_like(weight, float("nan"))
            >>> optimizer.step()
            >>> own = optimizer.stats()["weight"]
            >>> own["treatment"]
            'Shampoo: 64 x 64, root, 2 bits'
            >>> own["steps"], own["nonfinite"], own["left.updates"], own["bytes"]
            (1, 1, 0, 2648)
        """
        self._prepare()
        treated = self._treatments()
        found: dict[str | int, dict[str, Any]] = {}
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        named = len(set(names)) == len(treated)  # torch takes the same name in two groups
        for index, (parameter, group) in enumerate(self._parameters()):
            cut = self.preconditioner.blocking(parameter, group)
            forms = None if cut is None else self.preconditioner.forms(group, cut)
            numbers = parameter_stats(self.state.get(parameter, {}), cut, forms, group["workspace"])
            found[names[index] if named else index] = {"treatment": treated[parameter], **numbers}
        to_host(list(found.values()))
        return found

    def report(self) -> str:
        """A plain-text table of every parameter's treatment and of the bytes of its state, and totals by kind.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> model = torch.nn.Linear(64, 64)
            >>> optimizer = Shampoo(model.named_parameters(), lr=1e-3)
            >>> model(torch.ones(1, 64)).sum().backward()
            >>> optimizer.step()
            >>> print(optimizer.report())
            parameter  shape    preconditioner                  moments   bytes  B/param
            ---------  -------  ------------------------------  -------  ------  -------
            weight     64 x 64  Shampoo: 64 x 64, root, 2 bits  32 bits  35,420     8.65
            bias       64       base                            32 bits     532     8.31
            <BLANKLINE>
            state      bytes  B/param
            --------  ------  -------
            roots      2,528    0.608
            moments   33,280    8.000
            scales        88    0.021
            counters      56    0.013
            total     35,952    8.642
        """
        self._prepare()
        return report(self, self._treatments())

    def _treatments(self) -> dict[Tensor, str]:
        """In words how each parameter is treated."""
        name, cut = type(self).__name__, self.preconditioner.blocking
        return {p: treatment(name, cut(p, group), group) for p, group in self._parameters()}

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError unless ``state_dict`` fits: its groups, and every tensor's name, shape and dtype.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> two, four = Shampoo([weight], bits=2), Shampoo([weight], bits=4)
            >>> try:
            ...     four.check_state_dict(two.state_dict())
            ... except ValueError as error:
            ...     print(str(error).partition(".")[0])
            ...
            the state dict has bits=2; the optimizer has 4
        """
        self._check_groups(state_dict)
        self._prepare()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved = {"base_bits": 32, **saved}  # which older versions did not know
            stored = [key for key in STORED if key in group]
            if missing := [key for key in stored if key not in saved]:
                lacks = ", ".join(missing)
                raise ValueError(f"the state dict's param groups lack {lacks}: it is not of {type(self).__name__}")
            saved = {**{key: self.defaults[key] for key in self._settings}, **saved}
            check_group(saved, self.preconditioner, self._low_bit_base)
            for key in stored:
                if kept_as(key, saved[key]) != kept_as(key, group[key]):
                    raise ValueError(
                        f"the state dict has {key}={saved[key]!r}; the optimizer has {group[key]!r}. Load it into an "
                        f"optimizer with the {key} that it has" + f"; {self._other_kept_as}" * (key != "base")
                    )
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(index)
                if state:
                    self._check_state(index, parameter, saved, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict exactly: every tensor keeps its dtype and goes to its parameter's device.

        Args:
            state_dict: of an optimizer of this class with the same groups of parameters. In a process group every rank
                must call this.

        Raises:
            ValueError: it does not fit (see ``check_state_dict``); the optimizer is left as it was.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = Shampoo([weight], lr=1e-3)
            >>> weight.grad = torch.eye(64)
            >>> optimizer.step()
            >>> resumed = Shampoo([weight], lr=1e-3)
            >>> resumed.load_state_dict(optimizer.state_dict())
            >>> int(resumed.state[weight]["step"]), resumed.state[weight]["left.root.codes"].dtype
            (1, torch.uint8)
        """
        # As the last of the pre hooks, for the user's may change the state dict.
        seal = self.register_load_state_dict_pre_hook(lambda _, given: self._sealed(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            seal.remove()
        self._prepare()

    def base_state_dict(self) -> dict[str, Any]:
        """The base's part of ``state_dict()``, which an optimizer of the base's class loads to go on by itself.

        Its param groups have the base's options only. Tensors are the live ones, as in ``state_dict()``.

        Raises:
            ValueError: the base cannot go on by itself (SOAP).

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = Shampoo([weight], lr=1e-3)
            >>> weight.grad = torch.eye(64)
            >>> optimizer.step()
            >>> adamw = torch.optim.AdamW([weight])
            >>> adamw.load_state_dict(optimizer.base_state_dict())
            >>> sorted(adamw.state[weight])
            ['exp_avg', 'exp_avg_sq', 'step']
        """
        self._check_base_alone()
        return base_part(self.state_dict(), self._ours)

    def load_base_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base's class: a run that it began goes on here, with its moments.

        The base's options (lr, betas, ...) come with it, as in ``load_state_dict``; the settings of this class stay,
        and so does what its preconditioner has. Where that has nothing yet, its steps count from now on.

        Args:
            state_dict: of an optimizer of the base's class with the same groups of parameters, or
                ``base_state_dict()`` of one of this library.

        Raises:
            ValueError: it lacks options or moments of the base, or does not fit the parameters, or the base cannot go
                on by itself (SOAP); the optimizer is left as it was.

        Example:
            >>> import torch
            >>> from lowbit_optim import Shampoo
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> adamw = torch.optim.AdamW([weight], lr=5e-4)
            >>> weight.grad = torch.eye(64)
            >>> adamw.step()
            >>> optimizer = Shampoo([weight])
            >>> optimizer.load_base_state_dict(adamw.state_dict())
            >>> optimizer.param_groups[0]["lr"], float(optimizer.state[weight]["base.step"])
            (0.0005, 1.0)
        """
        self._check_base_alone()
        self._check_groups(state_dict)
        assert self.base is not None
        # Older versions of torch lack some of the switches, and torch itself our keywords; the base has defaults.
        ours = self.base.own if isinstance(self.base, FirstOrder) else ()
        options = {k: v for k, v in self.base.defaults.items() if k not in ours}
        check_base_part(state_dict, self.defaults["base"], options)
        self._prepare()
        # Read by an optimizer of the base's class, which knows what its older versions lacked, and how it casts.
        reader = rebuild(*self._base_and_attributes(), [dict(group) for group in self.param_groups])
        reader.load_state_dict(state_dict)
        for index, (parameter, _) in enumerate(self._parameters()):
            check_moments(index, parameter, reader.state.get(parameter, {}))
        whole = self.state_dict()  # to be loaded at once, so that nothing has changed if it does not fit
        for index, (parameter, group) in enumerate(self._parameters()):
            own, read = whole["state"].get(index, {}), reader.state.get(parameter, {})
            kept = without_base(own)
            if read and self._lacks_state(parameter, group, kept):
                first = self.preconditioner.init_state(parameter, group)
                kept = {**self.preconditioner.shown(parameter, group, first), **kept}
            if kept:
                whole["state"][index] = kept | given_back(read)
        for group, read in zip(whole["param_groups"], reader.param_groups, strict=True):
            group.update({k: v for k, v in read.items() if k not in {"params", "param_names", *self._ours}})
            if any(index in whole["state"] for index in group["params"]):
                _fix(group)
        self.load_state_dict(whole)

    def _check_base_alone(self) -> None:
        if not self.base_stands_alone:
            name = type(self).__name__
            raise ValueError(
                f"{name} keeps the moments of {self.defaults['base']} in the eigenbases of its factors, where no other "
                f"optimizer can go on with them, nor {name} with those of another: start {name} or the other anew"
            )

    @property
    def _other_kept_as(self) -> str:
        """The way to other settings of ``KEPT_AS``."""
        if not self.base_stands_alone:
            return (
                "to go on with another, convert a checkpoint (`lowbit-optim convert`: bits, storage, base_bits), or "
                "make a new optimizer, which starts anew"
            )
        return (
            "to go on with another, convert a checkpoint (`lowbit-optim convert`: bits, storage, base_bits), or make a "
            "new optimizer, whose factors start anew, and keep the moments: "
            "new.load_base_state_dict(old.base_state_dict())"
        )

    @property
    def _ours(self) -> set[str]:
        """The keys of param groups that are not the base's."""
        return {*self._settings, "base", "kept_as"}

    def _check_groups(self, state_dict: Mapping[str, Any]) -> None:
        check_groups(state_dict, self.param_groups)

    def _sealed(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict that fits, so that torch leaves it as it is: it casts every tensor to the parameter's dtype."""
        self._prepare()
        self._agree_on_state(state_dict)
        # What the state dict says of blocks goes for its state.
        groups = [
            {**group, **saved, "params": group["params"]}
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        self.preconditioner.place(groups)
        state = dict(state_dict["state"])
        for group, saved in zip(groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                if index in state:
                    own = {k: placed(v, parameter) if _is_moment(k, v) else v for k, v in state[index].items()}
                    state[index] = self.preconditioner.taken(parameter, group, own)
        return sealed({**state_dict, "state": state})

    def _agree_on_state(self, state_dict: Mapping[str, Any]) -> None:
        """Check a state dict; in a process group, that all have the same, for they take it together."""
        team = self.preconditioner.team
        if team is None:
            self.check_state_dict(state_dict)
            return
        problem: Exception | None = None
        names: list[Any] = []
        try:
            self.check_state_dict(state_dict)
            for index, own in state_dict["state"].items():
                names.append((index, sorted((key, is_dtensor(value)) for key, value in own.items())))
        except Exception as error:  # whatever it is, the others must hear of it
            problem = error
        described = {"whether the state dict fits": str(problem or "yes"), "the tensors in the state dict": names}
        team.agree(described, self._parameters()[0][0].device, problem)

    def __setstate__(self, state: dict[str, Any]) -> None:
        base = state.pop("base", None)
        if "_distribution" not in vars(self):
            self._distribution = state.pop("_distribution", Distribution())
        super().__setstate__(state)
        if base is not None:  # from a pickle or a copy, where torch keeps nothing of an optimizer but these three
            kind, attributes = base
            self.base = rebuild(kind, attributes, self.param_groups)
        for group in self.param_groups:
            for key in self._settings:  # what an older version did not know
                group.setdefault(key, plain(self.defaults[key]))
        for parameter, group in self._parameters():
            own = self.state.get(parameter, {})
            self.state[parameter] = opened(own, parameter, group)
            if not own:
                del self.state[parameter]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "base": self._base_and_attributes(),
            "preconditioner": self.preconditioner,
            "_settings": self._settings,
            "_low_bit_base": self._low_bit_base,
            "_distribution": self._distribution,
            "_watch": copy.copy(self._watch),
        }

    def _base_and_attributes(self) -> tuple[type[Optimizer], dict[str, Any]]:
        """What ``rebuild`` makes another base of."""
        assert self.base is not None
        own = ("state", "param_groups")
        attributes = {k: v for k, v in vars(self.base).items() if k not in own and not k.startswith("_optimizer_")}
        return type(self.base), attributes | {"defaults": dict(self.base.defaults)}

    def _prepare(self) -> None:
        parameters = [parameter for parameter, _ in self._parameters()]
        self.preconditioner.team = self._distribution.team(parameters)
        self.preconditioner.prepare(self.param_groups, self.state)

    def _refuse_misspelt(self, group: Group) -> None:
        for key in group.keys() - self.defaults.keys() - {"params", "param_names"}:
            if key in RULES:
                name = type(self).__name__
                raise TypeError(f"param group has the key {key!r}, which is no setting of {name}: leave it out")
            for meant in difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.85):
                raise TypeError(f"param group has the unknown key {key!r}; did you mean {meant!r}?")

    def _check_step(self) -> None:
        if isinstance(self.base, FirstOrder):
            for index, (parameter, group) in enumerate(self._parameters()):
                if parameter.grad is not None and not self._lends_rows(parameter, group):
                    self.base.check_state(index, parameter, group, lent(self.state.get(parameter, {})))
        for group in self.param_groups:
            for key, kept in zip(KEPT_AS, group.get("kept_as", ()), strict=False):
                if group.get(key) != kept:
                    raise ValueError(
                        f"a param group's {key} was changed from {kept!r} to {group[key]!r}, which no longer fits its "
                        f"state: {', '.join(k for k in KEPT_AS if k in group)} must stay as at the first step. "
                        f"Set it back; {self._other_kept_as}"
                    )
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise TypeError(
                        f"a gradient of shape {tuple(parameter.shape)} is {parameter.grad.layout}; only dense "
                        "gradients can be preconditioned: build the embedding with sparse=False"
                    )

    def _lends_rows(self, parameter: Tensor, group: Group) -> bool:
        """Whether of a parameter's moments this process may have only some rows, or none, though it has all of it."""
        return False

    def _parameters(self) -> list[tuple[Tensor, Group]]:
        return [(parameter, group) for group in self.param_groups for parameter in group["params"]]

    def _create_state(self, parameters: list[tuple[Tensor, Group]]) -> None:
        for parameter, group in parameters:
            own = self.state[parameter]
            if self._lacks_state(parameter, group, own):
                _fix(group)
                own.update({**self.preconditioner.init_state(parameter, group), **own})
            elif own["nonfinite"].device != parameter.device:  # the model was moved
                self.state[parameter] = {k: to_device(v, home(k, v, parameter, group, own)) for k, v in own.items()}

    def _lacks_state(self, parameter: Tensor, group: Group, own: Mapping[str, Any]) -> bool:
        """Whether the preconditioner has nothing of a parameter yet, or no factors, which a group may ask for later."""
        wanted = self.preconditioner.blocking(parameter, group) is not None
        return "step" not in own or (wanted and "left.failures" not in own)

    def _check_state(self, index: int, parameter: Tensor, group: Group, state: Mapping[str, Any]) -> None:
        own = without_base(state)
        # Factors stay where they are while a group does without them.
        group = {**group, "precondition": group["precondition"] or "left.failures" in own}
        expected = self.preconditioner.layout(parameter, group)
        name = where(index, parameter)
        check_shards(name, own, expected)
        if own.keys() != expected.keys():
            wrong = ", ".join(sorted(own.keys() ^ expected.keys()))
            raise ValueError(
                f"{name}: the state dict and the optimizer's settings do not have the same tensors: {wrong}"
            )
        check_tensors(name, own, expected)
        check_moments(index, parameter, lent(state))
        if isinstance(self.base, FirstOrder) and not self._lends_rows(parameter, group):
            self.base.check_state(index, parameter, group, lent(state))

    def _step_base(self) -> None:
        """The base's step, without its hooks: this optimizer's own step has fired the global ones already."""
        self._step_base_on({})

    def _step_base_on(self, instead: Mapping[Tensor, Tensor]) -> None:
        """Likewise, on other tensors instead of some parameters."""
        assert self.base is not None
        self.base.state = defaultdict(dict)
        for parameter, own in self.state.items():
            if own_of_base := lent(own):
                self.base.state[instead.get(parameter, parameter)] = own_of_base
        groups = [{**group, "params": [instead.get(p, p) for p in group["params"]]} for group in self.param_groups]
        try:
            for some in self._apart(groups, {*instead.values()}) if instead else [self.param_groups]:
                self.base.param_groups = some
                unhooked(type(self.base).step)(self.base)
            back = {stand_in: parameter for parameter, stand_in in instead.items()}
            for parameter, own in self.base.state.items():
                self.state[back.get(parameter, parameter)].update(given_back(own))
        finally:
            self.base.state = defaultdict(dict)
            self.base.param_groups = self.param_groups

    def _apart(self, groups: list[Group], plain: set[Tensor]) -> list[list[Group]]:
        """Groups with plain tensors among DTensors, which torch's optimizers do not take together, one kind a time."""
        if isinstance(self.base, FirstOrder):  # it knows, and numbers parameters by their places
            return [groups]
        return [
            [{**group, "params": [p for p in group["params"] if (p in plain) == first]} for group in groups]
            for first in (True, False)
        ]


def _fix(group: Group) -> None:
    """Note what of a group's settings must stay, now that there is state."""
    group.setdefault("kept_as", tuple(group.get(key) for key in KEPT_AS))


def _unfold(parameter: Tensor) -> None:
    """Give a parameter a gradient that can be written to, if several of its numbers are one (``expand``)."""
    gradient = parameter.grad
    assert gradient is not None
    if any(stride == 0 and size > 1 for stride, size in zip(gradient.stride(), gradient.shape, strict=True)):
        parameter.grad = gradient.clone(memory_format=torch.contiguous_format)


def keywords(given: dict[str, Any], *others: str) -> dict[str, Any]:
    """The settings of param groups among the locals of a constructor, without those that it names."""
    others = ("self", "params", "base", "base_kwargs", "__class__", *others)
    return {key: value for key, value in given.items() if key not in others}


def _is_moment(key: str, value: Any) -> bool:
    """Whether a tensor in a parameter's state has its rows."""
    return key.startswith(BASE) and isinstance(value, Tensor) and value.dim() > 0
