"""Which rank owns which blocks, and what of them passes together; without processes."""

from collections import Counter

import pytest
import torch

from lowbit_optim.blocking import blocking
from lowbit_optim.distributed import Placement, Unit, runs_of
from lowbit_optim.preconditioners.shared import rounds
from lowbit_optim.shapes import MODELS

# Of the largest, tests/test_scale_plan.py.
CASES = [(model, limit) for model in ("gpt2", "vit-s", "resnet50") for limit in (1200, 512, 256)] + [
    ("llama2-7b", 1200)
]


def cuts_of(model, limit):
    """Of every matrix, by name."""
    cuts = {name: blocking(shape, limit) for name, shape in MODELS[model]().items()}
    return {name: cut for name, cut in cuts.items() if cut is not None}


def placed(cuts, ranks):
    placement = Placement(ranks)
    placement.place((name, cut.count, cut.rows**3 + cut.columns**3) for name, cut in cuts.items())
    return placement


@pytest.mark.parametrize(("model", "limit"), CASES)
def test_loads_are_within_a_twentieth_of_their_mean(model, limit):
    """In work and in bytes of state, where there are twenty blocks for each rank."""
    cuts = cuts_of(model, limit)
    blocks = sum(cut.count for cut in cuts.values())
    tried = [ranks for ranks in (2, 4, 8, 64, 256, 1024, 4096) if blocks >= 20 * ranks]
    for ranks in tried:
        placement = placed(cuts, ranks)
        for power in (2, 3):
            loads = Counter()
            for name, cut in cuts.items():
                for rank, (first, last) in enumerate(placement[name]):
                    loads[rank] += (last - first) * (cut.rows**power + cut.columns**power)
            assert max(loads.values()) <= 1.05 * loads.total() / ranks, (ranks, power)
    assert tried


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_ranks_own_runs_one_after_the_other(ranks):
    cuts = cuts_of("vit-s", 512)
    placement = placed(cuts, ranks)
    for name, cut in cuts.items():
        assert [block for run in placement[name] for block in range(*run)] == list(range(cut.count))
        assert len(placement[name]) == ranks


def units_of(shapes, ranks, limit=64, dtype=torch.float32):
    """Of parameters of these shapes, in blocks of 64, dealt to the ranks one after the other."""
    units = []
    for shape in shapes:
        cut = blocking(shape, limit)
        counts = [cut.count // ranks + (rank < cut.count % ranks) for rank in range(ranks)]
        units.append(Unit((torch.empty(shape, device="meta"),), cut, runs_of(counts), dtype))
    return units


def test_rounds_fill_half_of_the_workspace_where_all_ranks_get_all_blocks():
    units = units_of([(128, 64)] * 10, ranks=2)  # of 2 blocks and 32 KiB
    workspaces = [2**18] * 10
    assert list(rounds(units, workspaces, everywhere=True)) == [(0, 4), (4, 8), (8, 10)]
    assert list(rounds(units, [2**18] * 9 + [2**16], everywhere=True)) == [(0, 4), (4, 8), (8, 9), (9, 10)]


def test_rounds_are_of_what_a_rank_has_where_it_gets_its_own_alone():
    units = units_of([(128, 64)] * 10, ranks=2)
    assert list(rounds(units, [2**18] * 10, everywhere=False)) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    units = units_of([(128, 64)] * 10, ranks=8)
    assert list(rounds(units, [2**18] * 10, everywhere=False)) == [(0, 8), (8, 10)]


@pytest.mark.parametrize("everywhere", [True, False])
def test_rounds_have_blocks_for_all_ranks_however_small_the_workspace(everywhere):
    units = units_of([(128, 64)] * 10, ranks=6)
    assert list(rounds(units, [1] * 10, everywhere=everywhere)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    units = units_of([(128, 64)] * 3, ranks=1)
    assert list(rounds(units, [1] * 3, everywhere=everywhere)) == [(0, 1), (1, 2), (2, 3)]
    assert list(rounds([], [], everywhere=everywhere)) == []


def test_rounds_are_of_one_dtype():
    units = units_of([(64, 64)], 1) + units_of([(64, 64)] * 2, 1, dtype=torch.float64) + units_of([(64, 64)], 1)
    assert list(rounds(units, [2**30] * 4, everywhere=True)) == [(0, 1), (1, 3), (3, 4)]
