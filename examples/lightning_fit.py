"""K-FAC under the Trainer of Lightning, and resumed from its checkpoint.

python examples/lightning_fit.py
"""

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_optim import KFAC, param_groups

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--path", default="run/lightning_fit", help="of the checkpoints")
args = parser.parse_args()


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 4))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = KFAC(param_groups(self), model=self, lr=1e-2, statistics_frequency=5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        print(f"epoch {self.current_epoch}: loss {self.trainer.callback_metrics['loss']:.4f}")

    # Dropout and shuffling go on where they were: Lightning itself saves no state of random generators.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random"])


def fit(resume: str | None = None) -> Classifier:
    module = Classifier()
    checkpoints = ModelCheckpoint(args.path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module


seed_everything(0)
labels = torch.randint(4, (512,))
points = torch.randn(4, 32)[labels] + torch.randn(512, 32)
loader = DataLoader(TensorDataset(points, labels), 32, shuffle=True)

whole = fit()
resumed = fit(f"{args.path}/epoch={args.epochs // 2 - 1}.ckpt")
same = all(map(torch.equal, whole.cpu().parameters(), resumed.cpu().parameters()))
print("the resumed run is the same to the last bit" if same else "the resumed run differs")
