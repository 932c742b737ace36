"""What checkpoints in a process group must refuse, on all ranks, and nothing is lost; as in checkpoint_checks.py."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lowbit_optim.checkpoint.writing import locked
from tests.checkpoint.common import copied_before, same, sealed
from tests.distributed.checkpoint_checks import build, on_rank_0, picture, whole


def locals_of(objects):
    """What this rank has, without talking to others."""
    tensors = [*objects["model"].state_dict().values()]
    tensors += [value for entry in objects["optimizer"].state.values() for value in entry.values()]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def everyone_raises(kind, match, call, *objects):
    """All ranks raise the same, and none has changed."""
    before = [locals_of(thing) for thing in objects]
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(kind, match=match) as caught:
        call()
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    assert all(same(one, locals_of(thing)) for one, thing in zip(before, objects, strict=True))
    assert same(states, (random.getstate(), torch.get_rng_state()))
    return messages


def check_damage(rank, world, folder):
    """Whatever file is missing, cut or changed, and whoever needs it: all ranks say the same, and none has changed."""
    mesh, group = DeviceMesh("cpu", list(range(world))), dist.group.WORLD
    save_checkpoint(folder / "good", **build(0, mesh), process_group=group)
    live = build(1, mesh)

    def refused(change, match):
        on_rank_0(lambda: change(shutil.copytree(folder / "good", folder / "bad")))
        messages = everyone_raises(
            CheckpointError, match, lambda: load_checkpoint(folder / "bad", **live, process_group=group), live
        )
        on_rank_0(lambda: shutil.rmtree(folder / "bad"))
        return messages

    def flip(name, at):
        def change(bad):
            content = bytearray((bad / name).read_bytes())
            content[at] ^= 1
            (bad / name).write_bytes(content)

        return change

    for name in sorted(os.listdir(folder / "good")):
        refused(lambda bad, name=name: (bad / name).unlink(), rf"{name} cannot be read")
        if name == "checkpoint.json":
            continue
        refused(lambda bad, name=name: os.truncate(bad / name, 99), rf"{name}: has 99 bytes")
        messages = refused(flip(name, -1), rf"{name}: .* does not match the sha256 in checkpoint\.json")
        assert len({re.sub(r"^rank \d: ", "", message) for message in messages}) == 1

    def without(kind, wanted):
        def change(bad):
            manifest = json.loads((bad / "checkpoint.json").read_text())
            entries = manifest["files"][kind]
            manifest["files"][kind] = [entry for entry in entries if wanted not in entry["name"]]
            (bad / "checkpoint.json").write_bytes(sealed(manifest))

        return change

    for kind in ("model", "optimizer") if world > 1 else ():
        refused(
            without(kind, "rank00001"), rf"of the {kind} files that it names, rows \d to \d of tensor .* in no file"
        )
    load_checkpoint(folder / "good", **live, process_group=group)


def check_disks(rank, world, folder):
    """A rank that cannot write: all ranks raise, and the earlier checkpoint is still the one; the next save is good."""
    mesh, group = DeviceMesh("cpu", list(range(world))), dist.group.WORLD
    objects, live = build(0, mesh), build(1, mesh)
    save_checkpoint(folder, **objects, step=1, process_group=group)
    dist.barrier()
    before = sorted(os.listdir(folder))
    for failing in range(world):
        for call in ("open", "write", "fsync"):
            with pytest.MonkeyPatch.context() as patch:
                if rank == failing:
                    patch.setattr(os, call, full_disk(getattr(os, call)))
                everyone_raises(
                    OSError,
                    "No space left on device",
                    lambda: save_checkpoint(folder, **objects, step=2, process_group=group),
                    objects,
                )
            dist.barrier()
            assert sorted(os.listdir(folder)) == before
            assert load_checkpoint(folder, **live, process_group=group)["step"] == 1
            assert same(picture(live), picture(objects))
    save_checkpoint(folder, **objects, step=3, process_group=group)
    dist.barrier()
    assert len(os.listdir(folder)) == len(before)
    assert load_checkpoint(folder, **live, process_group=group)["step"] == 3


def full_disk(function):
    """Of what is in the folders of checkpoints, only the second file can be touched."""
    calls = []

    def failing(*args, **keywords):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **keywords)

    return failing


def check_power_cuts(rank, world, folder):
    """The folder is copied before every change of it by the first rank: as all would leave it if they vanished."""
    mesh, run = DeviceMesh("cpu", list(range(world))), folder / "run"
    objects = build(0, mesh)
    save_checkpoint(run, **objects, step=1, process_group=dist.group.WORLD)
    copying = copied_before(pytest.MonkeyPatch, run, ("fsync", "replace", "unlink")) if rank == 0 else None
    with copying or contextlib.nullcontext([]) as copies:
        save_checkpoint(run, **objects, step=2, process_group=dist.group.WORLD)
    steps = [load_checkpoint(copy, **build(1))["step"] for copy in copies]
    assert steps == sorted(steps)
    assert rank or ({*steps} == {1, 2} and len(steps) > 8)


def check_undone(rank, world, folder):
    """A load that fails on one rank, when others are done, is undone on all."""
    mesh, group = DeviceMesh("cpu", list(range(world))), dist.group.WORLD
    save_checkpoint(folder, **build(0, mesh), process_group=group)
    for failing in range(world):
        for steps in (0, 2):
            live = build(1, mesh, steps)
            load_model = live["model"].load_state_dict

            def load_and_fail(state, load_model=load_model):
                load_model(state)
                raise OSError("no luck")

            if rank == failing:
                live["model"].load_state_dict = load_and_fail
            everyone_raises(
                CheckpointError,
                r"loading them raised OSError: (rank \d: )?no luck; everything was put back as it was",
                lambda: load_checkpoint(folder, **live, process_group=group),  # noqa: B023
                live,
            )
            assert live["scheduler"].get_last_lr() == [0.02]
            assert bool(live["optimizer"].state) == bool(steps)


def check_live_objects(rank, world, folder):
    """One rank with another model, settings or damaged state: none loads."""
    mesh, group = DeviceMesh("cpu", list(range(world))), dist.group.WORLD
    objects = build(0, mesh)
    save_checkpoint(folder, **objects, process_group=group)
    live = build(1, mesh)
    if rank == world - 1:
        live["model"].register_buffer("more", torch.zeros(1))
    everyone_raises(
        CheckpointError,
        "'more' is missing",
        lambda: load_checkpoint(folder, **live, process_group=group),
        live,
    )
    if world > 1:
        with pytest.raises(ValueError, match="strict=False is for one process"):
            load_checkpoint(folder, **live, process_group=group, strict=False)
        match = r"ranks \[.*\] have parts, and they do not take part.* give a process_group="
        for call in (save_checkpoint, load_checkpoint):
            with pytest.raises(ValueError, match=match):
                call(folder, **objects)
        other = build(0, mesh)
        if rank == 1:
            other["model"].register_buffer("more", torch.zeros(1))
        save_again = partial(save_checkpoint, folder, process_group=group)
        everyone_raises(ValueError, r"'more' is", lambda: save_again(**other), other)
        everyone_raises(ValueError, r"step is \d", lambda: save_again(**objects, step=rank), objects)
        save_elsewhere = partial(save_checkpoint, folder / "steps", **objects, step=1, process_group=group)
        everyone_raises(ValueError, r"keep is \d", lambda: save_elsewhere(keep=rank + 1), objects)
        everyone_raises(TypeError, "extras", lambda: save_again(**objects, bad=rank or object()), objects)
    load_checkpoint(folder, **objects, process_group=group)
    assert same(picture(objects), picture(build(0)))


def check_placements(rank, world, folder):
    """Those that a checkpoint holds, and those that it does not."""
    mesh = DeviceMesh("cpu", list(range(world)))
    numbers = torch.arange(12.0).view(3, 4)
    for placement, said in ((Shard(1), "Shard"), (Partial(), "Partial")):
        model = nn.Module()
        model.register_buffer("bad", DTensor.from_local(numbers, mesh, [placement], run_check=False))
        with pytest.raises(TypeError, match=rf"model tensor 'bad' is a DTensor with the placements .*{said}"):
            save_checkpoint(folder / "new", model=model, process_group=dist.group.WORLD)
    uneven = nn.Module()
    shape, stride = (2 * world + 1, 4), (4, 1)
    own = torch.zeros(1 if rank else world + 1, 4)  # rows that no torch.chunk gives
    uneven.register_buffer("bad", DTensor.from_local(own, mesh, [Shard(0)], shape=shape, stride=stride))
    with pytest.raises(TypeError, match=r"'bad' is a DTensor of the shape"):
        save_checkpoint(folder / "new", model=uneven, process_group=dist.group.WORLD)
    assert not (folder / "new").exists()

    def good(factor):
        model = nn.Module()
        model.register_buffer("everywhere", distribute_tensor(numbers * factor, mesh, [Replicate()]))
        model.register_buffer("scalar", distribute_tensor(torch.tensor(factor), mesh, [Replicate()]))
        model.register_buffer("empty", distribute_tensor(torch.zeros(0, 3), mesh, [Shard(0)]))
        model.register_buffer("no_columns", distribute_tensor(torch.zeros(5, 0), mesh, [Shard(0)]))
        model.register_buffer("codes", distribute_tensor((9 * numbers * factor).byte(), mesh, [Shard(0)]))
        return model

    save_checkpoint(folder, model=good(2.0), process_group=dist.group.WORLD)
    live = good(1.0)
    load_checkpoint(folder, model=live, process_group=dist.group.WORLD)
    assert same(whole(dict(live.state_dict())), whole(dict(good(2.0).state_dict())))
    assert live.everywhere.placements == (Replicate(),)


def check_files_of_own(rank, world, folder):
    """Ranks that write into folders of their own, or read from them."""
    if world == 1:
        return
    own = folder / str(rank)
    own.mkdir()
    objects = build(0)
    match = "is in a folder of another rank's own"
    everyone_raises(OSError, match, lambda: save_checkpoint(own, **objects, process_group=dist.group.WORLD), objects)
    save_checkpoint(own, **objects)
    everyone_raises(
        CheckpointError,
        "the ranks found trainer-",
        lambda: load_checkpoint(own, **objects, process_group=dist.group.WORLD),
        objects,
    )


def check_a_second_writer(rank, world, folder):
    """Somebody else is saving into the folder: nothing is written."""
    objects = build(0, DeviceMesh("cpu", list(range(world))))
    save_checkpoint(folder, **objects, process_group=dist.group.WORLD)
    dist.barrier()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    dist.barrier()
    with locked(folder) if rank == world - 1 else contextlib.nullcontext():
        dist.barrier()
        everyone_raises(
            BlockingIOError,
            "is saving into this folder, and nothing was written",
            lambda: save_checkpoint(folder, **objects, process_group=dist.group.WORLD),
            objects,
        )
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


CHECKS = [function for name, function in sorted(globals().items()) if name.startswith("check_")]
