"""A small model, optimizers, schedulers, and pictures of them, for the tests of checkpoints."""

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim import Shampoo
from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def same(one, other):
    """The same types, order, shapes and bits, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(map(repr, one)) == list(map(repr, other)) and all(map(same, one.values(), other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return one.hex() == other.hex()
    return one == other


def picture(*objects):
    """A deep copy of everything that loading a checkpoint may change."""
    rng = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    return copy.deepcopy([[thing.state_dict() for thing in objects], rng])


class Net(nn.Module):
    def __init__(self, width=6, dtype=torch.float32, tied=True):
        super().__init__()
        self.embed = nn.Linear(5, width, dtype=dtype)
        self.norm = nn.BatchNorm1d(width, dtype=dtype)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width, width, bias=False, dtype=dtype)
        self.out = nn.Linear(width, width, bias=False, dtype=dtype)
        if tied:
            self.out.weight = self.head.weight

    def forward(self, x):
        return self.out(self.drop(self.head(self.norm(self.embed(x))).relu()))


class CodesOptimizer(torch.optim.Optimizer):
    """Momentum kept as uint8 codes with a fp32 scale, beside a number, a bool, None and a string."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update({"steps": 0, "warm": True, "none": None, "name": "momentum"})
                    state["base.codes"] = torch.full(p.shape, 128, dtype=torch.uint8)
                    state["base.scale"] = torch.ones((), dtype=torch.float32)
                momentum = 0.9 * (state["base.codes"].float() - 128) / 127 * state["base.scale"] + p.grad.float()
                state["base.scale"] = momentum.abs().max().clamp(min=1e-30)
                state["base.codes"] = (momentum / state["base.scale"] * 127 + 128).round().to(torch.uint8)
                state["steps"] += 1
                p.sub_((group["lr"] * momentum).to(p.dtype))

    def load_state_dict(self, state_dict):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        self.state.update({parameters[index]: dict(entry) for index, entry in state_dict["state"].items()})
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def check_state_dict(self, state_dict):
        for entry in state_dict["state"].values():
            if entry["base.codes"].dtype != torch.uint8:
                raise ValueError(f"base.codes must be uint8, got {entry['base.codes'].dtype}")

    def state_codecs(self):
        return {0: {"base": {"codebook": "linear-2", "bits": 4, "block_size": 64}}, 1: {"base": {"codebook": None}}}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=torch.tensor(0.05), momentum=0.9)


def multi_step(optimizer):
    return lr_scheduler.MultiStepLR(optimizer, [3, 5, 5], gamma=0.1)


def shampoo(parameters):
    """Coded however small the factors are, and with an update in every second step."""
    return Shampoo(parameters, lr=0.01, bits=2, min_quant_size=1, statistics_frequency=2)


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "codes": CodesOptimizer, "shampoo": shampoo}
SCHEDULERS = {
    "multistep": multi_step,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20, cycle_momentum=False),
    "warm-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
}


def build(seed, optimizer=adamw, scheduler=multi_step, **net):
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)
    model = Net(**net)
    optimizer = optimizer(model.parameters())
    return model, optimizer, scheduler(optimizer)


def train(model, optimizer, scheduler, steps):
    """Every random generator takes part."""
    losses = []
    for _ in range(steps):
        noise = random.random() + np.random.rand()  # noqa: NPY002
        x = torch.randn(8, 5, dtype=model.embed.weight.dtype)
        loss = (model(x) * noise - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def save(path, objects, **extras):
    return save_checkpoint(path, model=objects[0], optimizer=objects[1], scheduler=objects[2], **extras)


def load(path, objects):
    return load_checkpoint(path, model=objects[0], optimizer=objects[1], scheduler=objects[2])


def kinds(folder):
    """Kind of file -> file, of a checkpoint that has one of each."""
    return {file.name.partition("-")[0]: file for file in folder.iterdir()}


def sealed(manifest):
    """checkpoint.json with the sha256 of itself, as docs/reference/checkpoint-format.md says."""
    body = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, indent=1).encode()[:-2]
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def rewrite(folder, change):
    """Change checkpoint.json with a correct sha256, as another program could."""
    manifest = json.loads((folder / "checkpoint.json").read_text())
    change(manifest)
    (folder / "checkpoint.json").write_bytes(sealed(manifest))


def craft(folder, kind, change, *, tensors=True, rank=0):
    """Change a safetensors file with correct sizes and checksums.

    Args:
        rank: whose file of the kind, of which it has one.
        change: given the header and the data, it changes them in place; it may return the header's bytes instead.
        tensors: False leaves checkpoint.json with the tensors, and their checksums, that it has.
    """
    (file,) = folder.glob(f"{kind}-rank{rank:05}-*" if rank else f"{kind}-????????????????.*")
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), bytearray(content[start:])
    head = change(header, data)
    if head is None:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
    file.write_bytes(head + data)

    def index(manifest):
        (entry,) = [entry for entry in manifest["files"][kind] if entry["name"] == file.name]
        entry["size"] = len(head) + len(data)
        entry["sha256"] = hashlib.sha256(head).hexdigest()
        if tensors:
            places = {name: said["data_offsets"] for name, said in header.items() if name != "__metadata__"}
            entry["tensors"] = {name: hashlib.sha256(data[slice(*place)]).hexdigest() for name, place in places.items()}

    rewrite(folder, index)


def refused(folder, objects, match):
    before = picture(*objects)
    with pytest.raises(CheckpointError, match=match):
        load(folder, objects)
    assert same(picture(*objects), before)


@contextlib.contextmanager
def copied_before(monkeypatch, folder, names):
    """Inside, the folder is copied beside itself before every call of these functions of `os`: a list of the copies.

    Each is what a process that vanishes there would leave.
    """
    copies = []

    def copying(function):
        def wrapped(*args, **keywords):
            copies.append(folder.with_name(f"copy{len(copies)}"))
            shutil.copytree(folder, copies[-1])
            return function(*args, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, copying(getattr(os, name)))
        yield copies
