"""Optimizers over several processes: who owns which block, and the collectives that carry gradients and blocks.

A unit is what is preconditioned as one matrix. Its gradient is there as rows of that matrix: all rows on every rank
(DDP), or each rank's own (FSDP2). Its blocks are worked on by their owners: each rank has a run of them, or none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_optim.distributed.placement import Placement, Run, Runs, Unit, chunks, runs_of
from lowbit_optim.distributed.team import LocalTeam, ShardTeam, Team
from lowbit_optim.shards import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DISTRIBUTION", "Distribution", "Placement", "Run", "Runs", "Team", "Unit", "chunks", "runs_of"]

# Keywords that say how an optimizer is spread over processes.
DISTRIBUTION = ("process_group", "replicate", "shards", "exchange_dtype")


class Distribution:
    """How an optimizer is spread over processes, as its user asks for it, and the team that comes of it.

    Args:
        process_group: processes with equal gradients (DDP); None: this one alone, unless parameters are DTensors, whose
            mesh says which.
        replicate: every process keeps everything.
        shards: "whole" or "local": whether blocks are those of whole parameters or of their shards.
        exchange_dtype: "bfloat16" or None.

    Raises:
        ValueError: an unknown value, or a process group of which this process is no member.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        replicate: bool = False,
        shards: str = "whole",
        exchange_dtype: str | None = None,
    ) -> None:
        if shards not in ("whole", "local"):
            raise ValueError(f"shards is {shards!r}; it must be 'whole' or 'local'")
        if exchange_dtype not in (None, "bfloat16"):
            raise ValueError(f"exchange_dtype is {exchange_dtype!r}; it must be None or 'bfloat16'")
        if not isinstance(replicate, bool):
            raise ValueError(f"replicate is {replicate!r}; it must be True or False")
        if process_group is not None and not _is_member(process_group):
            raise ValueError(
                f"process_group is {process_group!r}; it must be a ProcessGroup that this process is a member of, as "
                "torch.distributed.group.WORLD is after init_process_group()"
            )
        self.process_group, self.replicate, self.shards = process_group, replicate, shards
        self.dtype = torch.bfloat16 if exchange_dtype else None
        self._team: Team | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Distribution:
        other = object.__new__(Distribution)  # for copy.copy would ask __reduce_ex__
        vars(other).update(vars(self), _team=copy.deepcopy(self._team, memo))
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None or self._team is not None:
            raise TypeError(
                "an optimizer in a process group cannot be pickled: save its state_dict(), with "
                "torch.distributed.checkpoint or lowbit_optim.save_checkpoint, and make the optimizer anew"
            )
        return super().__reduce_ex__(protocol)

    def team(self, parameters: Sequence[Tensor]) -> Team | None:
        """The processes that share the blocks of the parameters; None if this one has them to itself.

        Raises:
            TypeError: parameters that are sharded in a way that blocks cannot be made of.
            ValueError: process_group or replicate for DTensors.
        """
        mesh = _mesh_of(parameters)
        if mesh is None:
            if self.process_group is None or self.replicate:
                return None
            if self._team is None or type(self._team) is not Team:
                self._team = Team(self.process_group, self.dtype)
            return self._team
        if self.process_group is not None or self.replicate:
            raise ValueError(
                "the parameters are DTensors, whose mesh says which processes share the work, and of which no process "
                "has the whole: leave process_group and replicate out"
            )
        if self._team is None or self._team.state.mesh(torch.device(mesh.device_type)) != mesh:
            kind = ShardTeam if self.shards == "whole" else LocalTeam
            self._team = kind(mesh.get_group(mesh.ndim - 1), self.dtype, mesh)
        return self._team

    def batches(self, parameters: Sequence[Tensor]) -> list[dist.ProcessGroup]:
        """The groups over which, one after the other, sums over batches are taken."""
        mesh = _mesh_of(parameters)
        if mesh is not None:
            return [mesh.get_group(dim) for dim in range(mesh.ndim)]
        return [] if self.process_group is None else [self.process_group]


def _is_member(group: object) -> bool:
    return dist.is_available() and isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0


def _mesh_of(parameters: Sequence[Tensor]) -> DeviceMesh | None:
    """The mesh of those parameters that are DTensors; None if none is."""
    found = [p for p in parameters if is_dtensor(p)]
    if not found:
        return None
    from torch.distributed.tensor import Replicate, Shard

    for parameter in found:
        mesh, placements = parameter.device_mesh, parameter.placements
        if tuple(placements) not in ((Shard(0),), (Replicate(), Shard(0))) or mesh != found[0].device_mesh:
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} has placements {tuple(placements)} on {mesh}; blocks "
                "are made of parameters that are all sharded on dim 0 of one mesh, (Shard(0),) as fully_shard makes "
                "them, or (Replicate(), Shard(0)) with a mesh of two dims. Other placements (tensor parallelism) are "
                "not supported: give those parameters to another optimizer"
            )
    return found[0].device_mesh
