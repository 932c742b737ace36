"""`strict=False`: what fits is loaded, all else stays, and the report says which is which."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim import AdamW, Shampoo
from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import CodesOptimizer, adamw, same, sgd, shampoo


class Tower(nn.Module):
    def __init__(self, classes=3, extra=False):
        super().__init__()
        self.body = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, classes)
        if extra:
            self.adapter = nn.Linear(6, 6)

    def forward(self, x):
        x = self.norm(self.body(x))
        return self.head(self.adapter(x) if hasattr(self, "adapter") else x)


def trained(seed, optimizer=adamw, steps=2, **tower):
    torch.manual_seed(seed)
    model = Tower(**tower)
    optimizer = optimizer(model.parameters())
    for _ in range(steps):
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def low_bit_adamw(parameters):
    return AdamW(parameters, bits=4, min_quant_size=1)


OPTIMIZERS = [adamw, sgd, CodesOptimizer, shampoo, low_bit_adamw]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_all_fits(tmp_path, optimizer, steps):
    saved, live, twin = trained(0, optimizer), trained(1, optimizer, steps), trained(1, optimizer, steps)
    save_checkpoint(tmp_path, model=saved[0], optimizer=saved[1], step=5)
    found = load_checkpoint(tmp_path, model=live[0], optimizer=live[1], strict=False)
    assert load_checkpoint(tmp_path, model=twin[0], optimizer=twin[1]) == {"step": 5}
    assert found["step"] == 5
    names = [name for name, _ in Tower().named_parameters()]
    for part in ("model", "optimizer"):
        assert found["report"][part] == {"matched": names, "missing": [], "unexpected": [], "mismatched": {}}
    for one, other in zip(live, twin, strict=True):
        assert same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_another_head_and_an_adapter(tmp_path, optimizer, steps):
    saved = trained(0, optimizer)
    live = trained(1, optimizer, steps, classes=5, extra=True)
    before = copy.deepcopy([part.state_dict() for part in live])
    for group in saved[1].param_groups:
        group["lr"] = 0.5
    save_checkpoint(tmp_path, model=saved[0], optimizer=saved[1])
    report = load_checkpoint(tmp_path, model=live[0], optimizer=live[1], strict=False)["report"]
    fits = ["body.weight", "body.bias", "norm.weight", "norm.bias"]
    for part in ("model", "optimizer"):
        assert report[part]["matched"] == fits
        assert report[part]["missing"] == ["adapter.weight", "adapter.bias"]
        assert report[part]["unexpected"] == []
        assert report[part]["mismatched"].keys() == {"head.weight", "head.bias"}
    assert "[3, 6], the live one torch.float32 [5, 6]" in report["model"]["mismatched"]["head.weight"]
    assert report["optimizer"]["mismatched"]["head.bias"] == "the parameter is [3], the live one [5]"

    theirs = saved[0].state_dict()
    assert same(dict(live[0].state_dict()), {**before[0], **{name: theirs[name] for name in fits}})
    parameters = [dict(saved[0].named_parameters()), dict(live[0].named_parameters())]
    after = live[1].state_dict()
    for index, name in enumerate(parameters[1]):
        state = live[1].state.get(parameters[1][name], {})
        expected = saved[1].state[parameters[0][name]] if name in fits else before[1]["state"].get(index, {})
        assert same(dict(state), dict(expected))
    assert same(after["param_groups"], before[1]["param_groups"])  # the groups are not the same: the settings stay
    model, optimizer = live
    model(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()  # with some state loaded, some not


def test_settings_of_the_groups_that_are_the_same(tmp_path):
    def build(seed, classes):
        model, _ = trained(seed, classes=classes)
        groups = [
            {"params": model.body.parameters(), "lr": 0.1},
            {"params": [*model.norm.parameters(), *model.head.parameters()]},
        ]
        return model, torch.optim.AdamW(groups, lr=0.2)

    saved, live = build(0, 3), build(1, 3)
    live[1].param_groups[1]["params"].pop()
    saved[1].param_groups[0]["lr"] = 0.7
    saved[1].param_groups[1]["lr"] = 0.8
    save_checkpoint(tmp_path, model=saved[0], optimizer=saved[1])
    report = load_checkpoint(tmp_path, model=live[0], optimizer=live[1], strict=False)["report"]
    assert [group["lr"] for group in live[1].param_groups] == [0.7, 0.2]
    assert report["optimizer"]["unexpected"] == ["head.bias"]


def test_state_of_another_meaning(tmp_path):
    """Codes of another codebook have the same names, shapes and dtypes; other bits have others."""
    from lowbit_optim.storage import Quantization

    def build(seed, steps=2, **settings):
        return trained(seed, lambda parameters: Shampoo(parameters, min_quant_size=1, **settings), steps)

    saved = build(0, quantization=Quantization(bits=4, codebook="nf"))
    save_checkpoint(tmp_path, model=saved[0], optimizer=saved[1])
    for settings, said in (
        ({"quantization": Quantization(bits=4, codebook="linear-2")}, "quantization"),
        ({"bits": 2}, "quantization|bits"),
        ({"storage": "dense", "bits": 32}, "storage|bits"),
    ):
        live = build(1, **settings)
        before = copy.deepcopy(live[1].state_dict())
        report = load_checkpoint(tmp_path, model=live[0], optimizer=live[1], strict=False)["report"]["optimizer"]
        assert report["matched"] == []
        assert len(report["mismatched"]) == 6
        for reason in report["mismatched"].values():
            assert any(word in reason for word in said.split("|"))
        assert same(live[1].state_dict(), before)
        assert same(live[0].state_dict(), saved[0].state_dict())


def test_another_class_and_parts_that_were_not_saved(tmp_path):
    saved, live = trained(0), trained(1, sgd)
    before = copy.deepcopy(live[1].state_dict())
    save_checkpoint(tmp_path / "both", model=saved[0], optimizer=saved[1])
    report = load_checkpoint(tmp_path / "both", model=live[0], optimizer=live[1], strict=False)["report"]
    assert len(report["model"]["matched"]) == 6
    assert report["optimizer"]["matched"] == []
    assert "state of a torch.AdamW, and the optimizer is a torch.SGD" in report["optimizer"]["mismatched"]["head.bias"]

    save_checkpoint(tmp_path / "none", step=3)
    found = load_checkpoint(tmp_path / "none", model=live[0], optimizer=live[1], strict=False)
    assert found["step"] == 3
    for part in ("model", "optimizer"):
        assert len(found["report"][part]["missing"]) == 6
    assert same(live[1].state_dict(), before)
    assert same(live[0].state_dict(), saved[0].state_dict())
    assert load_checkpoint(tmp_path / "none", strict=False)["report"] == {}


def test_by_index_without_a_model(tmp_path):
    saved, live = trained(0), trained(1, classes=4)
    save_checkpoint(tmp_path, optimizer=saved[1])
    report = load_checkpoint(tmp_path, optimizer=live[1], strict=False)["report"]
    assert report == {
        "optimizer": {
            "matched": ["0", "1", "2", "3"],
            "missing": [],
            "unexpected": [],
            "mismatched": {
                "4": "the parameter is [3, 6], the live one [4, 6]",
                "5": "the parameter is [3], the live one [4]",
            },
        }
    }


def test_tied_and_retyped_tensors(tmp_path):
    class Tied(nn.Module):
        def __init__(self, tied, dtype=torch.float32):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.other = nn.Linear(3, 3, bias=False, dtype=dtype)
            if tied:
                self.two.weight = self.one.weight

    saved, live = Tied(False, torch.bfloat16), Tied(True)
    save_checkpoint(tmp_path, model=saved)
    report = load_checkpoint(tmp_path, model=live, strict=False)["report"]["model"]
    assert report["matched"] == ["one.weight"]
    assert report["mismatched"]["two.weight"] == "it is tied to 'one.weight' in the model, but was not when saved"
    assert "is torch.bfloat16 [3, 3], the live one torch.float32" in report["mismatched"]["other.weight"]
    assert torch.equal(live.two.weight, saved.one.weight)


def test_scheduler_is_loaded_as_ever(tmp_path):
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, scheduler=lr_scheduler.StepLR(optimizer, 3))
    with pytest.raises(CheckpointError, match="the scheduler given is a"):
        load_checkpoint(tmp_path, model=model, scheduler=lr_scheduler.ConstantLR(optimizer), strict=False)


def test_undone_if_it_fails(tmp_path):
    class Failing(Tower):
        fails = True

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            raise OSError("no luck")

    saved = trained(0)
    save_checkpoint(tmp_path, model=saved[0], optimizer=saved[1])
    model = Failing(classes=4)
    optimizer = adamw(model.parameters())
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(CheckpointError, match="no luck; everything was put back"):
        load_checkpoint(tmp_path, model=model, optimizer=optimizer, strict=False)
    assert same([model.state_dict(), optimizer.state_dict()], before)


@pytest.mark.parametrize("named", ["saved", "loaded", "neither"])
def test_by_index_if_a_side_has_no_names(tmp_path, named):
    def build(value):
        model = nn.ParameterList(torch.zeros(2) for _ in range(2))  # with the names "0" and "1"
        optimizer = torch.optim.SGD([model[1], model[0]], lr=0.1, momentum=0.9)
        for i, parameter in enumerate(model):
            optimizer.state[parameter]["momentum_buffer"] = torch.full((2,), float(value + i))
        return model, optimizer

    saved, live = build(10), build(20)
    save_checkpoint(tmp_path, model=saved[0] if named == "saved" else None, optimizer=saved[1])
    model = live[0] if named == "loaded" else None
    report = load_checkpoint(tmp_path, model=model, optimizer=live[1], strict=False)["report"]["optimizer"]
    matched = ["1", "0"] if named == "loaded" else ["0", "1"]
    assert report == {"matched": matched, "missing": [], "unexpected": [], "mismatched": {}}
    assert [live[1].state[parameter]["momentum_buffer"][0].item() for parameter in live[0]] == [10, 11]


def test_saved_without_a_model_and_loaded_with_one(tmp_path):
    saved, live = trained(0), trained(1, classes=4)
    save_checkpoint(tmp_path, optimizer=saved[1])
    report = load_checkpoint(tmp_path, model=live[0], optimizer=live[1], strict=False)["report"]["optimizer"]
    assert report["matched"] == ["body.weight", "body.bias", "norm.weight", "norm.bias"]
    assert report["missing"] == report["unexpected"] == []
    assert report["mismatched"] == {
        "head.weight": "the parameter is [3, 6], the live one [4, 6]",
        "head.bias": "the parameter is [3], the live one [4]",
    }
    for mine, theirs in zip(live[0].body.parameters(), saved[0].body.parameters(), strict=True):
        assert same(dict(live[1].state[mine]), dict(saved[1].state[theirs]))


def test_versions_of_modules_that_are_loaded(tmp_path):
    class Versioned(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            self.seen = local_metadata["version"]
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    saved, live = (nn.Sequential(Versioned(2, 2), Versioned(2, out)) for out in (2, 3))
    for layer in saved:
        layer._version = 7
    save_checkpoint(tmp_path, model=saved)
    load_checkpoint(tmp_path, model=live, strict=False)
    assert [layer.seen for layer in live] == [7, 1]


def test_optimizer_of_which_nothing_fits_is_left_alone(tmp_path):
    saved, live = trained(0), trained(1, sgd)
    save_checkpoint(tmp_path, model=saved[0], optimizer=saved[1])
    entries = [live[1].state[parameter] for parameter in live[0].parameters()]
    load_checkpoint(tmp_path, model=live[0], optimizer=live[1], strict=False)
    assert all(live[1].state[p] is entry for p, entry in zip(live[0].parameters(), entries, strict=True))
