"""One training run of the demo, in a process of its own: text, model, loop, checkpoints, and what it measured.

A run writes into OUT/<run>/: "checkpoint" when it ends or is interrupted (and goes on from there when it is started
again), "halfway" half way, "result.json" at the end. OUT/settings.json says what to do.
"""

import hashlib
import io
import json
import math
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowbit_optim import Shampoo
from lowbit_optim.checkpoint import load_checkpoint, save_checkpoint
from lowbit_optim.presets import DEFAULT_BITS
from lowbit_optim.storage.budget import ONE_PERIOD

RUNS = ADAMW, SHAMPOO32, SHAMPOO, RESUMED = "adamw", "shampoo-32bit", "shampoo", "resumed"

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 64, 2, 4, 64, 32
LEARNING_RATE = 1e-2  # of 1e-3, 3e-3, 1e-2 and 3e-2 the best for AdamW on the default text
WEIGHT_DECAY, BETAS = 0.01, (0.9, 0.95)
WARMUP = 0.05  # of all steps
UPDATE_EVERY = 10  # steps between updates of Shampoo's statistics and roots
MEASUREMENTS = 12  # of the validation loss, over a run
VOCABULARY = 256  # the most frequent characters; the rest become one
LEAST_TEXT = 1000  # characters, so that the validation tenth holds more than one context
MOST_TEXT = 10_000_000  # characters; the rest of a file is left alone
MOST_WINDOWS = 1024  # of validation text
MANIFEST = "checkpoint.json"  # in the folder of a checkpoint that is whole
INTERRUPTED = 130  # exit code


class DemoError(Exception):
    """Something that the user can put right; the message says how."""


@dataclass(frozen=True)
class Settings:
    """What the user chooses; the same for every run."""

    steps: int = 900
    seed: int = 0
    device: str = "cpu"
    storage: str = "root"
    bits: float = DEFAULT_BITS
    text: str | None = None
    text_sha256: str = ""

    def save(self, out: Path) -> None:
        (out / "settings.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, out: Path) -> "Settings":
        return cls(**json.loads((out / "settings.json").read_text(encoding="utf-8")))


# ---- text ------------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """A text as numbers of characters."""

    train: Tensor  # [characters]
    validation: Tensor  # [windows, CONTEXT + 1]
    vocabulary: int


def read_text(path: str | None) -> str:
    """The file, or the documentation of Python that comes with Python."""
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise DemoError("this Python comes without its documentation (pydoc_data): give a --text FILE") from error
        return "\n".join(topics[name] for name in sorted(topics))
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_TEXT)
    except OSError as error:
        raise DemoError(f"--text {path} cannot be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        raise DemoError(f"--text {path} is not UTF-8 ({error.reason}): give a text file, or convert it") from error
    if len(text) < LEAST_TEXT:
        raise DemoError(f"--text {path} has {len(text)} characters; it needs at least {LEAST_TEXT}: give a longer one")
    return text


def text_sha256(text: str) -> str:
    """To know the text again."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode(text: str) -> Corpus:
    """The first 90 % to train on; of the rest, windows for validation, each a context and the character after it."""
    common = [character for character, _ in Counter(text).most_common(VOCABULARY - 1)]
    number = {character: i for i, character in enumerate(sorted(common))}
    numbers = torch.tensor([number.get(character, len(number)) for character in text])
    cut = len(text) * 9 // 10
    windows = numbers[cut:].unfold(0, CONTEXT + 1, CONTEXT)
    return Corpus(numbers[:cut], windows[:: math.ceil(len(windows) / MOST_WINDOWS)], len(number) + 1)


# ---- model -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind a layer norm and around a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.perceptron_norm(x))


class GPT(nn.Module):
    """A small character transformer."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, windows: Tensor) -> Tensor:
        """The mean loss of predicting each next character of windows [batch, CONTEXT + 1]."""
        x = self.characters(windows[:, :-1]) + self.positions.weight
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), windows[:, 1:].flatten())


# ---- training --------------------------------------------------------------------------------------------------------


def make_optimizer(run: str, settings: Settings, parameters: Iterator[nn.Parameter]) -> Optimizer:
    """AdamW, or Shampoo in front of the same AdamW."""
    if run == ADAMW:
        return AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    kept: dict[str, Any] = {"bits": 32} if run == SHAMPOO32 else {"bits": settings.bits, "storage": settings.storage}
    return Shampoo(
        parameters,
        lr=LEARNING_RATE,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        statistics_frequency=UPDATE_EVERY,
        precondition_frequency=UPDATE_EVERY,
        **kept,
    )


def schedule(steps: int, step: int) -> float:
    """What the learning rate is multiplied with after `step` steps: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def train(
    run: str,
    settings: Settings,
    out: Path,
    *,
    tell: Callable[[dict[str, Any]], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train, or go on with training, and write the result.

    Args:
        run: which optimizer, or RESUMED, the second half of SHAMPOO from its checkpoint.
        settings: of the demo.
        out: folder of the demo.
        tell: gets {"step": ..., "train": ..., "validation": ... or None} after every step.
        stop: asked after every step; True saves a checkpoint and ends the run.

    Returns:
        Whether the run came to its end.
    """
    device = torch.device(settings.device)
    corpus = encode(read_text(settings.text))
    # The resumed run starts from other weights, so only the checkpoint can make it end with the same.
    torch.manual_seed(settings.seed + (run == RESUMED))
    model = GPT(corpus.vocabulary).to(device)
    optimizer = make_optimizer(run, settings, model.parameters())
    scheduler = LambdaLR(optimizer, partial(schedule, settings.steps))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history: dict[str, list[Any]] = {"train": [], "validation": [], "step_ms": [], "optimizer_ms": []}

    done, latest, halfway = 0, out / run / "checkpoint", out / SHAMPOO / "halfway"
    for folder in (latest, halfway) if run == RESUMED else (latest,):
        if (folder / MANIFEST).exists():
            loaded = load_checkpoint(folder, **parts)
            done, history = loaded["step"], loaded["history"]
            break

    train_text, validation_text = corpus.train.to(device), corpus.validation.to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    starts = torch.randint(len(corpus.train) - CONTEXT, (settings.steps, BATCH), generator=generator)
    window = torch.arange(CONTEXT + 1)
    for step in range(done + 1, settings.steps + 1):
        batch = train_text[(starts[step - 1, :, None] + window).to(device)]
        began = _now(device)
        loss = model(batch)
        loss.backward()
        stepped = _now(device)
        optimizer.step()
        ended = _now(device)
        scheduler.step()
        optimizer.zero_grad()

        history["train"].append(loss.item())
        history["step_ms"].append(1e3 * (ended - began))
        history["optimizer_ms"].append(1e3 * (ended - stepped))
        validation = None
        if step % max(1, settings.steps // MEASUREMENTS) == 0 or step == settings.steps:
            validation = measure(model, validation_text)
            history["validation"].append((step, validation))
        tell({"step": step, "train": history["train"][-1], "validation": validation})
        if run == SHAMPOO and step == settings.steps // 2:
            save_checkpoint(halfway, **parts, step=step, history=history)
        if stop() and step < settings.steps:
            save_checkpoint(latest, **parts, step=step, history=history)
            return False

    save_checkpoint(latest, **parts, step=settings.steps, history=history)
    result = {
        **history,
        "validation_loss": history["validation"][-1][1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": state_bytes(optimizer),
        "checkpoint_bytes": sum(file.stat().st_size for file in latest.glob("optimizer-*.safetensors")),
        "torch_save_bytes": torch_save_bytes(optimizer),
        "time_ms": times(history),
        "sha256": {"parameters": sha256(model.state_dict()), "optimizer": sha256(flat_state(optimizer))},
    }
    (out / run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return True


def _now(device: torch.device) -> float:
    """Seconds: of this process on the CPU, so that other load does not count; else by the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


# ---- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: nn.Module, windows: Tensor) -> float:
    """The mean loss over all windows."""
    total = sum(model(part).double() * len(part) for part in windows.split(BATCH))
    return float(total / len(windows))


def times(history: dict[str, list[Any]]) -> dict[str, float | None]:
    """Median milliseconds of steps without and with an update of the statistics, and both in their proportion.

    "update" is None if no step had one.
    """

    def medians(values: list[float]) -> tuple[float, float | None, float]:
        updates = values[UPDATE_EVERY - 1 :: UPDATE_EVERY]
        ordinary = statistics.median(value for i, value in enumerate(values, 1) if i % UPDATE_EVERY)
        if not updates:
            return ordinary, None, ordinary
        update = statistics.median(updates)
        return ordinary, update, ordinary + (update - ordinary) / UPDATE_EVERY

    ordinary, update, average = medians(history["step_ms"])
    optimizer_average = medians(history["optimizer_ms"])[-1]
    return {"ordinary": ordinary, "update": update, "average": average, "optimizer_average": optimizer_average}


def flat_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state, as "<parameter>/<key>"."""
    entries = optimizer.state_dict()["state"].items()
    return {f"{index}/{key}": value for index, entry in entries for key, value in entry.items()}


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """What the tensors of the state are for, and how many bytes they take."""
    total = {"moments": 0, "statistics": 0, "roots": 0, "counters": 0}
    for name, tensor in flat_state(optimizer).items():
        key = name.partition("/")[2].removeprefix("base.")
        side, _, rest = key.partition(".")
        if key in ("step", "nonfinite") or rest == "failures":
            kind = "counters"
        elif side in ("left", "right"):
            kind = "roots" if rest.startswith(ONE_PERIOD) else "statistics"
        else:
            kind = "moments"
        total[kind] += tensor.nbytes
    return total


def torch_save_bytes(optimizer: Optimizer) -> int:
    """The size of the file that torch.save writes."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.tell()


def sha256(tensors: dict[str, Tensor]) -> str:
    """One number for the names, dtypes, shapes and bits of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- the process -----------------------------------------------------------------------------------------------------


def main(out: Path, run: str) -> int:
    """Run, with progress as lines of JSON on stdout. Ctrl-C ends it between two steps, with a checkpoint."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda signum, frame: stop.set())
    settings = Settings.load(out)
    torch.set_num_threads(1)
    if torch.device(settings.device).type != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    finished = train(
        run,
        settings,
        out,
        tell=lambda progress: print(json.dumps(progress), flush=True),
        stop=stop.is_set,
    )
    return 0 if finished else INTERRUPTED
