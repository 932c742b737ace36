"""The param groups of a model: every trainable parameter once, where it belongs."""

import pytest
import torch
from torch import nn

from lowbit_optim import CASPR, KFAC, SOAP, AdaBK, Shampoo, param_groups
from tests.contract import loss_of, net, train


def kinds(model, **settings):
    """{"decay" or "none", "preconditioned" or "base": names}, checked to be every trainable parameter once."""
    groups = param_groups(model, **settings)
    assert all(group["params"] for group in groups)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert all(model.get_parameter(name) is p for group in groups for name, p in group["params"])
    return {
        ("decay" if group["weight_decay"] else "none", "preconditioned" if group["precondition"] else "base"): {
            name for name, _ in group["params"]
        }
        for group in groups
    }


MATRICES, BASE, VECTORS, NORMS = (
    ("decay", "preconditioned"),
    ("decay", "base"),
    ("none", "preconditioned"),
    ("none", "base"),
)


class Conv1D(nn.Module):
    """As transformers.pytorch_utils.Conv1D: y = x W + b, W of [inputs, outputs]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Language(nn.Module):
    """As a GPT-2 of Hugging Face."""

    def __init__(self, tied):
        super().__init__()
        self.head = nn.Linear(8, 50, bias=False)
        self.tokens = nn.Embedding(50, 8)
        self.positions = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = Conv1D(24, 8)
        self.out = nn.Linear(24, 8)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.out(self.attention(self.norm(x))))


class Told(Language):
    def get_output_embeddings(self):
        return self.head


VECTORS_OF_LANGUAGE = {"norm.weight", "norm.bias", "attention.bias", "out.bias"}


def test_a_plain_model():
    assert kinds(net()) == {
        MATRICES: {"conv.weight", "hidden.weight"},
        BASE: {"head.weight"},
        VECTORS: {"conv.bias", "norm.weight", "norm.bias", "head.bias"},
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_hugging_face_model(tied):
    """Which says what its output layer is, so that the last Linear is an ordinary matrix; also within another model."""
    output = {"head.weight"}  # the first name of the tied weight, too
    expected = {
        MATRICES: {"attention.weight", "out.weight"},
        BASE: {"positions.weight"} | output | (set() if tied else {"tokens.weight"}),
        VECTORS: VECTORS_OF_LANGUAGE,
    }
    assert kinds(Told(tied)) == expected
    within = nn.Sequential(Told(tied))
    assert kinds(within) == {key: {f"0.{name}" for name in names} for key, names in expected.items()}


@pytest.mark.parametrize("name", ["out", "out.weight", "head", ("out", "attention"), ()], ids=str)
def test_names_are_left_to_the_base(name):
    """And nothing is guessed beside them; a vector has no use for preconditioning anyhow."""
    given = {name} if isinstance(name, str) else set(name)
    named = {f"{own.removesuffix('.weight')}.weight" for own in given}
    every = {"head.weight", "attention.weight", "out.weight"}
    got = kinds(Language(False), leave_to_base=name)
    assert got == {
        MATRICES: every - named,
        BASE: {"tokens.weight", "positions.weight"} | named,
        VECTORS: VECTORS_OF_LANGUAGE,
    }


def test_names_are_whole_parts_of_a_path():
    model = nn.ModuleDict({f"block{i}": nn.ModuleDict({"up": nn.Linear(4, 4)}) for i in (1, 10)})
    assert kinds(model, leave_to_base=["block1"])[BASE] == {"block1.up.weight"}
    assert kinds(model, leave_to_base=["block1", "block10.up.weight"])[BASE] == {
        "block1.up.weight",
        "block10.up.weight",
    }


def test_a_name_of_a_tied_weight():
    assert "head.weight" in kinds(Language(True), leave_to_base="tokens")[BASE]


@pytest.mark.parametrize("name", ["heads", "block.head", "hea", "", "head.weight.data"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=rf"'{name}'.*conv, norm, hidden, head"):
        param_groups(net(), leave_to_base=("hidden", name))
    with pytest.raises(ValueError, match=r"'1'.*At the top it has 0, 1"):
        param_groups(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), leave_to_base="1")


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf")])
def test_weight_decay_must_be_one(decay):
    with pytest.raises(ValueError, match=rf"weight_decay is {decay}"):
        param_groups(net(), weight_decay=decay)


def test_frozen_parameters_are_left_out():
    model = net()
    model.conv.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    assert kinds(model) == {
        MATRICES: {"hidden.weight"},
        BASE: {"head.weight"},
        VECTORS: {"norm.weight", "norm.bias"},
    }
    assert param_groups(model.requires_grad_(False)) == []


def test_only_a_linear_at_the_end_is_guessed():
    layers = nn.Linear(4, 4), nn.Linear(4, 4)
    assert kinds(nn.Sequential(*layers, nn.ReLU()))[BASE] == {"1.weight"}
    assert BASE not in kinds(nn.Sequential(*layers, nn.LayerNorm(4)))
    assert BASE not in kinds(nn.LSTM(4, 4))


def test_norms_of_two_dims_and_embeddings_below_parametrizations():
    bag = nn.utils.parametrizations.weight_norm(nn.EmbeddingBag(9, 4))
    groups = kinds(nn.Sequential(bag, nn.Linear(4, 6), nn.LayerNorm((3, 2))))
    originals = {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    assert groups == {MATRICES: {"1.weight"}, BASE: originals, VECTORS: {"1.bias"}, NORMS: {"2.weight", "2.bias"}}


def test_decay_is_where_it_belongs():
    """With gradients of zero, weight decay is all that moves a parameter."""
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Shampoo(param_groups(model, weight_decay=0.5), lr=0.1, base="sgd")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.dim() > 1 else 1.0))


@pytest.mark.parametrize("made", [Shampoo, CASPR, SOAP, KFAC, AdaBK, torch.optim.AdamW])
def test_optimizers_take_them(made):
    model = net()
    own = {"model": model} if made in (KFAC, AdaBK) else {}
    own |= {"statistics_frequency": 2} if made not in (SOAP, torch.optim.AdamW) else {}
    optimizer = made(param_groups(model), lr=0.01, **own)
    before = loss_of(model, 0).item()
    train(model, optimizer, [0] * 12)
    assert loss_of(model, 0).item() < 0.8 * before
    if made is not torch.optim.AdamW:
        stats = optimizer.stats()
        treated = {name for name, one in stats.items() if one["treatment"] != "base"}
        columns = {"conv.bias"} if own.get("model") else set()
        assert treated == {"conv.weight", "hidden.weight"} | columns


def test_from_adamw_to_shampoo_over_the_same_groups():
    model = net()
    adamw = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=0.01)
    train(model, adamw, range(3))
    optimizer = Shampoo(param_groups(model), lr=0.5)
    optimizer.load_base_state_dict(adamw.state_dict())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert [group["precondition"] for group in optimizer.param_groups] == [True, False, True]
    train(model, optimizer, range(3, 5))
