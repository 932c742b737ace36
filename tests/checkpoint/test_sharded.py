"""States that are too large for one file, and the memory that saving and loading take."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn

from lowbit_optim.checkpoint import save_checkpoint
from tests.checkpoint.common import build, load, picture, refused, same, save, shampoo, train


@pytest.mark.parametrize(("size", "several"), [("0.3KB", True), (1, True), ("0.25KiB", True), ("1MB", False)])
def test_files_of_some_size(tmp_path, size, several):
    objects, live = build(0, optimizer=shampoo), build(1, optimizer=shampoo)
    train(*objects, 2)
    save(tmp_path, objects, max_file_size=size)
    files = sorted(tmp_path.glob("optimizer-*"))
    assert (len(files) > 3) == several
    limit = {"0.3KB": 300, 1: 1, "0.25KiB": 256, "1MB": 10**6}[size]
    tensors = []
    for i, file in enumerate(files, 1):
        assert file.name.startswith(f"optimizer-{i:05}-of-{len(files):05}-" if several else "optimizer-")
        with safe_open(file, "pt") as source:
            found = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
            codecs = json.loads(source.metadata()["codecs"])
        assert len(found) == 1 or sum(tensor.nbytes for tensor in found.values()) <= limit
        # Each file can be read without the others.
        for name in found:
            if "/left." in name or "/right." in name:
                assert name.rpartition("/")[0] + "/" + name.rpartition("/")[2].partition(".")[0] in codecs
        tensors += found
    assert len(tensors) == len({*tensors})
    load(tmp_path, live)
    assert same(picture(*live), picture(*objects))
    save(tmp_path, objects)
    assert len(os.listdir(tmp_path)) == 4


def test_a_part_that_is_missing_or_of_another(tmp_path, live):
    objects = build(0, width=4)
    train(*objects, 1)
    save(tmp_path / "run", objects, max_file_size=100)
    save(tmp_path / "other", objects, max_file_size=100)
    files, others = (sorted((tmp_path / name).glob("optimizer-*")) for name in ("run", "other"))
    content = files[1].read_bytes()
    files[1].unlink()
    refused(tmp_path / "run", live, rf"{files[1].name} cannot be read")
    files[1].write_bytes(others[2].read_bytes())
    refused(tmp_path / "run", live, rf"{files[1].name}")
    files[1].write_bytes(content)
    load(tmp_path / "run", live)


def test_an_error_names_the_tensor(tmp_path, live):
    objects = build(0, width=4)
    train(*objects, 1)
    save(tmp_path, objects)
    (file,) = tmp_path.glob("optimizer-*")
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]
    for name, said in header.items():
        content[start + said["data_offsets"][1] - 1] ^= 1
        file.write_bytes(content)
        refused(tmp_path, live, rf"{file.name}: is not .*tensor '{name}' does not match the sha256 in checkpoint\.json")
        content[start + said["data_offsets"][1] - 1] ^= 1


def test_one_tensor_can_be_verified_alone(tmp_path):
    save_checkpoint(tmp_path, model=nn.Linear(3, 3), max_file_size=1)
    manifest = json.loads((tmp_path / "checkpoint.json").read_text())
    one = manifest["files"]["model"][0]
    content = (tmp_path / one["name"]).read_bytes()
    (name,) = one["tensors"]
    assert one["tensors"][name] == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


MEMORY = """
import sys
import torch
from torch import nn
from lowbit_optim import load_checkpoint, save_checkpoint

COUNT, ORDER = 24, 1024  # tensors of 4 MiB


def resident(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(what))


def peak(work):
    '''MiB that it had at most beyond what was there before.'''
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from here
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


torch.set_num_threads(1)
model = nn.ParameterList([nn.Parameter(torch.rand(ORDER, ORDER)) for _ in range(COUNT)])
for parameter in model:
    parameter.data = parameter.data.t()  # so that its bytes must be copied
optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
for parameter in model:
    optimizer.state[parameter]["momentum_buffer"] = torch.rand(ORDER, ORDER).t()
folder, parts = sys.argv[1], {"model": model, "optimizer": optimizer}
save_checkpoint(folder + "/small", step=1)
load_checkpoint(folder + "/small")
saving = peak(lambda: save_checkpoint(folder + "/run", **parts))
loading = peak(lambda: load_checkpoint(folder + "/run", **parts))
print(saving, loading)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not measure peaks anew")
def test_memory(tmp_path, record_property):
    """Beside what must be there: nothing but the largest tensor, and a little."""
    run = [sys.executable, "-c", MEMORY, str(tmp_path)]
    # Every tensor is memory of its own, which goes back to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(
        run, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    saving, loading = map(float, ended.stdout.split())
    each, one, little = 24 * 4, 4, 8
    # The model's copy and the new state of the optimizer, for undoing; the pages of the files, which are the system's.
    needed = {"saving": 0, "loading": each + each + 2 * each}
    record_property(
        f"peak host memory, MiB, of a model and a state of {each} each in tensors of {one}",
        f"saving {saving:.1f}, loading {loading:.1f} of which {needed['loading']} must be there",
    )
    assert saving < needed["saving"] + one + little
    assert loading < needed["loading"] + one + little
