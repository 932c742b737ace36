"""DistributedDataParallel: every rank has its part of a batch, and all end where one process ends on all of it.

The gradients of the ranks are added in another order than in one process, so it is not the same bits; in float64 it is
the same codes, and the rest up to rounding. All ranks have the same bits.
"""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import (
    LAYERED,
    OPTIMIZERS,
    Mlp,
    assert_one_process,
    differences,
    loss_of,
    model_of,
    of_one_process,
    outcome,
    part,
    train_model,
)
from tests.distributed.runs import STEPS, on


def ddp(rank, world, model_name, name, dtype=torch.float64, group=True, options=None, **more):
    """As trained by all; ``group``: whether the optimizer is told of them."""
    model = model_of(model_name).to(dtype)
    wrapped = DistributedDataParallel(model, **(options or {}))
    optimizer = OPTIMIZERS[name](wrapped, **more, **({"process_group": dist.group.WORLD} if group else {}))

    def inputs(step):
        x = model.inputs(step)
        return x.to(dtype) if x.is_floating_point() else x

    train_model(wrapped, optimizer, range(STEPS), rank, world, inputs)
    return outcome(wrapped, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_transformer(ranks, name):
    assert_one_process(ranks(ddp, "transformer", name), of_one_process("transformer", name, STEPS))


@on(2, 3)
@pytest.mark.parametrize("name", LAYERED)
def test_convolutions(ranks, name):
    """Layers of groups, whose blocks share a damping or a norm."""
    assert_one_process(ranks(ddp, "convolutions", name), of_one_process("convolutions", name, STEPS))


@on(3)
@pytest.mark.parametrize("name", LAYERED)
def test_statistics_are_of_all_batches_also_without_a_group(ranks, name):
    """The model says which processes train it."""
    assert_one_process(ranks(without_group, name), of_one_process("mlp", name, STEPS))


def without_group(rank, world, name):
    return ddp(rank, world, "mlp", name, group=False)


@on(3)
@pytest.mark.parametrize("name", LAYERED)
def test_replicate(ranks, name):
    assert_one_process(ranks(replicated, name), of_one_process("mlp", name, STEPS))


def replicated(rank, world, name):
    return ddp(rank, world, "mlp", name, replicate=True)


@on(2, 4)
@pytest.mark.parametrize(("name", "tolerance"), [("shampoo", 1e-3), ("kfac", 1e-5)])
def test_float32(ranks, name, tolerance):
    """Rounding flips codes, so it is compared without them. Shampoo's factors are singular but for 1e-6 of them."""
    one = model_of("mlp").float()
    optimizer = OPTIMIZERS[name](one, bits=32, base="sgd")
    train_model(one, optimizer, range(STEPS), inputs=lambda step: one.inputs(step).float())
    assert_one_process(ranks(in_float32, name), outcome(one, optimizer), tolerance)


def in_float32(rank, world, name):
    return ddp(rank, world, "mlp", name, torch.float32, bits=32, base="sgd")


# ---- what DDP can do besides -----------------------------------------------------------------------------------------


@on(2)
@pytest.mark.parametrize("name", ["shampoo", "kfac"])
def test_gradients_in_the_buckets_of_ddp(ranks, name):
    """``gradient_as_bucket_view``: gradients that are changed in place are those that DDP will write to."""
    assert_one_process(ranks(in_buckets, name), of_one_process("transformer", name, STEPS))


def in_buckets(rank, world, name):
    return ddp(rank, world, "transformer", name, options={"gradient_as_bucket_view": True})


class Switch(nn.Module):
    """A layer that some inputs go around."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x):
        return self.one(x) if (x[:, 0] > 100).all() else self.other(self.one(x))


def unused(rank, world, name, where):
    """A layer that is used on no rank, or not on the first, at every other step."""
    torch.manual_seed(0)
    model = Switch().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = OPTIMIZERS[name](wrapped, process_group=dist.group.WORLD)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = part(Mlp.inputs(step), rank, world).clone()
        if step % 2 and rank in where:
            inputs[:, 0] = 101
        loss_of(wrapped, inputs).backward()
        optimizer.step()
    steps = [int(optimizer.state[p]["step"]) for p in model.parameters()]
    return steps, outcome(wrapped, optimizer)


@on(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("where", "count"), [([0], STEPS), ([0, 1], STEPS // 2)], ids=["on-one-rank", "nowhere"])
def test_a_layer_that_is_not_used(ranks, name, where, count):
    (steps, expected), (_, found) = ranks(unused, name, where)
    assert steps == [STEPS, STEPS, count, count]
    assert differences(found, expected, 0) == {}
    assert all(torch.isfinite(x).all() for x in found.values())


def accumulated(rank, world, name):
    """Two parts of a batch, one after the other."""
    model = model_of("mlp")
    wrapped = DistributedDataParallel(model)
    optimizer = OPTIMIZERS[name](wrapped, process_group=dist.group.WORLD)
    for step in range(STEPS):
        optimizer.zero_grad()
        first, second = model.inputs(step).chunk(2)
        with wrapped.no_sync():
            (loss_of(wrapped, part(first, rank, world)) / 2).backward()
        (loss_of(wrapped, part(second, rank, world)) / 2).backward()
        optimizer.step()
    return outcome(wrapped, optimizer)


@on(2, 3)
@pytest.mark.parametrize("name", LAYERED)
def test_batches_in_parts(ranks, name):
    assert_one_process(ranks(accumulated, name), accumulated_alone(name))


def accumulated_alone(name):
    model = model_of("mlp")
    optimizer = OPTIMIZERS[name](model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for inputs in model.inputs(step).chunk(2):
            (loss_of(model, inputs) / 2).backward()
        optimizer.step()
    return outcome(model, optimizer)


def told(rank, world, wrap, more):
    """What is logged of a K-FAC that knows of no other process."""
    model = model_of("mlp")
    if wrap:
        model = DistributedDataParallel(model)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lowbit_optim").addHandler(handler)
    OPTIMIZERS["kfac"](model, **more)
    logging.getLogger("lowbit_optim").removeHandler(handler)
    return said


@on(2)
def test_kfac_without_a_group_warns(ranks):
    for (said,) in ranks(told, False, {}):
        assert "torch.distributed is initialized, but KFAC has no process_group" in said
    assert ranks(told, True, {}) == [[], []]
