"""Checkpoints in a process group: every check on real processes, launched once for each number of them."""

import multiprocessing
import os
import signal
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist

from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import same
from tests.distributed import checkpoint_checks, checkpoint_refusals
from tests.distributed.checkpoint_checks import build, picture

CHECKS = {check.__name__: check for module in (checkpoint_checks, checkpoint_refusals) for check in module.CHECKS}
WORLDS = {1: [*CHECKS], 2: [*CHECKS], 3: [*CHECKS], 4: [*CHECKS], 8: ["check_golden", "check_same_world"]}


def launch(work, world, *args, waited_for=None):
    """Call it in processes, with the rank, the world, and what is given; those that do not end are killed.

    Args:
        waited_for: ranks; the others are killed when these have ended. Default None: all.
    """
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, world, *args)) for rank in range(world)]
    for process in ranks:
        process.start()
    for rank in range(world) if waited_for is None else waited_for:
        ranks[rank].join(200)
    for process in ranks:
        process.kill()
        process.join()


def make_group(rank, world, folder, seconds):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(rank, world, folder):
    """The checks one after the other, and what each raised in a file of this rank; after that there is nothing more."""
    make_group(rank, world, folder, seconds=60)
    for name in WORLDS[world]:
        if rank == 0:
            (folder / name).mkdir()
        dist.barrier()
        error = ""
        try:
            CHECKS[name](rank, world, folder / name)
        except BaseException:
            error = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(error)
        if error:
            os._exit(1)
    dist.destroy_process_group()


@cache
def checked(world):
    """For each check what each rank raised: nothing, if it holds; None, if the rank did not come to it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        launch(check, world, folder)
        files = {name: [folder / f"{name}.{rank}" for rank in range(world)] for name in WORLDS[world]}
        return {
            name: [file.read_text() if file.exists() else None for file in of_ranks] for name, of_ranks in files.items()
        }


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in WORLDS.items() for name in names])
def test_check(world, name):
    found = checked(world)[name]
    # The shortest is the one that is not about another rank that has ended.
    assert found == [""] * world, min(filter(None, found), key=len, default="no rank came to it")


# ---- deaths ----------------------------------------------------------------------------------------------------------


def last_fsync(ends):
    """It ends with the files of this rank, before it can tell the others."""
    fsync, calls = os.fsync, []

    def ending(descriptor):
        fsync(descriptor)
        calls.append(descriptor)
        if len(calls) == 3:
            ends()

    return ending


def outlive(rank, world, folder, work, dying, ends):
    make_group(rank, world, folder, seconds=5)
    mesh = torch.distributed.device_mesh.DeviceMesh("cpu", list(range(world)))
    objects, live = build(0, mesh), build(1, mesh)
    save_checkpoint(folder / "run", **objects, step=1, process_group=dist.group.WORLD)
    load_checkpoint(folder / "run", **live, process_group=dist.group.WORLD)
    dist.barrier()
    end = {"exits": lambda: os._exit(1), "hangs": lambda: os.kill(os.getpid(), signal.SIGSTOP)}[ends]
    if rank == dying:
        os.fsync = last_fsync(end)
        objects["model"].load_state_dict = lambda state: end()
    start, error = time.monotonic(), None
    expected = [value.to_local().clone() for value in objects["model"].parameters()]
    try:
        if work == "save":
            save_checkpoint(folder / "run", **live, step=2, process_group=dist.group.WORLD)
        else:
            load_checkpoint(folder / "run", **objects, process_group=dist.group.WORLD)
    except (RuntimeError, CheckpointError) as caught:
        error = caught
    assert error is not None
    assert time.monotonic() - start < 20
    assert same(expected, [value.to_local() for value in objects["model"].parameters()])
    (folder / f"outlived.{rank}").write_text(type(error).__name__)
    os._exit(0)  # torch's own exit would wait for the others


@pytest.mark.parametrize(("work", "dying", "ends"), [("save", 0, "exits"), ("save", 1, "hangs"), ("load", 1, "exits")])
def test_a_rank_that_dies(tmp_path, work, dying, ends):
    """The others raise, the earlier checkpoint is whole, and who was loading has what it had."""
    launch(outlive, 2, tmp_path, work, dying, ends, waited_for=[1 - dying])
    (outlived,) = tmp_path.glob("outlived.*")
    assert outlived.name == f"outlived.{1 - dying}"
    assert outlived.read_text() == {"save": "RuntimeError", "load": "CheckpointError"}[work]
    live = build(1)
    assert load_checkpoint(tmp_path / "run", **live)["step"] == 1
    assert same(picture(live), picture(build(0)))
    save_checkpoint(tmp_path / "run", **live)
    assert len([*(tmp_path / "run").iterdir()]) == 4  # and nothing is left of the one that was not finished
