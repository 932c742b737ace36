"""What a checkpoint holds, and what it refuses to hold."""

import hashlib
import json
import math
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

from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lowbit_optim.checkpoint.values import decode, encode
from lowbit_optim.storage.codebooks import codebook
from tests.checkpoint.common import CodesOptimizer, Net, adamw, build, picture, same, save, sealed, shampoo, train


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


def test_conjugated_and_negated_views(tmp_path):
    numbers = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    model = nn.Module()
    model.register_buffer("conjugate", numbers.conj())
    model.register_buffer("negative", numbers.conj().imag)
    assert model.conjugate.is_conj()
    assert model.negative.is_neg()
    save_checkpoint(tmp_path, model=model)
    (file,) = tmp_path.glob("model-*.safetensors")
    stored = load_file(file)
    assert stored["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert stored["negative"].tolist() == [-2, 4]


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


def test_header_decodes_shampoo(tmp_path):
    """Whoever has the file alone finds the codec of every factor and the values of its codes."""
    objects = build(0, optimizer=shampoo)
    train(*objects, 2)
    save(tmp_path, objects)
    (file,) = tmp_path.glob("optimizer-*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata, names = opened.metadata(), set(opened.keys())
    assert json.loads(metadata["codebooks"]) == {"nf": {"4": codebook("nf", 4).tolist()}}
    codecs = json.loads(metadata["codecs"])
    assert {name.removesuffix(".root.codes") for name in names if name.endswith(".codes")} == codecs.keys()
    for codec in codecs.values():
        assert codec["form"] == "root"
        assert codec["codec"]["codec"] | {"bits": 4, "codebook": "nf", "block_size": 64} == codec["codec"]["codec"]


def test_format_of_checkpoint_json(tmp_path):
    objects = build(0)
    train(*objects, 1)
    save(tmp_path, objects)
    content = (tmp_path / "checkpoint.json").read_bytes()
    manifest = json.loads(content)
    assert manifest["format_version"] == 1
    assert manifest["files"].keys() == {"model", "optimizer", "trainer"}
    for kind, (entry,) in manifest["files"].items():
        file = (tmp_path / entry["name"]).read_bytes()
        start = len(file) if kind == "trainer" else 8 + int.from_bytes(file[:8], "little")
        header = {} if kind == "trainer" else json.loads(file[8:start])
        header.pop("__metadata__", None)
        assert entry["size"] == len(file)
        assert entry["sha256"] == hashlib.sha256(file[:start]).hexdigest()
        assert entry["tensors"] == {
            name: hashlib.sha256(file[start:][slice(*said["data_offsets"])]).hexdigest()
            for name, said in header.items()
        }
    assert content == sealed(manifest)


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
    text = json.dumps(encode(value, "value"), allow_nan=False)
    assert same(decode(json.loads(text)), value)


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
