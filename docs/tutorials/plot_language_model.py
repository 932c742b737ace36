"""
Language model: AdamW and 2-bit Shampoo
=======================================

A character transformer learns to continue the documentation of Python, once with AdamW and once with Shampoo on 2 bits
per matrix element. The loop is the same; the optimizer's line is all that differs. Half way the run is saved, and goes
on in a new model and a new optimizer with the same bits.
"""

# %%
# Text
# ----
#
# Python comes with its documentation as one dictionary (what ``help("while")`` prints), so there is nothing to
# download. Characters become numbers; the last tenth is not trained on.

import math
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lowbit_optim import Shampoo, load_checkpoint, param_groups, save_checkpoint, state_bytes

text = "\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
number = {character: i for i, character in enumerate(characters)}
tokens = torch.tensor([number[character] for character in text])
cut = len(tokens) * 9 // 10
CONTEXT, BATCH, STEPS = 48, 16, 250
unseen = tokens[cut:].unfold(0, CONTEXT + 1, CONTEXT)[::4]
print(f"{len(text):,} characters, {len(characters)} different; {len(unseen)} windows to judge by")

# %%
# Model
# -----
#
# Two layers of attention and perceptron, 48 wide: a toy, to train in seconds.

WIDTH, HEADS = 48, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(len(characters), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers, self.norm = nn.Sequential(Layer(), Layer()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(characters), bias=False)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, windows: Tensor) -> Tensor:
        """The mean loss of each next character of windows [batch, CONTEXT + 1]."""
        x = self.layers(self.characters(windows[:, :-1]) + self.places.weight)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), windows[:, 1:].flatten())


# %%
# One loop for both
# -----------------
#
# Steps are numbered from the start of the training, and batches follow from the number, so that a resumed run sees
# what the uninterrupted one sees. The learning rate warms up and falls along half a cosine.


def make_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer()


def schedule(step: int) -> float:
    return min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, first: int, last: int
) -> list[float]:
    losses = []
    for step in range(first, last):
        starts = torch.randint(cut - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
        loss = model(tokens[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def judge(model: nn.Module) -> float:
    """The loss on text that was not trained on, in nats per character."""
    return model(unseen).item()


# %%
# The optimizers
# --------------
#
# ``param_groups`` leaves embeddings and the head to the base, and takes weight decay from biases and norms; torch's
# AdamW takes the same groups. ``statistics_frequency`` is 100 by default, which suits long trainings; a short one
# wants 10. ``min_quant_size=0`` codes the factors of these small matrices, too, which otherwise keep 32 bits where
# they have fewer than 4096 numbers.
#
# Shampoo takes AdamW's learning rate, because the preconditioned gradient is given the gradient's own norm. The rate
# here, 0.01, is the one that the library's demo found best for both, of four, on a larger model of the same text
# (:doc:`/evidence/demo`). No other is tried.

RATE = 0.01


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = param_groups(model, weight_decay=0.01)
    settings: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.95)}
    if name == "AdamW":
        return torch.optim.AdamW(groups, **settings)
    return Shampoo(groups, **settings, bits=2, statistics_frequency=10, min_quant_size=0)


# %%
# Train, and save half way
# ------------------------
#
# ``save_checkpoint`` writes a folder of safetensors and JSON: model, optimizer, scheduler, random state. Codes are
# saved as they are.

folder = TemporaryDirectory()
found: dict[str, list[float]] = {}
results: dict[str, float] = {}
sizes: dict[str, dict[str, int]] = {}
for name in ("AdamW", "Shampoo"):
    model = make_model()
    optimizer = make_optimizer(name, model)
    scheduler = LambdaLR(optimizer, schedule)
    found[name] = train(model, optimizer, scheduler, 0, STEPS // 2)
    path = Path(folder.name, name)
    save_checkpoint(path, model=model, optimizer=optimizer, scheduler=scheduler, step=STEPS // 2)
    found[name] += train(model, optimizer, scheduler, STEPS // 2, STEPS)
    results[name], sizes[name] = judge(model), state_bytes(optimizer)
    saved = sum(file.stat().st_size for file in path.glob("optimizer*.safetensors"))
    print(f"{name:8} unseen text {results[name]:.4f} nats per character; saved optimizer {saved:,} bytes")

# %%
# (The last tenth of the text is easier than the rest: its loss lies below that of the batches.) One seed, a toy, and
# a short training: what this shows is how, not how much. :doc:`/evidence/convergence` has several seeds with
# intervals.

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, losses in found.items():
    axes.plot(range(10, STEPS + 1), torch.tensor(losses).unfold(0, 10, 1).mean(-1), label=name)
axes.set(xlabel="step", ylabel="training loss, mean of 10 batches")
axes.set_title("Training loss of a character transformer: AdamW and 2-bit Shampoo")
axes.legend()
plt.show()

# %%
# What the state weighs
# ---------------------
#
# Both keep AdamW's two moments in 32 bits. What Shampoo adds are its roots, which are its statistics as well.

parameters = sum(parameter.numel() for parameter in make_model().parameters())
print(f"{parameters:,} parameters; bytes of state for each of them:")
for name, size in sizes.items():
    kinds = ", ".join(f"{kind} {bytes / parameters:.2f}" for kind, bytes in size.items() if bytes > parameters / 100)
    print(f"{name:8} {kinds}")

# %%
# ``base_bits=4`` keeps the moments in 4 bits, too: see :doc:`plot_fine_tuning`.
#
# Resume
# ------
#
# A new model with other weights and a new optimizer load the checkpoint, and end where the uninterrupted run ended,
# to the last bit.

torch.manual_seed(1)
resumed = Transformer()
again = make_optimizer("Shampoo", resumed)
scheduler = LambdaLR(again, schedule)
first = load_checkpoint(Path(folder.name, "Shampoo"), model=resumed, optimizer=again, scheduler=scheduler)["step"]
train(resumed, again, scheduler, first, STEPS)
folder.cleanup()
same = all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
print(f"resumed at step {first}; the same bits at the end: {same}")

# %%
# In your own training
# --------------------
#
# * Start with the rate that AdamW has there. Hugging Face's Trainer, accelerate and Lightning: :doc:`/trainers`.
# * Leave ``statistics_frequency`` at its default of 100 unless the training is short: until the first update, at step
#   100, the base runs alone.
# * Keep the last few checkpoints, and write them in the background: :doc:`/checkpoints`.
