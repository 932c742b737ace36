"""Blocks that take turns with their updates, and what steps of parts, slices and bfloat16 do to results."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowbit_optim import CASPR, SOAP, Shampoo
from lowbit_optim.preconditioners.buckets import staggered
from tests.contract import random

SHAPES = [(96, 40), (64, 64), (130, 66), (33,), (40, 96)]
PERIOD = 6


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 10**9)), min_size=1, max_size=9), st.integers(1, 120))
def test_every_block_has_one_turn_in_a_period(units, period):
    total, before = sum(count * cost for count, cost in units), 0
    work = np.zeros(period)
    for count, cost in units:
        turns = []
        for step in range(1, period + 1):
            first, last = staggered(before, cost, count, total, period, step)
            assert (first, last) == staggered(before, cost, count, total, period, step + 7 * period)
            turns += range(first, last)
            work[step - 1] += (last - first) * cost
        assert turns == list(range(count))
        before += count * cost
    # No step has more than its share and one block more.
    assert work.max() <= total / period + max(cost for _, cost in units)


def train(steps, dtype=torch.float64, make=Shampoo, shapes=SHAPES, **settings):
    """Parameters and the optimizer after so many steps of noise."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    settings = {"statistics_frequency": PERIOD, "max_preconditioner_dim": 48, "bits": 4, "lr": 0.01, **settings}
    optimizer = make(parameters, **settings)
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=100 * step + index, dtype=torch.float64).to(dtype)
        optimizer.step()
    return parameters, optimizer


def updates(optimizer):
    return torch.cat([own["left.updates"] for own in optimizer.state.values() if "left.updates" in own])


@pytest.mark.parametrize("make", [Shampoo, CASPR])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": 32}, {"storage": "logarithm", "bits": 2}, {"storage": "spiked", "bits": 2}],
    ids=["4", "32", "log", "spiked"],
)
def test_turns(make, settings):
    counts = []
    for steps in range(1, 2 * PERIOD + 1):
        _, optimizer = train(steps, make=make, stagger=True, **settings)
        counts.append(updates(optimizer))
    assert (counts[PERIOD - 1] == 1).all()
    assert (counts[-1] == 2).all()
    begun = [int(count.sum()) for count in counts]
    per_step = np.diff([0, *begun])
    assert per_step.max() <= 6 < len(counts[0]) == begun[PERIOD - 1]  # nowhere all at once
    assert list(per_step[:PERIOD]) == list(per_step[PERIOD:])


def test_one_block_with_a_turn_of_its_own_is_the_optimizer_whose_period_begins_there():
    """A parameter whose only block has the first of the turns: every root is that of the gradients of its turns."""
    (alone,), optimizer = train(4, shapes=[(40, 30)], stagger=True)  # its turn is step 1
    parameter = nn.Parameter(torch.zeros(40, 30, dtype=torch.float64))
    often = Shampoo([parameter], statistics_frequency=1, bits=4, lr=0.01)
    for step in range(4):
        parameter.grad = random(40, 30, seed=100 * step, dtype=torch.float64)
        often.step()
        often.param_groups[0]["statistics_frequency"] = 1000
    assert updates(optimizer).tolist() == updates(often).tolist() == [1]
    torch.testing.assert_close(alone, parameter, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 32])
def test_blocks_before_their_first_turn_do_not_outweigh_the_others(bits):
    """The root of a tiny statistic is huge; of a block without one it would be I."""
    scale = 1e-6
    parameter = nn.Parameter(torch.zeros(96, 48, dtype=torch.float64))
    optimizer = Shampoo([parameter], statistics_frequency=2, max_preconditioner_dim=48, bits=bits, stagger=True)
    parameter.grad = scale * random(96, 48, dtype=torch.float64)
    before = parameter.grad.clone()
    optimizer.step()
    assert sorted(updates(optimizer).tolist()) == [0, 1]
    norms = parameter.grad.view(2, 48, 48).norm(dim=(1, 2)) / before.view(2, 48, 48).norm(dim=(1, 2))
    assert norms.max() / norms.min() < 3


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("change", ["a group", "a shorter period", "a turn without a gradient"])
def test_blocks_that_miss_their_first_turn_do_not_outweigh_the_others(bits, change):
    parameter = nn.Parameter(torch.zeros(192, 48, dtype=torch.float64))
    keywords = {"max_preconditioner_dim": 48, "bits": bits, "stagger": True, "base": "sgd"}
    optimizer = Shampoo([parameter], statistics_frequency=8, **keywords)
    for step in range(12):
        parameter.grad = 1e-6 * random(192, 48, seed=step, dtype=torch.float64)
        if change == "a turn without a gradient" and step < 3:
            parameter.grad[:48] = 0
        if change == "a group" and step == 2:
            other = nn.Parameter(torch.zeros(300, 48, dtype=torch.float64))
            optimizer.add_param_group({"params": [other]})
        if change == "a shorter period" and step == 3:
            optimizer.param_groups[0]["statistics_frequency"] = 4
        before = parameter.grad.clone()
        optimizer.step()
        norms = [x.view(4, 48, 48).norm(dim=(1, 2)) for x in (parameter.grad, before)]
        ratios = (norms[0] / norms[1])[norms[1] > 0]
        assert ratios.max() / ratios.min() < 10, step


def test_groups_with_periods_of_their_own_take_turns_in_all_of_them():
    groups = [{"params": [nn.Parameter(torch.zeros(4 * 48, 48))], "statistics_frequency": period} for period in (2, 4)]
    optimizer = Shampoo(groups, max_preconditioner_dim=48, bits=4, stagger=True)
    for step in range(1, 5):
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = random(*parameter.shape, seed=step)
        optimizer.step()
        counts = [int(optimizer.state[g["params"][0]]["left.updates"].sum()) for g in groups]
        assert counts == [2 * step, step]


def test_state_is_resumed_in_the_middle_of_a_period():
    steps = 4
    _, optimizer = train(steps, stagger=True)
    parameters, other = train(0, stagger=True)
    for parameter, source in zip(parameters, optimizer.param_groups[0]["params"], strict=True):
        parameter.detach().copy_(source.detach())
    other.load_state_dict(optimizer.state_dict())
    for step in range(steps, 2 * PERIOD):
        for one in (optimizer, other):
            for index, parameter in enumerate(one.param_groups[0]["params"]):
                parameter.grad = random(*parameter.shape, seed=100 * step + index, dtype=torch.float64)
            one.step()
    for one, two in zip(optimizer.param_groups[0]["params"], parameters, strict=True):
        assert torch.equal(one, two)


def test_parts_and_slices_change_nothing():
    """The codes are the same, and parameters up to the last bits, which BLAS rounds by the place in memory."""
    for settings in ({}, {"stagger": True}):
        one, first = train(2 * PERIOD, **settings)
        two, second = train(2 * PERIOD, workspace=1, **settings)
        for p, q in zip(one, two, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
            codes = [
                {k: v for k, v in o.state[x].items() if v.dtype == torch.uint8} for o, x in ((first, p), (second, q))
            ]
            assert all(torch.equal(codes[0][key], codes[1][key]) for key in codes[0])


@pytest.mark.parametrize(("make", "limit"), [(Shampoo, 0.02), (CASPR, 0.05)])
@pytest.mark.parametrize("bits", [4, 32])
def test_bfloat16_application_is_near_and_leaves_factors_alone(make, limit, bits):
    own = partial(train, 2 * PERIOD, dtype=torch.float32, make=make, bits=bits, base="sgd")
    exact, first = own()
    rounded, second = own(apply_dtype="bfloat16")
    for p, q in zip(exact, rounded, strict=True):
        assert (p - q).norm() <= limit * p.norm()
        assert p.dim() == 1 or not torch.equal(p, q)
        for key, value in first.state[p].items():
            if key.startswith(("left.", "right.")):
                assert torch.equal(value, second.state[q][key]), key


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stagger": 1}, "stagger is 1; it must be True or False"),
        ({"stagger": True, "storage": "eigen", "bits": 4}, "leave stagger out"),
        ({"apply_dtype": "float16"}, "apply_dtype is 'float16'; it must be None or 'bfloat16'"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        Shampoo([nn.Parameter(torch.zeros(4, 4))], **settings)


def test_optimizers_that_take_no_turns_refuse_them_in_groups():
    with pytest.raises(TypeError, match="'stagger', which is no setting of SOAP"):
        SOAP([{"params": [nn.Parameter(torch.zeros(4, 4))], "stagger": True}])
