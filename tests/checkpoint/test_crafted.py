"""Checkpoints whose checksums are right and whose content is not: refused, with little memory; nothing is executed."""

import hashlib
import json
import math
import pickle
import shutil
import tracemalloc

import pytest
import torch

from lowbit_optim.checkpoint import contents, load_checkpoint, manifest, reading, save_checkpoint
from tests.checkpoint.common import build, craft, kinds, load, refused, rewrite, save, shampoo, train

FIRST, SECOND = "embed.weight", "embed.bias"


def entry(name, **changes):
    return lambda header, data: header[name].update(changes)


def raw_header(text, length=None):
    """This text in place of the header, said to be of this length."""
    return lambda header, data: (len(text) if length is None else length).to_bytes(8, "little") + text


def twice(header, data):
    text = json.dumps(header)[:-1] + f', "{FIRST}": {json.dumps(header[FIRST])}}}'
    return len(text).to_bytes(8, "little") + text.encode()


def hole(header, data):
    data += bytes(8)


def swap_places(header, data):
    header[FIRST]["data_offsets"], header[SECOND]["data_offsets"] = (
        header[SECOND]["data_offsets"],
        header[FIRST]["data_offsets"],
    )


@pytest.mark.parametrize(
    "change",
    [
        raw_header(b"{}", 2**64 - 1),
        raw_header(b"{}", 2**40),
        raw_header(b"{}", 10**6),
        raw_header(b"", 0),
        raw_header(b"[" * 100_000),
        raw_header(b'{"a": ' * 100_000),
        raw_header(b"[]"),
        raw_header(b"\xff\xfe"),
        raw_header(b'{"a": null}'),
        raw_header(b'{"__metadata__": {"codecs": "[]"}}'),
        raw_header(b'{"__metadata__": 3}'),
        twice,
        hole,
        swap_places,
        entry(FIRST, shape=[2**62, 2**62]),
        entry(FIRST, shape=[2**40], data_offsets=[0, 2**42]),
        entry(FIRST, shape=[-4, -5]),
        entry(FIRST, shape=[4.0, 5]),
        entry(FIRST, shape=[True, 20]),
        entry(FIRST, shape=None),
        entry(FIRST, shape="45"),
        entry(FIRST, dtype="F32 "),
        entry(FIRST, dtype=["F32"]),
        entry(FIRST, dtype="F64"),
        entry(FIRST, data_offsets=[0, 0]),
        entry(FIRST, data_offsets=[4, 84]),
        entry(FIRST, data_offsets=[-80, 0]),
        entry(FIRST, data_offsets=[2**63, 2**63 + 80]),
        entry(FIRST, data_offsets=[80, 0]),
        entry(FIRST, data_offsets=[0]),
        entry(FIRST, data_offsets=None),
        entry(FIRST, data_offsets=[0, "80"]),
    ],
)
def test_header(good, live, change):
    craft(good, "model", change, tensors=False)
    file = kinds(good)["model"]
    tracemalloc.start()
    try:
        refused(good, live, rf"{file.name}: is not what save_checkpoint writes")
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 20 * file.stat().st_size
    finally:
        tracemalloc.stop()


def test_crafting_itself_does_no_harm(good, live):
    craft(good, "model", lambda header, data: None)
    assert load(good, live)["step"] == 2


def test_zeros_of_endless_shape(good, live):
    """No bytes, but more numbers in a row than torch can count."""

    def change(header, data):
        header["zz"] = {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [len(data)] * 2}

    craft(good, "model", change)
    refused(good, live, "is not what save_checkpoint writes|'zz' is there, but has no place")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["files"].update(model=[]), r"tensor 'embed\.weight' is missing"),
        (lambda m: m["files"].pop("model"), "names no model file"),
        (lambda m: m["files"].pop("optimizer"), "names no optimizer file"),
        (lambda m: m["files"].update(trainer=[]), "it names 0 trainer files"),
        (lambda m: m["files"].update(trainer=2 * m["files"]["trainer"]), "it names 2 trainer files"),
        (lambda m: m["files"].update(model=2 * m["files"]["model"]), r"is in another file, too"),
        (lambda m: m["files"].update(model=m["files"]["optimizer"]), "only the model files"),
        (lambda m: m["files"].update(weights=m["files"]["model"]), "only the weights files"),
        (lambda m: m["files"]["model"][0].update(size=-1), "the size of"),
        (lambda m: m["files"]["model"][0].update(size=2**70), "has .* bytes, and checkpoint.json says"),
        (lambda m: m["files"]["model"][0].update(size="9"), "the size of"),
        (lambda m: m["files"]["model"][0].update(more=1), "unexpected keyword"),
        (lambda m: m["files"]["model"][0].pop("sha256"), "missing 1 required"),
        (lambda m: m["files"]["model"][0].update(sha256="0" * 63), "a sha256 of"),
        (lambda m: m["files"]["model"][0]["tensors"].pop(FIRST), rf"tensor '{FIRST}' is in only one of"),
        (lambda m: m["files"]["model"][0]["tensors"].update(more="0" * 64), "tensor 'more' is in only one of"),
        (lambda m: m["files"]["trainer"][0]["tensors"].update(more="0" * 64), "names tensors in it"),
        (lambda m: m["files"].pop("trainer"), "KeyError"),
        (lambda m: m.update(format_version=0), "no format version 0"),
        (lambda m: m.update(format_version="2"), "no format version '2'"),
        (lambda m: m.update(format_version=10**30), "is newer than 2"),
    ],
)
def test_index(good, live, change, match):
    rewrite(good, change)
    refused(good, live, match)


def test_index_with_a_name_twice(good, live):
    file = good / "checkpoint.json"
    file.write_text(file.read_text().replace('"files":', '"files": {}, "files":'))
    refused(good, live, "the name 'files' is there twice")


# ---- tensors of another content, with checksums that are right ------------------------------------------------------


def drop(name):
    def change(header, data):
        start, end = header.pop(name)["data_offsets"]
        del data[start:end]
        for said in header.values():
            if said.get("data_offsets", [0])[0] >= end:
                said["data_offsets"] = [offset - (end - start) for offset in said["data_offsets"]]

    return change


def rename(old, new):
    def change(header, data):
        header[new] = header.pop(old)

    return change


def exchange(one, other):
    def change(header, data):
        header[one], header[other] = header[other], header[one]

    return change


MODEL_CHANGES = [
    (drop(FIRST), rf"tensor '{FIRST}' is missing"),
    (rename(FIRST, "other"), rf"tensor '{FIRST}' is missing"),
    (exchange(FIRST, SECOND), rf"tensor '{FIRST}' is torch.float32 \[4\], the live one"),
    (entry(FIRST, shape=[5, 4]), rf"tensor '{FIRST}' is torch.float32 \[5, 4\]"),
    (entry(FIRST, shape=[20]), rf"tensor '{FIRST}' is torch.float32 \[20\]"),
    (entry(FIRST, dtype="I32"), rf"tensor '{FIRST}' is torch.int32 \[4, 5\]"),
    (entry(FIRST, dtype="BF16", shape=[4, 10]), rf"tensor '{FIRST}' is torch.bfloat16"),
]


@pytest.mark.parametrize(("change", "match"), MODEL_CHANGES)
def test_tensors_of_the_model(good, live, change, match):
    craft(good, "model", change)
    refused(good, live, match)


@pytest.mark.parametrize("live_steps", [0, 2])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("embed.weight/left.root.codes"), r"tensor 'embed\.weight/left\.root\.codes' is missing"),
        (entry("embed.weight/left.root.scale_maxima", dtype="I32"), r"scale_maxima is torch\.int32"),
        (entry("embed.weight/left.root.diagonal", shape=[6]), r"left\.root\.diagonal is torch\.float32 \[6\]"),
        (exchange("embed.weight/left.root.codes", "embed.weight/right.root.codes"), r"root\.codes is torch\.uint8"),
        (exchange("embed.weight/left.root.codes", "embed.weight/left.root.scales"), r"root\.\w+ is torch"),
    ],
)
def test_tensors_of_the_optimizer(tmp_path, change, match, live_steps):
    saved, live = build(0, optimizer=shampoo), build(1, optimizer=shampoo)
    train(*saved, 4)
    train(*live, live_steps)
    save(tmp_path, saved)
    craft(tmp_path, "optimizer", change)
    refused(tmp_path, live, match)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["root.scale_maxima", "root.diagonal", "rms", "previous_norm"])
def test_numbers_that_are_none(tmp_path, part, value):
    saved, live = build(0, optimizer=shampoo), build(1, optimizer=shampoo)
    train(*saved, 4)
    train(*live, 2)
    save(tmp_path, saved)
    name = f"head.weight/left.{part}"

    def change(header, data):
        end = header[name]["data_offsets"][1]
        data[end - 4 : end] = torch.tensor([value]).numpy().tobytes()

    craft(tmp_path, "optimizer", change)
    refused(tmp_path, live, rf"optimizer-\w+\.safetensors: tensor '{name}' holds NaN or infinity")
    report = load_checkpoint(tmp_path, model=live[0], optimizer=live[1], strict=False)["report"]["optimizer"]
    assert report["mismatched"].keys() == {"head.weight"}


# ---- trainer.json ----------------------------------------------------------------------------------------------------


def with_trainer(folder, change):
    file = kinds(folder)["trainer"]
    trainer = json.loads(file.read_text())
    text = change(trainer)
    text = json.dumps(trainer) if text is None else text
    file.write_text(text)
    digest = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    rewrite(folder, lambda manifest: manifest["files"]["trainer"][0].update(digest))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: "[]",
        lambda t: "null",
        lambda t: "{",
        lambda t: "[" * 100_000,
        lambda t: t.pop("random"),
        lambda t: t.update(model=3),
        lambda t: t["model"].pop("state_dict"),
        lambda t: t["optimizer"].update(names=["a"]),
        lambda t: t["optimizer"].update({"class": 3}),
        lambda t: t["optimizer"].pop("class") and None,
        lambda t: t["optimizer"].update(state_dict=None),
        lambda t: t["optimizer"]["state_dict"].update(param_groups=[{}]),
        lambda t: t["optimizer"]["state_dict"].update(param_groups=[{"params": [0, 0]}]),
        lambda t: t["optimizer"]["state_dict"].update(state={"$dict": [[77, {}]]}),
        lambda t: t.update(scheduler={"class": "torch.MultiStepLR", "state_dict": 3}),
        lambda t: t.update(extras=3),
        lambda t: t["extras"].update(bad={"$unknown": 3}),
        lambda t: t["extras"].update(bad={"$stored": 3}),
        lambda t: t["extras"].update(bad={"$array": ["O", [1], "AAAAAAAAAAA="]}),
        lambda t: t["extras"].update(bad={"$array": ["<f4", [2**40], "AAAAAA=="]}),
        lambda t: t["extras"].update(bad={"$tensor": ["F32", [2**40], "AAAAAA=="]}),
        lambda t: t["extras"].update(bad={"$tensor": ["F32", [0, 2**70], ""]}),
        lambda t: t["extras"].update(bad={"$bytes": 3}),
        lambda t: t["extras"].update(bad={"$float": "one"}),
        lambda t: t["extras"].update(bad={"$dict": [[[1], 2]]}),
    ],
)
def test_trainer_json(good, live, change):
    def text_only(trainer):
        found = change(trainer)
        return found if isinstance(found, str) else None

    with_trainer(good, text_only)
    refused(good, live, r"trainer-\w+\.json: is not what save_checkpoint writes")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["random"].pop("numpy"),
        lambda t: t["random"].update(torch={"$tensor": ["U8", [4], "AAAAAA=="]}),
        lambda t: t["random"].update(python=None),
        lambda t: t["random"].update(cuda=3),
    ],
)
def test_trainer_json_that_objects_refuse(good, live, change):
    with_trainer(good, lambda trainer: change(trainer) and None)
    refused(good, live, "the files are intact, but loading them raised")


def test_json_that_is_too_large(good, live, monkeypatch):
    file = kinds(good)["trainer"]
    monkeypatch.setattr(manifest, "LARGEST_JSON", 100)
    refused(good, live, r"checkpoint\.json: has \d+ bytes, more than 100")
    monkeypatch.undo()
    monkeypatch.setattr(reading, "LARGEST_JSON", file.stat().st_size - 1)
    refused(good, live, rf"{file.name}: .*more than")
    monkeypatch.setattr(contents, "LARGEST_JSON", 10_000)
    with pytest.raises(ValueError, match="the extras"):
        save_checkpoint(good, text="x" * 10_000)
    monkeypatch.undo()
    assert load(good, live)["step"] == 2


def test_pickles_are_not_opened(good, live):
    flag = good.parent / "executed"

    class Payload:
        def __reduce__(self):
            return open, (str(flag), "w")

    pickles = [pickle.dumps(Payload())]
    torch.save(Payload(), good.parent / "saved.pt")
    pickles.append((good.parent / "saved.pt").read_bytes())
    for kind in ("model", "optimizer", "trainer", "checkpoint.json"):
        for content in pickles:
            folder = good.parent / "copy"
            shutil.copytree(good, folder)
            file = kinds(folder)[kind]
            file.write_bytes(content)
            if kind != "checkpoint.json":
                said = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                rewrite(folder, lambda manifest: manifest["files"][kind][0].update(said))  # noqa: B023
            refused(folder, live, file.name)
            shutil.rmtree(folder)
    assert not flag.exists()


def test_saving_refuses_names_that_the_format_needs(tmp_path):
    model = torch.nn.Module()
    model.register_parameter("__metadata__", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="'__metadata__' of a model tensor is taken"):
        save_checkpoint(tmp_path / "new", model=model)
    assert not (tmp_path / "new").exists()
