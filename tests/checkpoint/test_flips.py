"""Every byte of a checkpoint counts."""

import copy

import pytest
import torch
from torch import nn

from lowbit_optim import Shampoo
from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoint.common import kinds, refused, same


def refused_by_name(folder, name):
    try:
        load_checkpoint(folder)  # without live objects, which is faster: the files are verified all the same
    except CheckpointError as error:
        return name in str(error)
    return False


def test_every_byte_flipped_in_turn(tmp_path, record_property):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = Shampoo(model.parameters(), bits=2, min_quant_size=1, statistics_frequency=1)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    flips, refusals = 0, 0
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        damaged = bytearray(content)
        with open(file, "r+b", buffering=0) as out:
            for i, byte in enumerate(content):
                damaged[i] = byte ^ (1 << flips % 8)
                out.seek(i)
                out.write(damaged[i : i + 1])
                flips += 1
                refusals += refused_by_name(tmp_path, file.name)
                damaged[i] = byte
                out.seek(i)
                out.write(content[i : i + 1])
    load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    record_property("bytes flipped, each refused", flips)
    assert flips == sum(file.stat().st_size for file in tmp_path.iterdir()) == refusals
    assert same([model.state_dict(), optimizer.state_dict()], before)


@pytest.mark.parametrize("kind", ["model", "optimizer", "trainer"])
def test_live_objects_are_not_touched(good, live, kind):
    file = kinds(good)[kind]
    content = bytearray(file.read_bytes())
    for i in (0, 8, len(content) // 2, len(content) - 1):
        content[i] ^= 1
        file.write_bytes(content)
        refused(good, live, file.name)
        content[i] ^= 1
