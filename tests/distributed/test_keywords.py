"""Keywords and parameters that cannot be, and what is said of them."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbit_optim import Shampoo
from tests.distributed.runs import mesh_of, on, sharded


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shards": "rows"}, "shards is 'rows'; it must be 'whole' or 'local'"),
        ({"exchange_dtype": "float16"}, "exchange_dtype is 'float16'; it must be None or 'bfloat16'"),
        ({"exchange_dtype": torch.bfloat16}, "exchange_dtype is torch.bfloat16; it must be None or 'bfloat16'"),
        ({"replicate": 1}, "replicate is 1; it must be True or False"),
        ({"process_group": "world"}, "process_group is 'world'; it must be a ProcessGroup that this process is a"),
    ],
)
def test_values_that_are_none(keywords, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Shampoo([nn.Parameter(torch.zeros(4, 4))], **keywords)


@pytest.mark.parametrize("key", ["process_group", "replicate", "shards", "exchange_dtype"])
def test_settings_of_the_whole(key):
    group = {"params": [nn.Parameter(torch.zeros(4, 4))], key: None}
    with pytest.raises(
        ValueError, match=f"a param group has the key '{key}', which is a setting of the whole optimizer"
    ):
        Shampoo([group])


def of_others(rank, world):
    others = dist.new_group([1])
    if rank == 0:
        with pytest.raises(ValueError, match="it must be a ProcessGroup that this process is a member of"):
            Shampoo([nn.Parameter(torch.zeros(4, 4))], process_group=others)


def test_a_group_of_others(start):
    start(2)(of_others)


def refused(rank, world):
    """DTensors that cannot be, and keywords that do not go with them: {what: the message}."""
    line, square = mesh_of(world), mesh_of(world, 2)
    x = torch.ones(8, 8)

    def of(*tensors, **keywords):
        parameters = [nn.Parameter(t) for t in tensors]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer = Shampoo(parameters, **keywords)
        with pytest.raises((TypeError, ValueError)) as error:
            optimizer.step()
        assert not optimizer.state
        return f"{error.type.__name__}: {error.value}"

    def placed(mesh, *placements):
        return distribute_tensor(x, mesh, placements, src_data_rank=None)

    rows = sharded(x, line)
    return {
        "columns": of(placed(line, Shard(1))),
        "copies": of(placed(line, Replicate())),
        "parts": of(DTensor.from_local(x, line, [Partial()])),
        "both": of(placed(square, Shard(0), Shard(1))),
        "two dims": of(placed(square, Shard(0), Shard(0))),
        "meshes": of(rows, placed(DeviceMesh("cpu", [*reversed(range(world))]), Shard(0))),
        "group": of(rows, process_group=dist.group.WORLD),
        "replicate": of(rows, replicate=True),
    }


@on(4)
def test_dtensors(ranks):
    for found in ranks(refused):
        for what in ("columns", "copies", "parts", "both", "two dims"):
            assert re.match(
                r"TypeError: a parameter of shape \(8, 8\) has placements .*; blocks are made of", found[what]
            )
            assert "tensor parallelism" in found[what]
        assert "(Shard(dim=1),)" in found["columns"]
        assert "all sharded on dim 0 of one mesh" in found["meshes"]
        for what in ("group", "replicate"):
            assert found[what].startswith("ValueError: the parameters are DTensors, whose mesh says which processes")
