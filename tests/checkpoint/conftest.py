"""A good checkpoint, and live objects that a bad one must not change."""

import pytest

from tests.checkpoint.common import build, save, train


@pytest.fixture
def good(tmp_path):
    objects = build(0, width=4)
    train(*objects, 2)
    save(tmp_path / "run", objects, step=2)
    return tmp_path / "run"


@pytest.fixture
def live():
    objects = build(1, width=4)
    train(*objects, 3)
    return objects
