"""Settings of every test run."""

import os
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

pytest_plugins = ["tests.conformance", "pytester"]

hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# Test matrices are small: more threads only wait for each other.
torch.set_num_threads(1)

# Triton reads this when it is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def silent_numpy() -> Iterator[None]:
    """Triton's interpreter computes with NumPy, which warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=["eigh", "products"])
def route(request):
    """Both ways to an inverse root, whatever the device: the second is that of a GPU."""
    from lowbit_optim.roots import forced_route  # after Triton's setting

    with forced_route(request.param):
        yield request.param
