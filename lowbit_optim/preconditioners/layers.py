"""The layers of a model whose inputs and output gradients make Kronecker factors, and the hooks that collect them.

For a layer y = W x + b the statistics are sums over rows of x x^T and g g^T, g the gradient of y; a bias is a last
column of W, and a last 1 of x. Hooks change nothing of the computation.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias, get_args

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from lowbit_optim.blocking import Blocking
from lowbit_optim.linalg import full_precision
from lowbit_optim.shards import is_dtensor

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Supported: TypeAlias = nn.Linear | nn.Embedding | Convolution

# One-hot inputs make a dense factor of the order of the vocabulary.
MAX_EMBEDDINGS = 1024
# Numbers of the unfolded inputs of a convolution that are there at one time.
MAX_PATCHES = 2**24


def patches(conv: Convolution, x: Tensor) -> Tensor:
    """What each output position sees: [batch, channels, *size] to [groups, batch, positions, channels / groups * k]."""
    windows = list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))
    if conv.padding == "same":
        total = [d * (k - 1) for k, _, d in windows]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in ((0,) * len(windows) if isinstance(conv.padding, str) else conv.padding)]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = pad(x, [side for pair in reversed(sides) for side in pair], mode=mode)
    for dim, (k, s, d) in enumerate(windows, 2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    x = x.flatten(2 + len(windows)).flatten(2, 1 + len(windows))
    return rearrange(x, "b (g c) p k -> g b p (c k)", g=conv.groups)


def rows_of(module: Supported, x: Tensor, g: Tensor, reduce: bool) -> tuple[Tensor, Tensor, int]:
    """Inputs and output gradients of one call of a layer as rows, and the number of examples.

    Args:
        module: the layer.
        x: its input.
        g: the gradient of its output.
        reduce: one row an example, of the mean of inputs and the sum of gradients over its positions. Else one row a
            position; an example is then a position too, but for images.

    Returns:
        ([groups, rows, c], [groups, rows, r], examples), float32 or float64.
    """
    g = _precise(g)
    if isinstance(module, nn.Embedding):
        x = one_hot(x, module.num_embeddings).to(g.dtype)
    x = _precise(x)
    if isinstance(module, Convolution):
        if g.dim() == len(module.kernel_size) + 1:
            x, g = x[None], g[None]
        x, g = patches(module, x), rearrange(g.flatten(2), "b (g r) p -> g b p r", g=module.groups)
    else:
        batch = len(g) if g.dim() > 1 else 1
        x, g = (t.reshape(1, batch, -1, t.shape[-1]) for t in (x, g))
    _, batch, positions, _ = g.shape
    if reduce:
        return x.mean(2), g.sum(2), batch
    return x.flatten(1, 2), g.flatten(1, 2), batch if isinstance(module, Convolution) else batch * positions


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Layer:
    """A supported module, which it does not keep alive, and what its hook has collected since the last step.

    Sums are kept as a magnitude and a matrix, magnitude^2 M: squares of small gradients underflow.

    Args:
        name: of the module in its model.
        module: a weak reference to it.
        reduce: whether positions of an example are one row.
        own_bias: whether the bias is this module's alone.
    """

    name: str
    module: Callable[[], Supported | None]
    reduce: bool
    own_bias: bool = True
    joint: bool | None = None  # the bias is a last column; None: not decided yet
    wanted: Callable[[], bool] = lambda: False  # whether the coming step takes statistics
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    examples: int = 0
    rows: int = 0
    sharded: tuple[Any, Any] | None = None  # weight and bias, where FSDP has others in their place at times

    @property
    def weight(self) -> nn.Parameter | None:
        """None once the module is gone."""
        return self._parameter("weight", 0)

    @property
    def bias(self) -> nn.Parameter | None:
        """None where there is none."""
        return self._parameter("bias", 1)

    def _parameter(self, name: str, place: int) -> nn.Parameter | None:
        module = self.module()
        found: Any = getattr(module, name, None)
        if module is not None and self.sharded is not None and not is_dtensor(found):
            found = self.sharded[place]
        return found if isinstance(found, nn.Parameter) else None

    @property
    def blocking(self) -> Blocking:
        """The weight, with the bias as a last column, as one block per group of a convolution."""
        module = self._module()
        matrix = len(module.weight), prod(module.weight.shape[1:]) + bool(self.joint)
        groups = module.groups if isinstance(module, Convolution) else 1
        shape = matrix if self.joint else tuple(module.weight.shape)
        return Blocking(shape, matrix, (groups, 1), matrix[0] // groups, matrix[1])

    def clear(self) -> None:
        """Forget what was collected."""
        self.sums, self.examples, self.rows = {}, 0, 0

    @torch.no_grad()
    def collect(self, x: Tensor, g: Tensor) -> None:
        """Add what one call of the module saw: its input and the gradient of its output."""
        module = self.module()
        if module is None or not g.numel():
            return
        parts = [(x, g)]
        if isinstance(module, Convolution) and g.dim() == len(module.kernel_size) + 2:
            each_example = prod(g.shape[2:]) * prod(module.weight.shape[1:]) * module.groups
            size = max(1, MAX_PATCHES // each_example)
            parts = list(zip(x.split(size), g.split(size), strict=True))
        with full_precision():
            for part in parts:
                self._collect(*rows_of(module, *part, self.reduce))

    def _collect(self, x: Tensor, g: Tensor, examples: int) -> None:
        self._add("inputs", pad(x, (0, 1), value=1.0) if self.joint else x)
        self._add("gradients", g)
        self.examples += examples
        self.rows += x.shape[1]

    def _add(self, role: str, rows: Tensor) -> None:
        magnitude = rows.abs().amax().clamp(min=1e-30)
        rows = rows / magnitude
        total = rows.mT @ rows
        if role in self.sums:
            before, old = self.sums[role]
            larger = torch.maximum(before, magnitude)
            total = old * (before / larger).square() + total * (magnitude / larger).square()
            magnitude = larger
        self.sums[role] = magnitude, total

    def collected(self, role: str) -> tuple[Tensor, Tensor]:
        """The magnitude and the matrix of "inputs" or "gradients"; zeros if nothing was collected."""
        if role in self.sums:
            return self.sums[role]
        cut, module = self.blocking, self._module()
        order = cut.columns if (role == "inputs") != isinstance(module, nn.Embedding) else cut.rows
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        nothing = torch.zeros(cut.count, order, order, dtype=dtype, device=module.weight.device)
        return nothing.new_full((), 1e-30), nothing

    def statistic(self, side: str, loss_scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """M [groups, n, n] and its magnitude [groups]: the statistic of a side is magnitude^2 M.

        Of inputs it is sum x x^T / N over N examples, of gradients N^2 / P sum g g^T over P rows, where g is the
        gradient of a mean over examples; so a convolution has the factors of KFC (Grosse and Martens 2016). NaN if
        nothing was collected. ``loss_scale`` is what the loss had been multiplied with.
        """
        # The weight of an embedding is [inputs, outputs].
        of_inputs = (side == "right") != isinstance(self.module(), nn.Embedding)
        if not self.rows:
            cut = self.blocking
            order = cut.columns if side == "right" else cut.rows
            weight = self._module().weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            nothing = torch.full((cut.count, order, order), torch.nan, dtype=dtype, device=weight.device)
            return nothing, nothing[:, 0, 0]
        magnitude, total = self.sums["inputs" if of_inputs else "gradients"]
        if of_inputs:
            return total / self.examples, magnitude.expand(len(total))
        return total * (self.examples**2 / self.rows), (magnitude / loss_scale).expand(len(total))

    def _module(self) -> Supported:
        module = self.module()
        assert module is not None
        return module


class _Keep(torch.autograd.Function):
    """Saves a tensor as autograd does, so that activation checkpointing neither keeps it alive nor counts it twice."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("nothing is computed from the anchor")


class Hook:
    """A forward hook that tells ``layer``, while it lives, of every backward pass through its module.

    A copy, or a pickle, which come with those of the model, tells nobody.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer: Callable[[], Layer | None] = weakref.ref(layer)

    def add_to(self, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Before every other hook, for the module's own output."""
        for key, old in list(module._forward_hooks.items()):
            if isinstance(old, Hook) and old._layer() is None:  # it came with a copy
                del module._forward_hooks[key]
        return module.register_forward_hook(self, prepend=True, with_kwargs=True)

    @torch._disable_dynamo  # without importing the compiler now
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        layer = self._layer()
        if layer is None or not (torch.is_grad_enabled() and output.requires_grad and layer.wanted()):
            return
        if torch._C._are_functorch_transforms_active():  # per-example gradients and the like, which train nothing
            return
        # FSDP keeps gradients elsewhere until it reduces them, perhaps after several backward passes.
        plain = layer.weight if layer.sharded is None else None
        if layer.rows and plain is not None and plain.grad is None and not _in_backward():
            layer.clear()  # of a step that was left out, whose gradients are gone already
        anchor = torch.empty(0, device=output.device, requires_grad=True)
        node: Any = _Keep.apply(anchor, args[0] if args else kwargs["input"]).grad_fn
        told = self._layer

        def backward(grad: Tensor) -> None:
            nonlocal node
            if (layer := told()) is not None:
                layer.collect(node.saved_tensors[0], grad)
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                node = None  # as autograd frees what it saved

        output.register_hook(backward)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layer = _nobody


def _in_backward() -> bool:
    """Whether autograd is at work, as when a checkpointed forward pass is run again."""
    return torch._C._current_graph_task_id() != -1


def _nobody() -> None:
    return None


def _unsupported(module: nn.Module) -> str | None:
    """Why a module's parameters are left to the base optimizer; None if they have factors."""
    if not isinstance(module, Supported):
        return "no layer that has Kronecker factors"
    kind: Any = next(kind for kind in get_args(Supported) if isinstance(module, kind))
    # nn.MultiheadAttention multiplies with the weight of its projection without calling the module.
    if type(module).forward is not kind.forward or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "computed by code of its own"
    if not isinstance(module._parameters.get("weight"), nn.Parameter) or nn.parameter.is_lazy(module.weight):
        return "its weight is computed from other parameters, or not there yet"
    if not module.weight.numel():
        return "its weight is empty"
    if isinstance(module, nn.Embedding):
        if module.num_embeddings > MAX_EMBEDDINGS:
            return f"an embedding of more than {MAX_EMBEDDINGS} entries: the factor of its inputs would be too large"
        if module.padding_idx is not None or module.max_norm or module.scale_grad_by_freq or module.sparse:
            return "an embedding with options that change its gradient"
    return None


def layers_of(model: nn.Module, reduce: bool) -> tuple[list[Layer], dict[str, str]]:
    """The layers that have factors, and for the parameters of all others, by name, why they have none."""
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    layers = []
    others = {}
    for name, module in model.named_modules():
        why = _unsupported(module)
        if why is None and isinstance(module, Supported):
            if owners[module.weight] == 1:
                own_bias = isinstance(module, nn.Embedding) or module.bias is None or owners[module.bias] == 1
                layers.append(Layer(name, weakref.ref(module), reduce, own_bias))
                continue
            why = "its weight is tied: its gradient is a sum over several layers"
        for own, _ in module.named_parameters(recurse=False):
            others[f"{name}.{own}" if name else own] = str(why)
    return layers, others


def add_batches(layers: list[Layer], group: Any) -> None:
    """Make what layers have collected that of the batches of all processes in a group, which call this together.

    The gradient that is trained on is the mean of those of the processes.
    """
    if not layers:
        return
    roles = ("inputs", "gradients")
    parts = [layer.collected(role) for layer in layers for role in roles]
    counts = torch.tensor([(layer.examples, layer.rows) for layer in layers], device=parts[0][1].device)
    dist.all_reduce(counts, group=group)
    magnitudes = torch.stack([magnitude.double() for magnitude, _ in parts])
    largest = magnitudes.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    shares = (magnitudes / largest).square()
    totals = _sum_over([m * share.to(m.dtype) for (_, m), share in zip(parts, shares, strict=True)], group)
    for i, (layer, (examples, rows)) in enumerate(zip(layers, counts.tolist(), strict=True)):
        if rows:
            layer.examples, layer.rows = examples, rows
            units = largest[2 * i], largest[2 * i + 1] / dist.get_world_size(group)
            pairs = zip(units, totals[2 * i : 2 * i + 2], strict=True)
            layer.sums = {role: (unit.to(m.dtype), m) for role, (unit, m) in zip(roles, pairs, strict=True)}


def _sum_over(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """The sums of tensors over processes: neighbours of one dtype as one collective, up to ``MAX_PATCHES`` numbers."""
    found: list[Tensor] = []
    start = 0
    for end in range(1, len(tensors) + 1):
        run = tensors[start:end]
        full = sum(t.numel() for t in tensors[start : end + 1]) > MAX_PATCHES
        if end == len(tensors) or tensors[end].dtype != run[0].dtype or full:
            flat = torch.cat([t.reshape(-1) for t in run])
            dist.all_reduce(flat, group=group)
            found += [x.view_as(t) for x, t in zip(flat.split([t.numel() for t in run]), run, strict=True)]
            start = end
    return found
