"""The param groups that most models want."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.01, leave_to_base: str | Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, each once, in groups for an optimizer of this library or of torch.

    * Matrices, and whatever else has two dims or more, of size 1 or not: preconditioned, with weight decay. So are the
      transposed matrices of Hugging Face's ``Conv1D``.
    * Embeddings and output layers: left to the base optimizer, with weight decay. A weight that is tied to one of them
      is theirs.
    * Vectors and numbers (biases, norms): no weight decay. The base has them anyhow, but for K-FAC and AdaBK, where the
      bias of a preconditioned weight goes with it.
    * Weights of two dims or more of a norm, as of ``LayerNorm((3, 8, 8))``: no weight decay, left to the base.

    An output layer is what ``get_output_embeddings()`` of the model, or of a module in it, returns (Hugging Face), and
    what ``leave_to_base`` names. Where neither says anything, it is the last module of ``model.modules()`` that has
    parameters of its own, if that is an ``nn.Linear``: of most models the classifier or the projection to a vocabulary.

    Args:
        model: the module; before it is wrapped, if names are given.
        weight_decay: of the groups that have it. Default 0.01.
        leave_to_base: names of modules or parameters, with all that is below them ("head", "encoder.layers.0",
            "pos_embed"), to be left to the base beside the embeddings. Where it is given, if only as an empty tuple,
            the last ``nn.Linear`` is not guessed: name the head, too. Default None.

    Returns:
        Groups in the order above, without those that would be empty: {"params": [(name, parameter), ...],
        "weight_decay": float, "precondition": bool}. ``Shampoo(param_groups(model))``,
        ``KFAC(param_groups(model), model=model)``; a torch optimizer takes them, and ignores "precondition".

    Raises:
        ValueError: ``leave_to_base`` has a name that the model does not have, or of something without parameters; a
            weight decay that is negative or not finite.

    Example:
        >>> import torch
        >>> from lowbit_optim import param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 100))
        >>> for group in param_groups(model, weight_decay=0.05):
        ...     print([name for name, _ in group["params"]], group["weight_decay"], group["precondition"])
        ...
        ['1.weight'] 0.05 True
        ['0.weight', '2.weight'] 0.05 False
        ['1.bias', '2.bias'] 0.0 True
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay!r}; it must be at least 0 and finite")
    norms = _below(module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm))
    left = norms | _below(module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
    left |= _below(_output_layers(model, guess=leave_to_base is None))
    left |= _named(model, [leave_to_base] if isinstance(leave_to_base, str) else leave_to_base or ())
    order = [(True, True), (True, False), (False, True), (False, False)]
    found: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {key: [] for key in order}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() < 2
            decays, preconditioned = not vector and parameter not in norms, vector or parameter not in left
            found[decays, preconditioned].append((name, parameter))
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "precondition": preconditioned}
        for (decays, preconditioned), params in found.items()
        if params
    ]


def _below(modules: Iterable[nn.Module]) -> set[Tensor]:
    """The parameters of modules, with those of parametrizations, which are modules in them."""
    return {parameter for module in modules for parameter in module.parameters()}


def _output_layers(model: nn.Module, *, guess: bool) -> list[nn.Module]:
    asked: list[Any] = [module for module in model.modules() if hasattr(module, "get_output_embeddings")]
    layers = [layer for module in asked if isinstance(layer := module.get_output_embeddings(), nn.Module)]
    own = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    return layers or [module for module in own[-1:] if guess and isinstance(module, nn.Linear)]


def _named(model: nn.Module, names: Iterable[str]) -> set[Tensor]:
    """The parameters that are named, or are below a module that is."""
    found: set[Tensor] = set()
    unknown = []
    for name in names:
        below = {p for own, p in model.named_parameters(remove_duplicate=False) if f"{own}.".startswith(f"{name}.")}
        found |= below
        if not below:
            unknown.append(name)
    if unknown:
        known = ", ".join(name for name, _ in model.named_children()) or "none"
        raise ValueError(
            f"leave_to_base names {', '.join(map(repr, unknown))}, where the model has no parameters; names are those "
            f"of model.named_modules() and model.named_parameters(). At the top it has {known}"
        )
    return found
