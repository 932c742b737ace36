"""What version 1 of the format has written, every later version loads, and finds in it what was there."""

import json
import shutil

import pytest
import torch

from lowbit_optim.checkpoint import load_checkpoint
from tests.checkpoint.common import same
from tests.checkpoint.golden.make import EXTRAS, FOLDER, GOLDEN, STEPS, build, content, next_change


def test_all_are_there():
    assert {file.stem for file in FOLDER.glob("*.json")} == {file.name for file in FOLDER.iterdir() if file.is_dir()}
    assert {file.stem for file in FOLDER.glob("*.json")} == GOLDEN.keys()
    for file in FOLDER.rglob("checkpoint.json"):
        assert json.loads(file.read_text())["format_version"] == 1
    assert len(list((FOLDER / "shampoo-sharded").glob("optimizer-*"))) > 2
    assert (FOLDER / "shampoo-bfloat16" / "latest").read_text() == f"step-{STEPS}\n"


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(tmp_path, name):
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    change = expected.pop("next change")
    objects = build(name, 99)
    shutil.copytree(FOLDER / name, tmp_path / name)
    assert same(load_checkpoint(tmp_path / name, **objects), {"step": STEPS, **EXTRAS})
    assert content(objects) == expected
    # With roots that are read from the codes: what they mean has not changed.
    narrow = objects["model"].first.weight.dtype == torch.bfloat16
    for parameter, numbers in next_change(objects).items():
        expected = torch.tensor(change[parameter])
        tolerance = 2e-3 if narrow else 1e-3 * expected.abs().max().item()
        torch.testing.assert_close(torch.tensor(numbers), expected, rtol=0, atol=tolerance)
