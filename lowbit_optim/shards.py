"""Tensors of which every process has some rows: DTensors, as FSDP2 makes a model's parameters."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(x: Tensor) -> Tensor:
    """What this process has of a tensor; writing to it writes to the tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def here(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process has of each tensor."""
    return {key: local(x) for key, x in own.items()}


def mesh_of(x: Tensor) -> DeviceMesh | None:
    """The processes that have the rows of a tensor; None if it is a plain one."""
    return x.device_mesh if isinstance(x, DTensor) else None


def alike(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are both plain, or have their rows in the same places."""
    if isinstance(x, DTensor) and isinstance(other, DTensor):
        return x.device_mesh == other.device_mesh and x.placements == other.placements
    return isinstance(x, DTensor) == isinstance(other, DTensor)


def in_rows(x: DTensor) -> bool:
    """Whether every process has whole rows, one after the other: all of them, or those of its place in the mesh."""
    # FSDP2 over tensor parallelism has shards of the first dim that are not in the order of the mesh: another class.
    return all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in x.placements)


def rows_here(x: Tensor) -> tuple[int, int]:
    """The first row of a tensor ``in_rows`` that is here, and the one after the last."""
    first, last = 0, x.shape[0]
    if isinstance(x, DTensor):
        place = x.device_mesh.get_coordinate()
        assert place is not None
        for placement, size, rank in zip(x.placements, x.device_mesh.shape, place, strict=True):
            if placement.is_shard():  # as torch.chunk divides them
                each = -(-(last - first) // size)
                first, last = min(first + rank * each, last), min(first + (rank + 1) * each, last)
    return first, last


def like(rows: Tensor, shape: torch.Size, other: Tensor) -> Tensor:
    """What this process has of a tensor of a shape as such a tensor: a DTensor, if the other one is, placed as that.

    Args:
        rows: as many as the process has of the other tensor.
        shape: of the whole, which has as many rows as the other one.
    """
    if not isinstance(other, DTensor):
        return rows
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(rows, other.device_mesh, other.placements, shape=shape, stride=stride)
    return whole.to(rows.device)  # from_local has moved what is offloaded to the mesh's device


def zeros(shape: torch.Size, dtype: torch.dtype, other: Tensor) -> Tensor:
    """Zeros of a shape, placed ``like`` the other tensor and on its device."""
    rows = (*local(other).shape[:1], *shape[1:])
    return like(torch.zeros(rows, dtype=dtype, device=other.device), shape, other)


def placed(x: Tensor, other: Tensor) -> Tensor:
    """A whole tensor placed ``like`` the other one, without a copy of the rows; a DTensor as it is."""
    if isinstance(x, DTensor) or not isinstance(other, DTensor):
        return x
    return like(x[slice(*rows_here(other))] if x.dim() else x, x.shape, other)


def total(counts: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    """Counts that every process has made of its rows of some tensors, added up; one collective for each mesh.

    Args:
        counts: of each tensor, [].
        of: the tensors, on all processes the same. Plain ones, and replicas, have been counted whole.
    """
    found = list(counts)
    meshes: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, x in enumerate(of):
        if isinstance(x, DTensor):
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
