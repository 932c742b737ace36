"""Checkpoints of several ranks, in one process: what is whole again, and what is refused."""

import json
import os
import re
import shutil
from functools import partial

import pytest
import torch

from lowbit_optim import cli
from lowbit_optim.checkpoint import load_checkpoint, manifest, save_checkpoint
from lowbit_optim.checkpoint.pieces import Chunk, Mapped
from tests.checkpoint.common import craft, picture, refused, rewrite, same
from tests.checkpoint.golden.make import FOLDERS, SPREAD, build, content

NAME = "shampoo-blocks"
GOOD = FOLDERS[2] / NAME
FIRST = "first.weight"  # rows [0, 2), [2, 4) and [4, 6)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOOD, tmp_path / "run")


@pytest.fixture
def live():
    return [*build(NAME, 5).values()]


def test_what_it_becomes_in_one_process(tmp_path, folder, live):
    """Saved again it is of version 1, with the same in it."""
    parts = dict(zip(("model", "optimizer", "scheduler"), live, strict=True))
    load_checkpoint(folder, **parts)
    before = picture(*live)
    save_checkpoint(folder, **parts)
    assert json.loads((folder / "checkpoint.json").read_text())["format_version"] == 1
    assert len(os.listdir(folder)) == 4  # also those of the other ranks are gone
    other = build(NAME, 6)
    load_checkpoint(folder, **other)
    assert same(picture(*other.values()), before)


def test_what_fits(folder, live):
    model, optimizer, scheduler = live
    expected = json.loads(GOOD.with_suffix(".json").read_text())
    found = load_checkpoint(folder, model=model, optimizer=optimizer, scheduler=scheduler, strict=False)
    for part in ("model", "optimizer"):
        assert found["report"][part]["missing"] == found["report"][part]["unexpected"] == []
        assert found["report"][part]["mismatched"] == {}
    assert content({"model": model, "optimizer": optimizer, "scheduler": scheduler})["state"] == expected["state"]


def test_rows_are_read_where_they_are():
    """And only there: no other part is looked at, and rows of one part stay where they are."""
    numbers, read = torch.arange(20).view(10, 2), []
    chunks = [Chunk(a, numbers[a:b], partial(read.append, a)) for a, b in ((0, 4), (4, 5), (5, 10))]
    tensor = Mapped(numbers.dtype, [10, 2], chunks)
    for first, last, starts in ((0, 10, [0, 4, 5]), (3, 5, [0, 4]), (4, 5, [4]), (6, 9, [5]), (5, 5, []), (10, 10, [])):
        read.clear()
        rows = tensor.rows(first, last)
        assert torch.equal(rows, numbers[first:last])
        assert read == starts
        assert len(starts) != 1 or rows.data_ptr() == numbers[first].data_ptr()


def test_libraries_of_version_1(folder, live, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 1)
    refused(folder, live, r"checkpoint\.json: format version 2 is newer than 1, the newest that .* install that")


def test_every_file_counts(folder, live):
    for name in sorted(os.listdir(folder)):
        file = folder / name
        whole = file.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            refused(folder, live, name)
        file.write_bytes(whole[:-1])
        refused(folder, live, name)
        file.unlink()
        refused(folder, live, f"{name} cannot be read")
        file.write_bytes(whole)
    load_checkpoint(folder, model=live[0])


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_a_rank_that_is_not_there(folder, live, kind, rank):
    def leave_out(manifest):
        entries = manifest["files"][kind]
        ranks = [re.search(r"-rank(\d{5})-", entry["name"]) for entry in entries]
        numbers = [int(found[1]) if found else 0 for found in ranks]
        manifest["files"][kind] = [entry for entry, number in zip(entries, numbers, strict=True) if number != rank]

    rewrite(folder, leave_out)
    match = rf"checkpoint\.json: of the {kind} files that it names, rows \d+ to \d+ of tensor \S+ are in no file"
    refused(folder, live, match)


def pieces(**changes):
    """The piece of the first weight that rank 1 has, with these changes."""

    def change(header, data):
        said = json.loads(header["__metadata__"]["pieces"])
        said[f"{FIRST}@2"].update(changes)
        header["__metadata__"]["pieces"] = json.dumps(said)

    return change


def replaced(text):
    def change(header, data):
        header["__metadata__"]["pieces"] = text

    return change


def dtype(header, data):
    header[f"{FIRST}@2"]["dtype"] = "I32"


def shape(header, data):
    header[f"{FIRST}@2"]["shape"] = [4, 16]


NO_ROWS = r"model-rank00001-\w+\.safetensors: is not what save_checkpoint writes .*'first\.weight@2', .*, is said to be"
CRAFTED = {
    "a gap": (pieces(first=3), r"rows 2 to 3 of tensor 'first\.weight' are in no file"),
    "rows twice": (pieces(first=1), r"rows 1 to 2 of tensor 'first\.weight' are in two files"),
    "the same rows": (pieces(first=0), r"rows 0 to 2 of tensor 'first\.weight' are in two files"),
    "beyond": (pieces(first=5), NO_ROWS),
    "far beyond": (pieces(first=2**70), NO_ROWS),
    "before": (pieces(first=-1), NO_ROWS),
    "no number": (pieces(first=2.0), NO_ROWS),
    "true": (pieces(first=True), NO_ROWS),
    "no row": (pieces(first="2"), NO_ROWS),
    "longer": (pieces(shape=[8, 32]), r"rows of tensor 'first\.weight' are of torch\.float32 \[8, 32\], and others of"),
    "wider": (pieces(shape=[6, 33]), NO_ROWS),
    "no dims": (pieces(shape=[]), "is not what save_checkpoint writes"),
    "no shape": (pieces(shape=6), "is not what save_checkpoint writes"),
    "huge": (pieces(shape=[2**62, 32]), r"rows of tensor 'first\.weight' are of"),
    "of no name": (pieces(tensor=3), NO_ROWS),
    "of another": (pieces(tensor="second.weight"), r"rows of tensor 'second\.weight' are of torch\.float32 \[6, 32\]"),
    "of a whole one": (pieces(tensor="seen"), r"rows of tensor 'seen' are of torch\.float32 \[6, 32\], and others of"),
    "of nothing": (pieces(tensor="other"), r"rows 2 to 4 of tensor 'first\.weight' are in no file"),
    "more members": (pieces(more=1), "unexpected keyword"),
    "other dtype": (
        dtype,
        r"rows of tensor 'first\.weight' are of torch\.int32 \[6, 32\], and others of torch\.float32",
    ),
    "other columns": (shape, NO_ROWS),
    "a name of nothing": (
        replaced(json.dumps({"gone": {"tensor": FIRST, "shape": [6, 32], "first": 2}})),
        "is not what save_checkpoint writes",
    ),
    "no object": (replaced("[]"), "is not what save_checkpoint writes"),
    "no pieces": (replaced("{}"), r"rows 2 to 4 of tensor '\S+' are in no file"),
    "no JSON": (replaced("{"), "is not what save_checkpoint writes"),
    "a name twice": (replaced('{"a": 1, "a": 1}'), "the name 'a' is there twice"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_pieces_that_do_not_fit(folder, live, case):
    change, match = CRAFTED[case]
    craft(folder, "model", change, rank=1)
    refused(folder, live, match)


@pytest.mark.parametrize("name", ["random-0123456789abcdef.json", "random-rank1-0123456789abcdef.json"])
def test_names_of_the_files_of_ranks(folder, live, name):
    rewrite(folder, lambda manifest: manifest["files"]["random"][0].update(name=name))
    refused(folder, live, r"checkpoint\.json: .* names the random file")


def test_inspect(capsys):
    """What is in pieces is one tensor."""
    expected = json.loads(GOOD.with_suffix(".json").read_text())
    names = json.loads(next(GOOD.glob("trainer-*")).read_text())["optimizer"]["names"]
    for arguments in ([], ["--verify"]):
        assert cli.main(["inspect", str(GOOD), "--json", *arguments]) == 0
        rows = json.loads(capsys.readouterr().out)["tensors"]
        found = {row["name"]: (row["shape"], row["bytes"]) for row in rows if row["kind"] == "optimizer"}
        for index, entry in expected["state"].items():
            for key, said in entry.items():
                dtype, shape, _ = said.replace(", ", ",").split()
                shape = json.loads(shape)
                size = torch.empty(shape, dtype=getattr(torch, dtype)).nbytes
                assert found.pop(f"{names[int(index)]}/{key}") == (shape, size)
        assert found == {}
        assert {row["name"]: row["shape"] for row in rows if row["kind"] == "model"} == {
            name: json.loads(said.replace(", ", ",").split()[1])
            for name, said in expected["model"].items()
            if name != "tied.weight"
        }


@pytest.mark.parametrize("name", SPREAD)
def test_convert(tmp_path, name):
    """As of the same state that one process has saved."""
    objects = build(name, 5)
    load_checkpoint(FOLDERS[2] / name, **objects)
    save_checkpoint(tmp_path / "one", **objects)
    converted = []
    for source in (FOLDERS[2] / name, tmp_path / "one"):
        target = tmp_path / f"converted-{len(converted)}"
        assert cli.main(["convert", str(source), str(target), "--bits", "8"]) == 0
        converted.append({file.name.partition("-")[0]: file.read_bytes() for file in target.glob("*.safetensors")})
    assert converted[0] == converted[1]
