"""``shards="local"``: blocks lie inside the rows of each rank, and nothing but norms goes between them."""

import pytest
import torch
from torch import nn

from lowbit_optim import CASPR, EKFAC, KFAC, SOAP, AdaBK, Shampoo
from tests.distributed.runs import (
    ODD_SHAPES,
    STEPS,
    STRICT,
    alone,
    digest,
    digests,
    give_gradients,
    in_rows,
    mesh_of,
    on,
    train,
    whole,
)

CASES = ["shampoo 2", "stagger", "caspr", "4-bit base"]


def begin(case, mesh, steps=0, **more):
    return in_rows(case, mesh, steps, ODD_SHAPES, shards="local", **more)


# Of which every rank has several rows, or none: of one alone a process would make no matrix.
MATRICES = ((8, 50), (4, 33), (130, 5), (11, 20), (9,), (6, 3, 4, 5))


def compared(rank, world, optimizer_class):
    """Whether each parameter here is that of an optimizer of the rows here alone, where blocks share no norm."""
    settings = {"lr": 0.01, "min_quant_size": 64, "statistics_frequency": 2, "max_preconditioner_dim": 48, "bits": 4}
    parameters, _ = in_rows("shampoo 2", mesh_of(world), 0, MATRICES)
    own = [nn.Parameter(p.to_local().detach().clone()) for p in parameters]
    optimizer = optimizer_class(parameters, **settings, graft=False, shards="local")
    reference = optimizer_class(own, **settings, graft=False)
    for step in range(STEPS):
        give_gradients(parameters, step)
        for p, q in zip(own, parameters, strict=True):
            p.grad = q.grad.to_local().clone()
        optimizer.step()
        reference.step()
    return [torch.equal(p, q.to_local()) for p, q in zip(own, parameters, strict=True)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("optimizer_class", [Shampoo, CASPR])
def test_blocks_are_those_of_the_rows_here(start, world, optimizer_class):
    for same in start(world, environment=STRICT)(compared, optimizer_class):
        assert same == [True] * len(MATRICES)


def norms(rank, world, replicas):
    """Of whole gradients, before and after each step."""
    parameters, optimizer = begin("shampoo 2", mesh_of(world, replicas))
    found = []
    for step in range(STEPS):
        give_gradients(parameters, step)
        before = [whole(p.grad).norm().item() for p in parameters]
        optimizer.step()
        found.append((before, [whole(p.grad).norm().item() for p in parameters]))
    return found, digests(parameters, optimizer)


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_norm_is_that_of_the_whole_gradient(start, replicas):
    answers = start(4)(norms, replicas)
    for found, state in answers:
        assert state == answers[0][1]
        for before, after in found:
            assert after == pytest.approx(before, rel=1e-5)


def test_with_one_rank_it_is_the_whole(start):
    ((found, _),) = start(1)(resumed, "stagger")
    for i, p in enumerate(alone("stagger", STEPS + 5, ODD_SHAPES)[0]):
        assert found[f"parameter {i}"] == digest(p)


def resumed(rank, world, case):
    """What a run was to become, and became from its state dict."""
    mesh = mesh_of(world)
    parameters, optimizer = begin(case, mesh, STEPS)
    others, other = begin(case, mesh, 2)
    for p, q in zip(others, parameters, strict=True):
        p.data.copy_(q)
    other.load_state_dict(optimizer.state_dict())
    for run in (parameters, optimizer), (others, other):
        train(*run, range(STEPS, STEPS + 5))
    return digests(parameters, optimizer), digests(others, other)


@on(2, 3)
@pytest.mark.parametrize("case", CASES)
def test_the_run_goes_on(ranks, case):
    for expected, found in ranks(resumed, case):
        assert found == expected


def state_of(rank, world):
    _, optimizer = begin("shampoo 2", mesh_of(world), 3)
    state = optimizer.state_dict()
    state["state"] = {i: {k: whole(x) for k, x in own.items()} for i, own in state["state"].items()}
    return state


def refused(rank, world, state, shards, message):
    parameters, optimizer = in_rows("shampoo 2", mesh_of(world), 3, ODD_SHAPES, shards=shards)
    before = digests(parameters, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert digests(parameters, optimizer) == before


@pytest.mark.parametrize(
    ("world", "shards", "wanted"),
    [
        (3, "local", "shards='local' on 3 ranks"),
        (1, "local", "shards='local' on 1 ranks"),
        (2, "whole", "whole parameters"),
    ],
)
def test_another_number_of_ranks_is_refused(start, world, shards, wanted):
    state = start(2)(state_of)[0]
    start(world)(refused, state, shards, f"are those of shards='local' on 2 ranks, the optimizer's those of {wanted}")


@pytest.mark.parametrize("optimizer_class", [SOAP, KFAC, AdaBK, EKFAC])
def test_what_needs_whole_matrices_refuses(optimizer_class):
    model = nn.Linear(3, 3)
    more = {} if optimizer_class is SOAP else {"model": model}
    with pytest.raises(ValueError, match=rf"shards='local': {optimizer_class.__name__} needs whole matrices"):
        optimizer_class(model.parameters(), shards="local", **more)
