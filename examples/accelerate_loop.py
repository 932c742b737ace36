"""accelerate: mixed precision, gradient accumulation, and a state that is saved and loaded.

python examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_optim import SOAP

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--path", default="run/accelerate_loop", help="of the saved state")
args = parser.parse_args()

# The order of an epoch follows from its number, so that it need not be saved.
accelerator = Accelerator(
    mixed_precision="bf16",
    gradient_accumulation_steps=2,
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
)
set_seed(0)
labels = torch.randint(4, (512,))
points = torch.randn(4, 32)[labels] + torch.randn(512, 32)

model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 4))
optimizer = SOAP(model.parameters(), lr=3e-3, base_bits=4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8 * args.epochs)
# A generator of its own: otherwise the loader draws from the stream that dropout draws from.
loader = DataLoader(TensorDataset(points, labels), 32, shuffle=True, generator=torch.Generator())
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)


def train(epoch: int) -> None:
    loader.set_epoch(epoch)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.4f}")


def weights() -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


half = args.epochs // 2
for epoch in range(half):
    train(epoch)
accelerator.save_state(args.path)
for epoch in range(half, args.epochs):
    train(epoch)
whole = weights()

accelerator.load_state(args.path)
for epoch in range(half, args.epochs):
    train(epoch)
same = all(map(torch.equal, whole, weights()))
print("the resumed run is the same to the last bit" if same else "the resumed run differs")
