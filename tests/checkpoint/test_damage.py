"""A bad checkpoint gives one clear error and changes nothing."""

import shutil

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import (
    CodesOptimizer,
    Net,
    adamw,
    build,
    kinds,
    load,
    multi_step,
    refused,
    rewrite,
    save,
    sgd,
    train,
)

KINDS = ["checkpoint.json", "model", "optimizer", "trainer"]


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_or_longer(good, live, kind):
    file = kinds(good)[kind]
    content = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(good, live, file.name if kind == "checkpoint.json" else f"{file.name}: has {length} bytes")
    file.write_bytes(content + b"}")
    refused(good, live, file.name)
    file.write_bytes(content)
    assert load(good, live)["step"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_missing_file_folder_or_link(good, live, kind):
    file = kinds(good)[kind]
    elsewhere = good.parent / "elsewhere"
    file.rename(elsewhere)
    refused(good, live, f"{file.name} cannot be read")
    file.mkdir()
    refused(good, live, f"{file.name}: must be a regular file")
    file.rmdir()
    file.symlink_to(elsewhere)
    refused(good, live, f"{file.name}: must be a regular file")


def test_not_a_checkpoint(tmp_path, live):
    refused(tmp_path / "nowhere", live, r"checkpoint\.json cannot be read")
    refused(tmp_path, live, r"checkpoint\.json cannot be read")
    (tmp_path / "file").write_text("{}")
    refused(tmp_path / "file", live, r"checkpoint\.json cannot be read")


@pytest.mark.parametrize("text", ["[]", "null", '{"format_version": 1}', "[" * 100_000, "\xff"])
def test_checkpoint_json_of_another_shape(good, live, text):
    (good / "checkpoint.json").write_text(text, encoding="latin1")
    refused(good, live, r"checkpoint\.json: is not what save_checkpoint writes")


def test_newer_version(good, live):
    rewrite(good, lambda manifest: manifest.update(format_version=3, library_version="9.9"))
    refused(good, live, r"checkpoint\.json: format version 3 is newer than 2.*written by 9\.9: install that")


@pytest.mark.parametrize("name", ["../{}", "{}/../{}", "./{}", "/{}", "..", "", "C:{}", "..\\{}", 3])
def test_names_that_leave_the_folder(good, live, name):
    file = kinds(good)["model"]
    shutil.copy(file, good.parent / file.name)

    def climb(manifest):
        manifest["files"]["model"][0]["name"] = name.format(file.name, file.name) if isinstance(name, str) else name

    rewrite(good, climb)
    refused(good, live, r"checkpoint\.json: is not what save_checkpoint writes")


def test_files_of_another_checkpoint(good, live):
    other = build(2, width=4)
    save(good.parent / "other", other)
    shutil.copy(kinds(good.parent / "other")["model"], kinds(good)["model"])
    refused(good, live, r"model-\w+\.safetensors: is not what .* does not match the sha256")


def renamed(old, new):
    def change(model):
        model.add_module(new, model._modules.pop(old))

    return change


def other_model(change):
    torch.manual_seed(1)
    model = Net(4)
    change(model)
    optimizer = adamw(model.parameters())
    return model, optimizer, multi_step(optimizer)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: setattr(m, "more", nn.Linear(1, 1, bias=False)), r"tensor 'more\.weight' is missing"),
        (lambda m: delattr(m, "norm"), r"tensor 'norm\.weight' is there, but has no place.*; and 2 more"),
        (lambda m: setattr(m, "embed", nn.Linear(6, 4)), r"'embed\.weight' is torch\.float32 \[4, 5\], .*\[4, 6\]"),
        (lambda m: m.embed.bfloat16(), r"'embed\.weight' is torch\.float32 .*, the live one torch\.bfloat16 \[4, 5\]"),
        (renamed("embed", "inputs"), r"'inputs\.weight' is missing"),
    ],
)
def test_other_model(good, change, match):
    refused(good, other_model(change), rf"model-\w+\.safetensors: .*{match}.*build the model as it was")


def test_model_without_memory(good):
    with pytest.raises(CheckpointError, match=r"'embed\.weight' of the model is on the meta device"):
        load_checkpoint(good, model=Net(4).to("meta"))


def test_other_optimizer(good, live):
    model, _, scheduler = live

    def with_optimizer(other):
        return model, other, scheduler

    class AdamW(torch.optim.AdamW):
        pass

    for other in (sgd, CodesOptimizer, AdamW):
        match = r"optimizer-\w+\.safetensors: holds the state of a torch\.\S*AdamW, and the optimizer given is a"
        refused(good, with_optimizer(other(model.parameters())), match)
    parameters = list(model.parameters())
    for groups in ([{"params": parameters[:2]}, {"params": parameters[2:]}], parameters[:-1]):
        refused(good, with_optimizer(adamw(groups)), r"optimizer-\w+\.\w+: has groups of \[5\] parameters, the live")
    refused(
        good, with_optimizer(adamw(parameters[::-1])), r"parameter 0 is 'embed\.weight', in the live .*'head\.weight'"
    )
    with pytest.raises(ValueError, match="is not a parameter of the model"):
        load(good, with_optimizer(adamw(Net(4).parameters())))


def test_other_state(good, live):
    model, optimizer, _ = live
    entry = optimizer.state[model.embed.weight]
    entry["max_exp_avg_sq"] = torch.zeros(4, 5)
    refused(good, live, r"optimizer-\w+\.safetensors: tensor 'embed\.weight/max_exp_avg_sq' is missing")
    del entry["max_exp_avg_sq"]
    entry["exp_avg"] = entry["exp_avg"].half()
    refused(good, live, r"'embed\.weight/exp_avg' is torch\.float32 \[4, 5\], the live one torch\.float16 \[4, 5\]")
    entry["exp_avg"] = torch.zeros(5, 4)
    refused(good, live, r"'embed\.weight/exp_avg' is torch\.float32 \[4, 5\], the live one torch\.float32 \[5, 4\]")
    del entry["exp_avg"]
    refused(good, live, r"'embed\.weight/exp_avg' is there, but has no place")


def test_the_optimizers_own_check(tmp_path):
    saved, live = build(0, optimizer=CodesOptimizer), build(1, optimizer=CodesOptimizer)
    train(*saved, 1)
    entry = saved[1].state[saved[0].embed.bias]
    entry["base.codes"] = entry["base.codes"].float()
    save(tmp_path, saved)
    refused(tmp_path, live, r"optimizer-\w+\.safetensors: base\.codes must be uint8, got torch\.float32")


def test_other_scheduler(good, live):
    other = lr_scheduler.ConstantLR(live[1])
    refused(good, (*live[:2], other), r"trainer-\w+\.json: holds the state of a torch\.MultiStepLR, and the scheduler")


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler"])
def test_part_that_was_not_saved(tmp_path, live, part):
    save_checkpoint(tmp_path, step=1)
    with pytest.raises(CheckpointError, match=rf"trainer-\w+\.json: the checkpoint was saved without {part}="):
        load_checkpoint(tmp_path, **{part: live[["model", "optimizer", "scheduler"].index(part)]})
