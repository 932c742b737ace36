"""The library without what some platforms do not have: numba and Triton, and file locks as on Windows."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Steps of each kind of kernel, and a checkpoint; prints what the states hold.
PROGRAM = """
import hashlib, importlib.abc, json, logging, sys, tempfile

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("lowbit_optim").addHandler(handler)

import torch
import lowbit_optim
from lowbit_optim import AdamW, SOAP, Shampoo, load_checkpoint, save_checkpoint

codes = {}
for name, make in {
    "shampoo": lambda p: Shampoo(p, bits=2, base_bits=4, statistics_frequency=1, min_quant_size=64),
    "soap": lambda p: SOAP(p, base_bits=8, min_quant_size=64),
    "adamw": lambda p: AdamW(p, bits=4, min_quant_size=64),
}.items():
    torch.manual_seed(0)
    model = torch.nn.Linear(48, 32)
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 48)).square().sum().backward()
        optimizer.step()
    state = optimizer.state_dict()["state"]
    codes[name] = {
        f"{index}.{key}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for index, own in state.items() for key, value in own.items() if key.endswith(".codes")
    }
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, model=model, optimizer=optimizer, step=3)
        assert load_checkpoint(folder, model=model, optimizer=optimizer)["step"] == 3
print(json.dumps({"codes": codes, "said": said, "modules": sorted(m for m in sys.modules if "." not in m)}))
"""


def run(*hidden: str) -> dict:
    program = f"HIDDEN = {hidden!r}\n{PROGRAM}"
    env = {name: value for name, value in os.environ.items() if name != "LOWBIT_BACKEND"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def with_numba():
    pytest.importorskip("numba", reason="there is nothing to compare with where numba cannot be imported")
    return run()


def test_without_numba_and_triton_the_codes_are_the_same(with_numba):
    bare = run("numba", "llvmlite", "triton")
    assert not {"numba", "llvmlite", "triton"} & {*bare["modules"]}
    assert "numba" in with_numba["modules"]
    assert with_numba["said"] == []
    assert bare["said"] == ["the plain torch reference runs on cpu, slowly: No module named 'numba'"]
    assert all(bare["codes"][name] for name in ("shampoo", "soap", "adamw"))
    assert bare["codes"] == with_numba["codes"]


def test_without_file_locks_checkpoints_are_saved_and_loaded():
    bare = run("fcntl")  # which Windows does not have
    assert "fcntl" not in bare["modules"]
    assert bare["codes"]["shampoo"]


def test_the_page_has_the_versions_that_are_required_and_tested():
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    python = re.search(r"^python_requires = >=(.+)$", setup, re.MULTILINE)[1]
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)$", setup, re.MULTILINE)
    torch = re.search(r"^    torch>=(.+)$", setup, re.MULTILINE)[1]
    tested = re.search(r"^torch==(.+)$", pinned, re.MULTILINE)[1]
    assert f"| Python | {python} or later; {named[0]} to {named[-1]} are named in the package |" in page
    assert f"| torch | {torch} or later | {tested}, as" in page
    assert f"The\npresent version is {version('lowbit-optim').rpartition('.')[0]}:" in page
    install = re.search(r"^install_requires =\n((?:    .+\n)+)", setup, re.MULTILINE)[1]
    packages = {re.split(r"[>=]", line.strip())[0] for line in install.splitlines()}
    sentence = re.search(r"Required packages are (.+?)\.", page)[1]
    assert {*re.split(r", | and ", sentence)} == packages
    assert {*re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)} <= {*re.findall(r"^(\w+) =$", setup, re.MULTILINE)}
