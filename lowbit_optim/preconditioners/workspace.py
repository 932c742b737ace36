"""Memory for temporary tensors."""

from itertools import accumulate
from math import prod

import torch
from torch import Tensor

# Bytes for each thread of a CPU: what stays in its caches is worked on several times faster.
CACHE = 32 * 2**20


class Workspace:
    """Room for temporary tensors. On the CPU it is small enough for the caches, and kept from step to step.

    (Fresh pages come one by one from the system, which takes longer than to fill them. CUDA's memory torch keeps
    itself.) What stays is as large as one run of blocks, ``CACHE`` bytes a thread at most. A copy or a pickle is empty.
    """

    def __init__(self) -> None:
        self.meta = "cpu"  # the kind of device that tensors on "meta" stand for
        self._kept: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()

    def room(self, device: torch.device, limit: int) -> int:
        """Bytes that a run of blocks should take at most, where the user's limit is this."""
        return min(limit, CACHE * torch.get_num_threads()) if self.on_cpu(device) else limit

    def kept(self, name: str) -> int:
        """Bytes that stay there under a name."""
        return self._kept[name].numel() if name in self._kept else 0

    def take(self, name: str, device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Tensors with any content; what was taken under the same name before is overwritten through them."""
        sizes = [prod(shape) for shape in shapes]
        size = sum(sizes) * dtype.itemsize
        if not self.on_cpu(device) or size > CACHE * torch.get_num_threads():
            return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = torch.empty(size, dtype=torch.uint8, device=device)
        whole = self._kept[name][:size].view(dtype)
        starts = accumulate(sizes[:-1], initial=0)
        return [whole[i : i + n].view(shape) for i, n, shape in zip(starts, sizes, shapes, strict=True)]

    def on_cpu(self, device: torch.device) -> bool:
        """Whether it is a CPU, or stands for one."""
        return (self.meta if device.type == "meta" else device.type) == "cpu"
