"""Two writers, and saves in the background."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from lowbit_optim.checkpoint import load_checkpoint, save_checkpoint, tensors
from lowbit_optim.checkpoint.writing import sweep
from tests.checkpoint.common import build, load, picture, same, save, train

ROOT = Path(__file__).parents[2]


class Gate:
    """Holds up the next fsync until it is opened."""

    def __init__(self, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        fsync = os.fsync

        def wait(descriptor):
            self.reached.set()
            assert self.open.wait(60)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", wait)


@pytest.fixture
def gate(monkeypatch):
    made = Gate(monkeypatch)
    yield made
    made.open.set()


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("keywords", [{}, {"keep": 2}], ids=["one", "rotated"])
def test_two_threads(tmp_path, gate, keywords):
    (tmp_path / "run").mkdir()
    other = threading.Thread(target=save_checkpoint, args=(tmp_path / "run",), kwargs={"step": 1, **keywords})
    other.start()
    assert gate.reached.wait(60)
    before = files(tmp_path / "run")
    with pytest.raises(BlockingIOError, match=r"run: another process or thread is saving into this folder"):
        save_checkpoint(tmp_path / "run", step=2, **keywords)
    assert files(tmp_path / "run") == before
    gate.open.set()
    other.join()
    assert load_checkpoint(tmp_path / "run")["step"] == 1
    save_checkpoint(tmp_path / "run", step=2, **keywords)
    assert load_checkpoint(tmp_path / "run")["step"] == 2


SAVE = """
import sys
from lowbit_optim import save_checkpoint
try:
    save_checkpoint(sys.argv[1], step=7)
except BlockingIOError as error:
    print(error)
"""


def test_two_processes(tmp_path, gate):
    (tmp_path / "run").mkdir()
    other = threading.Thread(target=save_checkpoint, args=(tmp_path / "run",), kwargs={"step": 1})
    other.start()
    assert gate.reached.wait(60)
    run = [sys.executable, "-c", SAVE, str(tmp_path / "run")]
    said = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f"{tmp_path / 'run'}: another process or thread is saving into this folder, and nothing was written" in said
    gate.open.set()
    other.join()
    assert load_checkpoint(tmp_path / "run")["step"] == 1
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout == ""
    assert load_checkpoint(tmp_path / "run")["step"] == 7


def test_background_saves_what_was(tmp_path, gate):
    objects, live = build(0), build(1)
    train(*objects, 2)
    before = picture(*objects)
    counts = [1, 2]
    saving = save_checkpoint(
        tmp_path, model=objects[0], optimizer=objects[1], scheduler=objects[2], counts=counts, background=True
    )
    assert gate.reached.wait(60)
    train(*objects, 2)  # in place, while it is being written
    with torch.no_grad():
        for parameter in objects[0].parameters():
            parameter.fill_(7.0)
    counts.append(3)
    assert not saving.done()
    assert not (tmp_path / "checkpoint.json").exists()
    gate.open.set()
    saving.wait()
    saving.wait()
    assert saving.done()
    assert load(tmp_path, live)["counts"] == [1, 2]
    assert same(picture(*live), before)


def test_saving_in_the_foreground_is_done(tmp_path):
    saving = save_checkpoint(tmp_path)
    assert saving.done()
    saving.wait()


def test_next_save_and_load_wait(tmp_path, gate):
    save_checkpoint(tmp_path / "a", step=1, background=True)
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    save_checkpoint(tmp_path / "a" / ".." / "a", step=2, background=True)
    assert load_checkpoint(tmp_path / "a")["step"] == 2


def test_many_in_the_background(tmp_path):
    objects, live = build(0), build(1)
    for step in range(5):
        train(*objects, 1)
        saving = save(tmp_path, objects, step=step, keep=2, background=True)
        before = picture(*objects)
    saving.wait()
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-3", "step-4"]
    assert load(tmp_path, live)["step"] == 4
    assert same(picture(*live), before)


def test_errors_of_the_arguments_come_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"extras\['bad'\]"):
        save_checkpoint(tmp_path / "new", bad=object(), background=True)
    with pytest.raises(ValueError, match="step is None"):
        save_checkpoint(tmp_path / "new", keep=1, background=True)
    assert not (tmp_path / "new").exists()


def test_error_of_the_writing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, step=1)
    for waits in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            saving = save_checkpoint(tmp_path, step=2, background=True)
            saving.join()
        assert saving.done()
        assert load_checkpoint(tmp_path)["step"] == 1
        with pytest.raises(OSError, match="No space left"):
            saving.wait() if waits else save_checkpoint(tmp_path, step=3)
        saving.wait()  # raised once
    save_checkpoint(tmp_path, step=3)
    assert load_checkpoint(tmp_path)["step"] == 3


AT_EXIT = """
import os, sys, time
from lowbit_optim import save_checkpoint
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.2)
    if sys.argv[2] == "fails":
        raise OSError(28, "No space left on device")
    fsync(descriptor)
os.fsync = slow
save_checkpoint(sys.argv[1], step=7, background=True)
"""


@pytest.mark.parametrize("how", ["works", "fails"])
def test_python_ends_after_the_save(tmp_path, how):
    run = [sys.executable, "-c", AT_EXIT, str(tmp_path / "run"), how]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    if how == "works":
        assert ended.stderr == ""
        assert load_checkpoint(tmp_path / "run")["step"] == 7
    else:
        assert "OSError: [Errno 28] No space left on device" in ended.stderr
        assert not (tmp_path / "run" / "checkpoint.json").exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_forked_during_a_save_does_not_keep_the_lock(tmp_path, gate):
    saving = save_checkpoint(tmp_path, step=1, background=True)
    assert gate.reached.wait(60)
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    try:
        gate.open.set()
        saving.wait()
        save_checkpoint(tmp_path, step=2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert load_checkpoint(tmp_path)["step"] == 2


def test_without_locks_a_save_that_lost_its_files_is_none(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, step=1)
    fsync = os.fsync

    def swept(descriptor):
        fsync(descriptor)
        sweep(tmp_path)  # as after another writer's commit

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", swept)
        with pytest.raises(FileNotFoundError, match=r"removed before the checkpoint was complete.*trainer-\w+\.json"):
            save_checkpoint(tmp_path, step=2)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_thread_that_does_not_start(tmp_path, monkeypatch):
    def none(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        with pytest.raises(RuntimeError, match="can't start"):
            save_checkpoint(tmp_path, step=1, background=True)
    save_checkpoint(tmp_path, step=2)
    assert load_checkpoint(tmp_path)["step"] == 2


def test_load_of_one_of_several_waits(tmp_path, gate):
    save_checkpoint(tmp_path, step=1, keep=2, background=True)
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    assert load_checkpoint(tmp_path / "step-1")["step"] == 1


def test_failed_save_lets_go_of_its_copy(tmp_path, monkeypatch):
    copies = []
    host_copy = tensors.host_copy

    def watched(tensor):
        copies.append(weakref.ref(copy := host_copy(tensor)))
        return copy

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "host_copy", watched)
        patch.setattr(os, "fsync", full)
        saving = save_checkpoint(tmp_path, model=torch.nn.Linear(2, 2), background=True)
        saving.join()
    gc.collect()
    assert len(copies) == 2
    assert not any(copy() is not None for copy in copies)
    with pytest.raises(OSError, match="No space left"):
        saving.wait()


@pytest.mark.parametrize("keywords", [{}, {"keep": 1}], ids=["one", "rotated"])
def test_save_beside_a_load(tmp_path, monkeypatch, keywords):
    """The files that checkpoint.json named are gone when they are to be read."""
    from lowbit_optim.checkpoint import reading

    save_checkpoint(tmp_path, step=1, **keywords)
    read_manifest = reading.read_manifest
    steps = iter([2, 3])

    def outrun(folder):
        manifest = read_manifest(folder)
        for step in steps:
            save_checkpoint(tmp_path, step=step, **keywords)
            break
        return manifest

    monkeypatch.setattr(reading, "read_manifest", outrun)
    assert load_checkpoint(tmp_path)["step"] == 3
