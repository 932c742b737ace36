"""
Write your own Kronecker optimizer
==================================

An optimizer of this kind keeps two matrices for each weight matrix W: averages L of G Gᵀ and R of Gᵀ G, G being the
gradient. It steps along L^(-1/4) G R^(-1/4). That product acts on G as one huge matrix would, the Kronecker product of
both, which nobody has to form.

In float32, L and R and their roots take several times the memory of the weights. Here you write such an optimizer, and
let the library's storage layer keep its matrices as codes of a few bits: 60 lines, with momentum, blocks, saving and
loading. At the end it is compared with ``lowbit_optim.Shampoo``, which has more to it.
"""

# %%
# How a symmetric matrix becomes codes
# ------------------------------------
#
# ``Symmetric`` says how a stack of symmetric matrices [k, n, n] is kept: the diagonal in float32, and one triangle of
# the rest as codes. A ``Quantization`` says what a code is. These have 8 bits, evenly spaced, every 64 of which share
# a scale; the scales have 8 bits themselves (``double``). Since only one triangle is kept, that is a little more than
# 4 bits for each element of the square.

from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowbit_optim import AdamW, Quantization, Shampoo, state_bytes
from lowbit_optim.blocking import blocking
from lowbit_optim.linalg import damped, each, eigh, matrix_power, trace
from lowbit_optim.storage import Symmetric
from lowbit_optim.storage.factors import put, take

CODEC = Symmetric(Quantization(8, "linear", 64, double=True))

x = torch.randn(1, 256, 300, generator=torch.Generator().manual_seed(0))
a = x @ x.mT / 300
parts = CODEC.encode(a)
for name, part in parts.items():
    print(f"{name:14} {tuple(part.shape)!s:12} {part.dtype}")
kept = sum(part.nbytes for part in parts.values())
print(f"{8 * kept / a.numel():.2f} bits per element, relative error {(CODEC.decode(parts) - a).norm() / a.norm():.4f}")

# %%
# Which matrix to keep
# --------------------
#
# L itself is a poor thing to round. Its eigenvalues span many orders of magnitude, one scale serves large and small
# ones alike, and the inverse root then blows up what was rounded away. The eigenvalues of X = L^(-1/4) lie far closer
# together: a quotient of 10,000 becomes one of 10. And X is what a step needs. So keep X alone, and where the average
# has to be updated read it back as X⁻⁴.
#
# One thing goes wrong with that: rounding X pushes X⁻⁴ upwards, a little at every update, and it compounds. So the
# trace of L, a single number, is kept beside X, and what is read back is scaled to it. These two functions are all of
# it.

EPS = 1e-6  # the smallest eigenvalue that counts, relative to the largest


def read_statistic(state: dict[str, Tensor], side: str) -> Tensor:
    """L or R, [k, n, n], from its coded root and its trace."""
    values, vectors, _ = eigh(CODEC.decode(take(side, state)))
    statistic = matrix_power(damped(values, EPS**0.25, clamp=True), vectors, -4.0)
    return statistic * each(state[f"{side}.trace"] / trace(statistic), statistic)


def write_statistic(state: dict[str, Tensor], side: str, statistic: Tensor) -> None:
    """The other way round."""
    state[f"{side}.trace"] = trace(statistic)
    unit = statistic * each(statistic.shape[-1] / trace(statistic).clamp(min=1e-30), statistic)
    values, vectors, _ = eigh(unit)
    state.update(put(side, CODEC.encode(matrix_power(damped(values, EPS, clamp=True), vectors, -0.25))))


# %%
# The optimizer
# -------------
#
# ``blocking`` cuts a parameter into equal blocks [k, rows, columns], or says None of a vector, which then takes its
# plain gradient. Each block has an L and an R of its own. Every tenth step updates them; every step multiplies.
# Afterwards the direction is given the norm that the gradient had ("grafting"), so that the learning rate means what
# it means without all this.
#
# ``load_state_dict`` has to be overridden: torch casts every floating-point parameter's state to the parameter's
# dtype, and that would turn the codes into floats. Here it is given the state without the tensors, which are then put
# back as they are.


class TinyShampoo(torch.optim.Optimizer):
    """Momentum on a preconditioned gradient, with both factors kept as codes."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.9, decay: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "every": 10, "max_dim": 256})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    direction = self.precondition(p.grad, state, group)
                    momentum = state.setdefault("momentum", torch.zeros_like(p))
                    p.sub_(momentum.mul_(group["momentum"]).add_(direction), alpha=group["lr"])

    def precondition(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        plan = blocking(tuple(gradient.shape), group["max_dim"])
        if plan is None:
            return gradient
        blocks = plan.split(gradient)
        if state["step"] % group["every"] == 1:
            updates = 1 + state["step"] // group["every"]
            weight = (1 - group["decay"]) / (1 - group["decay"] ** updates)  # first about 1, 1/2, 1/3
            for side, statistic in (("left", blocks @ blocks.mT), ("right", blocks.mT @ blocks)):
                if updates > 1:
                    statistic = torch.lerp(read_statistic(state, side), statistic, weight)
                write_statistic(state, side, statistic)
        blocks = CODEC.decode(take("left", state)) @ blocks @ CODEC.decode(take("right", state))
        direction = plan.merge(blocks)
        return direction * (gradient.norm() / direction.norm().clamp(min=1e-30))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for index, own in state_dict["state"].items():
            self.state[params[index]] = {k: v.clone() if torch.is_tensor(v) else v for k, v in own.items()}


# %%
# Try it
# ------
#
# The digits of scikit-learn, 8 x 8 pixels, and a perceptron with one hidden layer. Everything starts from the same
# weights and sees the same batches.

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
inputs = torch.from_numpy(digits.data).float()[order] / 16
labels = torch.from_numpy(digits.target)[order]
train, test = slice(0, 1400), slice(1400, None)
STEPS = 300


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def run(optimizer: torch.optim.Optimizer, model: nn.Module, first: int = 0, last: int = STEPS) -> list[float]:
    """Train from one step to another; the losses of the batches."""
    losses = []
    for step in range(first, last):
        batch = torch.randint(1400, (64,), generator=torch.Generator().manual_seed(step))
        loss = cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


model = make_model()
tiny = TinyShampoo(model.parameters(), lr=0.03)
run(tiny, model, 0, 10)
for name, value in tiny.state[model[0].weight].items():
    print(f"{name:20}", f"{tuple(value.shape)!s:14} {value.dtype}" if isinstance(value, Tensor) else value)

own = tiny.state[model[0].weight]
factors = sum(value.nbytes for name, value in own.items() if name.startswith(("left", "right")))
in_float32 = 2 * 4 * (64**2 + 128**2)  # statistic and root, of order 64 and 128
print(f"factors: {factors:,} bytes, where statistics and roots in float32 would be {in_float32:,}")

# %%
# The state of the first layer holds its codes as uint8, diagonals and traces in float32, and the momentum.
#
# Saved half way and loaded into a new optimizer, the run must go on with the same bits:

run(tiny, model, 10, 150)
saved = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "optimizer": tiny.state_dict()}
file = BytesIO()
torch.save(saved, file)
run(tiny, model, 150, STEPS)

resumed = make_model()
again = TinyShampoo(resumed.parameters(), lr=0.03)
file.seek(0)
halfway = torch.load(file, weights_only=True)
resumed.load_state_dict(halfway["model"])
again.load_state_dict(halfway["optimizer"])
run(again, resumed, 150, STEPS)
print("the same bits:", all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True)))

# %%
# Beside others
# -------------
#
# Each optimizer gets the best of six learning rates, by its loss on the digits that it has not seen, so that none
# suffers from the rate of another. It is one seed, a small model and few steps, and rates were chosen on the digits
# that are shown: no ranking follows from it.

MAKERS: dict[str, Callable[[Iterable[Tensor], float], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9),
    "AdamW of 32 bits": lambda ps, lr: AdamW(ps, lr=lr, bits=32),
    "TinyShampoo": lambda ps, lr: TinyShampoo(ps, lr=lr),
    "Shampoo, bits=4": lambda ps, lr: Shampoo(
        ps, lr=lr, bits=4, base="sgd", momentum=0.9, statistics_frequency=10, min_quant_size=0
    ),
}
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
print(f"{'':20} {'rate':>6} {'loss on unseen digits':>22} {'bytes of state':>15}")
for name, make in MAKERS.items():
    best = None
    for rate in RATES:
        model = make_model()
        optimizer = make(model.parameters(), rate)
        losses = run(optimizer, model)
        with torch.no_grad():
            unseen = cross_entropy(model(inputs[test]), labels[test]).item()
        if best is None or unseen < best[0]:
            best = unseen, rate, losses, state_bytes(optimizer)["total"]
    unseen, rate, losses, size = best
    print(f"{name:20} {rate:6g} {unseen:22.4f} {size:15,}")
    smooth = torch.tensor(losses).unfold(0, 20, 1).mean(-1)
    axes.plot(range(20, STEPS + 1), smooth, label=f"{name}, rate {rate:g}")
axes.set(xlabel="step", ylabel="training loss, mean of 20 batches", yscale="log")
axes.set_title("Training loss on digits: SGD, AdamW, TinyShampoo and 4-bit Shampoo")
axes.legend()
plt.show()

# %%
# What the library adds
# ---------------------
#
# * Codes of 2 bits per element and less, whose scales are fitted; other forms of storage behind one interface.
# * Blocks of one shape from all parameters in one stack, so that a model of a hundred layers makes a few calls.
# * Any base optimizer, with moments of few bits themselves. Here the momentum is now most of the state.
# * Gradients that are not finite, outliers, failed decompositions, bfloat16 parameters, closures, DDP and FSDP2.
#
# :doc:`/storage` compares what else could be kept in the place of X, and what did not help.
