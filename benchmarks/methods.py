"""The optimizers whose steps are timed, ours and others', and how each is made to take one kind of step.

The base of ours is torch's AdamW, fused. Compiled peers run as they are written, without torch.compile, which takes
minutes on them. No registry has Distributed Shampoo, kfac-pytorch or SOAP's reference implementation, so they have no
rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.memory import peer
from lowbit_optim import CASPR, SOAP, Shampoo
from lowbit_optim.blocking import blocking
from lowbit_optim.presets import WANG2024
from lowbit_optim.shapes import gpt2, resnet50, vit_s

NEVER = 10**9  # a period that does not end
ABSENT = ("Distributed Shampoo", "kfac-pytorch", "SOAP's reference implementation")
WORKSPACE = 256 * 2**20
FLOOR = "its matmuls"  # the row of what a step cannot do without

Shape = tuple[int, ...]
Kind = Literal["ordinary", "statistics", "root"]

# When statistics and roots come: in one period, in two, or statistics in every step and roots in the second period.
Schedule = Literal["one period", "two periods", "every step"]


def _gpt() -> list[Shape]:
    """The matrices and layer norms of a GPT of 6 layers and width 384: 10.6 million numbers."""
    width = 384
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [*matrices, (width,), (width,)] * 6


def _llama_1b_layer() -> list[Shape]:
    """One layer of Llama 3.2 1B: 32 heads of queries, 8 of keys and values, of 64."""
    width, hidden = 2048, 8192
    attention = [(width, width), (512, width), (512, width), (width, width)]
    return [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "gpt": _gpt,
    "gpt2": lambda: list(gpt2().values()),
    "resnet50": lambda: list(resnet50().values()),
    "vit-s": lambda: list(vit_s().values()),
    "llama-1b layer": _llama_1b_layer,
    "tiny": lambda: [(96, 64), (64, 64), (64,)],  # to see that everything runs
}
FULL = ("gpt", "tiny")  # those that are small enough for every row


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        label: of the row.
        limit: of the sides of its blocks; None if matrices stay whole.
        make: from parameters to an optimizer.
        force: makes the optimizer's next step one of the given kind.
        schedule: None of what has no updates.
        ours: whether it is of this library.
    """

    label: str
    limit: int | None
    make: Callable[[list[nn.Parameter]], Any]
    force: Callable[[Any, Kind], None] = lambda optimizer, kind: None
    schedule: Schedule | None = None
    ours: bool = False

    @property
    def name(self) -> str:
        """Of the row, apart from those with another limit."""
        return self.label if self.limit is None else f"{self.label}, blocks of {self.limit}"

    @property
    def kinds(self) -> list[Kind]:
        """Of its steps."""
        updates: dict[Schedule | None, list[Kind]] = {None: [], "two periods": ["statistics", "root"]}
        return ["ordinary", *updates.get(self.schedule, ["root"])]


class Run:
    """An optimizer of a method with parameters of its own, and gradients that every step finds anew."""

    def __init__(self, method: Method, gradients: Sequence[Tensor]) -> None:
        self.method, self.gradients = method, gradients
        self.parameters = [nn.Parameter(gradient.clone()) for gradient in gradients]
        self.optimizer = method.make(self.parameters)

    def prepare(self, kind: Kind = "ordinary") -> None:
        """Make the next step one of the kind; preconditioning changes gradients in place."""
        self.method.force(self.optimizer, kind)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.copy_(gradient)

    @property
    def apart(self) -> list[Tensor]:
        """Parameters and gradients."""
        return [*self.parameters, *(p.grad for p in self.parameters if p.grad is not None)]


def gradients_of(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Gradients of these shapes, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * 1e-2).to(device, dtype) for shape in shapes]


# ---- what a step cannot do without -----------------------------------------------------------------------------------


class Blocks:
    """All blocks of parameters, cut as the optimizers cut them, stacked by shape: their gradients, [k, r, c]."""

    def __init__(self, parameters: Sequence[Tensor], limit: int) -> None:
        counts: Counter[tuple[int, int]] = Counter()
        for parameter in parameters:
            cut = blocking(tuple(parameter.shape), limit)
            if cut is not None:
                counts[cut.rows, cut.columns] += cut.count
        like = {"dtype": torch.float32, "device": parameters[0].device}
        self.stacks = [torch.randn(count, *shape, **like) for shape, count in counts.items()]  # type: ignore[arg-type]


class Floor(Blocks):
    """``left @ gradient @ right`` of all blocks, in float32: as many at a time as an optimizer's workspace holds."""

    def __init__(self, parameters: Sequence[Tensor], limit: int) -> None:
        super().__init__(parameters, limit)
        self.state: dict[Any, Any] = {}
        self.work: list[tuple[Tensor, ...]] = []
        for stack in self.stacks:
            count, r, c = stack.shape
            run = min(count, max(1, WORKSPACE // (8 * (r * r + c * c))))
            roots = torch.randn(run, r, r).to(stack), torch.randn(run, c, c).to(stack)
            self.work.append((stack, torch.empty_like(stack), torch.empty_like(stack[:run]), *roots))

    def step(self) -> None:
        for gradient, result, between, left, right in self.work:
            run = len(left)
            for start in range(0, len(gradient), run):
                own = gradient[start : start + run]
                k = len(own)
                torch.bmm(left[:k], own, out=between[:k])
                torch.bmm(between[:k], right[:k], out=result[start : start + k])


class EighLoop(Blocks):
    """The inverse fourth root of every factor by an ``eigh`` of its own, one after the other, and nothing else."""

    def __init__(self, parameters: Sequence[Tensor], limit: int) -> None:
        super().__init__(parameters, limit)
        self.factors = [a for g in self.stacks for b in (g @ g.mT, g.mT @ g) for a in b]

    def step(self) -> None:
        for factor in self.factors:
            values, vectors = torch.linalg.eigh(factor)
            (vectors * values.clamp(min=1e-6 * values[-1]).pow(-0.25)) @ vectors.mT


# ---- ours ------------------------------------------------------------------------------------------------------------


def force_ours(optimizer: Any, kind: Kind) -> None:
    for group in optimizer.param_groups:
        group["statistics_frequency"] = NEVER if kind == "ordinary" else 1
        if group["precondition_frequency"] is not None:
            group["precondition_frequency"] = 1 if kind == "root" else NEVER


def _ours(label: str, kind: Any, limit: int | None, **keywords: Any) -> Method:
    given = {**keywords, "fused": True} | ({"max_preconditioner_dim": limit} if limit else {})
    separate = kind is SOAP or given.get("storage", "root") != "root"
    schedule: Schedule = "two periods" if separate else "one period"
    return Method(label, limit, lambda parameters: kind(parameters, lr=1e-3, **given), force_ours, schedule, True)


def shampoo(bits: float, limit: int) -> Method:
    return _ours(f"Shampoo, {bits} bit{'s' * (bits > 1)}", Shampoo, limit, bits=bits)


def ours(limit: int) -> list[Method]:
    """Ours with blocks of at most that size."""
    rows = [shampoo(bits, limit) for bits in (32, 4, 2, 1)]
    rows.append(_ours("Shampoo, 4 bits, bfloat16 roots", Shampoo, limit, bits=4, apply_dtype="bfloat16"))
    rows.append(_ours("Shampoo of WANG2024", Shampoo, limit, **WANG2024))
    rows.append(_ours("CASPR, 4 bits", CASPR, limit, bits=4))
    return rows


# ---- peers -----------------------------------------------------------------------------------------------------------


def _peer(module: str, name: str) -> Any:
    found = peer(module, name)
    if found is None:
        raise ImportError(f"{module} is not installed")
    if module == "heavyball" and not torch.backends.opt_einsum.is_available():
        raise ImportError("heavyball needs opt_einsum: its einsums take a hundred times as long without")
    return found


def _scalable(parameters: list[nn.Parameter], limit: int) -> Any:
    return _peer("pytorch_optimizer", "ScalableShampoo")(
        parameters,
        lr=1e-3,
        block_size=limit,
        start_preconditioning_step=1,
        statistics_compute_steps=NEVER,
        preconditioning_compute_steps=NEVER,
    )


def _force_scalable(optimizer: Any, kind: Kind) -> None:
    optimizer.statistics_compute_steps = NEVER if kind == "ordinary" else 1
    optimizer.preconditioning_compute_steps = 1 if kind == "root" else NEVER


def _force_shampoo(optimizer: Any, kind: Kind) -> None:
    optimizer.preconditioning_compute_steps = 1 if kind == "root" else NEVER


def _force_old_shampoo(optimizer: Any, kind: Kind) -> None:
    for group in optimizer.param_groups:
        group["update_freq"] = 1 if kind == "root" else NEVER


def _force_soap(optimizer: Any, kind: Kind) -> None:
    for own in optimizer.state.values():
        own["precondition_frequency"] = 1 if kind == "root" else NEVER


def _force_heavyball(optimizer: Any, kind: Kind) -> None:
    optimizer.precond_schedule = float(kind == "root")


def _whole(label: str, module: str, name: str, force: Callable[[Any, Kind], None], **keywords: Any) -> Method:
    def make(parameters: list[nn.Parameter]) -> Any:
        return _peer(module, name)(parameters, lr=1e-3, **keywords)

    return Method(label, None, make, force, "every step")


def scalable(limit: int) -> Method:
    label = "pytorch_optimizer ScalableShampoo"
    return Method(label, limit, partial(_scalable, limit=limit), _force_scalable, "two periods")


def adamw() -> Method:
    return Method("torch AdamW, fused", None, partial(torch.optim.AdamW, lr=1e-3, fused=True))


def floor(limit: int) -> Method:
    return Method(FLOOR, limit, partial(Floor, limit=limit))


def whole() -> list[Method]:
    """Those that do not cut matrices into blocks; SOAPs leave a side above their limit alone."""
    heavyball = {"consume_grad": False}
    return [
        _ours("SOAP, 4 bits", SOAP, None, bits=4),
        _whole("pytorch_optimizer Shampoo", "pytorch_optimizer", "Shampoo", _force_shampoo),
        _whole("pytorch_optimizer SOAP", "pytorch_optimizer", "SOAP", _force_soap),
        _whole("HeavyBall SOAP", "heavyball", "SOAP", _force_heavyball, **heavyball),
        _whole("HeavyBall PSGDKron", "heavyball", "PSGDKron", _force_heavyball, **heavyball),
        _whole("torch_optimizer Shampoo", "torch_optimizer", "Shampoo", _force_old_shampoo),
    ]


def second_order(limits: Sequence[int], few: bool) -> list[Method]:
    """All rows, or the few that models of a hundred million parameters allow; AdamW is the first.

    Limits after the first have few rows anyway.
    """
    found = [adamw()]
    for limit in limits:
        own = ours(limit)
        if few or limit != limits[0]:
            own = [method for method in own if not method.label.startswith(("CASPR", "Shampoo of", "Shampoo, 1"))]
        found += [floor(limit), *own, scalable(limit)]
    return found if few else found + whole()
