"""The demo's training at other learning rates: is the one that it uses fair to AdamW?"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.report import keep, show
from lowbit_optim.demo import worker
from lowbit_optim.demo.worker import ADAMW, SHAMPOO, Settings

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SETTINGS = Settings()


def final_loss(run: str, rate: float) -> float:
    """The validation loss at the end of one run of the demo."""
    torch.set_num_threads(1)
    worker.LEARNING_RATE = rate
    text = worker.read_text(None)
    losses: list[float] = []

    def tell(progress: dict[str, Any]) -> None:
        if progress.get("validation") is not None:
            losses.append(progress["validation"])

    with TemporaryDirectory() as folder:
        (Path(folder) / run).mkdir()
        worker.train(run, replace(SETTINGS, text_sha256=worker.text_sha256(text)), Path(folder), tell=tell)
    return losses[-1]


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = list(product((ADAMW, SHAMPOO), RATES))
    with ProcessPoolExecutor(2) as pool:
        losses = dict(zip(runs, pool.map(final_loss, *zip(*runs, strict=True)), strict=True))
    rows = [
        {"learning rate": rate, "AdamW": losses[ADAMW, rate], "low-bit Shampoo": losses[SHAMPOO, rate]}
        for rate in RATES
    ]
    show(f"The demo's validation loss after {SETTINGS.steps} steps, seed {SETTINGS.seed}", rows)
    keep("demo_rates", {"validation loss": rows}, asdict(SETTINGS))


if __name__ == "__main__":
    main()
