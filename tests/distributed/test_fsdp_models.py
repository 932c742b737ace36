"""Models of ``fully_shard`` in real training: every rank has its part of a batch, as in test_ddp.py."""

import copy

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from tests.distributed.models import (
    LAYERED,
    OPTIMIZERS,
    assert_one_process,
    differences,
    loss_of,
    model_of,
    of_one_process,
    outcome,
    part,
    train_model,
)
from tests.distributed.runs import STEPS, mesh_of, on, whole


def fully_sharded(model, **options):
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp(rank, world, model_name, name, replicas=1, **more):
    model = model_of(model_name)
    fully_sharded(model, mesh=mesh_of(world, replicas))
    optimizer = OPTIMIZERS[name](model, **more)
    train_model(model, optimizer, range(STEPS), rank, world)
    return outcome(model, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_transformer(ranks, name):
    assert_one_process(ranks(fsdp, "transformer", name), of_one_process("transformer", name, STEPS))


@on(3)
@pytest.mark.parametrize("name", ["shampoo", *LAYERED])
def test_convolutions(ranks, name):
    assert_one_process(ranks(fsdp, "convolutions", name), of_one_process("convolutions", name, STEPS))


@on(4)
@pytest.mark.parametrize("name", ["shampoo", *LAYERED])
def test_few_rows(ranks, name):
    """Of 17, 7 and 3. Not SOAP, whose first bases are of one gradient: rounding chooses where that is singular."""
    assert_one_process(ranks(fsdp, "mlp", name), of_one_process("mlp", name, STEPS))


@on(4)
@pytest.mark.parametrize("name", ["shampoo", "soap", "kfac"])
def test_replicas(ranks, name):
    assert_one_process(ranks(fsdp, "transformer", name, 2), of_one_process("transformer", name, STEPS))


# ---- what fully_shard can do besides ---------------------------------------------------------------------------------


def mixed(rank, world, name):
    """Losses, and what became of the steps and of those of one process with the same gradients."""
    model = model_of("transformer").float()
    one = copy.deepcopy(model)
    fully_sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer, reference = (OPTIMIZERS[name](m) for m in (model, one))
    losses = torch.zeros(STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, part(model.inputs(step % 2), rank, world))
        loss.backward()
        losses[step] = loss.detach()
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            q.grad = whole(p.grad).clone()
        optimizer.step()
        reference.step()
    return losses, outcome(model, optimizer), outcome(one, reference)


@on(2)
@pytest.mark.parametrize("name", ["shampoo", "soap", "kfac"])
def test_mixed_precision(ranks, name):
    """Gradients and steps are float32: one process ends at the same bits from the same gradients.

    K-FAC and its kin have statistics beside them, those of bfloat16.
    """
    answers = ranks(mixed, name)
    for losses, found, expected in answers:
        assert losses[-2:].mean() < losses[:2].mean()
        assert differences(found, answers[0][1], 0) == {}
        if name not in LAYERED:
            assert differences(found, expected, 0) == {}
        updates = [x for key, x in found.items() if key.endswith("updates")]
        assert torch.cat(updates).ge(STEPS // 2).all()


@on(2)
@pytest.mark.parametrize("name", ["shampoo", "soap", "ekfac"])
def test_cpu_offload(ranks, name):
    assert_one_process(ranks(offloaded, name), of_one_process("transformer", name, STEPS))


def offloaded(rank, world, name):
    model = fully_sharded(model_of("transformer"), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = OPTIMIZERS[name](model)
    train_model(model, optimizer, range(STEPS), rank, world)
    return outcome(model, optimizer)


def accumulated(rank, world, name, synchronized):
    """Two parts of a batch, one after the other."""
    model = fully_sharded(model_of("convolutions"))
    optimizer = OPTIMIZERS[name](model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for last, inputs in enumerate(model.inputs(step).chunk(2)):
            model.set_requires_gradient_sync(synchronized or bool(last))
            (loss_of(model, part(inputs, rank, world)) / 2).backward()
        optimizer.step()
    return outcome(model, optimizer)


@on(2)
@pytest.mark.parametrize("synchronized", [True, False], ids=["reduced-each", "reduced-once"])
@pytest.mark.parametrize("name", LAYERED)
def test_batches_in_parts(ranks, name, synchronized):
    one = model_of("convolutions")
    optimizer = OPTIMIZERS[name](one)
    for step in range(STEPS):
        optimizer.zero_grad()
        for inputs in one.inputs(step).chunk(2):
            (loss_of(one, inputs) / 2).backward()
        optimizer.step()
    assert_one_process(ranks(accumulated, name, synchronized), outcome(one, optimizer))
