"""A load that fails half-way is undone."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim import KFAC
from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import (
    CodesOptimizer,
    Net,
    build,
    load,
    picture,
    refused,
    same,
    save,
    train,
)


class Failing:
    """An object whose load_state_dict does its work and then raises."""

    fails = False

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if type(self).fails:
            self.new_attribute = torch.rand(()).item() + random.random()
            raise OSError("no luck")


class FailingNet(Failing, Net):
    pass


class FailingAdamW(Failing, torch.optim.AdamW):
    pass


class FailingCodes(Failing, CodesOptimizer):  # fills the containers that it has, where torch replaces them
    pass


class FailingKFAC(Failing, KFAC):
    def __init__(self, model):
        super().__init__(model.parameters(), model=model, lr=0.01, min_quant_size=1, statistics_frequency=2)


class FailingSequential(Failing, lr_scheduler.SequentialLR):
    pass


@pytest.mark.parametrize("live_steps", [0, 3])
@pytest.mark.parametrize("failing", [FailingNet, FailingAdamW, FailingCodes, FailingKFAC, FailingSequential])
def test_load_that_raises_is_undone(tmp_path, monkeypatch, failing, live_steps):
    def build_failing(seed):
        torch.manual_seed(seed)
        model = FailingNet()
        if failing is FailingKFAC:
            optimizer = FailingKFAC(model)
        else:
            optimizer = (FailingCodes if failing is FailingCodes else FailingAdamW)(model.parameters(), lr=0.01)
        parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return model, optimizer, FailingSequential(optimizer, parts, [2])

    saved, live, twin = build_failing(0), build_failing(1), build_failing(1)
    train(*saved, 4)
    save(tmp_path, saved)
    for objects in (live, twin):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        train(*objects, live_steps)
    with monkeypatch.context() as patch:
        patch.setattr(failing, "fails", True)
        refused(tmp_path, live, "loading them raised OSError: no luck; everything was put back")
    assert not any(hasattr(thing, "new_attribute") for thing in live[1:])
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    expected = train(*twin, 3)
    torch.set_rng_state(rng[0])
    random.setstate(rng[1])
    np.random.set_state(rng[2])  # noqa: NPY002
    assert train(*live, 3) == expected
    load(tmp_path, live)
    assert same(picture(*live)[0], picture(*saved)[0])


def test_module_that_refuses_a_good_checkpoint(tmp_path):
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args):
            args[-1].append("not today")

    model = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    save_checkpoint(tmp_path, model=model)
    with torch.no_grad():
        model[0].weight.zero_()
    before = picture(model)
    with pytest.raises(CheckpointError, match="not today"):
        load_checkpoint(tmp_path, model=model)
    assert same(picture(model), before)


def test_buffer_that_cannot_be_written(tmp_path):
    model = nn.BatchNorm1d(4)
    model.register_buffer("mask", torch.ones(1).expand(4))  # torch itself refuses to load into one
    save_checkpoint(tmp_path, model=model)
    model.weight.data.zero_()
    before = picture(model)
    with pytest.raises(CheckpointError, match=r'loading them raised RuntimeError: (.|\n)*"mask"'):
        load_checkpoint(tmp_path, model=model)
    assert same(picture(model), before)


def test_loaded_state_does_not_hang_on_the_files(tmp_path):
    objects, live = build(0), build(1)
    train(*objects, 2)
    save(tmp_path, objects)
    load(tmp_path, live)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert same(picture(*live)[0], picture(*objects)[0])


@pytest.mark.parametrize("strict", [True, False])
def test_extra_state_does_not_hang_on_the_files(tmp_path, strict):
    class Keeping(nn.Linear):
        def get_extra_state(self):
            return self.kept

        def set_extra_state(self, state):
            self.kept = state

    saved, live = Keeping(2, 2), Keeping(2, 2)
    saved.kept, live.kept = torch.ones(3), torch.zeros(3)
    save_checkpoint(tmp_path, model=saved)
    load_checkpoint(tmp_path, model=live, strict=strict)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(live.kept, torch.ones(3))
