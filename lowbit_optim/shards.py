"""Tensors of which every process has some rows: DTensors, as FSDP2 makes a model's parameters.

Their module is imported where there are some already, or are to be: it takes a second.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Whether it is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """What this process has of a tensor; writing to it writes to the tensor."""
    return x.to_local() if is_dtensor(x) else x


def here(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process has of each tensor."""
    return {key: local(x) for key, x in own.items()}


def mesh_of(x: Tensor) -> DeviceMesh | None:
    """The processes that have the rows of a tensor; None if it is a plain one."""
    return x.device_mesh if is_dtensor(x) else None


def alike(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are both plain, or have their rows in the same places."""
    if is_dtensor(x) and is_dtensor(other):
        return x.device_mesh == other.device_mesh and x.placements == other.placements
    return is_dtensor(x) == is_dtensor(other)


def in_rows(x: DTensor) -> bool:
    """Whether every process has whole rows, one after the other: all of them, or those of its place in the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    # FSDP2 over tensor parallelism has shards of the first dim that are not in the order of the mesh: another class.
    return all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in x.placements)


def first_row(x: DTensor) -> int:
    """Which row of a tensor ``in_rows`` is the first that is here; of one without rows here any."""
    first, last = 0, x.shape[0]
    place = x.device_mesh.get_coordinate()
    assert place is not None
    for placement, size, rank in zip(x.placements, x.device_mesh.shape, place, strict=True):
        if placement.is_shard():  # as torch.chunk divides them
            each = -(-(last - first) // size)
            first, last = min(first + rank * each, last), min(first + (rank + 1) * each, last)
    return first


def zeros(shape: torch.Size, dtype: torch.dtype, other: Tensor) -> Tensor:
    """Zeros on the device of another tensor, of a shape with as many rows, placed as it is."""
    rows = torch.zeros((*local(other).shape[:1], *shape[1:]), dtype=dtype, device=other.device)
    if not is_dtensor(other):
        return rows
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(rows, other.device_mesh, other.placements, shape=shape, stride=stride)
    return whole.to(rows.device)  # from_local has moved what is offloaded to the mesh's device


def placed(x: Tensor, other: Tensor) -> Tensor:
    """A tensor, the same on all processes, placed as the other one is; of a DTensor, a plain one takes the whole."""
    if is_dtensor(x) and not is_dtensor(other):
        return x.full_tensor()
    if is_dtensor(x) or not is_dtensor(other):
        return x
    from torch.distributed.tensor import distribute_tensor

    whole = distribute_tensor(x.detach(), other.device_mesh, other.placements, src_data_rank=None)
    return whole.to(x.device)


def total(counts: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    """Counts that every process has made of its rows of some tensors, added up; one collective for each mesh.

    Args:
        counts: of each tensor, [].
        of: the tensors, on all processes the same. Plain ones, and replicas, have been counted whole.
    """
    found = list(counts)
    meshes: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, x in enumerate(of):
        if is_dtensor(x):
            shards = tuple(dim for dim, placement in enumerate(x.placements) if placement.is_shard())
            meshes.setdefault((x.device_mesh, shards), []).append(i)
    for (mesh, shards), members in meshes.items():
        home = found[members[0]].device
        sums = torch.stack([found[i] for i in members]).to(mesh.device_type)
        for dim in shards:
            dist.all_reduce(sums, group=mesh.get_group(dim))
        for i, count in zip(members, sums.to(home), strict=True):
            found[i] = count
    return found
