"""The rows of a unit's gradient that are here, as one matrix."""

from collections.abc import Iterator
from itertools import accumulate

from torch import Tensor

from lowbit_optim.blocking import Rectangle
from lowbit_optim.distributed.placement import Unit
from lowbit_optim.shards import local


class Rows:
    """The rows of a unit's gradient that are here, as one matrix."""

    def __init__(self, unit: Unit, first: int) -> None:
        self._first = first
        self._gradients = [None if p.grad is None else local(p.grad) for p in unit.parameters]
        columns = unit.cut.matrix[1]
        widths = [columns] if len(unit.parameters) == 1 else [columns - 1, 1]
        self._starts = list(accumulate(widths, initial=0))
        # Views of the gradients, where they are contiguous.
        self._parts = [None if g is None else g.reshape(-1, w) for g, w in zip(self._gradients, widths, strict=True)]

    def read(self, place: Rectangle, out: Tensor) -> None:
        for part, start, here in self._overlaps(place):
            target = out[:, start : start + here.columns]
            if part is None:
                target.zero_()
            else:
                target.copy_(part[here.top : here.bottom, here.left : here.right])

    def write(self, place: Rectangle, values: Tensor) -> None:
        for part, start, here in self._overlaps(place):
            if part is not None:
                part[here.top : here.bottom, here.left : here.right] = values[:, start : start + here.columns]

    def done(self) -> None:
        """Bring what was written to gradients that are not contiguous."""
        for gradient, part in zip(self._gradients, self._parts, strict=True):
            if gradient is not None and part is not None and part.data_ptr() != gradient.data_ptr():
                gradient.copy_(part.view_as(gradient))

    def _overlaps(self, place: Rectangle) -> Iterator[tuple[Tensor | None, int, Rectangle]]:
        """For each part that a place lies in: the part, the first column of the place that does, where it is there."""
        top, bottom = place.top - self._first, place.bottom - self._first
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            left, right = max(place.left, start), min(place.right, end)
            if left < right:
                yield part, left - place.left, Rectangle(top, bottom, left - start, right - start)
