"""A reader written from docs/reference/checkpoint-format.md alone, with Python and NumPy, on kept checkpoints."""

import hashlib
import json

import numpy as np
import pytest
import torch

from lowbit_optim.checkpoint import load_checkpoint
from lowbit_optim.optimizers.moments import moment_form
from lowbit_optim.storage.factors import take
from tests.checkpoint.golden.make import FOLDERS, GOLDEN, SPREAD, build

DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "BF16": "<u2"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def read(folder):
    """({kind: {tensor name: array}}, {prefix: codec}, {codebook: {bits: numbers}}, trainer.json as it stands)."""
    if not (folder / "checkpoint.json").exists():
        folder = folder / (folder / "latest").read_text().removesuffix("\n")
    text = (folder / "checkpoint.json").read_bytes()
    body, _, end = text.rpartition(b',\n "sha256": "')
    assert end == sha256(body).encode() + b'"\n}\n'
    tensors, codecs, codebooks, trainer, pieces = {}, {}, {}, None, {}
    for kind, entries in json.loads(text)["files"].items():
        for entry in entries:
            content = (folder / entry["name"]).read_bytes()
            assert len(content) == entry["size"]
            if kind in ("trainer", "random"):
                assert sha256(content) == entry["sha256"]
                trainer = json.loads(content) if kind == "trainer" else trainer
                continue
            start = 8 + int.from_bytes(content[:8], "little")
            assert start % 8 == 0
            assert sha256(content[:start]) == entry["sha256"]
            header = json.loads(content[8:start])
            metadata = header.pop("__metadata__")
            codecs |= json.loads(metadata.get("codecs", "{}"))
            for name, tables in json.loads(metadata.get("codebooks", "{}")).items():
                codebooks.setdefault(name, {}).update(tables)
            assert header.keys() == entry["tensors"].keys()
            places = json.loads(metadata.get("pieces", "{}"))
            for name, said in header.items():
                first, last = said["data_offsets"]
                part = content[start + first : start + last]
                assert sha256(part) == entry["tensors"][name]
                array = np.frombuffer(part, DTYPES[said["dtype"]]).reshape(said["shape"])
                if name in places:
                    pieces.setdefault((kind, places[name]["tensor"]), {})[places[name]["first"]] = array
                    assert list(array.shape[1:]) == places[name]["shape"][1:]
                else:
                    tensors.setdefault(kind, {})[name] = array
    for (kind, name), rows in pieces.items():
        tensors[kind][name] = np.concatenate([rows[first] for first in sorted(rows)])
    return tensors, codecs, codebooks, trainer


def rows_of(tensors, prefix, codec, codebooks, n):
    """The numbers of rows of n codes."""
    codes, scales = tensors[f"{prefix}.codes"], tensors[f"{prefix}.scales"]
    if codec.get("double"):
        groups = np.repeat(tensors[f"{prefix}.scale_maxima"], 256, axis=-1)[..., : scales.shape[-1]]
        scales = scales.astype("f4") / np.float32(255) * groups
    bits = np.unpackbits(codes, axis=-1, bitorder="little")[..., : n * codec["bits"]]
    code = (bits.reshape(*codes.shape[:-1], n, -1) << np.arange(codec["bits"])).sum(-1)
    table = np.array(codebooks[codec["codebook"]][str(codec["bits"])], "f4")
    return table[code] * np.repeat(scales, codec["block_size"], axis=-1)[..., :n]


def matrices(tensors, prefix, codec, codebooks):
    """The symmetric matrices of a factor, [k, n, n]."""
    diagonal = tensors[f"{prefix}.diagonal"]
    count, n = diagonal.shape
    whole = np.zeros((count, n, n), "f4")
    assert codec["layout"] == "triangle"
    below = np.tril_indices(n, -1)
    whole[:, below[0], below[1]] = rows_of(tensors, prefix, codec["codec"], codebooks, n * (n - 1) // 2)
    whole += whole.transpose(0, 2, 1)
    whole[:, range(n), range(n)] = diagonal
    return whole


OF_ONE = ["shampoo-4", "shampoo-2", "shampoo-sharded", "shampoo-bfloat16", "soap", "kfac"]


@pytest.mark.parametrize(("version", "name"), [*((1, name) for name in OF_ONE), (2, "shampoo-blocks")])
def test_factors(version, name):
    tensors, codecs, codebooks, _ = read(FOLDERS[version] / name)
    objects = build(name, 5)
    load_checkpoint(FOLDERS[version] / name, **objects)
    optimizer, found = objects["optimizer"], 0
    for parameter_name, parameter in objects["model"].named_parameters():
        group = optimizer.param_groups[0]
        cut = optimizer.preconditioner.blocking(parameter, group)
        if cut is None:
            continue
        for side, factor in optimizer.preconditioner.forms(group, cut).sides():
            factor = getattr(factor, "factor", factor)  # of a basis
            own = take(side, optimizer.state[parameter])
            expected = factor.codec.decode(take("root", own))
            prefix = f"{parameter_name}/{side}"
            read_back = matrices(tensors["optimizer"], f"{prefix}.root", codecs[prefix]["codec"], codebooks)
            np.testing.assert_array_equal(read_back, expected.numpy())
            found += 1
    assert found == (2 if name == "kfac" else 4)  # which leaves a layer with a tied weight to the base


@pytest.mark.parametrize("version", [1, 2])
def test_moments(version):
    tensors, codecs, codebooks, _ = read(FOLDERS[version] / "adamw-4")
    objects = build("adamw-4", 5)
    load_checkpoint(FOLDERS[version] / "adamw-4", **objects)
    optimizer, parameter = objects["optimizer"], objects["model"].first.weight
    for moment, kind in optimizer.moments.items():
        prefix = f"first.weight/{moment}"
        read_back = rows_of(tensors["optimizer"], prefix, codecs[prefix], codebooks, 32)
        form = moment_form(parameter, optimizer.param_groups[0], kind)
        expected = form.read(moment, optimizer.state[parameter], parameter.shape)
        np.testing.assert_array_equal(read_back, expected.numpy())


@pytest.mark.parametrize(("version", "name"), [*((1, name) for name in GOLDEN), *((2, name) for name in SPREAD)])
def test_parameters_and_their_names(version, name):
    tensors, _, _, trainer = read(FOLDERS[version] / name)
    objects = build(name, 5)
    load_checkpoint(FOLDERS[version] / name, **objects)
    for key, value in trainer["model"]["state_dict"].items():
        stored = torch.from_numpy(tensors["model"][value["$stored"]].copy())
        live = objects["model"].state_dict()[key]
        assert torch.equal(stored, live.view(torch.uint16) if live.dtype == torch.bfloat16 else live)
    names, shapes = trainer["optimizer"]["names"], trainer["optimizer"]["shapes"]
    assert dict(zip(names, shapes, strict=True)) == {
        name: list(parameter.shape) for name, parameter in objects["model"].named_parameters()
    }
    assert {key.rpartition("/")[0] for key in tensors["optimizer"]} <= {*names}
