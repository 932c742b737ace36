"""What must hold of checkpoints in a process group, as functions that every rank calls with the default group made.

Each takes (rank, world, folder), a folder that the ranks share and that is the check's own, and raises if it does not
hold. The groups of fewer ranks are for what was saved by as many.
"""

import json
import os
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowbit_optim import Shampoo
from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import same
from tests.checkpoint.golden import make as golden


class Net(nn.Module):
    """Of 7, 2 and 1 rows: uneven shards, and empty ones. Buffers are no DTensors, and two weights are tied."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.down = nn.Linear(7, 2, bias=False)
        self.again = nn.Linear(7, 2, bias=False)
        self.again.weight = self.down.weight
        self.out = nn.Linear(2, 1)

    def forward(self, x):
        x = self.norm(self.embed(x))
        return self.out(self.down(x) + self.again(x))


def build(seed, mesh=None, steps=2):
    """The same model and state for every mesh; None: plain tensors."""
    torch.manual_seed(seed)
    model = Net()
    state = [(torch.randn(p.shape), torch.rand(p.shape)) for p in model.parameters()]
    if mesh is not None:
        fully_shard(model.embed, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1), betas=(0.5, 0.9))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for parameter, moments in zip(model.parameters(), state, strict=True):
        if steps:
            moments = [as_like(parameter, moment) for moment in moments]
            names = ("exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **dict(zip(names, moments, strict=True))}
    with torch.no_grad():
        model.norm.running_mean += seed + 1
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def as_like(parameter, whole):
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def train(objects, steps):
    """The same data on every rank, for buffers are the first rank's, and random numbers of its own."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = objects["model"](torch.randn(8, 5, generator=generator)).sub(torch.rand(())).square().mean()
        objects["optimizer"].zero_grad()
        loss.backward()
        objects["optimizer"].step()
        objects["scheduler"].step()


def whole(value):
    """With full tensors in the place of DTensors and keys in order, all the way down."""
    if isinstance(value, dict):
        return {key: whole(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return type(value)(map(whole, value))
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def picture(objects):
    return whole([thing.state_dict() for thing in objects.values()])


def seed_of_rank(rank):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + rank)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def meshes(world):
    """Of the first n ranks, for all n, with their groups; every rank makes all of them."""
    found = {n: DeviceMesh("cpu", list(range(n))) for n in range(1, world + 1)}
    return {n: (mesh, mesh.get_group() if dist.get_rank() < n else None) for n, mesh in found.items()}


def on_rank_0(work):
    if dist.get_rank() == 0:
        work()
    dist.barrier()


# ---- saved and loaded ------------------------------------------------------------------------------------------------


def check_same_world(rank, world, folder):
    """Resumed, training is what it would have been, and so are each rank's random numbers."""
    mesh, group = DeviceMesh("cpu", list(range(world))), dist.group.WORLD
    objects = build(0, mesh)
    train(objects, 2)
    seed_of_rank(rank)
    save_checkpoint(folder, **objects, step=7, process_group=group, note=f"of rank {rank}")
    expected = picture(objects), draw()
    train(objects, 2)
    for steps in (0, 3):
        live = build(1, mesh, steps)
        found = load_checkpoint(folder, **live, process_group=group)
        assert found == {"step": 7, "note": "of rank 0"}
        assert same((picture(live), draw()), expected)
        train(live, 2)
        assert same(picture(live), picture(objects))
    if world == 1:  # who has all rows needs no group
        save_checkpoint(folder, **objects)
        load_checkpoint(folder, **live)
    names = sorted(os.listdir(folder))
    assert len([name for name in names if name.startswith("random-rank")]) == world - 1
    assert json.loads((folder / "checkpoint.json").read_text())["format_version"] == (1 if world == 1 else 2)


def check_other_worlds(rank, world, folder):
    """What n ranks saved, m ranks load, with state or without; and so does a process alone, into plain tensors."""
    plain = picture(build(0))
    for n, (mesh, group) in meshes(world).items():
        if rank < n:
            objects = build(0, mesh)
            seed_of_rank(rank)
            save_checkpoint(folder / str(n), **objects, process_group=group)
            assert same(picture(objects), plain)
    if rank == 0:
        save_checkpoint(folder / "plain", **build(0))
    dist.barrier()
    for saved in [*map(str, range(1, world + 1)), "plain"]:
        live = build(1)
        load_checkpoint(folder / saved, **live)
        assert same(picture(live), plain)
        for m, (mesh, group) in meshes(world).items():
            for steps in (0, 1) if rank < m else ():
                live = build(1, mesh, steps)
                seed_of_rank(50)
                load_checkpoint(folder / saved, **live, process_group=group)
                assert same(picture(live), plain)
                if saved != "plain":  # random numbers of a rank of this number, or those that were
                    found = draw()
                    seed_of_rank(rank if rank < int(saved) else 50)
                    assert draw() == found
                train(live, 1)


def check_golden(rank, world, folder):
    """A checkpoint of three ranks that is kept with the tests."""
    name = "shampoo-blocks"
    model = golden.build(name, 9)["model"]
    fully_shard(model, mesh=DeviceMesh("cpu", list(range(world))))
    load_checkpoint(golden.FOLDERS[2] / name, model=model, process_group=dist.group.WORLD)
    expected = json.loads((golden.FOLDERS[2] / f"{name}.json").read_text())["model"]
    assert {key: golden.digest(value) for key, value in whole(model.state_dict()).items()} == expected


def check_replicas(rank, world, folder):
    """HSDP: of ranks that have the same rows, one writes them."""
    if world % 2:
        return
    mesh = DeviceMesh("cpu", torch.arange(world).view(2, -1), mesh_dim_names=("replicate", "shard"))
    objects = build(0, mesh)
    save_checkpoint(folder, **objects, process_group=dist.group.WORLD)
    writers = {name.split("-rank")[1][:5] for name in os.listdir(folder) if "-rank" in name and name[0] != "r"}
    assert writers == {f"{n:05}" for n in range(1, world // 2)}
    live = build(1, mesh)
    load_checkpoint(folder, **live, process_group=dist.group.WORLD)
    assert same(picture(live), picture(build(0)))
    live = build(1)
    load_checkpoint(folder, **live)
    assert same(picture(live), picture(build(0)))


def check_ddp(rank, world, folder):
    """State that all ranks have: the first writes it, and every rank its random states."""
    objects = build(0)
    seed_of_rank(rank)
    save_checkpoint(folder, **objects, process_group=dist.group.WORLD)
    expected = draw()
    live = build(1)
    load_checkpoint(folder, **live, process_group=dist.group.WORLD)
    assert draw() == expected
    assert same(picture(live), picture(objects))
    kinds = sorted(name.partition("-")[0] for name in os.listdir(folder))
    assert kinds == ["checkpoint.json", "model", "optimizer", *["random"] * (world - 1), "trainer"]


class Sums(torch.optim.Optimizer):
    """State that lies on the ranks otherwise than its parameter, as that of blocks does: a DTensor only when asked."""

    def __init__(self, parameters, mesh, blocks=5):
        super().__init__(parameters, {})
        self.mesh, self.blocks = mesh, blocks

    def fill(self, factor):
        for parameter in self.param_groups[0]["params"]:
            numbers = factor * torch.arange(self.blocks * 6.0).view(self.blocks, 2, 3)
            self.state[parameter] = {"step": 3, "sums": numbers.bfloat16(), "scale": torch.tensor(factor)}
        return self

    def state_dict(self):
        packed = super().state_dict()
        for i, entry in packed["state"].items():
            sums = distribute_tensor(entry["sums"], self.mesh, [Shard(0)], src_data_rank=None)
            packed["state"][i] = {**entry, "sums": sums}
        return packed

    def load_state_dict(self, state_dict):
        parameters = self.param_groups[0]["params"]
        for i, entry in state_dict["state"].items():
            self.state[parameters[i]] = whole(entry)


def check_state_in_blocks(rank, world, folder):
    """Fresh or not, with parameters that are plain or not."""
    mesh = DeviceMesh("cpu", list(range(world)))
    for sharded in (False, True):
        models = [build(seed, mesh if sharded else None)["model"] for seed in (0, 1)]
        saved = Sums(models[0].parameters(), mesh).fill(2.0)
        save_checkpoint(folder / str(sharded), model=models[0], optimizer=saved, process_group=dist.group.WORLD)
        load = partial(load_checkpoint, folder / str(sharded), model=models[1], process_group=dist.group.WORLD)
        for live in (Sums(models[1].parameters(), mesh), Sums(models[1].parameters(), mesh).fill(1.0)):
            load(optimizer=live)
            assert same(whole(live.state_dict()["state"]), whole(saved.state_dict()["state"]))
        other = Sums(models[1].parameters(), mesh, 3).fill(1.0)
        with pytest.raises(CheckpointError, match=r"/sums' is torch.bfloat16 \[5, 2, 3\], the live .* \[3, 2, 3\]"):
            load(optimizer=other)


def second_order(seed, mesh=None, group=None, steps=0):
    """With several blocks to each weight: of one process, of a group (DDP), or of a mesh (FSDP2)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    settings = {"bits": 2, "min_quant_size": 1, "statistics_frequency": 1, "max_preconditioner_dim": 5}
    optimizer = Shampoo(model.parameters(), lr=0.01, base_bits=32, process_group=group, **settings)
    for step in range(steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def check_second_order(rank, world, folder):
    """State of one process, of owners of blocks (DDP) and of shards (FSDP2), each loaded by the others."""
    expected = picture(second_order(0, steps=3))
    on_rank_0(lambda: save_checkpoint(folder / "plain", **second_order(0, steps=3)))
    for n, (mesh, group) in meshes(world).items():
        saved = folder / "plain"
        layouts = {"ddp": {"group": group}, "fsdp": {"mesh": mesh}, "again": {"group": group}, "one": {}}
        for name, layout in layouts.items() if rank < n else ():
            for steps in (2, 0):
                live = second_order(1, **layout, steps=steps)
                load_checkpoint(saved, **live, process_group=group)
                assert same(picture(live), expected)
            saved = folder / f"{name}-{n}"
            save_checkpoint(saved, **live, process_group=group)


def check_small_files_kept(rank, world, folder):
    """`max_file_size` and `keep` in a group."""
    mesh = DeviceMesh("cpu", list(range(world)))
    objects = build(0, mesh)
    for step in (1, 2, 3):
        train(objects, 1)
        save_checkpoint(folder, **objects, step=step, keep=2, max_file_size=100, process_group=dist.group.WORLD)
    dist.barrier()
    assert sorted(os.listdir(folder)) == ["latest", "step-2", "step-3"]
    names = [name for name in os.listdir(folder / "step-3") if name.startswith("model-")]
    assert len(names) > world
    live = build(1, mesh)
    assert load_checkpoint(folder, **live, process_group=dist.group.WORLD)["step"] == 3
    assert same(picture(live), picture(objects))


def check_background(rank, world, folder):
    """In threads, on a group of their own, while training goes on."""
    mesh, group = DeviceMesh("cpu", list(range(world))), dist.new_group(backend="gloo")
    objects = build(0, mesh)
    for step in (1, 2):
        expected = picture(objects)
        saving = save_checkpoint(folder / str(step % 2), **objects, step=step, background=True, process_group=group)
        train(objects, 3)
    saving.wait()
    live = build(1, mesh)
    assert load_checkpoint(folder / "0", **live, process_group=group)["step"] == 2
    assert same(picture(live), expected)
    with pytest.raises(ValueError, match="give a process_group that nothing else uses"):
        save_checkpoint(folder / "0", **objects, background=True, process_group=dist.group.WORLD)


CHECKS = [function for name, function in sorted(globals().items()) if name.startswith("check_")]
