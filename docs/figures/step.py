"""Singular values of a gradient before and after preconditioning, in a short training of the network of start.md."""

import torch
from figures import BLUE, GREY, SKY, axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from lowbit_optim import Shampoo

STEPS = 60
LINES = {
    32: {"color": SKY, "linewidth": 4},
    2: {"color": BLUE, "linestyle": "--"},
}


def train(bits: float) -> tuple[Tensor, Tensor]:
    """The gradient of the second layer in the last step, before and after."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 64)
    labels = inputs[:, :10].argmax(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer = Shampoo(model.parameters(), lr=1e-3, statistics_frequency=5, bits=bits)
    weight = model[2].weight
    for _ in range(STEPS):
        batch = torch.randint(len(inputs), (64,))
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        before = weight.grad.clone()
        optimizer.step()  # which preconditions gradients in place
    return before, weight.grad


def draw() -> Figure:
    figure, ax = axes(3.4)
    for bits, line in LINES.items():
        before, after = (torch.linalg.svdvals(gradient) for gradient in train(bits))
        if bits == 32:
            ax.semilogy(before, label="gradient", color=GREY)
        ax.semilogy(after, label=f"preconditioned, {bits} bits", **line)
    ax.set_ylim(1e-3 * float(before.max()), 2 * float(before.max()))
    ax.set_xlabel("singular value, largest first")
    ax.legend(fontsize=10)
    return figure
