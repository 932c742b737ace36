"""What a step does on a GPU and must not: wait for it."""

import pytest
import torch
from torch import nn

from lowbit_optim import CASPR, Shampoo
from tests.contract import random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def begun(make, **settings):
    """An optimizer whose factors have had a statistic, and its parameters with gradients."""
    parameters = [nn.Parameter(random(*shape).cuda()) for shape in ((96, 80), (64, 64), (33,))]
    optimizer = make(parameters, lr=0.01, bits=4, statistics_frequency=1, capturable=True, **settings)
    for seed in range(3):
        for parameter in parameters:
            parameter.grad = random(*parameter.shape, seed=seed).cuda()
        optimizer.step()
        optimizer.param_groups[0]["statistics_frequency"] = 1000
    return optimizer, parameters


@pytest.mark.parametrize("make", [Shampoo, CASPR])
@pytest.mark.parametrize("settings", [{}, {"apply_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_an_ordinary_step_is_captured(make, settings):
    optimizer, parameters = begun(make, **settings)
    eager, others = begun(make, **settings)
    fresh = [p.grad.clone() for p in parameters]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        for own in (parameters, others):
            for parameter, gradient in zip(own, fresh, strict=True):
                parameter.grad.copy_(gradient)
        graph.replay()
        eager.step()
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", [Shampoo, CASPR])
def test_an_ordinary_step_waits_for_nothing(make):
    optimizer, _ = begun(make)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
