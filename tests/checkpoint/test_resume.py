"""A resumed run is the uninterrupted one, bit for bit."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import OPTIMIZERS, SCHEDULERS, build, load, picture, same, save, sgd, train


@pytest.mark.parametrize("live_steps", [0, 2])
@pytest.mark.parametrize(
    ("optimizer", "scheduler", "dtype"),
    [(name, "multistep", torch.float32) for name in OPTIMIZERS]
    + [("adamw", name, torch.float32) for name in SCHEDULERS if name != "multistep"]
    + [("sgd", "lambda", torch.float64), ("codes", "multistep", torch.bfloat16)]
    + [("shampoo", "onecycle", torch.bfloat16)],
)
def test_resume_is_exact(tmp_path, optimizer, scheduler, dtype, live_steps):
    kinds = {"optimizer": OPTIMIZERS[optimizer], "scheduler": SCHEDULERS[scheduler], "dtype": dtype}
    original = build(0, **kinds)
    train(*original, 4)
    save(tmp_path, original, step=4, epoch=(1, "two"))
    expected = train(*original, 4), picture(*original)

    resumed = build(1, **kinds)
    train(*resumed, live_steps)
    assert load(tmp_path, resumed) == {"step": 4, "epoch": (1, "two")}
    assert train(*resumed, 4) == expected[0]
    assert same(picture(*resumed), expected[1])


def test_before_the_first_step(tmp_path):
    saved = build(0)
    save(tmp_path, saved)
    fresh, stepped = build(1), build(2)
    train(*stepped, 2)
    for live in (fresh, stepped):
        assert load(tmp_path, live) == {"step": None}
        assert same(picture(*live), picture(*saved))
        assert not live[1].state


def test_plateau_scheduler_keeps_infinity(tmp_path):
    model = nn.Linear(2, 2)
    scheduler = lr_scheduler.ReduceLROnPlateau(sgd(model.parameters()))
    assert scheduler.best == math.inf
    save_checkpoint(tmp_path, scheduler=scheduler)
    other = lr_scheduler.ReduceLROnPlateau(sgd(model.parameters()))
    other.step(1.0)
    load_checkpoint(tmp_path, scheduler=other)
    assert same(other.state_dict(), scheduler.state_dict())


def test_parts_alone_and_parameters_by_index(tmp_path):
    original = build(0)
    train(*original, 2)
    save_checkpoint(tmp_path / "without", optimizer=original[1])
    (file,) = (tmp_path / "without").glob("optimizer-*.safetensors")
    assert "0/exp_avg" in load_file(file)
    save(tmp_path / "with", original)
    for folder, model in (("without", True), ("with", False), ("without", False)):
        live = build(1)
        before = picture(live[0], live[2])[0]
        load_checkpoint(tmp_path / folder, model=None, optimizer=live[1])
        assert same(live[1].state_dict(), original[1].state_dict())
        assert same(picture(live[0], live[2])[0], before)
        if model:
            with pytest.raises(CheckpointError, match="without model="):
                load_checkpoint(tmp_path / folder, model=live[0], optimizer=live[1])
