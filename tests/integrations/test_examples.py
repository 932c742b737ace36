"""Every script in examples/ runs, learns, and says that its resumed run is exact."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
# (script, arguments, package that it needs, whether it resumes)
RUNS = [
    ("torch_amp_compile.py", ["--backend=aot_eager", "--steps=20", "--optimizer=kfac"], "torch", True),
    ("transformers_vit.py", ["--steps=30"], "transformers", False),
    ("hf_trainer.py", ["--steps=12"], "transformers", True),
    ("accelerate_loop.py", ["--epochs=4"], "accelerate", True),
    ("lightning_fit.py", ["--epochs=4"], "lightning", True),
]


def test_every_example_is_run():
    assert sorted(script for script, *_ in RUNS) == EXAMPLES


@pytest.mark.parametrize(
    ("script", "arguments", "package", "resumes"),
    [pytest.param(*run, id=run[0].removesuffix(".py")) for run in RUNS],
)
def test_an_example(script, arguments, package, resumes, tmp_path):
    if not find_spec(package):
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(found) for found in re.findall(r"loss'?:? '?([0-9.]+)", done.stdout)]
    assert len(losses) > 1, done.stdout
    assert losses[-1] < losses[0], done.stdout
    assert ("the resumed run is the same to the last bit" in done.stdout) == resumes, done.stdout
