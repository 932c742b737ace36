"""The command `lowbit-optim estimate`."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowbit_optim import cli
from lowbit_optim.memory import estimate
from lowbit_optim.planning import PlanError, parse_bytes
from lowbit_optim.shapes import MODELS

MODULE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64))

def shapes():
    return {"weight": (512, 256), "bias": (512,)}

def broken():
    return 3
"""


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Run the command in a folder with a module of models; its exit code, what it printed, and its JSON."""
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)

    def run(*arguments):
        code = cli.main(["estimate", *arguments, "--json", "numbers.json"])
        said = capsys.readouterr()
        file = tmp_path / "numbers.json"
        return code, said.out, said.err, json.loads(file.read_text()) if code == 0 else None

    yield run
    sys.modules.pop("my_models", None)


def test_a_module_of_the_user(planned):
    code, out, _, numbers = planned("my_models:model", "--bits", "2", "--budget", "4MB")
    assert code == 0
    rows = {row["optimizer"]: row for row in numbers["rows"]}
    assert list(rows)[:3] == ["AdamW of torch", "AdamW of bitsandbytes, 8 bits", "Shampoo, 32 bits"]
    assert len(rows) == 4
    count = 256 * 512 + 512 + 512 * 64 + 64
    for name, row in rows.items():
        assert row["numbers"] == count
        assert row["parameters"] == row["gradients"] == 4 * count
        assert row["total"] == 8 * count + row["state"] + row["workspace"]
        assert row["fits"] == (row["total"] <= 4e6)
        assert name in out
    assert rows["AdamW of bitsandbytes, 8 bits"]["fits"]
    assert not rows["Shampoo, 32 bits"]["fits"]
    assert rows["Shampoo, 32 bits"]["state"] == estimate([(512, 256), (512,), (64, 512), (64,)], bits=32).state
    assert "fits 4MB" in out
    assert "Activations" in out


@pytest.mark.parametrize("optimizer", ["kfac", "soap", "caspr"])
def test_the_optimizer_that_was_asked_for(planned, optimizer):
    code, out, _, numbers = planned("my_models:model", "--optimizer", optimizer)
    assert code == 0
    assert [row["optimizer"].partition(",")[0] for row in numbers["rows"][3:]] == [optimizer] * 3
    assert out.count(optimizer) == 3


def test_shapes_and_sharding(planned):
    one, many = (
        planned("my_models:shapes", "--bits", "4", "--dtype", "bfloat16", *more)[3]["rows"][-1]
        for more in ((), ("--world-size", "4", "--sharding", "fsdp2"))
    )
    assert one["parameters"] == 2 * (512 * 256 + 512) == 4 * many["parameters"]
    assert many["state"] < 0.8 * one["state"]
    assert many["kinds"] == one["kinds"]


def test_the_figure(planned, tmp_path):
    pytest.importorskip("matplotlib")
    assert planned("my_models:shapes", "--bits", "4", "--figure", "new/bars.png")[0] == 0
    assert (tmp_path / "new/bars.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["my_models:nothing"], "nothing"),
        (["my_modles:model"], "my_modles"),
        (["my_models:broken"], "neither an nn.Module nor shapes"),
        (["my_models:shapes", "--optimizer", "shampo"], "unknown optimizer 'shampo'"),
        (["my_models:shapes", "--optimizer", "kfac"], "give the nn.Module"),
        (["my_models:shapes", "--bits", "5"], "bits is 5"),
        (["my_models:shapes", "--sharding", "zero"], "'ddp' or 'fsdp2'"),
        (["my_models:shapes", "--dtype", "int3"], "float32, bfloat16, float16"),
        (["my_models:shapes", "--budget", "much"], "80GiB"),
        (["my_models.py"], "is no configuration"),
        (["empty.json"], "model_type"),
        (["no-such-model"], "llama2-7b, llama3-70b, llama3-405b nor module:function"),
    ],
)
def test_errors(planned, tmp_path, arguments, says, monkeypatch):
    (tmp_path / "empty.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    code, _, error, _ = planned(*arguments)
    assert code == 2
    assert error.startswith("lowbit-optim: error: ")
    assert says in error


class Tiny(nn.Module):
    """What transformers makes of a configuration: a tied model, on the device of the context."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, 64)
        self.head = nn.Linear(64, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        assert self.head.weight.is_meta


def test_hugging_face(planned, tmp_path, monkeypatch):
    def from_pretrained(name, local_files_only):
        assert local_files_only
        if not name.endswith("config.json"):
            raise OSError("not in the cache")
        return SimpleNamespace(**json.loads((tmp_path / name).read_text()))

    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"model_type": "tiny", "vocab_size": 100, "architectures": ["Unknown", "Tiny"]}
    (folder / "config.json").write_text(json.dumps(config))
    auto = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoConfig=auto, Tiny=Tiny))
    for spec in ("tiny", "tiny/config.json"):
        assert planned(spec, "--bits", "2")[3]["rows"][0]["numbers"] == 6400
    code, _, error, _ = planned("someone/tiny")
    assert code == 2
    assert "local cache" in error


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GB", 80 * 10**9), ("80 GiB", 80 * 2**30), ("1.5kb", 1500), ("7", 7), ("24576MiB", 24576 * 2**20)],
)
def test_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "8 bits", "1.2.3GB", "-1GB", "."])
def test_no_bytes(text):
    with pytest.raises(PlanError, match="80GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("vit-s", 22_050_664),
        ("resnet50", 25_557_032),
        ("llama2-7b", 6_738_415_616),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
    ],
)
def test_published_shapes(name, count):
    assert sum(map(math.prod, MODELS[name]().values())) == count


def test_large_models_in_seconds():
    planned = estimate(MODELS["llama2-7b"](), base="sgd", dtype=torch.bfloat16)
    assert 0.5 < planned.bytes_per_parameter < 0.6
