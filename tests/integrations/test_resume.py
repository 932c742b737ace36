"""A run that a fresh process goes on with is the run that nothing interrupted, to the last bit.

Parameters, the optimizer's state, the scheduler, every random stream and the order of the data: for every optimizer
through our own files, torch.save and torch.distributed.checkpoint, and through the trainers, once for every class.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.contract import same
from tests.integrations import runs, trainers
from tests.integrations.runs import DTYPES, EVERY, WAYS_OF

pytestmark = pytest.mark.filterwarnings(*trainers.WARNINGS)
ROOT = Path(__file__).parents[2]
CLASSES = ["shampoo", "caspr", "soap", "kfac", "adabk", "ekfac", "adamw", "sgd", "adagrad"]
TRAINED = list(product(CLASSES, DTYPES, trainers.PACKAGES))
OWN = [(name, dtype, way) for name, dtype in product(EVERY, DTYPES) for way in WAYS_OF[dtype]]
CASES = [*OWN, *TRAINED]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(what an uninterrupted run has come to, what the resumed one has) by optimizer, dtype and way."""
    folder = tmp_path_factory.mktemp("runs")
    first = {}
    for name, dtype in product(EVERY, DTYPES):
        whole = runs.attempt(runs.whole, name, dtype)
        half = runs.attempt(runs.first_half, folder, name, dtype)
        first |= {(EVERY[name], dtype, way): half if "error" in half else whole for way in WAYS_OF[dtype]}
    for name, dtype, way in TRAINED:
        if way in trainers.TRAINERS:
            own = folder / f"{name}.{dtype}.{way}"
            own.mkdir()
            args = own, name, DTYPES[dtype], 0, False
            first[EVERY[name], dtype, way] = runs.attempt(trainers.TRAINERS[way], *args)
    fresh = [sys.executable, "-m", "tests.integrations.runs", str(folder)]
    done = subprocess.run(fresh, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {make: name for name, make in EVERY.items()}

    def second(make, dtype, way):
        return torch.load(folder / f"{names[make]}.{dtype}.{way}" / "second.pt", weights_only=True)

    return {case: (run, second(*case)) for case, run in first.items()}


@pytest.mark.parametrize(
    ("make", "dtype", "way"), [pytest.param(EVERY[case[0]], *case[1:], id="-".join(case)) for case in CASES]
)
def test_a_fresh_process_goes_on_to_the_last_bit(make, dtype, way, found):
    if way in trainers.PACKAGES and way not in trainers.TRAINERS:
        pytest.skip(f"{way} is not installed")
    whole, resumed = found[make, dtype, way]
    for run in (whole, resumed):
        assert "error" not in run, run["error"]
    for part in whole:
        assert same(resumed[part], whole[part]), part


def test_a_run_is_more_than_its_start():
    """Equal ends would say little if runs that differ ended alike: random streams and the second half count."""
    whole = runs.whole("shampoo", "fp32")["parameters"]
    for steps, seed, equal in ((2 * runs.HALF, 0, True), (runs.HALF, 0, False), (2 * runs.HALF, 1, False)):
        loop = runs.Loop("shampoo", torch.float32, seed=0)
        runs.seed_all(seed)
        loop.go(steps)
        assert same(loop.picture()["parameters"], whole) == equal
