"""What benchmarks.promises tries: ours keep all of it, and each experiment tells an optimizer that does not."""

import copy

import pytest
import torch

from benchmarks import promises


@pytest.mark.parametrize("name", promises.OURS)
def test_ours_keep_every_promise(name):
    rows, errors = promises.tried({name: promises.OURS[name]})
    assert errors == []
    assert {row["promise"] for row in rows if row[name] != "yes"} == set()


class Breaking(torch.optim.SGD):
    """SGD that breaks one promise after the other, as it is told to."""

    def __init__(self, params, lr, way):
        super().__init__(params, lr, momentum=0.9)
        self.way = way

    def step(self, closure=None):
        if self.way == "closure":
            return None
        if self.way == "unused":
            for parameter in self.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad
        if self.way == "rate":
            self.param_groups[0]["lr"] = 0.1
        if self.way == "raises":
            raise RuntimeError("no")
        return super().step(closure)

    def state_dict(self):
        found = copy.deepcopy(super().state_dict())
        for own in found["state"].values():
            if self.way == "forgets":
                own["momentum_buffer"] *= 0
            if self.way == "object":
                own["kept"] = type(self)
        return found


@pytest.mark.parametrize(
    ("way", "broken"),
    [
        ("closure", "takes a closure"),
        ("unused", "leaves parameters without a gradient alone"),
        ("rate", "a rate of 0 moves nothing"),
        ("forgets", "resumes to the last bit"),
        ("forgets", "the same with bfloat16 parameters"),
        ("object", "state of plain tensors and numbers"),
        ("object", "opens with weights_only=True"),
        ("none", "a NaN in one gradient leaves weights finite"),
        ("raises", "resumes to the last bit"),
    ],
)
def test_a_broken_promise_shows(way, broken):
    rows, errors = promises.tried({"it": promises.of(Breaking, way=way)})
    (answer,) = (row["it"] for row in rows if row["promise"] == broken)
    assert answer == ("error" if way == "raises" or broken.startswith("opens") else "no")
    assert (broken in {error["promise"] for error in errors}) == (answer == "error")
