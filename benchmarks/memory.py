"""Bytes of optimizer state per parameter, measured and estimated, beside every peer that is installed.

    python -m benchmarks.memory            GPT-2 124M, ViT-S/16 and ResNet-50, and LLaMA2-7B on paper

State is measured after steps that create all of it, on real tensors; of the peers in ``ON_META``, whose first step
takes minutes on a CPU, on the meta device. Peaks are those of three steps of ViT-S, with statistics and roots in the
second.
"""

import gc
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.report import keep, show
from lowbit_optim import AdamW, Shampoo, estimate, presets, state_bytes
from lowbit_optim.peak import peak_bytes
from lowbit_optim.shapes import MODELS, Shapes

FEW, MOMENTS = {"base_bits": 4}, ", moments 4"
MODELS_MEASURED = ("gpt2", "vit-s", "resnet50")

OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Shampoo, 32 bits": (Shampoo, {"bits": 32}),
    "Shampoo of WANG2024": (Shampoo, dict(presets.WANG2024)),
    **{f"Shampoo, {bits} bit{'s' * (bits > 1)}{MOMENTS}": (Shampoo, {"bits": bits, **FEW}) for bits in (4, 2, 1)},
    **{f"AdamW, {bits} bits": (AdamW, {"bits": bits}) for bits in (8, 4)},
}
# label: (module, class, keywords)
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torch AdamW": ("torch.optim", "AdamW", {}),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit", {}),
    "torchao AdamW4bit": ("torchao.optim", "AdamW4bit", {}),
    "pytorch_optimizer Shampoo": ("pytorch_optimizer", "Shampoo", {}),
    "pytorch_optimizer SOAP": ("pytorch_optimizer", "SOAP", {}),
    "HeavyBall SOAP": ("heavyball", "SOAP", {"consume_grad": False}),
}
ON_META = {"torchao AdamW8bit", "torchao AdamW4bit", "pytorch_optimizer Shampoo", "pytorch_optimizer SOAP"}
NOT_ON_META = {"HeavyBall SOAP"}  # whose step wants real numbers: measured, but not estimated
WANTED = {"gpt2": (2.2, 1.65, 1.4), "vit-s": (2.5, 1.85, 1.5), "resnet50": (2.8, 2.0, 1.6)}

# Wang et al. 2024, table 13: MB (2^20 bytes) at batches of 64 sequences of 256 tokens, with activation checkpointing,
# on an A800 of 81920 MB; weights and gradients in bfloat16, order 2048. AdamW: 68689 at 128, out of memory at 256.
# Shampoo of 4 bits: out of memory at 128; of 32 bits: at 2.
PUBLISHED_MEMORY, PUBLISHED_ADAMW = 81920, {64: 60135, 128: 68689}
ADAMW_8BIT, SHAMPOO_32BIT, SHAMPOO_4BIT = "AdamW, 8 bits", "+ Shampoo, 32 bits", "+ Shampoo of WANG2024"
PUBLISHED = {ADAMW_8BIT: "60135", SHAMPOO_32BIT: "out of memory", SHAMPOO_4BIT: "74561"}


def eager(function: Any = None, **options: Any) -> Any:
    """In the place of torch.compile: compiling peers takes a minute, and changes no state."""
    return function if function is not None else lambda given: given


def peer(module: str, name: str) -> Any:
    """A peer's class; None if it is not installed."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    if module == "heavyball":
        found.utils.compile_mode = None
    return getattr(found, name)


def of_shapes(shapes: Shapes) -> list[nn.Parameter]:
    """Real parameters with gradients, normal numbers."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes.values()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def measured_state(kind: type[Optimizer], keywords: dict[str, Any], shapes: Shapes) -> dict[str, int]:
    """``state_bytes`` after a step that makes all of it; of ours without preconditioning, which adds nothing."""
    if kind is Shampoo:
        keywords = {**keywords, "start_preconditioning_step": 10**9, "statistics_frequency": 10**9}
        keywords["precondition_frequency"] = None
    optimizer = kind(of_shapes(shapes), lr=1e-3, **keywords)
    optimizer.step()
    return state_bytes(optimizer)


def row_of(label: str, kind: Any, keywords: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What is measured of one optimizer, and what ``estimate`` says."""
    known: Any = kind if label != "bitsandbytes AdamW8bit" else "adamw8bit"
    given = {} if known == "adamw8bit" else {"lr": 1e-3, **keywords}
    planned = None if label in NOT_ON_META else estimate(shapes, known, device="cpu", **given)
    if planned is not None and label in ON_META:
        kinds, place = planned.kinds | {"total": planned.state}, "meta"
    else:
        kinds, place = measured_state(kind, keywords, shapes), torch.get_default_device().type
        gc.collect()
    state, numbers = kinds.pop("total"), sum(map(math.prod, shapes.values()))
    return {
        "optimizer": label,
        "measured on": place,
        "numbers": numbers,
        "state": state,
        "bytes_per_parameter": state / numbers,
        "estimated": planned and planned.state / numbers,
        "difference": planned and planned.state - state,
        "kinds": kinds,
    }


def states(model: str) -> list[dict[str, Any]]:
    """A row for each optimizer that is installed."""
    shapes = MODELS[model]()
    peers = {label: (peer(module, name), keywords) for label, (module, name, keywords) in PEERS.items()}
    every = {label: pair for label, pair in peers.items() if pair[0] is not None} | OURS
    found = []
    for label, (kind, keywords) in every.items():
        print(f"{model}: {label}", flush=True)
        found.append(row_of(label, kind, keywords, shapes))
    return found


def peaks(model: str, bits: tuple[float, ...]) -> list[dict[str, Any]]:
    """The peak of real steps of Shampoo, beside its estimate."""
    found = []
    for own in bits:
        keywords: dict[str, Any] = {"bits": own, **FEW} if own < 32 else {"bits": own}
        parameters = of_shapes(MODELS[model]())
        optimizer = Shampoo(parameters, statistics_frequency=2, precondition_frequency=2, **keywords)
        device = parameters[0].device.type
        print(f"{model}: steps of Shampoo, {own} bits", flush=True)
        measured = peak_bytes(optimizer, lambda: None)
        planned = estimate(MODELS[model](), device=device, **keywords)
        found.append(
            {
                "Shampoo": f"{own} bits",
                "on": device,
                "peak MiB": measured / 2**20,
                "estimated MiB": planned.peak / 2**20,
                "difference %": 100 * (planned.peak / measured - 1),
                "of it state MiB": planned.state / 2**20,
            }
        )
    return found


def on_paper() -> list[dict[str, Any]]:
    """LLaMA2-7B; activations, and whatever else that run had, are what it published for AdamW beyond our estimate."""
    order = {"max_preconditioner_dim": 2048}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        ADAMW_8BIT: ("adamw8bit", {}),
        SHAMPOO_32BIT: ("shampoo", {"base": "adamw8bit", "bits": 32, **order}),
        SHAMPOO_4BIT: ("shampoo", {"base": "adamw8bit", **presets.WANG2024, **order}),
    }
    for bits in (4, 2, 1):
        label = f"ours, {bits} bit{'s' * (bits > 1)}{MOMENTS}"
        wanted[label] = ("shampoo", {"bits": bits, **FEW, **order})
    found: list[dict[str, Any]] = []
    rest = 0
    for label, (name, keywords) in wanted.items():
        planned = estimate(MODELS["llama2-7b"](), name, dtype=torch.bfloat16, **keywords)
        weights = 2 * planned.parameters
        held = 2 * weights + planned.state
        # While activations are there the workspace is not.
        rest = rest or PUBLISHED_ADAMW[64] * 2**20 - held
        more = (PUBLISHED_ADAMW[128] - PUBLISHED_ADAMW[64]) * 2**20
        sizes = {"weights": weights, "gradients": weights, "state": planned.state, "workspace": planned.workspace}
        sizes |= {"step": held + planned.workspace, "batch 64": held + rest, "batch 128": held + rest + more}
        fits = [name for name in ("step", "batch 64", "batch 128") if sizes[name] <= PUBLISHED_MEMORY * 2**20]
        found.append(
            {
                "optimizer": label,
                **{name: round(size / 2**20) for name, size in sizes.items()},
                "fits": fits[-1] if fits else "no",
                "published, batch 64": PUBLISHED.get(label, "-"),
            }
        )
    return found


def main() -> None:
    compiled: Callable[..., Any] = torch.compile
    torch.compile = eager  # type: ignore[assignment]
    try:
        found = {model: states(model) for model in MODELS_MEASURED}
    finally:
        torch.compile = compiled  # type: ignore[assignment]
    columns = ("optimizer", "measured on", "bytes_per_parameter", "estimated", "difference")
    for model, own in found.items():
        limits = ", ".join(f"{x:g}" for x in WANTED[model])
        note = f"bytes; difference: of the estimate, in bytes of all. Wanted at 4, 2, 1 bits: {limits}"
        show(f"{model}: state per parameter", [{k: row[k] for k in columns} for row in own], note)
    of_steps = peaks("vit-s", (32, 2))
    show("vit-s: peak of three steps, parameters and gradients apart", of_steps)
    paper = on_paper()
    show(
        "LLaMA2-7B, weights and gradients in bfloat16, order 2048: MB of 2^20 bytes, and what fits in 81920",
        paper,
        "Step: weights, gradients, state and workspace. Batch: weights, gradients, state, and what Wang et al. 2024, "
        "table 13, published for 8-bit AdamW at 64 and 128 sequences of 256 tokens beyond that, activations among it.",
    )
    keep("memory", {**{f"state {k}": v for k, v in found.items()}, "peak": of_steps, "LLaMA2-7B": paper})
    from benchmarks import figures  # which imports this module

    figures.draw("memory.png")


if __name__ == "__main__":
    main()
