"""What each version of the format has written, every later version loads, and finds in it what was there."""

import json
import shutil

import pytest
import torch

from lowbit_optim.checkpoint import load_checkpoint
from tests.checkpoint.common import same
from tests.checkpoint.golden.make import EXTRAS, FOLDERS, GOLDEN, RANKS, SPREAD, STEPS, build, content, next_change


@pytest.mark.parametrize(("version", "names"), [(1, GOLDEN), (2, SPREAD)])
def test_all_are_there(version, names):
    folder = FOLDERS[version]
    assert {file.stem for file in folder.glob("*.json")} == {file.name for file in folder.iterdir() if file.is_dir()}
    assert {file.stem for file in folder.glob("*.json")} == names.keys()
    for file in folder.rglob("checkpoint.json"):
        assert json.loads(file.read_text())["format_version"] == version


def test_they_are_of_every_kind():
    assert len(list((FOLDERS[1] / "shampoo-sharded").glob("optimizer-*"))) > 2
    assert (FOLDERS[1] / "shampoo-bfloat16" / "latest").read_text() == f"step-{STEPS}\n"
    for rank in range(1, RANKS):
        assert len(list((FOLDERS[2] / "shampoo-blocks").glob(f"optimizer-rank{rank:05}-*"))) > 1
        assert len(list((FOLDERS[2] / "shampoo-blocks").glob(f"random-rank{rank:05}-*"))) == 1


@pytest.mark.parametrize(("version", "name"), [*((1, name) for name in GOLDEN), *((2, name) for name in SPREAD)])
def test_golden(tmp_path, version, name):
    expected = json.loads((FOLDERS[version] / f"{name}.json").read_text())
    change = expected.pop("next change")
    objects = build(name, 99)
    shutil.copytree(FOLDERS[version] / name, tmp_path / name)
    assert same(load_checkpoint(tmp_path / name, **objects), {"step": STEPS, **EXTRAS})
    assert content(objects) == expected
    # With roots that are read from the codes: what they mean has not changed.
    narrow = objects["model"].first.weight.dtype == torch.bfloat16
    for parameter, numbers in next_change(objects).items():
        expected = torch.tensor(change[parameter])
        tolerance = 2e-3 if narrow else 1e-3 * expected.abs().max().item()
        torch.testing.assert_close(torch.tensor(numbers), expected, rtol=0, atol=tolerance)
