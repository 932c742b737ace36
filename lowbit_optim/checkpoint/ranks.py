"""The processes that save or load a checkpoint together: all of them do it, or none."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from lowbit_optim.checkpoint.manifest import CheckpointError

# What another rank raised is raised here as the first of these that it is.
_ERRORS: tuple[type[Exception], ...] = (CheckpointError, BlockingIOError, OSError, TypeError, ValueError, RuntimeError)


class Ranks:
    """The ranks of a process group, or one process alone, which talks to nobody.

    Each method is a collective: every rank calls the same ones in the same order. A rank that has ended lets torch
    raise a RuntimeError in the others, at the latest after the group's timeout.

    Args:
        group: a torch ProcessGroup of which this process is one; None for this process alone.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise ValueError("this process is not in the process_group given: only the ranks of the group call this")

    @property
    def first(self) -> bool:
        """Whether this is the one that decides what the checkpoint is."""
        return self.rank == 0

    def members(self) -> set[int]:
        """The ranks in the whole world."""
        if self.group is None:
            return {dist.get_rank() if dist.is_available() and dist.is_initialized() else 0}
        return {*dist.get_process_group_ranks(self.group)}

    def all(self, value: Any) -> list[Any]:
        """The values of all ranks, small ones, on each of them."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def to_first(self, value: Any) -> list[Any]:
        """The values of all ranks on the first, nothing on the others."""
        values = [value] * self.size if self.first else []
        if self.group is not None:
            dist.gather_object(value, values if self.first else None, group_dst=0, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """The value of the first rank, on each of them."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, group_src=0, group=self.group)
        return values[0]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """What raises on one rank in here raises on all: a rank leaves this well only if every rank does."""
        if self.group is None:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        kinds = [] if own is None else [i for i, kind in enumerate(_ERRORS) if isinstance(own, kind)]
        told = self.all(None if own is None else (kinds[0] if kinds else len(_ERRORS) - 1, str(own)))
        if own is not None:
            raise own
        for rank, failure in enumerate(told):
            if failure is not None:
                raise _ERRORS[failure[0]](f"rank {rank}: {failure[1]}")


ALONE = Ranks()
