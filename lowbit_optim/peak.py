"""The bytes that are alive during an optimizer's steps: real ones, or those of a rehearsal on the meta device."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_optim.optimizers.report import tensors_in

_aten = torch.ops.aten


class Tracker(TorchDispatchMode):
    """Counts the bytes of every storage that torch operators make or meet while it is on, until the storage is freed.

    What an operator allocates and frees inside itself is not seen. On the meta device a number that is asked for is
    True: steps ask only whether everything went well.

    Attributes:
        live: bytes that are there now.
        peak: the most that have been there at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def add(self, tensors: Iterable[Any]) -> None:
        """Count these tensors' storages, each once; what is no tensor is passed over."""
        self._meet(tensors, True)

    def leave_out(self, tensors: Iterable[Any]) -> None:
        """Do not count these tensors' storages: those of parameters and gradients."""
        self._meet(tensors, False)

    def _meet(self, values: Iterable[Any], counts: bool) -> None:
        for storage in {part.untyped_storage() for value in values for part in tensors_in(value)}:
            key, size = storage._cdata, storage.nbytes() * counts
            if key not in self._known:
                self._known[key] = weakref.ref(storage, partial(self._freed, key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int, _: Any) -> None:
        self._known.pop(key, None)
        self.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.add(tree_leaves((args, kwargs)))  # tables that are kept between steps, first of all
        result = _on_meta(function, args)
        if result is None:
            result = function(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def _on_meta(function: Any, args: Any) -> Any:
    """What an operator that torch does not have on the meta device returns there; None for all others."""
    if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
        return None
    if function is _aten._local_scalar_dense.default:
        return True
    if function is _aten.geqrf.default:
        return torch.empty_like(args[0]), args[0].new_empty(*args[0].shape[:-2], min(args[0].shape[-2:]))
    return None


def collected(optimizer: Optimizer) -> list[Tensor]:
    """What the hooks of K-FAC hold for the coming step."""
    layers = getattr(getattr(optimizer, "preconditioner", None), "layers", ())
    return [tensor for layer in layers for pair in layer.sums.values() for tensor in pair]


def peak_bytes(optimizer: Optimizer, backward: Callable[[], Any], steps: int = 3) -> int:
    """The most bytes that state and temporaries of an optimizer take at one time in its steps.

    Parameters and gradients do not count. On CUDA the allocator is asked, which nothing else must use meanwhile;
    elsewhere operators are watched (``Tracker``).

    Args:
        optimizer: one of torch's kind, new or not.
        backward: makes the gradients of a step; it is not measured.
        steps: how many to take. Default 3.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tracker, most = Tracker(), 0
    for _ in range(steps):
        backward()
        if parameters[0].is_cuda:
            most = max(most, _on_cuda(optimizer, parameters[0].device))
        else:
            tracker.leave_out([*parameters, *(p.grad for p in parameters)])
            tracker.add(collected(optimizer))
            tracker.add(own for own in optimizer.state.values())
            with tracker:
                optimizer.step()
            most = tracker.peak
    return most


def _on_cuda(optimizer: Optimizer, device: torch.device) -> int:
    """The peak of one step by the counts of the allocator."""
    storages = {t.untyped_storage() for own in optimizer.state.values() for t in tensors_in(own) if t.is_cuda}
    storages |= {t.untyped_storage() for t in collected(optimizer)}
    apart = torch.cuda.memory_allocated(device) - sum(storage.nbytes() for storage in storages)
    storages.clear()
    torch.cuda.reset_peak_memory_stats(device)
    optimizer.step()
    return torch.cuda.max_memory_allocated(device) - apart
