"""FSDP2: parameters by rows on all ranks. Blocks of the whole matrices have the bits that they have in one process."""

import pytest

from tests.distributed.runs import (
    CASES,
    CLASSES,
    ODD_SHAPES,
    STEPS,
    STRICT,
    alone,
    digests,
    in_rows,
    mesh_of,
    on,
)


def steps(rank, world, case, replicas=1, *args):
    return digests(*in_rows(case, mesh_of(world, replicas), *args))


def steps_alone(rank, world, *args):
    return digests(*alone(*args))


@pytest.mark.parametrize("case", CLASSES)
def test_the_bits_of_one_process(ranks, case):
    expected = digests(*alone(case))
    for found in ranks(steps, case):
        assert found == expected


@on(3)
@pytest.mark.parametrize("case", sorted(CASES.keys() - CLASSES))
def test_every_setting(ranks, case):
    expected = digests(*alone(case))
    for found in ranks(steps, case):
        assert found == expected


@on(4)
@pytest.mark.parametrize("case", CLASSES)
def test_replicas(ranks, case):
    """HSDP."""
    expected = digests(*alone(case))
    for found in ranks(steps, case, 2):
        assert found == expected


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("case", CLASSES)
def test_rows_that_do_not_divide(start, world, case):
    """Some ranks have fewer, or none."""
    (expected,) = start(1, environment=STRICT)(steps_alone, case, STEPS, ODD_SHAPES)
    for found in start(world, environment=STRICT)(steps, case, 1, STEPS, ODD_SHAPES):
        assert found == expected
