"""What the plan for many ranks computes from shapes, costs and a network."""

import argparse
from math import prod

import numpy as np
import pytest
import torch

from benchmarks import costs, scale_plan, spread
from benchmarks.costs import Costs, Host
from benchmarks.scale_plan import Network, Plan
from benchmarks.spread import Spread
from lowbit_optim import AdamW, Shampoo, state_bytes
from lowbit_optim.shapes import MODELS

GPUS = [64, 256, 1024, 4096]
SHAPES = [(130, 64), (64, 50), (1, 96, 70), (2, 96), (64,)]
NETWORK = Network(node=8, inside=400.0, between=50.0, latency=1.0, message=0.5)


def arguments(**more):
    plain = {"models": list(scale_plan.PLANNED), "gpus": GPUS, "bits": 2, "base_bits": 4, "limit": 1200, "period": 100}
    plain |= {"workspace": 2**28, "exchange_dtype": None, "dtype": "bfloat16", "gpu_gb": 80.0, "others_gb": 20.0}
    return argparse.Namespace(**(plain | {"node": 8} | more))


@pytest.fixture(scope="module")
def placements():
    return scale_plan.placements(arguments())


def test_placements_are_within_a_twentieth_of_the_mean(placements):
    """In work and in bytes, wherever there are 20 blocks for each rank."""
    for row in placements:
        assert row["blocks"] >= 20 * row["ranks"]
        assert row["worst / mean, cost"] <= 1.05, row
        assert row["worst / mean, bytes"] <= 1.05, row
    found = {(row["model"], row["ranks"]) for row in placements}
    assert {("llama2-7b", 256), ("llama3-70b", 1024), ("llama3-405b", 4096)} <= found


def test_a_fourth_of_gpt2_is_on_each_of_four_ranks(placements):
    (row,) = [row for row in placements if (row["model"], row["ranks"]) == ("gpt2", 4)]
    assert 0.25 <= row["worst / all, bytes"] <= 0.27


@pytest.mark.parametrize(("bits", "limit"), [(2, 48), (4, 64), (32, 48)])
def test_bytes_of_factors_and_moments_are_those_of_optimizers(bits, limit):
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = Shampoo(parameters, bits=bits, max_preconditioner_dim=limit)
    optimizer.init_state()
    real = sum(x.nbytes for own in optimizer.state.values() for name, x in own.items() if "." in name)
    for mode in ("ddp", "whole"):
        own = Spread(SHAPES, mode, 3, limit=limit).summed(spread.factor_bytes(bits))
        assert own.sum() == real
    adam = AdamW(parameters, bits=4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    kinds = state_bytes(adam)
    assert spread.moment_bytes(SHAPES, 4, torch.float32) == kinds["moments"] + kinds["scales"]


def test_a_network_of_one_node_and_of_several():
    assert NETWORK.all_gather(8, 100) == 3 * 1.0 + 7 * 100 / 400
    slow = Network(node=4, inside=400.0, between=50.0, latency=1.0, message=0.5)
    assert slow.all_gather(16, 100) == 4 * 1.0 + 15 * 100 / 200
    assert slow.all_reduce(16, 1600) == 2 * slow.all_gather(16, 100)
    assert NETWORK.all_to_all(8, 100, 7) == 1 + 0.5 * 7 + 100 / 400
    assert NETWORK.all_to_all(15, 100, 14) == 1 + 0.5 * 14 + 100 / 2 / 50


@pytest.mark.parametrize("mode", spread.MODES)
def test_a_step_is_that_of_its_rounds_one_after_the_other(mode):
    """Followed by hand: what waits for what, with costs of which now the work and now the network is the larger."""
    own = Spread(SHAPES, mode, 3, left=1, limit=48, workspace=2**16)
    assert len(own.rounds) > 2
    for scale in (1e-6, 1e-3, 1.0):
        of = Costs("", (scale, 0.0, 0.0), (0.0, scale, 0.0), 0.25, 1e-4, Host(2.0, 0.125, 0.5))
        found = scale_plan.step(own, 1000, of, NETWORK)
        clocks = []
        for updates in (False, True):
            clock = NETWORK.all_gather(3, scale_plan.AGREED) + NETWORK.all_reduce(3, 4 * own.alone)
            arrives = clock + coming(own, 0)
            left = 0.0
            for i in range(len(own.rounds)):
                clock = max(clock, arrives)
                began = clock
                clock += max(
                    sum(work(blocks, rank, scale, updates) for share in own.rounds[i] for blocks in share.blocks)
                    + (2.0 + 0.125 * own.pieces[i, rank] + 1e-4 * own.copied[i, rank])
                    for rank in range(3)
                )
                clock += NETWORK.all_gather(3, own.told[i, 0])
                clock = max(clock, began + coming(own, i + 1) + left)  # one link for both
                arrives, left = clock, going(own, i)
            clocks.append(clock + left + 250 + 0.5 * 3 * 4)
        assert [found.whole, found.worst] == pytest.approx(clocks)
        assert found.mean(10) == pytest.approx(0.9 * clocks[0] + 0.1 * clocks[1])


def work(blocks, rank, scale, updates):
    r, c = blocks.rows, blocks.columns
    return int(blocks.counts[rank]) * scale * (r * c * (r + c) + updates * r * c * (r + c))


def coming(own, i):
    if own.mode != "whole" or i == len(own.rounds):
        return 0.0
    sent, received = (x[i].max() for x in own.collected)
    return NETWORK.all_to_all(3, max(sent, received), own.messages[i].max())


def going(own, i):
    return NETWORK.all_gather(3, own.gathered[i, 0]) if own.mode == "ddp" else coming(own, i)


def test_what_is_fitted_is_found_again():
    pytest.importorskip("scipy", reason="it fits with scipy, which comes with the extra bench")
    known = (3e-9, 2e-6, 5e-7)
    sizes = [*costs.MEASURED, (64, 32)]
    seconds = {size: float(np.dot(known, costs._work_of_step(*size))) for size in sizes}
    assert costs._fitted(costs._work_of_step, seconds) == pytest.approx(known)


def test_pieces_that_are_copied_are_those_of_the_library():
    """Those of the first of some ranks, in one round; a matrix with rows and blocks that do not divide evenly."""
    for ranks, rows, columns, limit in [(3, 130, 64, 48), (4, 33, 100, 10), (16, 64, 50, 20)]:
        team = costs.OneOfMany(ranks)
        unit = team.unit(rows, columns, limit)
        routes = [team._routes([unit], of) for of in (team._in_my_rows, team._of_my_blocks)]
        pieces = [piece.place.numbers for parts in routes for part in parts for _, piece in part]
        own = Spread([(rows, columns)], "whole", ranks, limit=limit)
        assert own.pieces[0, 0] == 2 * len(pieces)
        assert own.copied[0, 0] == 2 * sum(pieces)


def test_an_update_on_a_gpu_takes_the_products_of_its_iterations(monkeypatch):
    """16 to read a statistic, 28 for a root, one for the new statistic; and sums that are counted as products.

    At 2 bits two more, for the weight that codes are chosen by.
    """
    assert 45 <= costs.products_of_update(4) < 47
    assert costs.products_of_update(2) == costs.products_of_update(4) + 2
    monkeypatch.setattr(costs, "of_host", lambda rounds: (Host(0.0, 0.0, 0.0), 0.0))
    of, _ = costs.assumed(2, 4, 2, flops=2e3, bandwidth=1e30, rounds=1)
    assert of.of_ordinary(10, 20) == pytest.approx(10 * 20 * 30 / 1e3)
    assert of.of_update(10, 10) == pytest.approx(2 * costs.products_of_update(2), rel=1e-6)


def test_a_plan_counts_what_training_sends_itself():
    own = Spread(SHAPES, "whole", 4)
    shapes = {str(i): shape for i, shape in enumerate([(8, 6), (4,)])}
    numbers = 8 * 6 + 4
    ddp = Plan(shapes, "DDP", 4, 4, own, {})
    assert ddp.own_gb(2) == pytest.approx(2 * 3 / 4 * numbers * 2 / 1e9)
    whole = Plan(shapes, "FSDP2 whole", 4, 4, own, {})
    assert whole.own_gb(2) == pytest.approx(3 * 3 / 4 * numbers * 2 / 1e9)
    hybrid = Plan(shapes, "HSDP whole", 8, 4, own, {})
    assert hybrid.own_gb(2) == pytest.approx((3 * 3 / 4 * numbers + 2 * 1 / 2 * numbers / 4) * 2 / 1e9)


def test_what_limits_is_memory_then_what_takes_longest():
    """A model of 7B on 16 GPUs; copies of HSDP grow until they fit."""
    nothing, host = (0.0, 0.0, 0.0), Host(1.0, 0.0, 0.0)
    of = {
        "host": Costs("", nothing, nothing, 0.0, 0.0, Host(1.0, 1e12, 0.0)),
        "network": Costs("", nothing, nothing, 0.0, 0.0, host),
        "update": Costs("", nothing, (1.0, 0.0, 0.0), 0.0, 0.0, host),
        "ordinary": Costs("", (1.0, 0.0, 0.0), nothing, 0.0, 0.0, host),
    }
    shapes = MODELS["llama2-7b"]()
    room = arguments(gpus=[16])
    found = {own.mode: own for own in scale_plan.plans(shapes, room)}
    for limit, own_costs in of.items():
        assert scale_plan.rows_of(found["FSDP2 whole"], own_costs, NETWORK, room)[1]["limit"] == limit
    assert found["HSDP whole"].shards == 8
    tight = arguments(gpus=[16], gpu_gb=found["HSDP whole"].total - 0.1, others_gb=0.0)
    found = {own.mode: own for own in scale_plan.plans(shapes, tight)}
    memory, steps = scale_plan.rows_of(found["DDP"], of["update"], NETWORK, tight)
    assert (memory["fits"], steps["limit"]) == ("no", "memory")
    assert memory["parameters"] == pytest.approx(2 * 6_738_415_616 / 1e9)
    assert found["HSDP whole"].shards == 16
    assert found["FSDP2 whole"].memory["parameters"] == pytest.approx(memory["parameters"] / 16)


def test_the_first_rank_has_most_rows():
    assert spread.numbers_on_first([(10, 3), (2, 5), (7,)], 4) == 3 * 3 + 1 * 5 + 2
    assert spread.numbers_on_first([(10, 3)], 1) == prod((10, 3))


def test_the_hosts_costs_are_of_steps_that_are_taken():
    host, copied = costs.of_host(1)
    assert min(host.each_round, host.each_owner) > 0
    assert np.isfinite([host.each_piece, copied]).all()
