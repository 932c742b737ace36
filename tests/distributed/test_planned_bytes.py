"""What benchmarks.spread says that ranks have and send, and what estimates say, is what processes have and send."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from benchmarks.spread import Spread, factor_bytes
from lowbit_optim import Shampoo, estimate, state_bytes

# Sides that do not divide evenly, dims of size 1, matrices with fewer rows than ranks; of rank 1 and 0 at the end.
SHAPES = [(130, 64), (64, 50), (1, 96, 70), (2, 96), (33, 3, 3), (5, 7), (64,), ()]
LEFT = (20, 12)  # to the base
LIMIT, WORKSPACE, STEPS, RANKS = 48, 2**16, 3, 2
CASES = list(itertools.product(["ddp", "whole", "local"], [None, "bfloat16"]))


def train(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    found = {case: run(*case) for case in CASES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(mode, exchange_dtype):
    """What this rank has sent in some steps, the bytes of its factors, and of all its state."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    shapes = SHAPES if mode == "ddp" else SHAPES[:-1]  # a number has no rows
    values = [torch.randn(shape) for shape in (*shapes, LEFT)]
    if mode != "ddp":
        mesh = init_device_mesh("cpu", (RANKS,))
        values = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
    *parameters, left = map(nn.Parameter, values)
    spread = {"process_group": dist.group.WORLD} if mode == "ddp" else {"shards": mode}
    optimizer = Shampoo(
        [{"params": parameters}, {"params": [left], "precondition": False}],
        max_preconditioner_dim=LIMIT,
        workspace=WORKSPACE,
        statistics_frequency=2,
        exchange_dtype=exchange_dtype,
        **spread,
    )
    for _ in range(STEPS):
        for parameter in (*parameters, left):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    named = [item for own in optimizer.state.values() for item in own.items()]
    factors = sum(value.nbytes for name, value in named if name.startswith(("left.", "right.")))
    return optimizer.preconditioner.team.sent, factors, state_bytes(optimizer)["total"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By rank and case what was sent."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(train, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("mode", "exchange_dtype"), CASES)
def test_the_plan_says_what_is_sent_and_kept(found, mode, exchange_dtype):
    shapes = SHAPES if mode == "ddp" else SHAPES[:-1]
    sent_as = 2 if exchange_dtype else 4
    planned = Spread(shapes, mode, RANKS, left=1, limit=LIMIT, workspace=WORKSPACE, sent_as=sent_as)
    assert len(planned.rounds) > 1
    sent, factors, _ = zip(*(own[mode, exchange_dtype] for own in found), strict=True)
    assert sent == tuple(STEPS * own for own in planned.sent.tolist())
    assert factors == tuple(planned.summed(factor_bytes(2)).sum(0))


def test_an_estimate_says_what_each_rank_keeps(found):
    groups = [{"params": SHAPES}, {"params": [LEFT], "precondition": False}]
    planned = estimate(groups, world_size=RANKS, sharding="ddp", device="cpu", max_preconditioner_dim=LIMIT)
    assert planned.ranks == tuple(own["ddp", None][2] for own in found)
    assert planned.ranks[0] != planned.ranks[1]
