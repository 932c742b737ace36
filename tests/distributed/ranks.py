"""Real processes for the tests: started once for each number of them, they run what the tests ask for.

They are forks of one process that has imported torch, so that starting them takes no time. The first that fails ends,
so that the others fail, too, and do not wait; for the next test they are all started anew.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


@dataclass
class Failure:
    """What came of a rank that returned nothing: its traceback, or how it ended and what it wrote."""

    text: str


class Ranks:
    """So many processes of one gloo group.

    Args:
        world: how many.
        folder: an empty one, of theirs.
        timeout: of the group, in seconds.
        environment: of theirs, beside this process's.
    """

    def __init__(self, world: int, folder: Path, timeout: float = 60, environment: dict[str, str] | None = None):
        self.world, self.timeout = world, timeout
        self.alive = True
        self._folder = folder
        self._connections: list[Connection] = []
        self._processes = []
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for rank in range(world):
            connection, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_work, args=(rank, world, str(folder), timeout, environment or {}, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(connection)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, world, *args)`` returns on each rank; the test fails if it fails on any."""
        answers = self.answers(function, *args)
        failures: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            if isinstance(answer, Failure):
                failures.setdefault(answer.text, []).append(rank)
        if failures:
            pytest.fail("\n".join(f"---- ranks {who}\n{text}" for text, who in failures.items()), pytrace=False)
        return answers

    def answers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What it returns on each rank, or a ``Failure``."""
        job = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(job)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + 2 * self.timeout
        while len(answers) < self.world:
            waiting = {self._connections[rank]: rank for rank in range(self.world) if rank not in answers}
            ready = wait(list(waiting), max(0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(self._connections[rank].recv_bytes())
                except EOFError:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    answers[rank] = Failure(f"ended with exit code {code}. It wrote:\n{self._written(rank)}")
                if isinstance(answers[rank], Failure):
                    self.alive = False
                    deadline = min(deadline, time.monotonic() + self.timeout + 10)
        for rank in set(range(self.world)) - answers.keys():
            self.alive = False
            os.kill(self._processes[rank].pid, signal.SIGABRT)  # faulthandler writes where it was
            self._processes[rank].join()
            answers[rank] = Failure(f"did not answer. It wrote:\n{self._written(rank)}")
        if not self.alive:
            self.close()
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self.alive = False

    def _written(self, rank: int) -> str:
        return (self._folder / f"{rank}.txt").read_text(errors="replace")[-5000:]


def _work(
    rank: int, world: int, folder: str, timeout: float, environment: dict[str, str], connection: Connection
) -> None:
    """In a process: run what comes, until something fails or nobody asks any more."""
    os.environ.update(environment)
    with open(f"{folder}/{rank}.txt", "wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            function, args = pickle.loads(job)
            connection.send_bytes(pickle.dumps(function(rank, world, *args)))
        except BaseException:
            connection.send_bytes(pickle.dumps(Failure(traceback.format_exc())))
            os._exit(1)
