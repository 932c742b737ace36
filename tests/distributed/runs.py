"""Runs of steps with gradients that all processes know: in one process, shared among several, or of rows on each."""

import hashlib
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lowbit_optim import CASPR, SOAP, Shampoo

STEPS = 20
# Matrices of several blocks and of one, batches of them, and what is none. Sides of multiples of 16 come out of MKL's
# products to the same bits wherever they lie in memory; others do with the environment STRICT.
SHAPES = ((96, 64), (144, 64), (64,), (192, 32), (16, 8, 2, 2), (1, 32, 32), (7,))
# Rows that no number of ranks divides, or fewer than ranks.
ODD_SHAPES = ((7, 50), (5, 33), (3, 130), (130, 5), (9,), (2, 3, 4, 5), (1, 20, 30))
STRICT = {"MKL_CBWR": "AVX2,STRICT"}


def on(*worlds):
    """The test is run on these numbers of ranks instead of on all."""
    return pytest.mark.parametrize("ranks", worlds, indirect=True, ids=[f"world-{n}" for n in worlds])


def _of(optimizer, **settings):
    return lambda parameters, **more: optimizer(parameters, **{**settings, **more})


def _in_groups(parameters, **more):
    """Settings differ, and what is not preconditioned now may be later."""
    groups = [
        {"params": parameters[:2], "bits": 4, "statistics_frequency": 3},
        {"params": parameters[2:4], "graft": False, "start_preconditioning_step": 5},
        {"params": parameters[4:], "precondition": False, "lr": 0.1},
    ]
    return Shampoo(groups, **{**_shampoo, **more})


_small = {"lr": 0.01, "min_quant_size": 64, "statistics_frequency": 2}
_shampoo = {**_small, "max_preconditioner_dim": 48}
_soap = {**_small, "statistics_frequency": 1, "precondition_frequency": 2}
CASES = {
    "shampoo 32": _of(Shampoo, **_shampoo, bits=32, precondition_frequency=6),
    "shampoo 4": _of(Shampoo, **_shampoo, bits=4, base="sgd", momentum=0.9),
    "shampoo 2": _of(Shampoo, **_shampoo, bits=2),
    "groups": _in_groups,
    "stagger": _of(Shampoo, **{**_shampoo, "statistics_frequency": 4}, bits=2, stagger=True),
    "staggered logarithm": _of(Shampoo, **_shampoo, bits=4, storage="logarithm", stagger=True, graft=False),
    "spiked": _of(Shampoo, **_shampoo, bits=1, storage="spiked"),
    "no graft": _of(Shampoo, **_shampoo, bits=4, graft=False, base="adagrad"),
    "eigen": _of(Shampoo, **_shampoo, bits=4, storage="eigen", precondition_frequency=4, start_preconditioning_step=7),
    "4-bit base": _of(Shampoo, **_shampoo, bits=2, base_bits=4),
    "bfloat16 roots": _of(Shampoo, **_shampoo, bits=4, apply_dtype="bfloat16"),
    "small workspace": _of(Shampoo, **_shampoo, bits=2, stagger=True, workspace=40_000),
    "caspr": _of(CASPR, **_shampoo, bits=4),
    "soap 32": _of(SOAP, **_soap, bits=32, amsgrad=True),
    "soap 4": _of(SOAP, **_soap, bits=4),
    "soap eigen": _of(SOAP, **{**_soap, "max_preconditioner_dim": 150}, bits=4, base_bits=8, basis="eigen"),
}
# One of each class, and blocks that take turns.
CLASSES = ("shampoo 2", "stagger", "caspr", "soap 4")


def parameters_of(shapes, dtypes=(torch.float32,)):
    """The same for every process; dtypes take turns."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(x.to(dtypes[i % len(dtypes)])) for i, x in enumerate(numbers)]


def gradients(shapes, step):
    """Of very different magnitudes, as those of layers are."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 10.0**-i for i, shape in enumerate(shapes)]


def mesh_of(world, replicas=1):
    """Of all ranks, which are so many copies of a group that has all rows."""
    if replicas == 1:
        return DeviceMesh("cpu", range(world))
    return DeviceMesh("cpu", torch.arange(world).view(replicas, -1), mesh_dim_names=("replicas", "rows"))


def sharded(x, mesh):
    """A tensor that all ranks have, by rows on the last dim of a mesh."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None)


def give_gradients(parameters, step):
    for parameter, gradient in zip(parameters, gradients([p.shape for p in parameters], step), strict=True):
        gradient = gradient.to(parameter.dtype)
        parameter.grad = sharded(gradient, parameter.device_mesh) if isinstance(parameter, DTensor) else gradient


def train(parameters, optimizer, steps):
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()


@cache
def alone(case, steps=STEPS, shapes=SHAPES, dtypes=(torch.float32,)):
    """(parameters, optimizer) of one process after so many steps. Nobody may go on with them."""
    parameters = parameters_of(shapes, dtypes)
    optimizer = CASES[case](parameters)
    train(parameters, optimizer, range(steps))
    return parameters, optimizer


def shared(case, steps=STEPS, shapes=SHAPES, dtypes=(torch.float32,), **more):
    """Likewise of all processes, which have equal gradients."""
    parameters = parameters_of(shapes, dtypes)
    optimizer = CASES[case](parameters, process_group=dist.group.WORLD, **more)
    train(parameters, optimizer, range(steps))
    return parameters, optimizer


def in_rows(case, mesh, steps=STEPS, shapes=SHAPES, dtypes=(torch.float32,), **more):
    """Likewise of the processes of a mesh, each with its rows of parameters and gradients."""
    parameters = [nn.Parameter(sharded(p, mesh)) for p in parameters_of(shapes, dtypes)]
    optimizer = CASES[case](parameters, **more)
    train(parameters, optimizer, range(steps))
    return parameters, optimizer


# ---- what became of them ---------------------------------------------------------------------------------------------


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def digest(x):
    """Of a tensor, or of what else is in a state, something short that tells its bits."""
    if not isinstance(x, torch.Tensor):
        return repr(x)
    x = whole(x).contiguous()
    bits = x.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{x.dtype} {list(x.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"


def digests(parameters, optimizer):
    """Of parameters and of what ``state_dict()`` holds, as one process would have it."""
    found = {f"parameter {i}": digest(p) for i, p in enumerate(parameters)}
    for i, own in optimizer.state_dict()["state"].items():
        found |= {f"{i} {name}": digest(value) for name, value in own.items()}
    return found
