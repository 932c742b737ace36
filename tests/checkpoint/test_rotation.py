"""`keep=`: several checkpoints in a folder, and `latest`."""

import os
import shutil

import pytest

from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import build, copied_before, load, picture, refused, same, save, train


def names(folder):
    return sorted(os.listdir(folder))


def test_the_last_ones_are_kept(tmp_path):
    objects, live = build(0), build(1)
    folder = tmp_path / "run"
    for step in (1, 2, 9, 10, 100):
        train(*objects, 1)
        save(folder, objects, step=step, keep=3)
        assert (folder / "latest").read_text() == f"step-{step}\n"
        assert load(folder, live)["step"] == step
        assert same(picture(*live), picture(*objects))
    assert names(folder) == ["latest", "step-10", "step-100", "step-9"]
    assert load(folder / "step-9", live)["step"] == 9
    save(folder, objects, step=100, keep=1)
    assert names(folder) == ["latest", "step-100"]
    assert len(names(folder / "step-100")) == 4


def test_the_same_step_again(tmp_path):
    for value in ("one", "two"):
        save_checkpoint(tmp_path, step=0, keep=2, value=value)
    assert names(tmp_path) == ["latest", "step-0"]
    assert load_checkpoint(tmp_path)["value"] == "two"


def test_going_back(tmp_path):
    """Steps after the one that was gone back to are of another run; the newest is never removed."""
    for step in (100, 200, 300, 250):
        save_checkpoint(tmp_path, step=step, keep=3)
    assert load_checkpoint(tmp_path)["step"] == 250
    assert names(tmp_path) == ["latest", "step-100", "step-200", "step-250"]
    save_checkpoint(tmp_path, step=10, keep=1)
    assert names(tmp_path) == ["latest", "step-10"]


def test_files_of_others_stay(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "notes.txt").write_text("mine")
    for name in ("step-01", "step-x", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-3").write_text("a file")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    save_checkpoint(outside, step=0)
    (tmp_path / "step-0").symlink_to(outside)
    for step in (1, 2, 4):
        save_checkpoint(tmp_path, step=step, keep=1)
    assert names(tmp_path) == ["best", "latest", "step-0", "step-01", "step-1", "step-3", "step-4", "step-x"]
    assert names(tmp_path / "step-1") == ["notes.txt"]
    assert load_checkpoint(tmp_path / "step-0")["step"] == 0


def test_leftovers_go(tmp_path):
    save_checkpoint(tmp_path, step=5, keep=2)
    shutil.copytree(tmp_path / "step-5", tmp_path / "step-6")
    (tmp_path / "step-6" / "checkpoint.json").unlink()  # as a save leaves it that was killed
    (tmp_path / "latest.0123456789abcdef").write_text("step-6\n")
    save_checkpoint(tmp_path, step=7, keep=2)
    assert names(tmp_path) == ["latest", "step-5", "step-7"]


def test_what_is_being_removed_is_no_checkpoint(tmp_path, monkeypatch):
    """The folder is copied before every change of it, as a process that vanishes would leave it."""
    objects, folder = build(0), tmp_path / "run"
    for step in (1, 2):
        save(folder, objects, step=step, keep=2)
    with copied_before(monkeypatch, folder, ("fsync", "replace", "unlink", "rmdir")) as copies:
        save(folder, objects, step=3, keep=2)
    steps = []
    for copy in copies:
        steps.append(load(copy, build(1))["step"])
        for place in copy.glob("step-*"):
            if (place / "checkpoint.json").exists():
                assert load(place, build(1))["step"] == int(place.name[5:])
    assert steps == sorted(steps)
    assert {*steps} == {2, 3}
    assert len(copies) > 12


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"keep": 0, "step": 1}, "keep is 0; it must be a positive integer"),
        ({"keep": True, "step": 1}, "keep is True"),
        ({"keep": 1.0, "step": 1}, r"keep is 1\.0"),
        ({"keep": 1}, "step is None; with keep it names the folder"),
        ({"keep": 1, "step": -1}, "step is -1"),
        ({"keep": 1, "step": 1.0}, r"step is 1\.0"),
        ({"max_file_size": 0}, "max_file_size is 0"),
        ({"max_file_size": "5 apples"}, "max_file_size: '5 apples' is no number of bytes"),
        ({"max_file_size": 5e9}, r"max_file_size is 5000000000\.0"),
        ({"report": 1}, "'report' is what load_checkpoint"),
    ],
)
def test_arguments(tmp_path, keywords, match):
    with pytest.raises(ValueError, match=match):
        save_checkpoint(tmp_path / "run", **keywords)
    assert not (tmp_path / "run").exists()


def test_folder_that_is_a_checkpoint_itself(tmp_path):
    save_checkpoint(tmp_path, step=1)
    with pytest.raises(ValueError, match="is a checkpoint itself"):
        save_checkpoint(tmp_path, step=2, keep=2)
    assert load_checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize("damage", ["gone", "no checkpoint.json", "truncated"])
def test_latest_is_bad(tmp_path, live, damage):
    objects = build(0, width=4)
    for step in (1, 2, 3):
        save(tmp_path, objects, step=step, keep=3)
    newest = tmp_path / "step-3"
    if damage == "gone":
        shutil.rmtree(newest)
    elif damage == "truncated":
        (file,) = newest.glob("model-*")
        os.truncate(file, 100)
    else:
        (newest / "checkpoint.json").unlink()
    refused(tmp_path, live, r"step-3.*latest names; the others there are \S*step-1, \S*step-2: load one of them")
    assert load(tmp_path / "step-2", live)["step"] == 2
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step}")
    refused(tmp_path, live, "there is no other")


@pytest.mark.parametrize(
    "line",
    ["", "step-", "step-1\nstep-2\n", "../step-1", "/step-1", "step-01", "step-\u0661", "step-1 ", 10**6 * "x"],
)
def test_latest_says_something_else(tmp_path, live, line):
    save(tmp_path / "step-1", build(0, width=4), step=1)
    (tmp_path / "latest").write_text(line)
    refused(tmp_path, live, r"latest: says .* must be one line like step-1000")


def test_latest_is_a_link_or_a_folder(tmp_path, live):
    save(tmp_path, build(0, width=4), step=1, keep=1)
    (tmp_path / "latest").rename(tmp_path / "elsewhere")
    (tmp_path / "latest").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, live, "latest: must be a regular file")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    refused(tmp_path, live, "latest: must be a regular file")


def test_any_byte_of_latest_flipped(tmp_path):
    for step in (1, 3):
        save_checkpoint(tmp_path, step=step, keep=2)
    content = (tmp_path / "latest").read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "latest").write_bytes(flipped)
        if flipped == b"step-1\n":  # another one that is there, whole
            assert load_checkpoint(tmp_path)["step"] == 1
            continue
        with pytest.raises(CheckpointError, match="latest"):
            load_checkpoint(tmp_path)
