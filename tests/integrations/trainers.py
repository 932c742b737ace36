"""The same run under three trainers: whole, or from the checkpoint on that the whole one has left half-way.

Each function has the arguments (folder, optimizer's name, dtype of parameters, seed of what is not loaded, whether to
resume) and returns a picture of the end.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.integrations.runs import BATCH, DATA, EVERY, HALF, net, picture, random_states, set_random_states

Run = Callable[[Path, str, torch.dtype, int, bool], dict[str, Any]]


def hugging_face(folder: Path, name: str, dtype: torch.dtype, seed: int, resume: bool) -> dict[str, Any]:
    """In the middle of an epoch, with gradient accumulation and clipping."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=2 * HALF,
        save_steps=HALF,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )
    model = net(dtype, seed)
    trainer = Trainer(model, arguments, train_dataset=DATA, optimizers=(EVERY[name](model), None))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return picture(model, trainer.optimizer, trainer.lr_scheduler)


def accelerated(folder: Path, name: str, dtype: torch.dtype, seed: int, resume: bool) -> dict[str, Any]:
    """In the middle of an epoch, with gradient accumulation and mixed precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    AcceleratorState._reset_state(reset_partial_state=True)  # of another run in this process
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )
    model = net(dtype, seed)
    optimizer = EVERY[name](model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * HALF)
    # With a generator of its own the loader takes nothing from the stream of dropout.
    loader = DataLoader(DATA, BATCH // 2, shuffle=True, generator=torch.Generator())
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    per_epoch, done = len(loader), 0
    if resume:
        accelerator.load_state(folder / "half")
        done = 2 * HALF
    while done < 4 * HALF:
        loader.set_epoch(done // per_epoch)
        for batch in accelerator.skip_first_batches(loader, done % per_epoch):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            done += 1
            if done == 2 * HALF and not resume:
                accelerator.save_state(folder / "half")
            if done == 4 * HALF:
                break
    return picture(accelerator.unwrap_model(model), optimizer, scheduler)


def lightning(folder: Path, name: str, dtype: torch.dtype, seed: int, resume: bool) -> dict[str, Any]:
    """At the end of an epoch, as Lightning says, with gradient accumulation and clipping."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(dtype, seed)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = EVERY[name](self.net)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * HALF)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        # Lightning itself does not save the states of random generators.
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["random"] = random_states()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            set_random_states(checkpoint["random"])

    module = Module()
    loader = DataLoader(DATA, len(DATA) // HALF // 2, shuffle=True)
    half = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,  # with max_steps Lightning itself resumes one batch before the next epoch
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[half],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = folder / f"step={HALF}.ckpt" if resume else None
    trainer.fit(module, loader, ckpt_path=path, weights_only=True if resume else None)
    return picture(module.net, trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler)


# What these packages say of others that they use, and of workers and the like.
WARNINGS = [
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:Checkpoint directory .* exists and is not empty",
]
PACKAGES = {"transformers": hugging_face, "accelerate": accelerated, "lightning": lightning}
TRAINERS: dict[str, Run] = {name: run for name, run in PACKAGES.items() if find_spec(name)}
