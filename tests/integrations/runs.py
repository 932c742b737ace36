"""Training runs that are saved half-way and gone on with in a fresh process.

``python -m tests.integrations.runs FOLDER`` is that process: it goes on with every run that is in the folder.
"""

import contextlib
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from lowbit_optim import load_checkpoint, save_checkpoint
from tests import contract
from tests.contract import FIRST_ORDER, OPTIMIZERS

EVERY = OPTIMIZERS | FIRST_ORDER
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# So many steps before a run is saved, and so many after: in the middle of an epoch of three.
HALF = 4
BATCH = 16
IMAGES = contract.random(48, 3, 4, 4)
LABELS = torch.arange(48) % 5
DATA = [{"images": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]


class Net(contract.Net):
    """With dropout, and an output of one, whose factors have empty triangles. Called as trainers call a model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(36, 1)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        images = nn.functional.dropout(images.to(self.head.weight.dtype), 0.2, self.training)
        hidden = torch.tanh(self.hidden(self.norm(self.conv(images).flatten(1))))
        logits = self.head(hidden) * torch.sigmoid(self.gate(hidden))
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def seed_all(seed: int) -> None:
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)


def net(dtype: torch.dtype, seed: int) -> Net:
    """A model under random generators that are all in the same state for the same seed."""
    seed_all(seed)
    model = Net().to(dtype)
    seed_all(seed)
    return model


def random_states() -> dict[str, Any]:
    """Of every generator, in what ``torch.load(weights_only=True)`` takes."""
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": (kind, key.tolist(), *rest), "torch": torch.get_rng_state()}


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])


def picture(model: nn.Module, optimizer: Any, scheduler: Any, **more: Any) -> dict[str, Any]:
    """Everything in which two runs may differ."""
    own = {"parameters": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    return own | {"scheduler": scheduler.state_dict(), "random": random_states(), **more}


class Loop:
    """A training loop as one writes it, with a scheduler, random augmentation, dropout and a shuffled epoch."""

    def __init__(self, name: str, dtype: torch.dtype, seed: int) -> None:
        self.model = net(dtype, seed)
        self.optimizer = EVERY[name](self.model)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=2 * HALF)
        self.step, self.order = 0, torch.empty(0)

    def go(self, steps: int) -> None:
        for _ in range(steps):
            at = self.step % (len(DATA) // BATCH) * BATCH
            if at == 0:
                self.order = torch.randperm(len(DATA))
            batch = self.order[at : at + BATCH]
            scale = 1 + random.random() * np.random.rand()  # noqa: NPY002
            loss = self.model(IMAGES[batch] * scale, LABELS[batch])["loss"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1

    def picture(self) -> dict[str, Any]:
        return picture(self.model, self.optimizer, self.scheduler, step=self.step, order=self.order)

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer's."""
        own = {"model": self.model.state_dict(), "scheduler": self.scheduler.state_dict(), "random": random_states()}
        return own | {"step": self.step, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.order = state["step"], state["order"]
        set_random_states(state["random"])


def save_own(loop: Loop, folder: Path) -> None:
    parts = {"model": loop.model, "optimizer": loop.optimizer, "scheduler": loop.scheduler}
    save_checkpoint(folder, **parts, step=loop.step, order=loop.order)


def load_own(loop: Loop, folder: Path) -> None:
    found = load_checkpoint(folder, model=loop.model, optimizer=loop.optimizer, scheduler=loop.scheduler)
    loop.step, loop.order = found["step"], found["order"]


def save_torch(loop: Loop, folder: Path) -> None:
    torch.save(loop.state_dict() | {"optimizer": loop.optimizer.state_dict()}, folder / "run.pt")


def load_torch(loop: Loop, folder: Path) -> None:
    state = torch.load(folder / "run.pt", weights_only=True)
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.load_state_dict(state)


@contextlib.contextmanager
def in_one_process() -> Iterator[None]:
    """Where torch.distributed.checkpoint warns that it is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def distributed(flat: bool) -> tuple[Callable[[Loop, Path], None], Callable[[Loop, Path], None]]:
    """By torch.distributed.checkpoint, which reads into a state that is there: a fresh optimizer makes one first."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def whole(loop: Loop) -> dict[str, Any]:
        own = get_optimizer_state_dict(loop.model, loop.optimizer, options=options)
        return loop.state_dict() | {"order": torch.zeros(len(DATA), dtype=torch.int64), "optimizer": own}

    def save(loop: Loop, folder: Path) -> None:
        with in_one_process():
            dcp.save(whole(loop) | {"order": loop.order}, checkpoint_id=folder)

    def load(loop: Loop, folder: Path) -> None:
        state = whole(loop)
        with in_one_process():
            dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(loop.model, loop.optimizer, state["optimizer"], options=options)
        loop.load_state_dict(state)

    return save, load


WAYS: dict[str, tuple[Callable[[Loop, Path], None], Callable[[Loop, Path], None]]] = {
    "own": (save_own, load_own),
    "torch": (save_torch, load_torch),
    "dcp": distributed(flat=False),
    "dcp-flat": distributed(flat=True),
}
# The two forms of torch.distributed.checkpoint take turns: in one process, test_optimizer_state.py has both for all.
WAYS_OF = {"fp32": ["own", "torch", "dcp"], "bf16": ["own", "torch", "dcp-flat"]}


def attempt(run: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a run returns, or how it failed, so that others are tried all the same."""
    try:
        return run(*args)
    except Exception:
        return {"error": traceback.format_exc()}


def whole(name: str, dtype: str) -> dict[str, Any]:
    """A run that nothing interrupts."""
    loop = Loop(name, DTYPES[dtype], seed=0)
    loop.go(2 * HALF)
    return loop.picture()


def first_half(folder: Path, name: str, dtype: str) -> dict[str, Any]:
    """The same run, saved in each way when half of it is done."""
    loop = Loop(name, DTYPES[dtype], seed=0)
    loop.go(HALF)
    for way in WAYS_OF[dtype]:
        own = folder / f"{name}.{dtype}.{way}"
        own.mkdir()
        WAYS[way][0](loop, own)
    return loop.picture()


def second_half(folder: Path, name: str, dtype: str, way: str) -> dict[str, Any]:
    """The same run from a saved half on, by objects that were made from another seed."""
    loop = Loop(name, DTYPES[dtype], seed=1)
    WAYS[way][1](loop, folder / f"{name}.{dtype}.{way}")
    loop.go(HALF)
    return loop.picture()


def main(folder: Path) -> None:
    """Go on with every run in the folder, and write what has become of each."""
    from tests.integrations import trainers

    torch.set_num_threads(1)
    for saved in sorted(folder.iterdir()):
        name, dtype, way = saved.name.split(".")
        if way in WAYS:
            found = attempt(second_half, folder, name, dtype, way)
        else:
            found = attempt(trainers.TRAINERS[way], saved, name, DTYPES[dtype], 1, True)
        torch.save(found, saved / "second.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
