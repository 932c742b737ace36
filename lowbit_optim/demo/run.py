"""`lowbit-optim demo`: AdamW against Shampoo on low-bit state, a checkpoint, a fresh process that resumes from it.

Every training run is a process of its own (see worker.py), two at a time with one thread each: two threads that
share a busy core are far slower than one. This module starts them, shows how far they are, and reports what they
measured (see report.py).
"""

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lowbit_optim import Shampoo
from lowbit_optim.checkpoint import load_checkpoint
from lowbit_optim.demo.report import publish
from lowbit_optim.demo.worker import (
    ADAMW,
    INTERRUPTED,
    LEARNING_RATE,
    MANIFEST,
    RESUMED,
    RUNS,
    SHAMPOO,
    SHAMPOO32,
    DemoError,
    Settings,
    read_text,
    text_sha256,
)

FAILED = 1  # exit code


def start(out: Path, settings: Settings) -> int:
    """Run the demo, all of it, into the folder `out`.

    Returns:
        The exit code: 1 if the resumed run does not equal the uninterrupted one, 130 after Ctrl-C.

    Raises:
        DemoError: a setting that cannot be, or a run that failed.
    """
    text = check(settings)
    path = settings.text and str(Path(settings.text).resolve())
    settings = replace(settings, text=path, text_sha256=text_sha256(text))
    try:
        for run in RUNS:
            (out / run).mkdir(parents=True, exist_ok=True)
            for stale in ("result.json", f"checkpoint/{MANIFEST}", f"halfway/{MANIFEST}"):
                (out / run / stale).unlink(missing_ok=True)
        settings.save(out)
    except OSError as error:
        raise DemoError(f"--out {out} cannot be written ({error.strerror}): give another folder") from error
    return _run(out, settings, len(text))


def resume(out: Path) -> int:
    """Go on with the demo that was interrupted in the folder `out`; what is finished is not done again.

    Returns, Raises: as `start`.
    """
    try:
        settings = Settings.load(out)
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DemoError(
            f"{out / 'settings.json'} cannot be read ({reason}): --resume takes the folder that a demo wrote to"
        ) from error
    text = check(settings)
    if text_sha256(text) != settings.text_sha256:
        name = settings.text or "the documentation of this Python"
        raise DemoError(f"{name} is not the text that the demo in {out} began with: start anew, without --resume")
    return _run(out, settings, len(text))


def check(settings: Settings) -> str:
    """Return the text to train on, or raise a DemoError if anything about the settings cannot be."""
    if settings.steps < 2:
        raise DemoError(f"--steps is {settings.steps}; it must be at least 2, as the checkpoint is taken half way")
    if not 0 <= settings.seed < 2**32:
        raise DemoError(f"--seed is {settings.seed}; it must be from 0 to 2**32 - 1")
    try:
        torch.ones((), device=settings.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DemoError(f"--device {settings.device} cannot be used here ({reason}): try --device cpu") from error
    try:
        Shampoo([torch.zeros(2, 2)], bits=settings.bits, storage=settings.storage)
    except ValueError as error:
        raise DemoError(str(error)) from error
    return read_text(settings.text)


def run_labels(settings: Settings) -> dict[str, str]:
    """The runs to make and what to call them."""
    storage = "" if settings.storage == Settings.storage or settings.bits == 32 else f"{settings.storage} "
    low = f"{settings.bits:g}-bit {storage}Shampoo"
    full = {} if settings.bits == 32 else {SHAMPOO32: "32-bit Shampoo"}  # else it is the same
    return {ADAMW: "AdamW", **full, SHAMPOO: low, RESUMED: f"{low}, resumed"}


def _run(out: Path, settings: Settings, characters: int) -> int:
    console = Console(highlight=False, soft_wrap=True)
    labels = run_labels(settings)
    console.print(introduction(settings, characters, labels))
    began = time.monotonic()
    try:
        with Display(console, labels, settings.steps) as display:
            asyncio.run(_run_all(out, settings, labels, display))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print(_interruption(out, labels))
        return INTERRUPTED
    same = publish(out, settings, characters, labels, time.monotonic() - began, console)
    return 0 if same else FAILED


def introduction(settings: Settings, characters: int, labels: dict[str, str]) -> str:
    """What is going to happen, for somebody who sees this for the first time."""
    source = settings.text or "the documentation that comes with Python"
    *others, last = (label for run, label in labels.items() if run != RESUMED)
    return (
        "[bold]lowbit-optim demo[/]\n"
        f"A small transformer learns to continue {escape(source)} ({characters:,} characters):\n"
        f"{settings.steps} steps with {', '.join(others)} and {last}, all from the same first weights, with\n"
        f"the same batches, schedule and learning rate ({LEARNING_RATE:g}). Half way {labels[SHAMPOO]} saves a\n"
        "checkpoint, and a fresh process that resumes from it must end with the same bits.\n"
        "Ctrl-C is safe at any time.\n"
    )


def _interruption(out: Path, labels: dict[str, str]) -> str:
    lines = ["\n[bold]Interrupted.[/]"]
    for run, label in labels.items():
        checkpoint = out / run / "checkpoint"
        if (checkpoint / MANIFEST).exists():
            lines.append(f"{label}: step {load_checkpoint(checkpoint)['step']} is saved in {escape(str(checkpoint))}")
    command = shlex.join(["lowbit-optim", "demo", "--resume", str(out)])
    return "\n".join([*lines, f"Go on from there:  [bold]{escape(command)}[/]"])


# ---- processes -------------------------------------------------------------------------------------------------------


async def _run_all(out: Path, settings: Settings, labels: dict[str, str], display: "Display") -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = asyncio.Semaphore(2 if torch.device(settings.device).type == "cpu" and cores > 1 else 1)

    async def one_after_another(*runs: str) -> None:
        for run in runs:
            if run in labels and not (out / run / "result.json").exists():
                async with places:
                    await _run_one(run, out, labels[run], display)

    await asyncio.gather(one_after_another(SHAMPOO, RESUMED), one_after_another(ADAMW, SHAMPOO32))


async def _run_one(run: str, out: Path, label: str, display: "Display") -> None:
    log_file = out / run / "log.txt"
    with open(log_file, "w", encoding="utf-8") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lowbit_optim", "demo-run", str(out), run),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            # For CUDA to compute the same bits in every process; the CPU does so on one thread.
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        )
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            display.update(run, **json.loads(line))
        code = await process.wait()
    except asyncio.CancelledError:
        with suppress(ProcessLookupError, ValueError):  # it has ended; Windows, where Ctrl-C reaches it anyway
            process.send_signal(signal.SIGINT)
        # Wait until it has saved and its pipe is closed, or its transport outlives the loop. When the other run ends
        # first, asyncio.run cancels this task a second time: wait through that too.
        ending = asyncio.create_task(_end_of(process))
        while not ending.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(ending)
        ending.result()
        raise
    if code == INTERRUPTED:  # Ctrl-C reaches all processes of a terminal
        raise asyncio.CancelledError
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    if code != 0:
        raise DemoError(f"the run of {label} failed: {lines[-1] if lines else f'exit code {code}'} (all: {log_file})")
    if lines:
        display.note(f"{label} gave warnings: see {log_file}")


async def _end_of(process: asyncio.subprocess.Process) -> None:
    await process.communicate()
    await asyncio.sleep(0.2)  # the transport closes a few turns of the loop later


# ---- progress --------------------------------------------------------------------------------------------------------


class Display:
    """How far the runs are: bars on a terminal, some plain lines elsewhere and in CI."""

    def __init__(self, console: Console, labels: dict[str, str], steps: int) -> None:
        self._console, self._labels, self._steps = console, labels, steps
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(pulse_style="bar.back"),  # a run that waits stands still
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal or bool(os.environ.get("CI")),
        )
        self._tasks = {
            run: self._bars.add_task(label, total=steps, start=False, loss="") for run, label in labels.items()
        }

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def update(self, run: str, step: int, train: float, validation: float | None) -> None:
        """A run has made a step."""
        self._bars.start_task(self._tasks[run])
        self._bars.update(self._tasks[run], completed=step, loss=f"loss {train:.2f}")
        quarter = max(1, self._steps // 4)
        if self._bars.disable and (step in (1, self._steps) or step % quarter == 0):
            measured = "" if validation is None else f", validation loss {validation:.3f}"
            self.note(f"{self._labels[run]}: step {step}/{self._steps}, loss {train:.3f}{measured}")

    def note(self, line: str) -> None:
        """Print above the bars."""
        self._bars.console.print(escape(line))
