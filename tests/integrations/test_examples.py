"""Every script in examples/ runs and learns, and what it resumes ends as it says."""

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
SHARED = ["ddp.py", "fsdp2.py"]  # by several processes


def run(folder, script, *arguments, processes=None):
    """What a script prints, and the losses in it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *torchrun, str(ROOT / "examples" / script), *arguments]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [float(found) for found in re.findall(r"loss'?:? '?([0-9.]+)", done.stdout)]


def test_every_example_is_run():
    assert sorted([script for script, *_ in RUNS] + SHARED) == EXAMPLES


@pytest.mark.parametrize(
    ("script", "arguments", "package", "resumes"),
    [pytest.param(*run, id=run[0].removesuffix(".py")) for run in RUNS],
)
def test_an_example(script, arguments, package, resumes, tmp_path):
    if not find_spec(package):
        pytest.skip(f"{package} is not installed")
    said, losses = run(tmp_path, script, *arguments)
    assert len(losses) > 1, said
    assert losses[-1] < losses[0], said
    assert ("the resumed run is the same to the last bit" in said) == resumes, said


def test_ddp(tmp_path):
    said, losses = run(tmp_path, "ddp.py", "--steps=20", processes=2)
    assert losses[-1] < losses[0], said
    assert "all processes have the same parameters" in said
    first, second = map(int, re.search(r"factors: (\d+) on rank 0, (\d+) on rank 1", said).groups())
    assert abs(first - second) < 0.2 * first


def test_fsdp2_goes_on_with_another_number_of_processes(tmp_path):
    """A half on two processes and a half on three end at the loss of a whole run on two.

    All see the same windows, but three add up gradients in another order than two: the last bits of float32 differ, by
    up to 1e-6 in the losses before the next update of the factors, which turns some codes of 2 bits into their
    neighbours. From there on it is a few times 1e-5. Without the factors of the first half it is 1e-2 at once.
    """
    whole = run(tmp_path, "fsdp2.py", "--steps=24", "--every=1", "--path=whole", processes=2)[1]
    half = run(tmp_path, "fsdp2.py", "--stop=12", "--every=1", processes=2)[1]
    rest = run(tmp_path, "fsdp2.py", "--steps=24", "--resume", "--every=1", processes=3)[1]
    assert half == whole[:12]
    assert rest[:3] == pytest.approx(whole[12:15], rel=2e-6)
    assert rest == pytest.approx(whole[12:], rel=1e-3)
    assert whole[-1] < 0.7 * whole[0]
