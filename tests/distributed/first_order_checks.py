"""Parameters of which every rank has some rows take the steps of one process, to the last bit.

Every ``check_...`` is called with (rank, world) by all ranks of an initialised gloo group. What one process has is made
beside what is sharded, of whole plain tensors; torch's ``distribute_tensor`` says which rows of it are a rank's.
"""

import copy
import shutil
import tempfile
from pathlib import Path

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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbit_optim import SGD, Adagrad, AdamW
from lowbit_optim.optimizers.report import state_bytes
from tests.contract import random

# Rows of one block, of several and of a short one, fewer rows than ranks, and what keeps 32 bits.
SHAPES = {
    "odd": (7, 50),
    "row": (1, 300),
    "tall": (130, 64),
    "vector": (5,),
    "conv": (6, 4, 3, 3),
    "two": (2, 3, 60),
    "short": (40, 3),
}
RULES = {
    "adamw": (AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "plain sgd": (SGD, {"lr": 0.1}),
    "adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
}
DTYPES = (torch.float32, torch.bfloat16)


def maker(rule="adamw", **more):
    optimizer, options = RULES[rule]
    return lambda parameters: optimizer(parameters, **{"min_quant_size": 64, **options, **more})


def mesh_of(*ranks):
    """A line of ranks; called by all ranks of the group."""
    return DeviceMesh("cpu", list(ranks))


def shard(x, mesh, placements=None):
    """A whole tensor, the same on all ranks, by rows."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)] if placements is None else placements
    return distribute_tensor(x.detach().clone(), mesh, placements, src_data_rank=None)


def model_of(tensors):
    model = nn.Module()
    for name, x in tensors.items():
        model.register_parameter(name, nn.Parameter(x))
    return model


def plain_model(dtype=torch.float32, seed=0):
    return model_of({name: random(*s, seed=seed + i).to(dtype) for i, (name, s) in enumerate(SHAPES.items())})


def sharded(model, mesh, placements=None):
    """The model with its parameters by rows."""
    return model_of({name: shard(p, mesh, placements) for name, p in model.named_parameters()})


def train(model, optimizer, steps):
    """Steps with the gradients of their numbers, the same ones whether parameters are sharded or not."""
    for step in steps:
        for i, p in enumerate(model.parameters()):
            gradient = random(*p.shape, seed=1000 * (step + 1) + i).to(p.dtype)
            p.grad = shard(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        optimizer.step()


def assert_bits(mine, expected, said):
    assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape), said
    assert torch.equal(*(x.detach().contiguous().view(-1).view(torch.uint8) for x in (mine, expected))), said


def assert_same(model, optimizer, plain, reference, said=""):
    """Parameters and state of the sharded model are the rows of those of the plain one."""
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_bits(p.to_local(), shard(q, p.device_mesh, p.placements).to_local(), f"{said} {name}")
        own, expected = optimizer.state[p], reference.state[q]
        assert own.keys() == expected.keys(), f"{said} {name}"
        for key, value in own.items():
            assert isinstance(value, DTensor) == (key not in ("step", "nonfinite")), f"{said} {name} {key}"
            whole = expected[key]
            if isinstance(value, DTensor):
                assert (value.device_mesh, value.placements) == (p.device_mesh, p.placements)
                assert (value.shape, value.stride()) == (whole.shape, whole.stride()), f"{said} {name} {key}"
                value, whole = value.to_local(), shard(whole, p.device_mesh, p.placements).to_local()
            assert_bits(value, whole, f"{said} {name} {key}")


def twins(make, mesh, dtype=torch.float32, placements=None, seed=0):
    """(sharded model, its optimizer, plain model, its optimizer)."""
    plain = plain_model(dtype, seed)
    model = sharded(plain, mesh, placements)
    return model, make(model.parameters()), plain, make(plain.parameters())


def assert_steps_agree(make, mesh, dtype=torch.float32, placements=None, said=""):
    model, optimizer, plain, reference = twins(make, mesh, dtype, placements)
    train(model, optimizer, range(5))
    train(plain, reference, range(5))
    assert_same(model, optimizer, plain, reference, said)


# ------------------------------------------------------------------------------------------------------ steps


def check_steps_of_one_process(rank, world):
    mesh = mesh_of(*range(world))
    for rule in RULES:
        for bits in (32, 8, 4):
            for dtype in DTYPES:
                assert_steps_agree(maker(rule, bits=bits), mesh, dtype, said=f"{rule} {bits} {dtype}")
    assert_steps_agree(maker(bits=4, stochastic_rounding=False), mesh, torch.bfloat16, said="to the nearest")


def check_what_is_coded_is_decided_of_the_whole(rank, world):
    """Although no rank has as many numbers as a parameter must have to be coded."""
    model, optimizer, plain, reference = twins(maker(bits=4, min_quant_size=7 * 50), mesh_of(*range(world)))
    train(model, optimizer, range(2))
    train(plain, reference, range(2))
    assert_same(model, optimizer, plain, reference)
    assert "exp_avg.codes" in optimizer.state[model.odd]
    assert "exp_avg.codes" not in optimizer.state[model.row]


def check_other_meshes(rank, world):
    """HSDP, two dims that both divide the rows, and replicas, as tensor parallelism has of norms."""
    sides = (2, world // 2) if world % 2 == 0 else (1, world)
    mesh = DeviceMesh("cpu", torch.arange(world).view(sides))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)], [Replicate()] * 2):
        for bits in (32, 4):
            assert_steps_agree(maker(bits=bits), mesh, torch.bfloat16, placements, f"{placements} {bits}")


def check_gradients_placed_otherwise(rank, world):
    mesh = mesh_of(*range(world))
    model, optimizer, plain, reference = twins(maker(bits=4), mesh)
    train(plain, reference, range(1))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        part = q.grad if rank == 0 else torch.zeros_like(q)
        p.grad = DTensor.from_local(part, mesh, [Partial()])
    optimizer.step()
    assert_same(model, optimizer, plain, reference)


def check_sharded_parameters_beside_plain_ones(rank, world):
    """In one group; torch's step on all parameters at once does not mix them."""
    mesh, other_mesh = mesh_of(*range(world)), DeviceMesh("cpu", torch.arange(world).view(1, world))
    for bits in (32, 4):
        make = maker(bits=bits, foreach=True)
        plain, beside = plain_model(), plain_model(seed=50)
        one, other = sharded(plain, mesh), sharded(plain, other_mesh)
        theirs = plain_model(seed=50)
        mixed = make([*beside.parameters(), *one.parameters(), *other.parameters()])
        reference = make([*theirs.parameters(), *plain.parameters(), *plain_model().parameters()])
        for step in range(3):
            for model in (beside, one, other, theirs, plain):
                fill_gradients(model, step)
            mixed.step()
            reference.step()
        assert_same(one, mixed, plain, reference)
        for p, q in zip(beside.parameters(), theirs.parameters(), strict=True):
            assert_bits(p, q, "beside")


def fill_gradients(model, step):
    class Nothing:
        def step(self):
            pass

    train(model, Nothing(), [step])


def check_numbers_that_are_not_finite(rank, world):
    """In the rows of one rank; counted alike by all, also where others have copies of these rows."""
    line = mesh_of(*range(world))
    square = DeviceMesh("cpu", torch.arange(world).view(2, world // 2)) if world % 2 == 0 else line
    for mesh in (line, square):
        for dtype in DTYPES:
            model, optimizer, plain, reference = twins(maker(bits=8, min_quant_size=300), mesh, dtype)
            for step in range(3):
                fill_gradients(plain, step)
                plain.tall.grad[-1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
                plain.row.grad[0, -1] = torch.nan
                for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                    p.grad = shard(q.grad, mesh)
                optimizer.step()
                reference.step()
            assert_same(model, optimizer, plain, reference)
            counts = {name: int(optimizer.state[p].get("nonfinite", 0)) for name, p in model.named_parameters()}
            assert {name: n for name, n in counts.items() if n} == {"tall": 9, "row": 3}


class Net(nn.Module):
    """A convolution, matrices and vectors, with fewer rows than there may be ranks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3)
        self.hidden = nn.Linear(36, 36)
        self.head = nn.Linear(36, 2)

    def forward(self, images):
        return self.head(torch.tanh(self.hidden(self.conv(images).flatten(1))))


def check_fully_shard(rank, world):
    """A model of FSDP2; every rank has a batch of its own. One process takes the gradients that come out."""
    offload = CPUOffloadPolicy(pin_memory=False)
    for dtype, policy in (
        (torch.float32, OffloadPolicy()),
        (torch.bfloat16, OffloadPolicy()),
        (torch.float32, offload),
    ):
        torch.manual_seed(0)
        model = Net().to(dtype)
        plain = copy.deepcopy(model)
        for layer in (model.hidden, model):
            fully_shard(layer, offload_policy=policy)
        make = maker(bits=4)
        optimizer, reference = make(model.parameters()), make(plain.parameters())
        for step in range(6):
            images = random(4, 3, 4, 4, seed=100 * step + rank).to(dtype)
            model(images).float().square().mean().backward()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                q.grad = p.grad.full_tensor()
            optimizer.step()
            reference.step()
            optimizer.zero_grad()
        assert_same(model, optimizer, plain, reference)
        assert "exp_avg.codes" in optimizer.state[model.hidden.weight]


# ------------------------------------------------------------------------------------------- copies and bytes


def check_deepcopy(rank, world):
    model, optimizer, plain, reference = twins(maker(bits=4), mesh_of(*range(world)), torch.bfloat16)
    train(model, optimizer, range(2))
    train(plain, reference, range(2))
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(other_model, other, range(2, 5))
    train(plain, reference, range(2, 4))
    assert_same(model, optimizer, plain, reference)
    train(plain, reference, range(4, 5))
    assert_same(other_model, other, plain, reference)


def check_bytes_are_those_of_this_rank(rank, world):
    model, optimizer, _, _ = twins(maker(bits=4), mesh_of(*range(world)))
    train(model, optimizer, range(1))
    rows = len(model.tall.to_local())  # of 64 numbers, two moments of 32 bytes and a scale, and counters
    (line,) = (line for line in optimizer.report().splitlines() if line.startswith("2 "))
    assert line.split()[-2:] == [f"{rows * 72 + 12:,}", f"{(rows * 72 + 12) / max(1, rows * 64):.2f}"]
    locals_ = [v.to_local() if isinstance(v, DTensor) else v for own in optimizer.state.values() for v in own.values()]
    assert state_bytes(optimizer)["total"] == sum(x.nbytes for x in locals_)


# ------------------------------------------------------------------------------------------ saving and loading


def shared_folder(rank):
    found = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return Path(found[0])


def load_in_place(model, optimizer, folder, options, group):
    """What torch.distributed.checkpoint has saved, into a model and its optimizer."""
    state = state_of(model, optimizer, options)
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"], options=options)


def state_of(model, optimizer, options=None):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def check_saved_on_some_ranks_and_loaded_on_others(rank, world):
    folder = shared_folder(rank)
    meshes = {n: mesh_of(*range(n)) for n in range(1, world + 1)}
    cases = [
        ("adamw", 4, torch.bfloat16, False),
        ("adamw", 32, torch.float32, True),
        ("sgd", 8, torch.float32, True),
        ("adagrad", 4, torch.float32, False),
    ]
    for n in meshes:
        for m in sorted({1, world, world - 1} & meshes.keys()) if n == world else [world]:
            for rule, bits, dtype, flat in cases:
                make, options = maker(rule, bits=bits), StateDictOptions(flatten_optimizer_state_dict=flat)
                here, said = folder / f"{n} {m} {rule} {bits}", f"{rule} {bits}: {n} to {m}"
                model, optimizer, plain, reference = twins(make, meshes[n], dtype)
                train(plain, reference, range(5))
                if rank < n:
                    train(model, optimizer, range(5))
                    group = meshes[n].get_group()
                    dcp.save(state_of(model, optimizer, options), checkpoint_id=here, process_group=group)
                dist.barrier()
                other_model, other, _, _ = twins(make, meshes[m], dtype, seed=70)
                if rank < m:
                    load_in_place(other_model, other, here, options, meshes[m].get_group())
                    assert_same(other_model, other, plain, reference, said)
                    train(other_model, other, range(5, 8))
                    train(plain, reference, range(5, 8))
                    assert_same(other_model, other, plain, reference, f"{said}, later")
                dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)


# How torch's functions give a state dict, and how they take it: whole and flat at once they do not take their own.
WAYS = {
    "sharded": ({"cpu_offload": True}, {}),
    "flat": ({"flatten_optimizer_state_dict": True, "cpu_offload": True}, {"flatten_optimizer_state_dict": True}),
    "whole": ({"full_state_dict": True}, {"full_state_dict": True}),
    "whole and flat": (
        {"full_state_dict": True, "flatten_optimizer_state_dict": True},
        {"flatten_optimizer_state_dict": True},
    ),
    "on rank 0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}


def check_every_kind_of_state_dict(rank, world):
    mesh = mesh_of(*range(world))
    for rule, bits in (("adamw", 4), ("sgd", 8), ("adagrad", 32)):
        make = maker(rule, bits=bits)
        model, optimizer, plain, reference = twins(make, mesh)
        train(model, optimizer, range(4))
        train(plain, reference, range(4))
        for way, (given, taken) in WAYS.items():
            state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**given))
            if way == "on rank 0":
                assert bool(state) == (rank == 0)
            other_model = sharded(plain, mesh)
            other = make(other_model.parameters())
            state = copy.deepcopy(state)
            set_optimizer_state_dict(other_model, other, optim_state_dict=state, options=StateDictOptions(**taken))
            assert_same(other_model, other, plain, reference, f"{rule} {bits} {way}")
            later_plain = copy.deepcopy((plain, reference))
            for one in ((other_model, other), later_plain):
                train(*one, range(4, 6))
            assert_same(other_model, other, *later_plain, f"{rule} {bits} {way}, later")


def check_state_dicts_of_the_live_state(rank, world):
    """``load_state_dict`` by itself: of DTensors, and of one process' plain tensors, in copies that are its own."""
    mesh = mesh_of(*range(world))
    for rule, bits, dtype in (("adamw", 4, torch.bfloat16), ("sgd", 8, torch.float32), ("adagrad", 32, torch.float32)):
        make = maker(rule, bits=bits)
        model, optimizer, plain, reference = twins(make, mesh, dtype)
        train(model, optimizer, range(3))
        train(plain, reference, range(3))
        for state in (optimizer.state_dict(), reference.state_dict()):
            other_model = sharded(plain, mesh)
            other = make(other_model.parameters())
            other.load_state_dict(state)
            assert_same(other_model, other, plain, reference)
            train(other_model, other, range(3, 4))
        assert_same(model, optimizer, plain, reference)


def check_a_run_of_torch_goes_on_in_codes(rank, world):
    mesh = mesh_of(*range(world))
    for dtype in DTYPES:
        plain = plain_model(dtype)
        model = sharded(plain, mesh)
        states = []
        for one in (model, plain):
            reference = torch.optim.AdamW(one.parameters(), lr=0.01)
            train(one, reference, range(3))
            states.append(reference.state_dict())
        make = maker(bits=4)
        reference = make(plain.parameters())
        reference.load_state_dict(states[1])
        for state in states:
            optimizer = make(model.parameters())
            optimizer.load_state_dict(state)
            assert_same(model, optimizer, plain, reference, f"{dtype}")
        train(model, optimizer, range(3, 6))
        train(plain, reference, range(3, 6))
        assert_same(model, optimizer, plain, reference, f"{dtype} later")


# -------------------------------------------------------------------------------------------------- refusals


def check_what_is_refused(rank, world):
    """On every rank alike, before anything has changed."""
    mesh = mesh_of(*range(world))
    start = plain_model()
    for placement, said in ((Shard(1), r"Shard\(dim=1\)"), (Partial(), r"Partial\(sum\)")):
        first, second = shard(start.tall, mesh), DTensor.from_local(start.conv.detach().clone(), mesh, [placement])
        model = model_of({"first": first, "second": second})
        optimizer = maker(bits=4)(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=rf"parameter 1 .*{said}.*Shard\(0\) or Replicate\(\).*bits=32"):
            optimizer.step()
        assert not optimizer.state
        assert_bits(model.first.to_local(), shard(start.tall, mesh).to_local(), "refused")
        optimizer.param_groups[0]["bits"] = 32
        if placement == Shard(1):  # as the message says
            optimizer.step()
            assert not model.second.to_local().equal(start.conv)


def check_a_plain_gradient_is_refused(rank, world):
    mesh = mesh_of(*range(world))
    model = sharded(plain_model(), mesh)
    fill_gradients(model, 0)
    model.tall.grad = random(130, 64)
    optimizer = maker(bits=4)(model.parameters())
    with pytest.raises(TypeError, match=r"parameter 2 .* and its gradient are not on the same device mesh"):
        optimizer.step()
    assert not optimizer.state


def check_autograd_sees_the_step(rank, world):
    parameter = nn.Parameter(shard(random(40, 64), mesh_of(*range(world))))
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones_like(parameter)
    AdamW([parameter], min_quant_size=0).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def check_columns_keep_32_bits(rank, world):
    """Torch's step takes them, and whole tensors are loaded as columns; codes of what torch has are refused."""
    mesh = mesh_of(*range(world))
    plain = plain_model()
    wide, whole = model_of({"wide": shard(plain.conv, mesh, [Shard(1)])}), model_of({"wide": plain.conv})
    optimizer, reference = (maker(bits=32)(one.parameters()) for one in (wide, whole))
    train(wide, optimizer, range(2))
    train(whole, reference, range(2))
    other = maker(bits=32)(wide.parameters())
    other.load_state_dict(reference.state_dict())
    assert_same(wide, other, whole, reference)
    theirs = torch.optim.AdamW(whole.parameters())
    train(whole, theirs, range(1))
    with pytest.raises(ValueError, match=r"parameter 0 .*Shard\(dim=1\)"):
        maker(bits=4)(wide.parameters()).load_state_dict(theirs.state_dict())


def check_state_dicts_that_do_not_fit(rank, world):
    mesh = mesh_of(*range(world))
    model, optimizer, plain, reference = twins(maker(bits=4), mesh)
    train(model, optimizer, range(2))
    train(plain, reference, range(2))
    state = reference.state_dict()
    of_fewer_rows = copy.deepcopy(state)
    of_fewer_rows["state"][2]["exp_avg.codes"] = of_fewer_rows["state"][2]["exp_avg.codes"][:-1]
    otherwise = optimizer.state_dict()
    codes = otherwise["state"][2]["exp_avg.codes"].redistribute(placements=[Replicate()])
    otherwise["state"][2] = otherwise["state"][2] | {"exp_avg.codes": codes}
    for given, said in ((of_fewer_rows, r"parameter 2 .*exp_avg\.codes is"), (otherwise, "parameter 2 .*not placed")):
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(given)
        assert_same(model, optimizer, plain, reference)
    theirs = torch.optim.AdamW(model.parameters())
    train(model, theirs, range(1))
    for state in (optimizer.state_dict(), theirs.state_dict()):
        with pytest.raises(ValueError, match="is a DTensor that is not placed as the parameter is; load whole tensors"):
            reference.load_state_dict(state)
    train(plain, torch.optim.AdamW(plain.parameters()), range(1))
    assert_same(model, optimizer, plain, reference)
