"""Disks that are full, read-only or broken: an OSError, and the earlier checkpoint is still good."""

import errno
import os
import resource
import shutil
import subprocess

import pytest

from lowbit_optim.checkpoint import load_checkpoint
from tests.checkpoint.common import build, load, picture, same, save, train

CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "listdir", "scandir", "fstat", "close")


def failing(monkeypatch, at, code):
    """Let the at-th of these calls from now on fail; return the names of the calls so far."""
    calls = []

    def wrap(name, function):
        def wrapped(*args, **keywords):
            calls.append(name)
            if len(calls) != at + 1:
                return function(*args, **keywords)
            if name == "close":  # which has closed all the same
                function(*args)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, name, wrapped)

    for name in CALLS:
        wrap(name, getattr(os, name))
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("rotated", [False, True], ids=["one", "rotated"])
def test_every_call_fails_in_turn(tmp_path, monkeypatch, record_property, rotated, code):
    objects, live = build(0), build(1)
    train(*objects, 1)
    folder = tmp_path / "run"
    keywords = {"max_file_size": 500} | ({"keep": 1} if rotated else {})
    raised, at = 0, 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, objects, step=1, **keywords)
        before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        with monkeypatch.context() as patch:
            calls = failing(patch, at, code)
            try:
                save(folder, objects, step=2, **keywords)
                error = None
            except OSError as caught:
                error = caught
        if len(calls) <= at:
            break
        step = load(folder, live)["step"]
        committed = calls.count("replace") - (calls[at] == "replace") == 1 + rotated
        assert step == (2 if committed else 1)
        if error is None:
            assert committed
        else:
            raised += 1
            assert error.errno == code
            for file, content in before.items():
                assert committed or (folder / file).read_bytes() == content
        save(folder, objects, step=3, **keywords)  # and the next one is as ever
        assert load(folder, live)["step"] == 3
        at += 1
    record_property("calls failed in turn", f"{at}, of which {raised} failed the save")
    assert raised > 20


def test_first_save_that_fails(tmp_path, monkeypatch):
    objects = build(0)
    for at in range(1000):
        with monkeypatch.context() as patch:
            calls = failing(patch, at, errno.ENOSPC)
            try:
                save(tmp_path / "run", objects)
            except OSError:
                assert "replace" in calls[:at] or not list(tmp_path.glob("run/*"))
        if len(calls) <= at:
            break
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert 10 < at < 999


@pytest.fixture
def small_files():
    """No file may become larger than this, as the system says."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 100, 1000, 4000, 10_000])
def test_files_cut_short_by_the_system(good, live, small_files, size):
    files = {file: file.read_bytes() for file in good.iterdir()}
    small_files(size)
    try:
        with pytest.raises(OSError, match="File too large"):
            save(good, live, step=3)
    finally:
        small_files(resource.RLIM_INFINITY)
    assert {file: file.read_bytes() for file in good.iterdir()} == files
    assert load_checkpoint(good)["step"] == 2


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(tiny_disk):
    objects, live = build(0, width=4), build(1, width=4)
    train(*objects, 1)
    save(tiny_disk / "run", objects, step=1)
    filler = tiny_disk / "filler"
    size = 128 * 1024
    while size:  # until no byte more fits
        with open(filler, "ab", buffering=0) as out:
            try:
                out.write(bytes(size))
            except OSError:
                size //= 2
    for _ in range(40):  # and then with a page more at a time
        error = None
        try:
            save(tiny_disk / "run", objects, step=2)
        except OSError as caught:
            error = caught
        if error is None:
            break
        assert error.errno == errno.ENOSPC
        assert load(tiny_disk / "run", live)["step"] == 1
        os.truncate(filler, max(0, filler.stat().st_size - 4096))
    assert load(tiny_disk / "run", live)["step"] == 2
    assert same(picture(*live)[0], picture(*objects)[0])


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match=r"exists|directory"):
        save(tmp_path / "run", build(0))
    assert (tmp_path / "run").read_text() == "mine"
