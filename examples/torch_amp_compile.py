"""A compiled model in mixed precision with a GradScaler, resumed from a file: torch alone.

python examples/torch_amp_compile.py --optimizer kfac
"""

import argparse

import torch
from torch import nn

from lowbit_optim import KFAC, Shampoo, load_checkpoint, param_groups, save_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--optimizer", choices=["shampoo", "kfac"], default="shampoo")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager needs no C++ compiler")
parser.add_argument("--path", default="run/torch_amp_compile", help="of the checkpoint")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of four classes, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (64,), generator=generator)
    centres = torch.randn(4, 32, generator=torch.Generator().manual_seed(-1))
    return (centres[labels] + torch.randn(64, 32, generator=generator)).to(device), labels.to(device)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 4)).to(device)
scaler = torch.amp.GradScaler(device)
if args.optimizer == "kfac":
    # Before compiling, for its hooks; and with the scale, for they see scaled gradients.
    settings = {"model": model, "grad_scale": scaler.get_scale}
    optimizer = KFAC(param_groups(model), lr=1e-2, statistics_frequency=5, **settings)
else:
    optimizer = Shampoo(param_groups(model), lr=1e-2, statistics_frequency=5)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
compiled = torch.compile(model, backend=args.backend)


def train(first: int, last: int) -> float:
    for step in range(first, last):
        points, labels = batch(step)
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
            loss = nn.functional.cross_entropy(compiled(points), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # so that gradients are clipped as they are
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if step == 0 or step == last - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    return loss.item()


half = args.steps // 2
train(0, half)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
save_checkpoint(args.path, **parts, step=half, scaler=scaler.state_dict())
first = train(half, args.steps)

found = load_checkpoint(args.path, **parts)
scaler.load_state_dict(found["scaler"])
again = train(found["step"], args.steps)
print("the resumed run is the same to the last bit" if again == first else "the resumed run differs")
print(optimizer.report())
