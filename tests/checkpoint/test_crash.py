"""Saving is all or nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.common import build, copied_before, load, picture, same, save, train


class Crash(BaseException):
    """Not an Exception: nothing may handle it as if it were an error of a file."""


def crash_at(monkeypatch, call):
    """Let the call-th fsync or rename from now on raise; return the calls so far."""
    calls = []

    def wrap(name, function):
        def wrapped(*args):
            calls.append(name)
            if len(calls) == call + 1:
                raise Crash
            return function(*args)

        monkeypatch.setattr(os, name, wrapped)

    wrap("fsync", os.fsync)
    wrap("replace", os.replace)
    return calls


def test_crash_leaves_the_old_checkpoint_or_the_new(tmp_path, monkeypatch):
    objects = build(0)
    train(*objects, 1)
    folder = tmp_path / "run"
    for call in range(100):
        save(folder, objects, step=1)
        names = set(os.listdir(folder))
        (folder / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch:
            calls = crash_at(patch, call)
            try:
                save(folder, objects, step=2)
            except Crash:
                committed = "replace" in calls[:-1]
                assert load(folder, build(1))["step"] == (2 if committed else 1)
                assert committed or set(os.listdir(folder)) == names | {"notes.txt"}
            else:
                break
        os.remove(folder / "notes.txt")
    # Three data files, checkpoint.json, the folder, the rename, the folder.
    assert calls == ["fsync"] * 5 + ["replace", "fsync"]
    assert load(folder, build(1))["step"] == 2
    assert len(os.listdir(folder)) == 5  # the last save's four, and the user's own


def test_power_cut_at_any_moment(tmp_path, monkeypatch):
    """The folder is copied before every change of it, as a process that vanishes would leave it."""
    objects, folder = build(0), tmp_path / "run"
    save(folder, objects, step=1)
    with copied_before(monkeypatch, folder, ("fsync", "replace", "unlink")) as copies:
        save(folder, objects, step=2)
    steps = [load(place, build(1))["step"] for place in copies]
    assert len(steps) > 8
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}

    leftovers = copies[steps.index(2) - 1]  # just before the rename: the old checkpoint and all the new files
    assert len(os.listdir(leftovers)) == 8
    save(leftovers, objects, step=3)
    assert len(os.listdir(leftovers)) == 4
    assert load(leftovers, build(1))["step"] == 3


def test_everything_is_on_disk_before_the_commit(tmp_path, monkeypatch):
    synced, at_commit = set(), set()
    fsync, replace = os.fsync, os.replace

    def record(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source, target):
        at_commit.update(synced)
        at_commit.add(os.stat(target.parent.parent).st_ino)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", check)
    folder = tmp_path / "new" / "run"
    save(folder, build(0))
    paths = [tmp_path, tmp_path / "new", folder, *folder.iterdir()]
    assert {path.name for path in paths if path.stat().st_ino not in at_commit} == set()


def test_failed_first_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(Crash):
            save(tmp_path, build(0))
    assert os.listdir(tmp_path) == []


def test_saving_leaves_the_random_generators_alone(tmp_path):
    objects = build(0)
    before = picture(*objects)
    save(tmp_path, objects)
    assert same(picture(*objects), before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("layout", ["one", "sharded", "rotated"])
def test_kill_at_random_moments(tmp_path, record_property, layout):
    """The folder loads as the checkpoint before the save that was killed, or as the one after it."""
    rounds = 100
    command = [sys.executable, "-m", "tests.checkpoint.killing", str(tmp_path), layout, str(rounds), "0"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    record_property(
        "saves killed with SIGKILL", f"{rounds}: {found['old']} left the old checkpoint, {found['new']} the new"
    )
    assert found["old"] + found["new"] == rounds
    assert found["old"] > 0
    assert found["new"] > 0
    folders = {"rotated": 2}.get(layout, 1)
    assert sum(name.endswith("checkpoint.json") for name in found["files"]) == folders
    # Nothing is left of the saves that were killed.
    stems = {name.rpartition("-")[0] for name in found["files"] if "-" in Path(name).name}
    data = [name for name in found["files"] if not name.endswith(("checkpoint.json", "latest"))]
    assert len(data) == len(stems)
