"""Processes with equal gradients, as DDP leaves them, share the blocks and end with the bits of one process."""

import pytest
import torch

from tests.distributed.runs import (
    CASES,
    CLASSES,
    ODD_SHAPES,
    SHAPES,
    STEPS,
    STRICT,
    alone,
    digests,
    give_gradients,
    on,
    shared,
)


def steps(rank, world, *args):
    return digests(*shared(*args))


def steps_alone(rank, world, *args):
    return digests(*alone(*args))


@pytest.mark.parametrize("case", CLASSES)
def test_the_bits_of_one_process(ranks, case):
    expected = digests(*alone(case))
    for found in ranks(steps, case):
        assert found == expected


@on(3)
@pytest.mark.parametrize("case", sorted(CASES.keys() - CLASSES))
def test_every_setting(ranks, case):
    expected = digests(*alone(case))
    for found in ranks(steps, case):
        assert found == expected


@pytest.mark.parametrize("case", CLASSES)
def test_odd_sides(start, case):
    (expected,) = start(1, environment=STRICT)(steps_alone, case, STEPS, (*ODD_SHAPES, ()))
    for found in start(3, environment=STRICT)(steps, case, STEPS, (*ODD_SHAPES, ())):
        assert found == expected


@on(3)
@pytest.mark.parametrize("case", CLASSES)
def test_dtypes(ranks, case):
    """Of a model in several; those that are worked on in one are sent together."""
    mixed = torch.bfloat16, torch.float64, torch.float32
    expected = digests(*alone(case, STEPS, SHAPES, mixed))
    for found in ranks(steps, case, STEPS, SHAPES, mixed):
        assert found == expected


def train_with_odd_gradients(parameters, optimizer):
    """Some are not there, and some are not contiguous, or one number everywhere."""
    for step in range(STEPS):
        give_gradients(parameters, step)
        for i, p in enumerate(parameters):
            if (step + i) % 5 == 0:
                p.grad = None
            elif (step + i) % 3 == 0 and p.dim() > 1:
                p.grad = p.grad.transpose(0, -1).contiguous().transpose(0, -1)
            elif step == i:
                p.grad = torch.tensor(0.5).expand(p.shape)
        optimizer.step()


def odd_gradients(rank, world, case):
    parameters, optimizer = shared(case, 0)
    train_with_odd_gradients(parameters, optimizer)
    return digests(parameters, optimizer)


@on(3)
@pytest.mark.parametrize("case", CLASSES)
def test_gradients_of_any_kind(ranks, case):
    parameters, optimizer = alone.__wrapped__(case, 0)
    train_with_odd_gradients(parameters, optimizer)
    expected = digests(parameters, optimizer)
    for found in ranks(odd_gradients, case):
        assert found == expected


def settings_that_change(rank, world):
    parameters, optimizer = shared("groups", 0)
    return change_settings(parameters, optimizer)


def change_settings(parameters, optimizer):
    """A schedule of lr, a group that is preconditioned from now on, another that no longer is, one that is added."""
    late = torch.nn.Parameter(parameters[3].detach().clone())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] *= 0.9
        if step == 5:
            optimizer.param_groups[2]["precondition"] = True
            optimizer.add_param_group({"params": [late], "bits": 4})
        if step == 12:
            optimizer.param_groups[0]["precondition"] = False
        give_gradients(parameters, step)
        late.grad = parameters[3].grad.clone()
        optimizer.step()
    return digests([*parameters, late], optimizer)


@on(2, 4)
def test_settings_that_change(ranks):
    expected = change_settings(*alone.__wrapped__("groups", 0))
    for found in ranks(settings_that_change):
        assert found == expected


# ---- keywords --------------------------------------------------------------------------------------------------------


def replicated(rank, world, case):
    parameters, optimizer = shared(case, replicate=True)
    plain = all(type(x) is torch.Tensor for own in optimizer.state_dict()["state"].values() for x in own.values())
    return plain, digests(parameters, optimizer)


@on(2)
@pytest.mark.parametrize("case", CLASSES)
def test_replicate_is_as_without_a_group(ranks, case):
    expected = True, digests(*alone(case))
    for found in ranks(replicated, case):
        assert found == expected


def rounded(rank, world, case):
    parameters, _ = shared(case, exchange_dtype="bfloat16")
    return [p.detach() for p in parameters]


@on(2, 3)
@pytest.mark.parametrize("case", CLASSES)
def test_exchange_in_bfloat16(ranks, case):
    """The same numbers on all ranks, and nearly those of one process; test_placement.py counts the bytes."""
    first, *others = ranks(rounded, case)
    for parameters in others:
        assert all(map(torch.equal, parameters, first))
    for p, start, expected in zip(first, alone(case, 0)[0], alone(case)[0], strict=True):
        moved = (expected.detach() - start.detach()).norm()
        assert (p - expected.detach()).norm() < 0.01 * moved
        assert p.dim() < 2 or not torch.equal(p, expected)
