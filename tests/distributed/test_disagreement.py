"""Ranks that differ where they must not, numbers that are not finite on one of them, ranks that die."""

import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowbit_optim import CASPR, Shampoo
from tests.distributed.models import LAYERED, OPTIMIZERS, differences, loss_of, model_of, outcome, part
from tests.distributed.ranks import Failure
from tests.distributed.runs import (
    CLASSES,
    STEPS,
    alone,
    digests,
    give_gradients,
    in_rows,
    mesh_of,
    on,
    parameters_of,
    sharded,
    shared,
    train,
)


def begin(arrangement, case, world, steps=0, **more):
    if arrangement == "ddp":
        return shared(case, steps, **more)
    return in_rows(case, mesh_of(world), steps, **more)


def raised(function):
    """What it raises, in words."""
    try:
        function()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


# ---- ranks that differ -----------------------------------------------------------------------------------------------


def take_gradient(optimizer):
    parameter = optimizer.param_groups[0]["params"][1]
    gradient, parameter.grad = parameter.grad, None

    def give_back():
        parameter.grad = gradient

    return give_back


def set_in(group, key, value):
    before = group[key]
    group[key] = value
    return lambda: group.update({key: before})


def swap(parameters):
    parameters[0], parameters[1] = parameters[1], parameters[0]
    return lambda: swap(parameters)


def count_on(state):
    state["step"] += 1
    return lambda: state["step"].sub_(1)


# (what is done to an optimizer, what all ranks say of it). What is done returns how it is undone.
DIFFERENCES = {
    "lr": (lambda o: set_in(o.param_groups[0], "lr", 0.5), r"settings: rank 0 has .*'lr', 0.01.* rank 1 .*'lr', 0.5"),
    "switch": (lambda o: set_in(o.param_groups[0], "precondition", False), "settings: .*True.* rank 1 .*False"),
    "order": (lambda o: swap(o.param_groups[0]["params"]), r"parameters: rank 0 has \[\(\(96, .* rank 1 \[\(\(144, "),
    "gradient": (take_gradient, r"which of the parameters have a gradient: rank 0 has \[1, 1, .* rank 1 \[1, 0, "),
    "steps": (
        lambda o: count_on(o.state[o.param_groups[0]["params"][0]]),
        r"steps: rank 0 has \[3, 3, .* rank 1 \[4, ",
    ),
}


def with_difference(rank, world, arrangement, name):
    """What is raised where the last rank differs, and what becomes of the run when it no longer does."""
    parameters, optimizer = begin(arrangement, "shampoo 2", world, 3)
    give_gradients(parameters, 3)
    before = digests(parameters, optimizer)
    if rank == world - 1:
        undo = DIFFERENCES[name][0](optimizer)
    said = raised(optimizer.step)
    if rank == world - 1:
        undo()
    assert digests(parameters, optimizer) == before
    train(parameters, optimizer, range(3, 6))
    return said, digests(parameters, optimizer)


@on(2)
@pytest.mark.parametrize("arrangement", ["ddp", "rows"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ(ranks, arrangement, name):
    """All raise, and when it is the same again the run goes on."""
    expected = digests(*alone("shampoo 2", 6))
    for said, found in ranks(with_difference, arrangement, name):
        assert said.startswith("RuntimeError: the processes that share this optimizer's blocks do not agree on")
        assert re.search(DIFFERENCES[name][1], said)
        assert found == expected


def other_class(rank, world):
    optimizer_class = CASPR if rank else Shampoo
    parameters = parameters_of([(32, 32)])
    optimizer = optimizer_class(parameters, process_group=dist.group.WORLD)
    give_gradients(parameters, 0)
    return raised(optimizer.step)


@on(3)
def test_other_classes(ranks):
    for said in ranks(other_class):
        assert re.search("do not agree on the class: rank 0 has 'Shampoo', rank 1 'CASPR'", said)


def own_problem(rank, world, arrangement):
    """One rank has a gradient that no rank can step on."""
    parameters, optimizer = begin(arrangement, "shampoo 2", world, 3)
    give_gradients(parameters, 3)
    before = digests(parameters, optimizer)
    if rank == 1:
        optimizer.param_groups[0]["kept_as"] = ("cholesky",)
    said = raised(optimizer.step)
    if rank == 1:
        del optimizer.param_groups[0]["kept_as"]
    assert digests(parameters, optimizer) == before
    return said


@on(2)
@pytest.mark.parametrize("arrangement", ["ddp", "rows"])
def test_what_one_rank_has_found_wrong(ranks, arrangement):
    """It says what; the others say that there is something."""
    other, own = ranks(own_problem, arrangement)
    assert re.search("ValueError: a param group's storage was changed from 'cholesky' to 'root'", own)
    assert re.search(
        "RuntimeError: .* whether a step can be taken: rank 0 has 'yes', rank 1 .*storage was changed", other
    )


# ---- state dicts -----------------------------------------------------------------------------------------------------


def lacking(state):
    del state["state"][1]["left.rms"]


def reshaped(state):
    state["state"][1]["base.exp_avg"] = torch.zeros(3)


def of_other_bits(state):
    state["param_groups"][0]["bits"] = 4


def no_state_dict(state):
    del state["param_groups"]


def without_a_parameter(state):
    del state["state"][0]


BAD = {
    lacking: ("do not have the same tensors: left.rms", "whether the state dict fits"),
    reshaped: (r"its exp_avg in the state dict is \[3\]", "whether the state dict fits"),
    of_other_bits: ("the state dict has bits=4; the optimizer has 2", "whether the state dict fits"),
    no_state_dict: ("a state dict has 'state' and 'param_groups'", "whether the state dict fits"),
    without_a_parameter: ("the tensors in the state dict", "the tensors in the state dict"),
}


def bad_state(rank, world, arrangement, bad):
    parameters, optimizer = begin(arrangement, "shampoo 2", world, 3)
    state = optimizer.state_dict()
    train(parameters, optimizer, range(3, 5))
    before = digests(parameters, optimizer)
    if rank == 1:
        bad(state)
    said = raised(lambda: optimizer.load_state_dict(state))
    assert digests(parameters, optimizer) == before
    train(parameters, optimizer, range(5, 6))
    return said, digests(parameters, optimizer)


@on(2)
@pytest.mark.parametrize("arrangement", ["ddp", "rows"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_state_dict_on_one_rank(ranks, arrangement, bad):
    """No rank loads, and the run goes on."""
    expected = digests(*alone("shampoo 2", 6))
    (other, other_found), (own, own_found) = ranks(bad_state, arrangement, bad)
    assert re.search(BAD[bad][0], own)
    assert re.search(BAD[bad][1], other)
    assert (other_found, own_found) == (expected, expected)


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def spoil(parameters, step, number):
    """A number in a matrix of several blocks, in another at another step, and in a vector."""
    for place, i in ((0, 0), (5, 1), (5, 2), (9, 3)):
        if step == place:
            parameters[i].grad.view(-1)[-7] = number


def spoilt_rows(rank, world, case, number, **more):
    """Only one rank has the rows with the number."""
    mesh = mesh_of(world)
    parameters, optimizer = in_rows(case, mesh, 0, **more)
    for step in range(STEPS):
        plain = parameters_of([p.shape for p in parameters])
        give_gradients(plain, step)
        spoil(plain, step, number)
        for p, q in zip(parameters, plain, strict=True):
            p.grad = sharded(q.grad, mesh)
        optimizer.step()
    return digests(parameters, optimizer), [int(optimizer.state[p]["nonfinite"]) for p in parameters]


@on(3)
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
@pytest.mark.parametrize("case", CLASSES)
def test_one_rank_has_the_rows(ranks, case, number):
    parameters, optimizer = alone.__wrapped__(case, 0)
    for step in range(STEPS):
        give_gradients(parameters, step)
        spoil(parameters, step, number)
        optimizer.step()
    expected = digests(parameters, optimizer)
    for found, counts in ranks(spoilt_rows, case, number):
        assert found == expected
        assert counts == [1, 1, 1, 1, 0, 0, 0]
    assert all(torch.isfinite(p).all() for p in parameters)


def test_one_rank_has_the_rows_and_their_blocks(start):
    """``shards="local"``."""
    answers = start(3)(local_rows)
    for found, counts in answers:
        assert (found, counts) == answers[0]
        assert counts == [1, 1, 1, 1, 0, 0, 0]


def local_rows(rank, world):
    return spoilt_rows(rank, world, "shampoo 2", torch.nan, shards="local")


def spoilt(rank, world, case, bad_rank):
    """Gradients that should be equal are not on one rank."""
    parameters, optimizer = shared(case, 0)
    for step in range(STEPS):
        give_gradients(parameters, step)
        if rank == bad_rank:
            spoil(parameters, step, torch.nan)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in parameters)
    return digests(parameters, optimizer)


@on(3)
@pytest.mark.parametrize("case", ["stagger", "soap 4"])
def test_one_rank_has_the_number(ranks, case):
    """All go on alike, whether it owned the block or not; nobody steps on a bad vector."""
    for bad_rank in range(ranks.world):
        answers = ranks(spoilt, case, bad_rank)
        assert all(found == answers[0] for found in answers)


def spoilt_batch(rank, world, name, wrapped):
    model = model_of("transformer" if wrapped == "ddp" else "convolutions")
    inputs = model.inputs
    if wrapped == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    optimizer = OPTIMIZERS[name](model, **({"process_group": dist.group.WORLD} if wrapped == "ddp" else {}))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, part(inputs(step), rank, world))
        (loss * (torch.nan if step in (5, 8) and rank == 1 else 1)).backward()
        optimizer.step()
    return outcome(model, optimizer)


@on(2)
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", LAYERED)
def test_one_rank_has_a_bad_batch(ranks, name, wrapped):
    """Its statistics are as bad as its gradients: all ranks leave both out."""
    answers = ranks(spoilt_batch, name, wrapped)
    for found in answers:
        assert differences(found, answers[0], 0) == {}
        assert all(torch.isfinite(x).all() for x in found.values())
    assert sum(int(x.sum()) for key, x in answers[0].items() if key.endswith("left.failures")) > 0


# ---- ranks that die --------------------------------------------------------------------------------------------------


def die(rank, world, arrangement, case, how):
    """What the other ranks raise when the last one dies in a step, or does not come to it, and after how long."""
    parameters, optimizer = begin(arrangement, case, world, 2)
    give_gradients(parameters, 2)
    if rank == world - 1:
        if how == "hangs":
            time.sleep(1000)
        optimizer.preconditioner.preconditioned = lambda *_: os._exit(3)
    began = time.monotonic()
    said = raised(optimizer.step)
    return said, time.monotonic() - began


@pytest.mark.parametrize("arrangement", ["ddp", "rows"])
@pytest.mark.parametrize(("how", "timeout"), [("dies", 30), ("hangs", 3)])
def test_the_others_raise_in_time(start, arrangement, how, timeout):
    *others, last = start(3, timeout=timeout).answers(die, arrangement, "shampoo 4", how)
    assert isinstance(last, Failure)
    assert ("exit code 3" if how == "dies" else "did not answer") in last.text
    for said, seconds in others:
        assert said.startswith("RuntimeError: ")
        assert seconds < timeout + 3
