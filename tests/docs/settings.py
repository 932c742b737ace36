"""What the code blocks of a page may take for granted: names and files that its reader has, and their own checks."""

import fnmatch
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_optim import Shampoo, save_checkpoint
from tests.docs.blocks import ROOT

Names = dict[str, Any]
MODELS = """from torch import nn


def build():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


my_model = build
"""
CONFIGURATION = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 32}


class Net(nn.Module):
    """A small model with everything that a page may point at."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(inputs)))


def common(folder: Path) -> Names:
    """On every page: torch, a model, its data, and an optimizer and a scheduler that have made some steps."""
    torch.manual_seed(0)
    (folder / "my_models.py").write_text(MODELS)
    (folder / "my_module.py").write_text(MODELS)
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/config.json").write_text(json.dumps(CONFIGURATION))
    for name in ("my_models", "my_module"):
        sys.modules.pop(name, None)
    model = Net()
    inputs, targets = torch.randint(20, (32,)), torch.randint(4, (32,))
    optimizer = Shampoo(model.named_parameters(), lr=1e-3, statistics_frequency=1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
    return {
        "__name__": "page",
        "torch": torch,
        "nn": nn,
        "model": model,
        "inputs": inputs,
        "targets": targets,
        "loss": nn.functional.cross_entropy(model(inputs), targets),
        "loader": DataLoader(TensorDataset(inputs, targets), batch_size=8),
        "optimizer": optimizer,
        "scheduler": scheduler,
    }


@contextmanager
def readme(names: Names) -> Iterator[None]:
    names["body"] = list(names["model"].body.parameters())
    names["embedding"] = list(names["model"].embedding.parameters())
    yield


@contextmanager
def checkpoints(names: Names) -> Iterator[None]:
    """Alone in a process group."""
    names["n"] = 12345
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def convert(names: Names) -> Iterator[None]:
    """A checkpoint of 32 bits, and the state of another Shampoo."""
    optimizer = Shampoo(names["model"].parameters(), lr=1e-3, bits=32, statistics_frequency=1)
    names["loss"].backward()
    optimizer.step()
    save_checkpoint("run", model=names["model"], optimizer=optimizer, step=1)
    matrices = [SimpleNamespace(dequantize=lambda order=order: torch.eye(order)) for order in (16, 32)]
    names["state_dict"] = {
        "state": {0: {"preconditioner": SimpleNamespace(preconditioners=matrices, statistics=matrices)}}
    }
    names |= {"L": torch.eye(16), "R": torch.eye(32), "L_root": torch.eye(16), "R_root": torch.eye(32)}
    names |= {"first_moment": torch.randn(16, 32), "second_moment": torch.rand(16, 32)}
    yield


@contextmanager
def memory(names: Names) -> Iterator[None]:
    """The optimizer whose bytes the page shows."""
    names["model"] = nn.Linear(1024, 1024)
    names["optimizer"] = Shampoo(names["model"].named_parameters(), lr=1e-3)
    names["model"](torch.randn(4, 1024)).sum().backward()
    names["optimizer"].step()
    yield


@contextmanager
def optimizers(names: Names) -> Iterator[None]:
    """A run of AdamW to go on from."""
    names["adamw"] = torch.optim.AdamW(names["model"].parameters())
    names["loss"].backward()
    names["adamw"].step()
    yield


@contextmanager
def trainers(names: Names) -> Iterator[None]:
    """What the trainers' own documentation has a reader make."""
    import lightning
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)  # of another test in this process

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return names["configure_optimizers"](self)

    names["args"] = TrainingArguments("trainer", max_steps=1, use_cpu=True, report_to=[])
    names["data"] = [{"input_ids": x, "labels": y} for x, y in zip(names["inputs"], names["targets"], strict=True)]
    names["module"] = Module()
    names["trainer"] = lightning.Trainer(
        max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    names |= {"folder": "state", "path": None, "train_loader": names["loader"]}
    yield


PAGES: dict[str, Callable[[Names], AbstractContextManager[None]]] = {
    "README.md": readme,
    "docs/checkpoints.md": checkpoints,
    "docs/convert.md": convert,
    "docs/memory.md": memory,
    "docs/optimizers.md": optimizers,
    "docs/trainers.md": trainers,
}


def files_of_a_checkpoint(text: str) -> None:
    """The listing names the files of a checkpoint: of one that is saved now, or of the kept one of several ranks."""
    patterns = [line.split()[0].replace("<token>", "*").replace("<n>", "*") for line in text.splitlines()]
    ranked = "rank" in text
    folder = ROOT / "tests/checkpoint/golden/v2/adamw-4" if ranked else save(Path("listed"))
    files = {path.name for path in folder.iterdir() if ("rank" in path.name) == ranked}
    found = [set(fnmatch.filter(files, pattern)) for pattern in patterns]
    assert all(found), f"{patterns} are not all in a checkpoint, which has {sorted(files)}"
    assert set.union(*found) == files, f"a checkpoint also has {sorted(files - set.union(*found))}"


def keys_of_checkpoint_json(text: str) -> None:
    """The same keys, at every depth that has names of its own."""
    shown, own = json.loads(text), json.loads((save(Path("keyed")) / "checkpoint.json").read_text())
    assert shown.keys() == own.keys()
    assert shown["files"].keys() == own["files"].keys()
    assert shown["files"]["model"][0].keys() == own["files"]["model"][0].keys()


def save(folder: Path) -> Path:
    model = Net()
    save_checkpoint(folder, model=model, optimizer=Shampoo(model.parameters(), lr=1e-3), step=1)
    return folder


# Of blocks with this line, on whatever page, beside what is asked of their language.
CHECKS: dict[str, Callable[[str], None]] = {
    "checkpoint.json": files_of_a_checkpoint,
    "model-rank<n>-<token>.safetensors": files_of_a_checkpoint,
    '"format_version": 1,': keys_of_checkpoint_json,
}
