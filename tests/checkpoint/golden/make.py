"""Checkpoints that every later version must load: python -m tests.checkpoint.golden.make writes those not there yet.

v1/<name>/ is what save_checkpoint wrote, v1/<name>.json what was in it: the sha256 of every tensor's bytes, settings,
and what one more step changes, which shows that the codes still mean what they meant. Neither is ever written
again; a new version of the format gets a folder of its own, and these stay. v2/ is from a group of three ranks.
"""

import copy
import hashlib
import json
import random
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim import KFAC, SOAP, AdamW, Shampoo
from lowbit_optim.checkpoint import save_checkpoint
from lowbit_optim.storage import Quantization

FOLDERS = {version: Path(__file__).parent / f"v{version}" for version in (1, 2)}
STEPS, RANKS = 3, 3

# Defaults may change, and the last step that is saved is one of an update, so that the one after it is none.
CODES = Quantization(bits=4, codebook="nf", block_size=64, double=False, scale="absmax")
COMMON = {"min_quant_size": 1, "base": "adamw", "base_bits": 32, "layout": "triangle", "statistics_frequency": 3}


def shampoo(bits):
    return lambda model: Shampoo(model.parameters(), lr=0.01, bits=bits, storage="root", **COMMON)


# name -> (optimizer of a model, dtype of the parameters, keywords of save_checkpoint)
GOLDEN = {
    "shampoo-4": (shampoo(4), torch.float32, {}),
    "shampoo-2": (shampoo(2), torch.float32, {}),
    "shampoo-eigen": (
        lambda model: Shampoo(
            model.parameters(), lr=0.01, bits=4, storage="eigen", quantization=CODES, **COMMON, precondition_frequency=3
        ),
        torch.float32,
        {},
    ),
    "shampoo-sharded": (shampoo(2), torch.float32, {"max_file_size": 700}),
    "shampoo-bfloat16": (shampoo(4), torch.bfloat16, {"keep": 2}),
    "soap": (
        lambda model: SOAP(
            model.parameters(),
            lr=0.01,
            bits=4,
            storage="root",
            basis="reflector",
            base_bits=32,
            layout="triangle",
            min_quant_size=1,
            statistics_frequency=3,
            precondition_frequency=3,
        ),
        torch.float32,
        {},
    ),
    "kfac": (
        lambda model: KFAC(model.parameters(), lr=0.01, model=model, bits=4, storage="root", **COMMON),
        torch.float32,
        {},
    ),
    "adamw-4": (lambda model: AdamW(model.parameters(), lr=0.01, bits=4, min_quant_size=1, seed=7), torch.float32, {}),
    "torch-adamw": (lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False), torch.float32, {}),
}
SPREAD = {  # of version 2
    "shampoo-blocks": (
        lambda model: Shampoo(
            model.parameters(), lr=0.01, bits=2, storage="root", max_preconditioner_dim=4, stagger=False, **COMMON
        ),
        torch.float32,
        {"max_file_size": 700},
    ),
    "adamw-4": GOLDEN["adamw-4"],
}
EXTRAS = {
    "epoch": 2,
    "tagged": [(1, (2.5, "three")), {4: None, (5, 6): b"\x00\xff"}, OrderedDict(b=1, a=2), float("-inf"), True],
    "tensor": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "array": np.array([[1.5, -2.0]], dtype=">f4"),
    "number": np.float32(0.1),
    "name": 'quotes " and \u00e9\u4e2d',
}


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(32, 6, dtype=dtype)
        self.second = nn.Linear(6, 4, bias=False, dtype=dtype)
        self.tied = nn.Linear(6, 4, bias=False, dtype=dtype)
        self.tied.weight = self.second.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += len(x)
        return self.second(self.first(x).tanh())


def build(name, seed):
    optimizer, dtype, _ = (GOLDEN | SPREAD)[name]
    torch.manual_seed(seed)
    model = Net(dtype)
    optimizer = optimizer(model)
    return {"model": model, "optimizer": optimizer, "scheduler": lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5)}


def step(objects, count):
    """A step whose gradients depend on nothing but the parameters and the count."""
    model, optimizer = objects["model"], objects["optimizer"]
    generator = np.random.default_rng(count)
    x = torch.from_numpy(generator.standard_normal((8, 32))).to(model.first.weight.dtype)
    optimizer.zero_grad()
    model(x).float().sin().square().sum().backward()
    optimizer.step()
    objects["scheduler"].step()


def digest(tensor):
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def content(objects):
    """Of live objects what a checkpoint must have brought."""
    state_dict = objects["optimizer"].state_dict()
    return {
        "model": {name: digest(tensor) for name, tensor in objects["model"].state_dict().items()},
        "state": {
            str(index): {key: digest(value) if torch.is_tensor(value) else repr(value) for key, value in entry.items()}
            for index, entry in state_dict["state"].items()
        },
        "groups": [
            {key: repr(group[key]) for key in ("lr", "params", "betas")} for group in state_dict["param_groups"]
        ],
        "scheduler": {key: repr(value) for key, value in objects["scheduler"].state_dict().items() if key[0] != "_"},
        "random": [random.random(), float(np.random.rand()), torch.rand((), dtype=torch.float64).item()],  # noqa: NPY002
    }


def next_change(objects):
    """What one more step adds to the parameters: a few numbers, to which every number of the state contributes."""
    before = {name: p.detach().double() for name, p in objects["model"].named_parameters()}
    step(objects, STEPS)
    changes = {name: p.detach().double() - before[name] for name, p in objects["model"].named_parameters()}
    return {name: change.flatten().tolist()[:32] for name, change in changes.items()}


def trained(name):
    objects = build(name, 1)
    for count in range(STEPS):
        step(objects, count)
    return objects


def seed(rank):
    for number, function in enumerate((random.seed, np.random.seed, torch.manual_seed), 3):
        function(number + 10 * rank)


def save(name, version, objects, **keywords):
    folder = FOLDERS[version] / name
    return save_checkpoint(folder, **objects, **(GOLDEN | SPREAD)[name][2], **keywords, step=STEPS, **EXTRAS)


def make(name):
    objects = trained(name)
    seed(0)
    save(name, 1, objects)
    write_down(name, 1, objects)


def write_down(name, version, objects):
    expected = content(objects)
    expected["next change"] = next_change(objects)
    (FOLDERS[version] / f"{name}.json").write_text(json.dumps(expected, indent=1) + "\n")


def spread(value, mesh, known=None):
    """Every tensor with rows as a DTensor of which each rank has some, all the way down; tied ones stay tied."""
    from torch.distributed.tensor import Shard, distribute_tensor

    known = {} if known is None else known
    if isinstance(value, dict):
        value = copy.copy(value)
        for key, item in value.items():
            value[key] = spread(item, mesh, known)
    if isinstance(value, torch.Tensor) and value.ndim:
        if value.data_ptr() not in known:
            known[value.data_ptr()] = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)
        return known[value.data_ptr()]
    return value


def make_by_rank(rank, name, store):
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    mesh = DeviceMesh("cpu", list(range(RANKS)))
    objects = trained(name)
    for kind in ("model", "optimizer"):
        objects[kind].state_dict = lambda whole=objects[kind].state_dict: spread(whole(), mesh)
    seed(rank)
    save(name, 2, objects, process_group=dist.group.WORLD)
    for kind in ("model", "optimizer"):
        del objects[kind].state_dict
    if rank == 0:
        write_down(name, 2, objects)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in GOLDEN:
        if not (FOLDERS[1] / f"{name}.json").exists():
            make(name)
    for name in SPREAD:
        if not (FOLDERS[2] / f"{name}.json").exists():
            with tempfile.TemporaryDirectory() as store:
                torch.multiprocessing.spawn(make_by_rank, (name, f"{store}/store"), RANKS)
