"""What version 1 of the format has written, every later version loads, and finds in it what was there."""

import json
import shutil

import pytest
import torch

from lowbit_optim.checkpoint import load_checkpoint
from tests.checkpoint.common import same
from tests.checkpoint.golden.make import EXTRAS, FOLDER, GOLDEN, STEPS, build, content, parameters, step


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
    later = expected.pop("one step later")
    objects = build(name, 99)
    shutil.copytree(FOLDER / name, tmp_path / name)
    assert same(load_checkpoint(tmp_path / name, **objects), {"step": STEPS, **EXTRAS})
    assert content(objects) == expected
    step(objects, STEPS)  # with roots that are read from the codes: what they mean has not changed
    tolerance = 2e-2 if objects["model"].first.weight.dtype == torch.bfloat16 else 1e-4
    for parameter, values in parameters(objects).items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(later[parameter]), rtol=tolerance, atol=tolerance * 0.01
        )
