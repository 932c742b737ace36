"""What the optimizer tests share: the optimizers that must keep the contract, a small model, comparisons of bits.

A new optimizer joins the contract by one entry in ``OPTIMIZERS``.
"""

import pytest
import torch
from torch import nn

from lowbit_optim import CASPR, EKFAC, KFAC, SGD, SOAP, AdaBK, Adagrad, AdamW, Shampoo, presets

# Factors of order 16 and more are quantized, so that small models have codes in their state.
small = {"lr": 0.01, "statistics_frequency": 2, "min_quant_size": 256}
sgd = {"base": "sgd", "momentum": 0.9}


def of_parameters(optimizer, **settings):
    """From a model, its parameters or some of them."""

    def make(model, params=None, **more):
        own = model.parameters() if isinstance(model, nn.Module) else model
        return optimizer(own if params is None else params, **{**settings, **more})

    make.optimizer, make.settings = optimizer, settings
    return make


def of_a_model(optimizer, **settings):
    """From a model, whose layers it hooks into."""

    def make(model, params=None, **more):
        own = model.parameters() if params is None else params
        return optimizer(own, model=model, **{**settings, **more})

    make.optimizer, make.settings = optimizer, settings
    return make


OPTIMIZERS = {
    "shampoo": of_parameters(Shampoo, **small),
    "shampoo-sgd": of_parameters(Shampoo, **small, **sgd, nesterov=True),
    "shampoo-4-bits": of_parameters(Shampoo, **small, bits=4),
    "shampoo-blocks": of_parameters(Shampoo, **small, base="adagrad", max_preconditioner_dim=20, workspace=10_000),
    "shampoo-32-bits": of_parameters(Shampoo, **small, bits=32, precondition_frequency=3),
    "shampoo-direct": of_parameters(Shampoo, **small, **sgd, bits=4, storage="direct", precondition_frequency=2),
    "shampoo-eigen": of_parameters(
        Shampoo, **{**presets.WANG2024, **small, "precondition_frequency": 4}, weight_decay=0.1
    ),
    "shampoo-low-bit-base": of_parameters(Shampoo, **small, base_bits=4),
    "shampoo-spiked": of_parameters(Shampoo, **small, bits=2, storage="spiked"),
    "caspr": of_parameters(CASPR, **small),
    "soap": of_parameters(SOAP, lr=0.01, min_quant_size=256, precondition_frequency=2),
    "soap-eigen": of_parameters(
        SOAP, lr=0.01, min_quant_size=256, precondition_frequency=3, storage="cholesky", basis="eigen", amsgrad=True
    ),
    "soap-low-bit-base": of_parameters(SOAP, lr=0.01, min_quant_size=256, precondition_frequency=2, base_bits=4),
}
LAYERED = {
    "kfac": of_a_model(KFAC, **small),
    "kfac-32-bits": of_a_model(KFAC, **small, **sgd, bits=32, storage="eigen", precondition_frequency=3),
    "kfac-absolute": of_a_model(KFAC, **small, damping_rule="absolute", graft=False, sharing="reduce", bits=4),
    "adabk": of_a_model(AdaBK, **small),
    "adabk-logarithm": of_a_model(AdaBK, **small, base="adagrad", storage="logarithm"),
    "adabk-spiked": of_a_model(AdaBK, **small, bits=1, storage="spiked"),
    "ekfac": of_a_model(EKFAC, **small),
    "ekfac-low-bit-base": of_a_model(EKFAC, **small, base="adagrad", base_bits=8),
    "ekfac-eigen": of_a_model(
        EKFAC, **small, **sgd, precondition_frequency=4, storage="cholesky", basis="eigen", graft=False, damping=0.1
    ),
}
OPTIMIZERS |= LAYERED
FIRST_ORDER = {
    "adamw": of_parameters(AdamW, lr=0.01, min_quant_size=256, bits=4),
    "adamw-8-bits": of_parameters(AdamW, lr=0.01, min_quant_size=256, weight_decay=0.1),
    "adagrad": of_parameters(Adagrad, lr=0.01, min_quant_size=256, bits=4),
    "sgd": of_parameters(SGD, lr=0.01, min_quant_size=256, momentum=0.9, nesterov=True),
}


def each(names):
    """For every one of these optimizers, ``make(model, params=None, **settings)``."""
    every = OPTIMIZERS | FIRST_ORDER
    return pytest.mark.parametrize("make", [pytest.param(every[name], id=name) for name in names])


each_optimizer = each(OPTIMIZERS)
each_of_parameters = each(name for name in OPTIMIZERS if name not in LAYERED)  # make([parameter, ...]), too
# One of each class over AdamW, and the published Shampoo.
CLASSES = ["shampoo", "shampoo-eigen", "caspr", "kfac", "adabk", "ekfac", "soap"]
each_class = each(CLASSES)
each_but_soap = each(CLASSES[:-1])  # whose base is AdamW, always
# With the first-order ones, in every setting or one of each class; torch's SGD, whose class ours is, counts no steps.
each_one = each([*OPTIMIZERS, *FIRST_ORDER])
each_public = each([*CLASSES, "adamw", "adagrad", "sgd"])
each_counting = each([*CLASSES, "adamw", "adagrad"])


# For the small model, at 4 bits, which every storage but dense supports.
shampoo = of_parameters(Shampoo, **small, bits=4)


class Net(nn.Module):
    """A convolution, matrices and vectors; every parameter has a shape of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.LayerNorm(64)
        self.hidden = nn.Linear(64, 36, bias=False)
        self.head = nn.Linear(36, 5)

    def forward(self, images):
        return self.head(torch.tanh(self.hidden(self.norm(self.conv(images).flatten(1)))))


def net(dtype=torch.float32, seed=0):
    """The same model for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def random(*shape, seed=0, dtype=torch.float32):
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model, step):
    """The loss of a model on the batch of a step."""
    weight = model.head.weight
    target = (torch.arange(12) % 5).to(weight.device)
    images = random(12, 3, 4, 4, seed=step, dtype=weight.dtype).to(weight.device)
    return nn.functional.cross_entropy(model(images).float(), target)


def backward(model, step):
    """The gradients of a step, in the place of the last."""
    model.zero_grad()
    loss_of(model, step).backward()


def train(model, optimizer, steps):
    """Optimizer steps on the batches of ``steps``, a range."""
    for step in steps:
        backward(model, step)
        optimizer.step()


def run(make, steps=6, model=None):
    """(model, optimizer) after so many steps."""
    model = net() if model is None else model
    optimizer = make(model)
    train(model, optimizer, range(steps))
    return model, optimizer


def follow(make, start, grads, dtype=torch.float64):
    """The only parameter of ``make([parameter])`` after each step, float64 numpy."""
    parameter = nn.Parameter(torch.tensor(start).to(dtype))
    optimizer = make([parameter])
    history = []
    for grad in grads:
        parameter.grad = torch.tensor(grad).to(dtype)
        optimizer.step()
        history.append(parameter.detach().double().numpy().copy())
    return history


def same(one, other):
    """The same types, keys, shapes, dtypes and bits, all the way down."""
    if isinstance(one, torch.Tensor):
        bits = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def same_models(one, other):
    """Whether two models have the same parameters, to the last bit."""
    return same(list(one.parameters()), list(other.parameters()))


def tensors(optimizer):
    """Every tensor of an optimizer's state."""
    return [value for own in optimizer.state.values() for value in own.values() if isinstance(value, torch.Tensor)]


def copies(optimizer):
    """What an optimizer holds, in copies: parameters, groups, state."""
    groups = [{**group, "params": [p.detach().clone() for p in group["params"]]} for group in optimizer.param_groups]
    state = [
        {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
        if p in optimizer.state
    ]
    return {"groups": groups, "state": state}
