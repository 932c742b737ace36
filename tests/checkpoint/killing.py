"""Saves that are killed, in processes of their own: python -m tests.checkpoint.killing FOLDER LAYOUT ROUNDS SEED.

Prints as JSON how many rounds left the checkpoint before the save that was killed, and how many the one after it.
"""

import json
import os
import random
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from lowbit_optim.checkpoint import load_checkpoint, save_checkpoint

LAYOUTS = {"one": {}, "sharded": {"max_file_size": 3000}, "rotated": {"keep": 2}}


def network(step):
    """Whose every number is the step."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, step)
    return {"model": model, "optimizer": optimizer}


def save(folder, layout, step):
    save_checkpoint(folder, **network(step), **LAYOUTS[layout], step=step, again=[step] * 100)


def loaded(folder):
    """The step of the checkpoint in the folder, of which every number must be that."""
    live = network(-1)
    found = load_checkpoint(folder, **live)
    values = [*live["model"].parameters(), *(s["momentum_buffer"] for s in live["optimizer"].state.values())]
    assert found["again"] == [found["step"]] * 100
    assert all((value == found["step"]).all() for value in values)
    return found["step"]


def kill_one(folder, layout, step, delay):
    """Fork a child that saves, and kill it so long after it began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, b"!")
            save(folder, layout, step)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the save itself failed"


def main(folder, layout, rounds, seed):
    chance = random.Random(seed)
    durations = []
    for step in range(5):
        start = time.perf_counter()
        save(folder, layout, step)
        durations.append(time.perf_counter() - start)
    longest = 1.5 * statistics.median(durations)
    last, outcomes = 4, {"old": 0, "new": 0}
    for step in range(5, 5 + rounds):
        kill_one(folder, layout, step, chance.uniform(0, longest))
        found = loaded(folder)
        assert found in (last, step), f"step {found} after the save of {step} over {last} was killed"
        outcomes["new" if found == step else "old"] += 1
        longest *= 0.9 if found == step else 1.1  # so that there are as many of the one as of the other
        last = found
    save(folder, layout, 5 + rounds)
    assert loaded(folder) == 5 + rounds
    files = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())
    print(json.dumps(outcomes | {"files": files}))


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
