"""What some ranks have saved others load, as many or not, and the run goes on to the last bit."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import (
    LAYERED,
    OPTIMIZERS,
    TOLERANCE,
    ConvNet,
    differences,
    model_of,
    of_one_process,
    outcome,
    train_model,
)
from tests.distributed.runs import (
    CASES,
    CLASSES,
    SHAPES,
    STEPS,
    alone,
    digests,
    mesh_of,
    on,
    parameters_of,
    sharded,
    train,
)

MORE = 5
# How torch's functions give a state dict, and how they take it.
WAYS = {
    "sharded": ({}, {}),
    "flat": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "offloaded": ({"cpu_offload": True}, {"cpu_offload": True}),
    "whole": ({"full_state_dict": True}, {"full_state_dict": True}),
    "of rank 0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}
# (arrangement when saved, when loaded, case, way): between all numbers of ranks, and between some
RUNS = [("ddp", "ddp", "soap 4", "flat"), ("rows", "rows", "stagger", "sharded")]
OTHER_RUNS = [
    ("ddp", "ddp", "shampoo 2", "sharded"),
    ("ddp", "ddp", "caspr", "whole"),
    ("rows", "rows", "soap 4", "offloaded"),
    ("rows", "rows", "eigen", "of rank 0"),
    ("rows", "rows", "4-bit base", "flat"),
    ("ddp", "rows", "groups", "sharded"),
    ("rows", "ddp", "soap eigen", "offloaded"),
]
PAIRS = list(itertools.product((1, 2, 3, 4), repeat=2))
CASES_TO_TEST = [
    *((run, *pair) for run in RUNS for pair in [*PAIRS, (8, 3), (2, 8)]),
    *((run, *pair) for run in OTHER_RUNS for pair in [(2, 3), (3, 2), (4, 1)]),
]


def begin(arrangement, case, world):
    """(model, its parameters, their optimizer)."""
    parameters, more = parameters_of(SHAPES), {}
    if arrangement == "rows":
        mesh = mesh_of(world)
        parameters = [nn.Parameter(sharded(p, mesh)) for p in parameters]
    else:
        more = {"process_group": dist.group.WORLD}
    model = nn.Module()
    for i, parameter in enumerate(parameters):
        model.register_parameter(f"p{i}", parameter)
    return model, parameters, CASES[case](parameters, **more)


def save(rank, world, folder, run):
    arrangement, _, case, way = run
    model, parameters, optimizer = begin(arrangement, case, world)
    train(parameters, optimizer, range(STEPS))
    options = StateDictOptions(**WAYS[way][0])
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if not options.full_state_dict:
        dcp.save(state, checkpoint_id=folder)
    elif rank == 0:
        folder.mkdir()
        torch.save(state, folder / "state.pt")


def load(rank, world, folder, run):
    """What was loaded, and what became of it in more steps."""
    _, arrangement, case, way = run
    model, parameters, optimizer = begin(arrangement, case, world)
    train(parameters, optimizer, range(50, 52))  # of another run
    options = StateDictOptions(**WAYS[way][1])
    if options.full_state_dict:
        state = torch.load(folder / "state.pt") if rank == 0 or not options.broadcast_from_rank0 else {}
        state = state or {"model": {}, "optimizer": {}}
    else:
        state = {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    loaded = digests(parameters, optimizer)
    train(parameters, optimizer, range(STEPS, STEPS + MORE))
    return loaded, digests(parameters, optimizer)


@pytest.fixture(scope="session")
def saved(start, tmp_path_factory):
    """``saved(world, run)``: the folder into which so many ranks have saved a run."""
    folders = {}

    def by(world, run):
        if (world, run) not in folders:
            folders[world, run] = tmp_path_factory.mktemp("saved") / "run"
            start(world)(save, folders[world, run], run)
        return folders[world, run]

    return by


@pytest.mark.parametrize(
    ("run", "before", "after"),
    [pytest.param(*case, id=f"{' '.join(case[0])} {case[1]}-{case[2]}") for case in CASES_TO_TEST],
)
def test_the_run_goes_on(start, saved, run, before, after):
    folder = saved(before, run)
    expected = digests(*alone(run[2])), digests(*alone(run[2], STEPS + MORE))
    for found in start(after)(load, folder, run):
        assert found == expected


# ---- layers ----------------------------------------------------------------------------------------------------------


def begin_layers(rank, world, arrangement, name):
    model = model_of("convolutions")
    if arrangement == "fsdp":
        return model, OPTIMIZERS[name](fully_shard(model))
    wrapped = DistributedDataParallel(model)
    return wrapped, OPTIMIZERS[name](wrapped, process_group=dist.group.WORLD)


def save_layers(rank, world, folder, arrangement, name):
    model, optimizer = begin_layers(rank, world, arrangement, name)
    train_model(model, optimizer, range(STEPS), rank, world, ConvNet.inputs)
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folder,
    )
    return outcome(model, optimizer)


def load_layers(rank, world, folder, arrangement, name):
    model, optimizer = begin_layers(rank, world, arrangement, name)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    loaded = outcome(model, optimizer)
    train_model(model, optimizer, range(STEPS, STEPS + MORE), rank, world, ConvNet.inputs)
    return loaded, outcome(model, optimizer)


@pytest.mark.parametrize("arrangements", [("ddp", "ddp"), ("fsdp", "fsdp"), ("ddp", "fsdp")], ids="-".join)
@pytest.mark.parametrize("name", LAYERED)
def test_layers(start, tmp_path, arrangements, name):
    """What was saved is loaded to the last bit; more batches are summed in another order."""
    before = start(2)(save_layers, tmp_path, arrangements[0], name)
    later = of_one_process("convolutions", name, STEPS + MORE)
    for loaded, found in start(3)(load_layers, tmp_path, arrangements[1], name):
        assert differences(loaded, before[0], 0) == {}
        assert differences(found, later, TOLERANCE) == {}


# ---- state dicts themselves ------------------------------------------------------------------------------------------


def passed_on(rank, world, arrangement, case, state):
    """Of this run, and of one that loads a state dict: that of one process, or this run's."""
    _, parameters, optimizer = begin(arrangement, case, world)
    if state is None:
        train(parameters, optimizer, range(STEPS))
        state = optimizer.state_dict()
    _, others, other = begin(arrangement, case, world)
    for p, q in zip(others, alone(case)[0], strict=True):
        p.data.copy_(sharded(q, p.device_mesh) if arrangement == "rows" else q)
    other.load_state_dict(state)
    loaded = digests(others, other)
    train(others, other, range(STEPS, STEPS + MORE))
    return loaded, digests(others, other)


@on(3)
@pytest.mark.parametrize("arrangement", ["ddp", "rows"])
@pytest.mark.parametrize("case", CLASSES)
@pytest.mark.parametrize("whole", [True, False], ids=["of-one-process", "of-the-group"])
def test_state_dicts(ranks, arrangement, case, whole):
    expected = digests(*alone(case)), digests(*alone(case, STEPS + MORE))
    state = alone(case)[1].state_dict() if whole else None
    for found in ranks(passed_on, arrangement, case, state):
        assert found == expected


def copied(rank, world, arrangement, case):
    """Of a run, and of its copy, which both went on."""
    _, parameters, optimizer = begin(arrangement, case, world)
    train(parameters, optimizer, range(STEPS))
    others, other = copy.deepcopy((parameters, optimizer))
    train(others, other, range(STEPS, STEPS + MORE))
    found = digests(others, other)
    train(parameters, optimizer, range(STEPS, STEPS + MORE))
    with pytest.raises(TypeError, match="in a process group cannot be pickled: save its state_dict"):
        pickle.dumps(optimizer)
    return digests(parameters, optimizer), found


@on(2)
@pytest.mark.parametrize("arrangement", ["ddp", "rows"])
@pytest.mark.parametrize("case", ["shampoo 2", "soap 4"])
def test_copies(ranks, arrangement, case):
    expected = digests(*alone(case, STEPS + MORE))
    for found in ranks(copied, arrangement, case):
        assert found == (expected, expected)
