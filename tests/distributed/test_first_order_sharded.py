"""The checks of first-order states in rows, each by name; processes are launched once for each world size."""

import json
import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

CHECKS = (
    "steps_of_one_process",
    "what_is_coded_is_decided_of_the_whole",
    "other_meshes",
    "gradients_placed_otherwise",
    "sharded_parameters_beside_plain_ones",
    "numbers_that_are_not_finite",
    "fully_shard",
    "deepcopy",
    "bytes_are_those_of_this_rank",
    "saved_on_some_ranks_and_loaded_on_others",
    "every_kind_of_state_dict",
    "state_dicts_of_the_live_state",
    "a_run_of_torch_goes_on_in_codes",
    "columns_keep_32_bits",
    "what_is_refused",
    "a_plain_gradient_is_refused",
    "autograd_sees_the_step",
    "state_dicts_that_do_not_fit",
)


def run(rank, world, folder):
    from tests.distributed import first_order_checks as checks

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {}
    for name in CHECKS:
        try:
            getattr(checks, f"check_{name}")(rank, world)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        store.set(f"{name} {rank}", "failed" if found[name] else "passed")
        # A process that has failed ends, and what others wait for with it.
        if found[name] or any(store.get(f"{name} {other}") == b"failed" for other in range(world)):
            break
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def found(request, tmp_path_factory):
    """What each rank says of each check."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run, (request.param, str(folder)), request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("check", CHECKS)
def test_in_rows(found, check):
    failures = {said.get(check, "not run, for one before it failed") for said in found} - {""}
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
