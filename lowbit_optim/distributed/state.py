"""State of which each rank has the blocks that it owns, as the rest of the world sees it: DTensors."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_optim.distributed.placement import Runs, chunks, overlap
from lowbit_optim.shards import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Layout = dict[str, tuple[torch.Size, torch.dtype]]


class OwnRuns:
    """Each rank has a run of the first dim, the blocks, of every tensor.

    All ranks must call ``shown`` and ``taken`` together: blocks change hands.
    """

    def __init__(self, group: dist.ProcessGroup, mesh: DeviceMesh | None) -> None:
        self._group, self._mesh = group, mesh
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def layout(self, of_ranks: list[Layout]) -> Layout:
        """Shapes and dtypes of the tensors that are shown, from those of the blocks as they are cut on each rank."""
        return of_ranks[0]

    def shown(self, own: dict[str, Tensor], layout: Layout, runs: Runs) -> dict[str, Tensor]:
        """Tensors of this rank's blocks as DTensors of the whole, which are sharded evenly on their first dim."""
        return self._dtensors(self._exchange(own, runs, chunks(runs[-1][1], self._size)), layout)

    def taken(self, given: dict[str, Tensor], own: Layout, runs: Runs) -> dict[str, Tensor]:
        """The inverse of ``shown``, which takes whole tensors, too.

        Args:
            own: shapes and dtypes of this rank's tensors.
        """
        first, last = runs[self._rank]
        shards = self._shards_of(given)
        taken = {name: x[first:last] for name, x in given.items() if name not in shards}
        return taken | (self._exchange(shards, chunks(runs[-1][1], self._size), runs) if shards else {})

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Of the DTensors."""
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            self._mesh = DeviceMesh.from_group(self._group, device.type)
        return self._mesh

    def _dtensors(self, parts: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shown: dict[str, Tensor] = {}
        for name, part in parts.items():
            mesh, (shape, _) = self.mesh(part.device), layout[name]
            placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
            stride = torch.empty(shape, device="meta").stride()
            shown[name] = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
        return shown

    def _shards_of(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of those tensors that are DTensors, what this rank has; made whole first, if they are not sharded as ours."""
        from torch.distributed.tensor import Shard

        shards = {}
        for name, x in given.items():
            if is_dtensor(x):
                if x.placements[-1] != Shard(0) or x.device_mesh.size(-1) != self._size:
                    first, last = chunks(x.shape[0], self._size)[self._rank]
                    shards[name] = x.full_tensor()[first:last]
                else:
                    shards[name] = x.to_local()
        return shards

    def _exchange(self, own: dict[str, Tensor], have: Runs, want: Runs) -> dict[str, Tensor]:
        """Tensors of which the ranks have runs of the first dim, of other runs."""
        names = sorted(own)
        each = {name: prod(own[name].shape[1:]) * own[name].dtype.itemsize for name in names}
        first = have[self._rank][0]
        sends = [overlap(have[self._rank], run) for run in want]
        receives = [overlap(run, want[self._rank]) for run in have]
        sent = [own[n][a - first : b - first].contiguous().view(-1).view(torch.uint8) for a, b in sends for n in names]
        bytes_each = sum(each.values())
        out = torch.empty(sum(b - a for a, b in receives) * bytes_each, dtype=torch.uint8, device=sent[0].device)
        received, sizes = ([(b - a) * bytes_each for a, b in runs] for runs in (receives, sends))
        dist.all_to_all_single(out, torch.cat(sent), received, sizes, group=self._group)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for a, b in receives:
            for name in names:
                part, out = out[: (b - a) * each[name]], out[(b - a) * each[name] :]
                found[name].append(part.clone().view(own[name].dtype).view(b - a, *own[name].shape[1:]))
        return {name: torch.cat(parts) for name, parts in found.items()}


class OwnShards(OwnRuns):
    """Each rank has blocks of its own, which differ from rank to rank: a row of numbers for each rank."""

    def layout(self, of_ranks: list[Layout]) -> Layout:
        """Rows are as long as the longest."""
        numbers: dict[str, int] = {}
        for layout in of_ranks:
            for name, (shape, _) in layout.items():
                numbers[name] = max(numbers.get(name, 0), shape.numel())
        dtypes = {name: dtype for layout in of_ranks for name, (_, dtype) in layout.items()}
        return {name: (torch.Size([self._size, most]), dtypes[name]) for name, most in sorted(numbers.items())}

    def shown(self, own: dict[str, Tensor], layout: Layout, runs: Runs) -> dict[str, Tensor]:
        device = next(iter(own.values())).device
        rows = {name: torch.zeros(1, shape[1], dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
        for name, x in own.items():
            rows[name][0, : x.numel()] = x.reshape(-1)
        return self._dtensors(rows, layout)

    def taken(self, given: dict[str, Tensor], own: Layout, runs: Runs) -> dict[str, Tensor]:
        shards = self._shards_of(given)
        rows = {name: shards[name][0] if name in shards else x[self._rank] for name, x in given.items()}
        return {name: rows[name][: shape.numel()].view(shape) for name, (shape, _) in own.items()}
