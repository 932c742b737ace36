"""A second-order optimizer is a preconditioner in front of a first-order optimizer, both over the same param groups."""

import difflib
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_optim.preconditioners.kronecker import Group, KroneckerPreconditioner, group_form
from lowbit_optim.storage import Quantization
from lowbit_optim.storage.budget import BITS

logger = logging.getLogger("lowbit_optim")

BASES: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}
_BASE = "base."


def base_class(base: str | type[Optimizer]) -> type[Optimizer]:
    """The optimizer class that ``base`` names or is."""
    if isinstance(base, str) and base in BASES:
        return BASES[base]
    if isinstance(base, type) and issubclass(base, Optimizer):
        return base
    raise ValueError(
        f"base is {base!r}; it must be one of {', '.join(map(repr, BASES))} or a subclass of torch.optim.Optimizer"
    )


class SecondOrder(Optimizer):
    """What every second-order optimizer of this library is: guard, precondition in place, then the base's own step.

    ``state[p]`` holds plain tensors under flat names: the preconditioner's ("step", "nonfinite", "left.rms",
    "left.root.codes", ...) and the base's under "base." ("base.exp_avg", ...). The base optimizer has no state of its
    own: it is lent its part for the length of its step.
    """

    preconditioner_class: ClassVar[type[KroneckerPreconditioner]]

    def __init__(
        self,
        params: Any,
        settings: dict[str, Any],
        base: str | type[Optimizer],
        base_kwargs: dict[str, Any],
    ) -> None:
        base_type = base_class(base)
        _check_base_kwargs(type(self), base_type, base_kwargs, settings)
        self.base: Optimizer | None = None
        self.preconditioner = self.preconditioner_class()
        self._warned = False
        self._pending: list[tuple[Tensor, torch.cuda.Event]] = []
        super().__init__(params, {**settings, **base_kwargs})
        # The base fills in its own defaults in the very same group dicts.
        self.base = base_type(self.param_groups, **{"lr": settings["lr"], **base_kwargs})
        self.defaults.update({k: v for k, v in self.base.defaults.items() if k not in self.defaults})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; every keyword of the constructor may be set in it.

        Raises:
            ValueError: a setting or a combination of settings that cannot be; the optimizer is left as it was.
            TypeError: complex parameters, or a key that looks like a misspelt keyword.
        """
        for key in param_group.keys() - self.defaults.keys() - {"params", "param_names"}:
            for meant in difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.85):
                raise TypeError(f"param group has the unknown key {key!r}; did you mean {meant!r}?")
        group = {**self.defaults, **param_group}
        check_group(group)
        if isinstance(group["quantization"], Quantization):  # a plain tuple: torch.load(weights_only=True) must take it
            param_group["quantization"] = astuple(group["quantization"])
        count = len(self.param_groups)
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise TypeError(
                        f"a gradient of shape {tuple(parameter.shape)} is {parameter.grad.layout}; only dense "
                        "gradients can be preconditioned: build the embedding with sparse=False"
                    )
        self._create_state(only_with_gradient=True)
        self._watch(self.preconditioner.step(self.param_groups, self.state))
        self._step_base()
        return loss

    def init_state(self) -> None:
        """Create the preconditioner's state of every parameter now instead of at its first step.

        The base's state still comes with its first step.
        """
        self._create_state(only_with_gradient=False)

    def state_codecs(self) -> dict[int, dict[str, dict[str, Any]]]:
        """How the coded tensors of ``state_dict()`` are to be read.

        Returns:
            For each parameter's index, for each factor ("left", "right"), a JSON-able dict: the form, and the fields
            of its ``Quantization``.
        """
        codecs: dict[int, dict[str, dict[str, Any]]] = {}
        for index, (parameter, group) in enumerate(self._parameters()):
            cut = self.preconditioner.blocking(parameter, group)
            if parameter in self.state and cut is not None:
                codecs[index] = {
                    "left": group_form(group, cut.rows).describe(),
                    "right": group_form(group, cut.columns).describe(),
                }
        return codecs

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError unless ``state_dict`` fits: its groups, and every tensor's name, shape and dtype."""
        saved_groups = state_dict["param_groups"]
        sizes = [len(g["params"]) for g in self.param_groups]
        saved_sizes = [len(g["params"]) for g in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(f"the state dict has param groups of sizes {saved_sizes}; the optimizer's are {sizes}")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            missing = self.defaults.keys() - saved.keys()
            if missing:
                lacks = ", ".join(sorted(missing))
                raise ValueError(f"the state dict's param groups lack {lacks}: it is not of {type(self).__name__}")
            check_group(saved)
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(index)
                if state:
                    self._check_state(index, parameter, saved, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict exactly: every tensor keeps its dtype and goes to its parameter's device.

        Raises:
            ValueError: it does not fit (see ``check_state_dict``); the optimizer is left as it was.
        """
        self.check_state_dict(state_dict)
        # torch casts the state of floating parameters to their dtype, codes and all; what it does not know it leaves.
        sealed = {index: {k: _Sealed(v) for k, v in own.items()} for index, own in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": sealed})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter, group in self._parameters():
            own = self.state.get(parameter, {})
            self.state[parameter] = {
                k: v.open(_home(k, v.value, parameter, group)) if isinstance(v, _Sealed) else v for k, v in own.items()
            }
            if not own:
                del self.state[parameter]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "base": self.base,
            "preconditioner": self.preconditioner,
            "_warned": self._warned,
            "_pending": [],
        }

    def _parameters(self) -> list[tuple[Tensor, Group]]:
        return [(parameter, group) for group in self.param_groups for parameter in group["params"]]

    def _create_state(self, *, only_with_gradient: bool) -> None:
        for parameter, group in self._parameters():
            if only_with_gradient and parameter.grad is None:
                continue
            own = self.state[parameter]
            if "step" not in own:
                own.update(self.preconditioner.init_state(parameter, group))
            elif own["nonfinite"].device != parameter.device:  # the model was moved
                self.state[parameter] = {k: _to(v, _home(k, v, parameter, group)) for k, v in own.items()}

    def _check_state(self, index: int, parameter: Tensor, group: Group, state: Mapping[str, Any]) -> None:
        expected = self.preconditioner.init_state(parameter, group, "meta")
        own = {key: value for key, value in state.items() if not key.startswith(_BASE)}
        where = f"parameter {index} of shape {tuple(parameter.shape)}"
        if own.keys() != expected.keys():
            wrong = ", ".join(sorted(own.keys() ^ expected.keys()))
            raise ValueError(
                f"{where}: the state dict and the optimizer's settings do not have the same tensors: {wrong}"
            )
        for key, tensor in expected.items():
            got = own[key]
            if not isinstance(got, Tensor) or got.shape != tensor.shape or got.dtype != tensor.dtype:
                got = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
                raise ValueError(f"{where}: {key} is {got}; it must be {tensor.dtype} {list(tensor.shape)}")

    def _step_base(self) -> None:
        """The base's step, without its hooks: this optimizer's own step has fired the global ones already."""
        assert self.base is not None
        self.base.param_groups = self.param_groups
        self.base.state = defaultdict(dict)
        for parameter, own in self.state.items():
            lent = {key.removeprefix(_BASE): value for key, value in own.items() if key.startswith(_BASE)}
            if lent:
                self.base.state[parameter] = lent
        step = type(self.base).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]
        step(self.base)
        for parameter, lent in self.base.state.items():
            self.state[parameter].update({f"{_BASE}{key}": value for key, value in lent.items()})
        self.base.state = defaultdict(dict)

    def _watch(self, troubles: Tensor | None) -> None:
        """Warn once when something was guarded against. On CUDA the counts are looked at when they have arrived."""
        if troubles is None or self._warned:
            return
        if troubles.is_cuda:
            host = troubles.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((host, event))
        arrived = [host for host, event in self._pending if event.query()] if troubles.is_cuda else [troubles]
        self._pending = [(host, event) for host, event in self._pending if not event.query()]
        nonfinite, failed = (sum(int(t[i]) for t in arrived) for i in (0, 1))
        if nonfinite:
            logger.warning(
                "%d gradient blocks were not finite and were replaced by zeros; state[p]['nonfinite'] counts them. "
                "This is said once.",
                nonfinite,
            )
        if failed:
            logger.warning(
                "%d matrix decompositions failed and the last good factors were kept; state[p]['left.failures'] and "
                "'right.failures' count them. This is said once.",
                failed,
            )
        self._warned = bool(nonfinite or failed)


class _Sealed:
    """A state value that ``Optimizer.load_state_dict`` passes on as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def open(self, device: torch.device) -> Any:
        """The value; a tensor as a copy on ``device``, so that two optimizers never share state."""
        return self.value.detach().to(device, copy=True) if isinstance(self.value, Tensor) else self.value


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _home(key: str, value: Any, parameter: Tensor, group: Group) -> torch.device:
    """Where a state tensor belongs: with its parameter; step counters on the CPU unless the base wants otherwise."""
    on_cpu = key == "step" or (key == "base.step" and not (group.get("capturable") or group.get("fused")))
    return torch.device("cpu") if on_cpu and isinstance(value, Tensor) and value.dim() == 0 else parameter.device


def _check_base_kwargs(
    optimizer: type[Optimizer], base: type[Optimizer], kwargs: dict[str, Any], settings: dict[str, Any]
) -> None:
    known = inspect.signature(base).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    unknown = kwargs.keys() - known.keys()
    if unknown:
        raise TypeError(
            f"{optimizer.__name__} got the unknown keyword {', '.join(map(repr, sorted(unknown)))}. "
            f"It knows base, {', '.join(sorted(settings))}. "
            f"Its base {base.__name__} knows {', '.join(k for k in known if k != 'params')}"
        )


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group's settings, or two of them together, cannot be."""

    def need(key: str, rule: str, ok: bool) -> None:
        if not ok:
            raise ValueError(f"{key} is {group[key]!r}; it must be {rule}")

    for key in (
        "max_preconditioner_dim",
        "statistics_frequency",
        "start_preconditioning_step",
        "root_power",
        "workspace",
    ):
        need(key, "a positive integer", _is_int(group[key]) and group[key] >= 1)
    for key in ("min_quant_size", "rectify_update", "rectify_root", "orthogonal_iterations"):
        least = 1 if key == "orthogonal_iterations" else 0
        need(key, f"an integer of at least {least}", _is_int(group[key]) and group[key] >= least)
    refresh = group["precondition_frequency"]
    need("precondition_frequency", "None or a positive integer", refresh is None or (_is_int(refresh) and refresh >= 1))
    need("shampoo_beta", "in [0, 1)", 0 <= group["shampoo_beta"] < 1)
    need("matrix_eps", "in (0, 1)", 0 < group["matrix_eps"] < 1)
    need("initial_scale", "at least 0", group["initial_scale"] >= 0)
    need("statistic_limit", "above 0", group["statistic_limit"] > 0)
    need("bits", f"one of {', '.join(map(str, BITS))}", group["bits"] in BITS)
    for key in ("graft", "precondition"):
        need(key, "True or False", isinstance(group[key], bool))
    if isinstance(group["quantization"], (tuple, list)):
        Quantization(*group["quantization"])
    else:
        need("quantization", "a Quantization or None", isinstance(group["quantization"], (Quantization, type(None))))
    plain = {**group, "quantization": _plain(group["quantization"])}
    if group_form(plain, 64).one_period and refresh not in (None, group["statistics_frequency"]):
        raise ValueError(
            f"precondition_frequency is {refresh}, but storage 'root' has one period, statistics_frequency "
            f"({group['statistics_frequency']}): leave precondition_frequency out"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(quantization: Any) -> Any:
    return astuple(quantization) if isinstance(quantization, Quantization) else quantization
