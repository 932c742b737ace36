"""
Image classifier with K-FAC
===========================

K-FAC looks at layers: it averages products of the inputs of each layer, and of the gradients at its outputs, and
preconditions the gradient of the weight with the inverses of both averages. This trains a small convolutional network
on scikit-learn's digits with it, and shows what is different from other optimizers: it wants the model, it treats every
parameter by the layer that it belongs to, and its damping matters.
"""

# %%
# Data and model
# --------------
#
# 1797 scans of digits, 8 x 8 pixels; the last fifth after a shuffle is not trained on.

import logging
import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lowbit_optim import KFAC, state_bytes

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images = torch.from_numpy(digits.images).float()[order].unsqueeze(1) / 16
labels = torch.from_numpy(digits.target)[order]
SEEN, STEPS = 1400, 150


def make_model() -> nn.Sequential:
    """Two convolutions with a normalization between them, and a perceptron; the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


# %%
# Make the optimizer
# ------------------
#
# ``model=model`` lets K-FAC put hooks on the layers. ``base="sgd"`` is what takes the preconditioned gradient; AdamW
# is the default. The default period, 200 steps, is meant for long trainings: a short one wants 10. ``treatments()``
# says what becomes of every parameter. A bias is one more column of its weight; the normalization goes to the base
# alone.

model = make_model()
optimizer = KFAC(model.named_parameters(), lr=0.03, model=model, base="sgd", momentum=0.9, statistics_frequency=10)
for name, treatment in optimizer.treatments().items():
    print(f"{name:10} {treatment}")

# %%
# Train
# -----
#
# The loop is the usual one. In a backward pass before a step that takes statistics (every tenth here, the first
# included) the hooks collect sums of input and gradient products; in the others they do nothing.


def run(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = STEPS) -> tuple[list[float], float, float]:
    """Train; the losses of the batches, and loss and accuracy on digits that were not seen."""
    losses = []
    for step in range(steps):
        batch = torch.randint(SEEN, (64,), generator=torch.Generator().manual_seed(step))
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        scores = model(images[SEEN:])
    return (
        losses,
        cross_entropy(scores, labels[SEEN:]).item(),
        (scores.argmax(-1) == labels[SEEN:]).float().mean().item(),
    )


_, loss, accuracy = run(optimizer, model)
print(f"unseen digits: loss {loss:.4f}, {accuracy:.1%} right")

# %%
# What it keeps of each layer, and whether all went well: updates that failed, and how far rounding to 2 bits has
# moved each factor's root, as an estimate. Factors with few numbers (``min_quant_size``, 4096) keep 32 bits, so their
# error is zero.

for name, own in optimizer.stats().items():
    if own["left.rounding_error"] is not None:
        errors = f"rounding error left {own['left.rounding_error']:.3f}, right {own['right.rounding_error']:.3f}"
        failures = own["left.failures"] + own["right.failures"]
        print(f"{name:10} {own['bytes']:6,} bytes, {failures} failed updates, {errors}")

# %%
# Choose the damping
# ------------------
#
# The inverse of a factor is large where the factor is small, and few batches say little about small directions. So
# the factors are damped: ``damping`` times the largest eigenvalue is added to all of them. Much damping makes K-FAC
# its base; too little trusts noise. Here is the loss on the unseen digits for several of them, and for SGD with the
# same learning rates.

RATES = (0.01, 0.03, 0.1)
DAMPINGS = (1.0, 0.1, 0.01)

# The log warns of gradients that are not finite, and some of these runs diverge.
logging.getLogger("lowbit_optim").setLevel(logging.ERROR)


def with_kfac(damping: float, rate: float, bits: float = 2) -> tuple[list[float], float, float, int]:
    """A run, and the bytes of its optimizer's state."""
    model = make_model()
    settings = {"base": "sgd", "momentum": 0.9, "statistics_frequency": 10, "damping": damping, "bits": bits}
    if bits == 32:
        settings["precondition_frequency"] = 10
    optimizer = KFAC(model.parameters(), lr=rate, model=model, **settings)
    return *run(optimizer, model), state_bytes(optimizer)["total"]


def with_sgd(rate: float) -> tuple[list[float], float, float, int]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return *run(optimizer, model), state_bytes(optimizer)["total"]


def judged(loss: float) -> float:
    """To be compared; a run that diverged is the worst."""
    return loss if math.isfinite(loss) else math.inf


found = {("SGD", rate): with_sgd(rate) for rate in RATES}
found |= {(f"K-FAC, damping {d:g}", rate): with_kfac(d, rate) for d in DAMPINGS for rate in RATES}
rows = list(dict.fromkeys(name for name, _ in found))
print(f"{'learning rate':22}" + "".join(f"{rate:9g}" for rate in RATES))
for name in rows:
    cells = (f"{loss:.4f}" if math.isfinite(loss := found[name, rate][1]) else "diverged" for rate in RATES)
    print(f"{name:22}" + "".join(f"{cell:>9}" for cell in cells))

# %%
# The runs at the best rate of each row:

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name in rows:
    rate = min(RATES, key=lambda rate: judged(found[name, rate][1]))
    losses = torch.tensor(found[name, rate][0]).unfold(0, 10, 1).mean(-1)
    axes.plot(range(10, STEPS + 1), losses, label=f"{name}, rate {rate:g}", linestyle="--" if name == "SGD" else "-")
axes.set(xlabel="step", ylabel="training loss, mean of 10 batches", yscale="log")
axes.set_title("Training loss on digits: SGD and K-FAC with three dampings")
axes.legend()
plt.show()

# %%
# Do few bits cost something here?
# --------------------------------
#
# The best damping and rate of 2 bits, with more bits:

name, rate = min((key for key in found if key[0] != "SGD"), key=lambda key: judged(found[key][1]))
damping = float(name.split()[-1])
for bits in (32, 4, 2):
    _, loss, accuracy, size = with_kfac(damping, rate, bits)
    print(f"{bits:2} bits: loss {loss:.4f}, {accuracy:.1%} right, {size:,} bytes of state")

# %%
# This is one seed, 150 steps, a few hundred digits to judge by, and settings that were chosen on these: what differs
# by a few hundredths is chance. :doc:`/evidence/convergence` has twenty seeds of a perceptron on the same digits.
#
# For your own model
# ------------------
#
# * Give the ``damping`` as much care as the learning rate, by powers of ten around the default.
#   ``damping_rule="absolute"`` adds an amount that does not follow the eigenvalues, split between both factors as
#   Martens and Grosse (2015) do.
# * Read ``treatments()`` once: a layer that is not called (``nn.MultiheadAttention`` computes with its weight itself)
#   goes to the base.
# * With gradient accumulation, all backward passes since the last step count as one large batch.
# * Hooks cost a pass with statistics some time. ``optimizer.close()`` removes them.
#
# What else the hooks see, and what they do not, is in :doc:`/optimizers`.
