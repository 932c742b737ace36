"""Small models for real batches, every optimizer over them, and what one process makes of the whole batch.

In float64, so that the rounding of sums over processes, which come in another order, stays far below what a test asks
for, and flips no code either: then low-bit state, too, can be compared.
"""

from functools import cache

import torch
from torch import nn

from lowbit_optim import CASPR, EKFAC, KFAC, SOAP, AdaBK, Shampoo
from tests.contract import of_a_model, of_parameters, random
from tests.distributed.runs import whole

BATCH = 12  # which 1, 2, 3 and 4 ranks divide

_small = {"lr": 0.01, "bits": 4, "statistics_frequency": 2, "min_quant_size": 64}
OPTIMIZERS = {
    "shampoo": of_parameters(Shampoo, **_small, max_preconditioner_dim=16),
    "caspr": of_parameters(CASPR, **{**_small, "lr": 0.03}, base="sgd", momentum=0.9),
    "soap": of_parameters(SOAP, **_small, precondition_frequency=2),
    "kfac": of_a_model(KFAC, **{**_small, "lr": 0.1}, base="sgd", momentum=0.9),
    "adabk": of_a_model(AdaBK, **_small),
    "ekfac": of_a_model(EKFAC, **_small),
}
LAYERED = ("kfac", "adabk", "ekfac")
TOLERANCE = 1e-9


class Mlp(nn.Module):
    """Matrices and biases of few rows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 17), nn.Linear(17, 7), nn.Linear(7, 3)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)

    @staticmethod
    def inputs(seed):
        return random(BATCH, 10, seed=seed, dtype=torch.float64)


class ConvNet(nn.Module):
    """Convolutions, one of them in groups, and a norm."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, groups=2)])
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.norm(x).flatten(1))

    @staticmethod
    def inputs(seed):
        return random(BATCH, 3, 6, 6, seed=seed, dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.into, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.into(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """An embedding and attention, with sides of multiples of 16: see ``runs.SHAPES``."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList([Attention()])
        self.head = nn.Linear(16, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.log_softmax(self.head(x), -1)

    @staticmethod
    def inputs(seed):
        return torch.randint(32, (BATCH, 5), generator=torch.Generator().manual_seed(seed))


MODELS = {"mlp": Mlp, "convolutions": ConvNet, "transformer": Transformer}


def model_of(name):
    """In float64; the same for every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().double()


def part(x, rank, world):
    """A rank's part of a batch."""
    return x.chunk(world)[rank]


def loss_of(model, inputs):
    """A mean over the batch and its positions, of a loss that is never flat."""
    return torch.log(model(inputs).double().square() + 0.1).mean()


def train_model(model, optimizer, steps, rank=0, world=1, inputs=None):
    """Steps on this rank's parts of the batches."""
    inputs = inputs or model.inputs
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, part(inputs(step), rank, world)).backward()
        optimizer.step()


@cache
def of_one_process(model_name, optimizer_name, steps, **more):
    """What becomes of training on whole batches."""
    model = model_of(model_name)
    optimizer = OPTIMIZERS[optimizer_name](model, **more)
    train_model(model, optimizer, range(steps))
    return outcome(model, optimizer)


def outcome(model, optimizer):
    """Parameters and state as one process would have them: {name: tensor}."""
    found = {name.removeprefix("module."): whole(p).clone() for name, p in model.named_parameters()}
    for i, own in optimizer.state_dict()["state"].items():
        found |= {f"{i} {name}": whole(x).clone() for name, x in own.items()}
    return found


def differences(found, expected, tolerance):
    """What is off by more than a part of its largest number, and by how much; codes and counters must be the same."""
    assert found.keys() == expected.keys()
    off = {}
    for name, x in expected.items():
        y = found[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        allowed = tolerance * x.abs().max().item() if x.dtype.is_floating_point and x.numel() else 0
        worst = (x.double() - y.double()).abs().max().item() if x.numel() else 0
        if not worst <= allowed:
            off[name] = worst
    return off


def assert_one_process(answers, expected, tolerance=TOLERANCE):
    """Every rank has what one process has, and all have the same bits."""
    for found in answers:
        for other, allowed in ((expected, tolerance), (answers[0], 0)):
            off = differences(found, other, allowed)
            assert off == {}, off
