"""The processes of the tests, by their number; see ranks.py."""

import pytest

from tests.distributed.ranks import Ranks

WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """``start(world, **options)``: processes that this session has started before, or new ones."""
    started = {}

    def of(world, **options):
        key = world, str(options)
        if key not in started or not started[key].alive:
            started[key] = Ranks(world, tmp_path_factory.mktemp("ranks"), **options)
        return started[key]

    yield of
    for ranks in started.values():
        ranks.close()


@pytest.fixture(params=WORLDS, ids=lambda world: f"world-{world}")
def ranks(request, start):
    """``ranks(function, *args)``: what ``function(rank, world, *args)`` returns on each rank."""
    return start(request.param)
