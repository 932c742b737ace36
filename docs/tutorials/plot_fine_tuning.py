"""
Fine-tuning with moments of few bits
====================================

AdamW keeps two moments for every parameter, 8 bytes of them in float32. When a large model is fine-tuned, that is
often what does not fit. ``lowbit_optim.AdamW(bits=4)`` keeps both in about one byte. This trains a small network on
half of the digits and fine-tunes it on the other half: with moments of 32 and of 4 bits, that start anew or that are
taken over from the first training.
"""

# %%
# Two tasks
# ---------
#
# The digits 0 to 4 are there to pretrain on, 5 to 9 to fine-tune on. A fifth of each is kept to judge by.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowbit_optim import AdamW, Shampoo, estimate, state_bytes
from lowbit_optim.shapes import gpt2

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
inputs = torch.from_numpy(digits.data).float()[order] / 16
labels = torch.from_numpy(digits.target)[order]


def task(first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels 0 to 4 of five digits, to train on and to judge by."""
    own = (labels >= first) & (labels < first + 5)
    x, y = inputs[own], labels[own] - first
    cut = len(y) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> list[float]:
    """The loss on digits that are not trained on, every fifth step."""
    x, y, unseen_x, unseen_y = task(first)
    losses = []
    for step in range(steps):
        if step % 5 == 0:
            with torch.no_grad():
                losses.append(cross_entropy(model(unseen_x), unseen_y).item())
        batch = torch.randint(len(y), (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return losses


# %%
# Pretrain
# --------
#
# With torch's AdamW, as most models that one gets were.

model = make_model()
adamw = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
losses = train(model, adamw, 0, 150)
pretrained = {name: value.clone() for name, value in model.state_dict().items()}
print(f"digits 0 to 4, unseen: loss {losses[0]:.3f} before, {losses[-1]:.3f} after")

# %%
# What will it take?
# ------------------
#
# ``estimate`` counts the state of an optimizer without making it. Here are this network, and GPT-2 as an example of
# something larger, by its shapes.

print(f"{'':16}{'this network':>24}{'GPT-2 124M':>24}")
for bits in (32, 8, 4):
    ours, larger = estimate(model, "adamw", bits=bits), estimate(gpt2(), "adamw", bits=bits)
    cells = (f"{x.state / 1e6:9.3f} MB, {x.bytes_per_parameter:5.2f} each" for x in (ours, larger))
    print(f"{f'AdamW, {bits} bits':16}" + "".join(f"{cell:>24}" for cell in cells))

# %%
# Fine-tune
# ---------
#
# Old moments can be thrown away or taken over. torch's AdamW loads its own state dict. An optimizer of 4 bits does
# not load a state dict of 32: what says how state is kept stays as it is, and an error says so.
# ``load_base_state_dict`` of a second-order optimizer takes moments of any bits over into others, and ``lowbit-optim
# convert`` does the same to a checkpoint. Here ``Shampoo`` goes on with AdamW's moments in 4 bits; with
# ``precondition=False`` it is its base alone, and every step is AdamW's.


def start_anew(bits: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model()
    model.load_state_dict(pretrained)
    return model, AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, bits=bits)


def go_on() -> tuple[nn.Module, torch.optim.Optimizer]:
    """With torch's AdamW and the moments of the pretraining."""
    model = make_model()
    model.load_state_dict(pretrained)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(adamw.state_dict())
    optimizer.param_groups[0]["lr"] = 1e-3
    return model, optimizer


def convert(precondition: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """With the moments of the pretraining in 4 bits, and the options that come with them but for the rate."""
    model = make_model()
    model.load_state_dict(pretrained)
    groups = [{"params": list(model.parameters()), "precondition": precondition}]
    optimizer = Shampoo(groups, base_bits=4, statistics_frequency=10)
    optimizer.load_base_state_dict(adamw.state_dict())
    optimizer.param_groups[0]["lr"] = 1e-3
    return model, optimizer


runs = {
    "AdamW, 32 bits": start_anew(32),
    "AdamW, 4 bits": start_anew(4),
    "AdamW, 32 bits, moments taken over": go_on(),
    "AdamW, 4 bits, moments converted": convert(False),
    "2-bit Shampoo, 4-bit moments converted": convert(True),
}
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, (model, optimizer) in runs.items():
    losses = train(model, optimizer, 5, 151)
    size = state_bytes(optimizer)["total"]
    print(f"{name:40} unseen loss {losses[-1]:.4f}, state {size:9,} bytes")
    axes.plot(range(0, 151, 5), losses, label=name)
axes.set(xlabel="step of fine-tuning", ylabel="loss on unseen digits 5 to 9", yscale="log")
axes.set_title("Loss while fine-tuning: moments of 32 and of 4 bits")
axes.legend()
plt.show()

# %%
# What to compare: 4 bits with 32 bits, both anew or both with the old moments. Whether to take moments over is
# another question. Those from the end of a training are of small gradients, so the first steps on something new are
# long; whether that is a head start or a jump too far depends on the rate. This is one seed, and one rate for all,
# 1e-3, which was not tuned. :doc:`/moments` has twenty seeds of training from the start and three other tasks.
#
# Which parameters keep what
# --------------------------
#
# ``report()`` has a line for each parameter. Biases keep 32 bits: what has fewer than ``min_quant_size`` numbers
# would save next to nothing.

model, optimizer = runs["AdamW, 4 bits"]
print(optimizer.report())

# %%
# In your own fine-tuning
# -----------------------
#
# * ``AdamW(model.parameters(), lr=..., bits=4)`` in the place of torch's, with the rate that you had. ``bits=8`` is
#   there for who wants to be careful.
# * bfloat16 weights need no float32 copy: steps are rounded at random. :doc:`/moments` says why.
# * A checkpoint whose moments have 32 bits goes on at 4 after ``lowbit-optim convert``: :doc:`/convert`.
