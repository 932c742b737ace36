"""Warnings of what a step had to leave out, each once and without waiting for the device."""

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("lowbit_optim")

_TROUBLES = (
    "%d gradient blocks were not finite and were replaced by zeros; stats() and state[p]['nonfinite'] count them. "
    "This is said once.",
    "%d updates of factors failed, for a statistic or a decomposition that is not finite, and the last good ones were "
    "kept; stats(), state[p]['left.failures'] and 'right.failures' count them. This is said once.",
)


class Watch:
    """Looks at the troubles of each step; on CUDA when they have arrived on the host."""

    def __init__(self, messages: tuple[str, ...] = _TROUBLES) -> None:
        self._messages = messages
        self._warned = [False for _ in messages]
        self._pending: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self, troubles: Tensor | None) -> None:
        """Warn of troubles, by default non-finite gradient blocks and failed decompositions, unless that was said.

        Args:
            troubles: how many of each, int64 [as many as messages].
        """
        if troubles is None or all(self._warned):
            return
        if troubles.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph's replays do not come by here; the state counts on
        arrived = [troubles]
        if troubles.is_cuda:
            host = torch.empty(len(self._messages), dtype=torch.int64, pin_memory=True).copy_(
                troubles, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
            self._pending.append((host, event))
            arrived = []
            while self._pending and self._pending[0][1].query():
                arrived.append(self._pending.pop(0)[0])
        for i, message in enumerate(self._messages):
            count = sum(int(t[i]) for t in arrived)
            if count and not self._warned[i]:
                logger.warning(message, count)
                self._warned[i] = True

    def __getstate__(self) -> dict[str, Any]:
        return {"_messages": self._messages, "_warned": list(self._warned), "_pending": []}
