"""Checkpoints: resume is exact, a save is all or nothing, and a bad checkpoint changes nothing."""

import copy
import hashlib
import json
import math
import os
import random
import shutil
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim.checkpoint import CheckpointError, _decode, _encode, load_checkpoint, save_checkpoint
from lowbit_optim.storage.codebooks import codebook


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


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "codes": CodesOptimizer}
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
    save_checkpoint(path, model=objects[0], optimizer=objects[1], scheduler=objects[2], **extras)


def load(path, objects):
    return load_checkpoint(path, model=objects[0], optimizer=objects[1], scheduler=objects[2])


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live_steps", [0, 2])
@pytest.mark.parametrize(
    ("optimizer", "scheduler", "dtype"),
    [(name, "multistep", torch.float32) for name in OPTIMIZERS]
    + [("adamw", name, torch.float32) for name in SCHEDULERS if name != "multistep"]
    + [("sgd", "lambda", torch.float64), ("codes", "multistep", torch.bfloat16)],
)
def test_resume_is_exact(tmp_path, optimizer, scheduler, dtype, live_steps):
    kinds = {"optimizer": OPTIMIZERS[optimizer], "scheduler": SCHEDULERS[scheduler], "dtype": dtype}
    original = build(0, **kinds)
    train(*original, 4)
    save(tmp_path, original, step=4, epoch=(1, "two"))
    expected = train(*original, 4), picture(*original)

    resumed = build(1, **kinds)
    train(*resumed, live_steps)
    assert load(tmp_path, resumed) == {"step": 4, "epoch": (1, "two")}
    assert train(*resumed, 4) == expected[0]
    assert same(picture(*resumed), expected[1])


def test_before_the_first_step(tmp_path):
    saved = build(0)
    save(tmp_path, saved)
    fresh, stepped = build(1), build(2)
    train(*stepped, 2)
    for live in (fresh, stepped):
        assert load(tmp_path, live) == {"step": None}
        assert same(picture(*live), picture(*saved))
        assert not live[1].state


def test_plateau_scheduler_keeps_infinity(tmp_path):
    model = nn.Linear(2, 2)
    scheduler = lr_scheduler.ReduceLROnPlateau(sgd(model.parameters()))
    assert scheduler.best == math.inf
    save_checkpoint(tmp_path, scheduler=scheduler)
    other = lr_scheduler.ReduceLROnPlateau(sgd(model.parameters()))
    other.step(1.0)
    load_checkpoint(tmp_path, scheduler=other)
    assert same(other.state_dict(), scheduler.state_dict())


def test_parts_alone_and_parameters_by_index(tmp_path):
    original = build(0)
    train(*original, 2)
    save_checkpoint(tmp_path / "without", optimizer=original[1])
    (file,) = (tmp_path / "without").glob("optimizer-*.safetensors")
    assert "0/exp_avg" in load_file(file)
    save(tmp_path / "with", original)
    for folder, model in (("without", True), ("with", False), ("without", False)):
        live = build(1)
        before = picture(live[0], live[2])[0]
        load_checkpoint(tmp_path / folder, model=None, optimizer=live[1])
        assert same(live[1].state_dict(), original[1].state_dict())
        assert same(picture(live[0], live[2])[0], before)
        if model:
            with pytest.raises(CheckpointError, match="without model="):
                load_checkpoint(tmp_path / folder, model=live[0], optimizer=live[1])


# ---- what is in the files --------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """A tensor of every kind that a model may hold."""

    def __init__(self, fill):
        super().__init__()
        dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]
        dtypes += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16]
        for i, dtype in enumerate(dtypes):
            self.register_buffer(f"buffer{i}", (torch.arange(15) * fill).reshape(3, 5).to(dtype))
        self.scalar = nn.Parameter(torch.tensor(1.5 * fill))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.empty_too = nn.Parameter(torch.zeros(0, 3))
        self.transposed = nn.Parameter((torch.arange(12.0) * fill).reshape(3, 4).T)
        both = torch.arange(8.0) * fill
        self.register_buffer("first_half", both[:4])
        self.register_buffer("overlapping", both[2:6])
        self.register_buffer("nan", torch.tensor([0x7FC00001 * fill], dtype=torch.int32).view(torch.float32))
        self.register_buffer("tied", self.transposed.data)

    def get_extra_state(self):
        return {"calls": 3, 4: (5,)}

    def set_extra_state(self, state):
        self.extra = state


def test_every_kind_of_tensor(tmp_path):
    model, live = Zoo(1), Zoo(0)
    save_checkpoint(tmp_path, model=model)
    load_checkpoint(tmp_path, model=live)
    assert same(live.state_dict(), model.state_dict())
    assert live.extra == {"calls": 3, 4: (5,)}
    assert not live.transposed.is_contiguous()

    (file,) = tmp_path.glob("model-*.safetensors")  # and read by somebody else
    stored = load_file(file)
    state = model.state_dict()
    assert stored.keys() == state.keys() - {"tied", "_extra_state"}
    for name, tensor in stored.items():
        assert same(tensor, state[name])
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_modules_see_the_version_of_their_state(tmp_path):
    versions = []

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            versions.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    save_checkpoint(tmp_path, model=Versioned(1, 1))
    load_checkpoint(tmp_path, model=Versioned(1, 1))
    assert versions == [7]


def test_tied_weights_are_stored_once(tmp_path):
    save_checkpoint(tmp_path, model=Net(tied=True))
    (file,) = tmp_path.glob("model-*")
    assert "head.weight" in load_file(file)
    assert "out.weight" not in load_file(file)
    untied = Net(tied=False)
    load_checkpoint(tmp_path, model=untied)
    assert torch.equal(untied.head.weight, untied.out.weight)

    save_checkpoint(tmp_path, model=Net(tied=False))
    tied = Net(tied=True)
    before = picture(tied)
    with pytest.raises(CheckpointError, match=r"'out\.weight' and 'head\.weight' are tied in the model"):
        load_checkpoint(tmp_path, model=tied)
    assert same(picture(tied), before)


def test_optimizer_file_describes_itself(tmp_path):
    objects = build(0, optimizer=CodesOptimizer)
    train(*objects, 1)
    save(tmp_path, objects)
    (file,) = tmp_path.glob("optimizer-*")
    with safe_open(file, "pt") as source:
        metadata = source.metadata()
        assert source.get_slice("embed.weight/base.codes").get_dtype() == "U8"
    assert metadata["format_version"] == "1"
    assert metadata["library_version"]
    assert json.loads(metadata["codecs"]) == {
        "embed.weight/base": {"codebook": "linear-2", "bits": 4, "block_size": 64},
        "embed.bias/base": {"codebook": None},
    }
    assert json.loads(metadata["codebooks"]) == {"linear-2": {"4": codebook("linear-2", 4).tolist()}}


def test_format_of_checkpoint_json(tmp_path):
    save(tmp_path, build(0))
    manifest = json.loads((tmp_path / "checkpoint.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["files"].keys() == {"model", "optimizer", "trainer"}
    for (entry,) in manifest["files"].values():
        content = (tmp_path / entry["name"]).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["sha256"] == own_sha256(manifest)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))  # lone surrogates too
    | st.sampled_from(["$tuple", "$float", "$"])
    | st.binary()
)
TENSORS = st.tuples(
    st.sampled_from(
        [
            torch.float32,
            torch.bfloat16,
            torch.float64,
            torch.uint8,
            torch.int64,
            torch.complex64,
            torch.uint16,
            torch.float8_e5m2,
        ]
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.binary(min_size=216, max_size=216),
).map(lambda t: torch.frombuffer(bytearray(t[2]), dtype=t[0])[: math.prod(t[1])].reshape(t[1]))
ARRAYS = hnp.arrays(
    st.sampled_from(["<f8", ">f4", "<f2", "|b1", "<u4", "|i1", "<c16"]), hnp.array_shapes(min_dims=0, min_side=0)
)
NUMPY_SCALARS = hnp.arrays(st.sampled_from(["<f4", "<f8", "|b1", "<i8"]), ()).map(lambda array: array[()])
KEYS = SCALARS | st.tuples(SCALARS, SCALARS)
VALUES = st.recursive(
    SCALARS | TENSORS | ARRAYS | NUMPY_SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(KEYS, st.integers(), max_size=4).map(Counter)
    ),
    max_leaves=8,
)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_trainer_json_gives_back_what_it_was_given(value):
    text = json.dumps(_encode(value, "value"), allow_nan=False)
    assert same(_decode(json.loads(text)), value)


# ---- what cannot be saved --------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (object(), r"extras\['bad'\] is a builtins\.object"),
        ({"a": [1, ({2},)]}, r"extras\['bad'\]\['a'\]\[1\]\[0\] is a builtins\.set"),
        ({frozenset(): 1}, r"a key of extras\['bad'\] is a builtins\.frozenset"),
        (lambda: 0, r"extras\['bad'\] is a builtins\.function"),
        (np.array([object()]), r"extras\['bad'\] is a numpy\.ndarray"),
        (torch.zeros(2).to_sparse(), r"extras\['bad'\] is a torch\.Tensor"),
        (torch.zeros(2, device="meta"), r"extras\['bad'\] is a torch\.Tensor"),
        (torch.zeros(2).as_subclass(Subclass), r"extras\['bad'\] is a .*Subclass"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, value, where):
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "new", model=nn.Linear(2, 2), bad=value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.Linear(2, 2, device="meta"),
        lambda: nn.LazyLinear(2),
        lambda: nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2).as_subclass(Subclass))}),
    ],
)
def test_tensors_without_bytes_are_named(tmp_path, module):
    with pytest.raises(TypeError, match="model tensor 'weight' is a"):
        save_checkpoint(tmp_path / "new", model=module())
    assert not (tmp_path / "new").exists()


def test_optimizer_of_another_model_is_refused(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"parameter 0 of the optimizer, of shape \[3, 3\], is not"):
        save_checkpoint(tmp_path / "new", model=model, optimizer=adamw(other.parameters()))
    assert not (tmp_path / "new").exists()


# ---- saving is all or nothing ----------------------------------------------------------------------------------------


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
    copies = []

    def copying(function):
        def wrapped(*args, **keywords):
            copies.append(tmp_path / f"copy{len(copies)}")
            shutil.copytree(folder, copies[-1])
            return function(*args, **keywords)

        return wrapped

    save(folder, objects, step=1)
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, copying(getattr(os, name)))
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


# ---- a bad checkpoint changes nothing --------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path):
    objects = build(0, width=4)
    train(*objects, 2)
    save(tmp_path / "run", objects, step=2)
    return tmp_path / "run"


@pytest.fixture
def live():
    objects = build(1, width=4)
    train(*objects, 3)
    return objects


def refused(folder, objects, match):
    before = picture(*objects)
    with pytest.raises(CheckpointError, match=match):
        load(folder, objects)
    assert same(picture(*objects), before)


def kinds(folder):
    """Kind of file -> file."""
    return {file.name.partition("-")[0]: file for file in folder.iterdir()}


def own_sha256(manifest):
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def rewrite(folder, change):
    """Change checkpoint.json with a correct sha256, as another program could."""
    manifest = json.loads((folder / "checkpoint.json").read_text())
    change(manifest)
    manifest["sha256"] = own_sha256(manifest)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


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
def test_any_flipped_bit(good, live, kind):
    file = kinds(good)[kind]
    content = file.read_bytes()
    bits = 8 * len(content)
    before = picture(*live)
    # All of checkpoint.json, which vouches for the rest; of the others the first and last bits and 60 between.
    for bit in range(bits) if kind == "checkpoint.json" else {*range(8), *range(8, bits, bits // 60), bits - 1}:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.name):
            load(good, live)
    assert same(picture(*live), before)
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
    rewrite(good, lambda manifest: manifest.update(format_version=2, library_version="9.9"))
    refused(good, live, r"checkpoint\.json: format version 2 is newer than 1.*written by 9\.9: install that")


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


# ---- a load that fails half-way is undone ----------------------------------------------------------------------------


class Failing:
    """An object whose load_state_dict does its work and then raises."""

    fails = False

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if type(self).fails:
            self.new_attribute = torch.rand(()).item() + random.random()
            raise OSError("no luck")


class FailingNet(Failing, Net):
    pass


class FailingAdamW(Failing, torch.optim.AdamW):
    pass


class FailingCodes(Failing, CodesOptimizer):  # fills the containers that it has, where torch replaces them
    pass


class FailingSequential(Failing, lr_scheduler.SequentialLR):
    pass


@pytest.mark.parametrize("live_steps", [0, 3])
@pytest.mark.parametrize("failing", [FailingNet, FailingAdamW, FailingCodes, FailingSequential])
def test_load_that_raises_is_undone(tmp_path, monkeypatch, failing, live_steps):
    def build_failing(seed):
        torch.manual_seed(seed)
        model = FailingNet()
        optimizer = (FailingCodes if failing is FailingCodes else FailingAdamW)(model.parameters(), lr=0.01)
        parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return model, optimizer, FailingSequential(optimizer, parts, [2])

    saved, live, twin = build_failing(0), build_failing(1), build_failing(1)
    train(*saved, 4)
    save(tmp_path, saved)
    for objects in (live, twin):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        train(*objects, live_steps)
    with monkeypatch.context() as patch:
        patch.setattr(failing, "fails", True)
        refused(tmp_path, live, "loading them raised OSError: no luck; everything was put back")
    assert not any(hasattr(thing, "new_attribute") for thing in live[1:])
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    expected = train(*twin, 3)
    torch.set_rng_state(rng[0])
    random.setstate(rng[1])
    np.random.set_state(rng[2])  # noqa: NPY002
    assert train(*live, 3) == expected
    load(tmp_path, live)
    assert same(picture(*live)[0], picture(*saved)[0])


def test_module_that_refuses_a_good_checkpoint(tmp_path):
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args):
            args[-1].append("not today")

    model = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    save_checkpoint(tmp_path, model=model)
    with torch.no_grad():
        model[0].weight.zero_()
    before = picture(model)
    with pytest.raises(CheckpointError, match="not today"):
        load_checkpoint(tmp_path, model=model)
    assert same(picture(model), before)


def test_buffer_that_cannot_be_written(tmp_path):
    model = nn.BatchNorm1d(4)
    model.register_buffer("mask", torch.ones(1).expand(4))  # torch itself refuses to load into one
    save_checkpoint(tmp_path, model=model)
    model.weight.data.zero_()
    before = picture(model)
    with pytest.raises(CheckpointError, match=r'loading them raised RuntimeError: (.|\n)*"mask"'):
        load_checkpoint(tmp_path, model=model)
    assert same(picture(model), before)


def test_loaded_state_does_not_hang_on_the_files(tmp_path):
    objects, live = build(0), build(1)
    train(*objects, 2)
    save(tmp_path, objects)
    load(tmp_path, live)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert same(picture(*live)[0], picture(*objects)[0])
