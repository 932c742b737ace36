"""A vision transformer of transformers, in a loop of one's own.

python examples/transformers_vit.py --optimizer kfac
"""

import argparse

import torch
from transformers import ViTConfig, ViTForImageClassification

from lowbit_optim import CASPR, EKFAC, KFAC, SOAP, AdaBK, Shampoo, param_groups

CLASSES = {cls.__name__.lower(): cls for cls in (Shampoo, CASPR, SOAP, KFAC, EKFAC, AdaBK)}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--optimizer", choices=CLASSES, default="shampoo")
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()

torch.manual_seed(0)
config = ViTConfig(
    image_size=16,
    patch_size=4,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    num_labels=4,
)
model = ViTForImageClassification(config)

# Matrices are preconditioned; the classifier, biases, norms and position embeddings go to AdamW.
cls = CLASSES[args.optimizer]
hooked = {"model": model} if issubclass(cls, KFAC) else {}
frequency = {"precondition_frequency" if cls is SOAP else "statistics_frequency": 5}
optimizer = cls(param_groups(model, weight_decay=0.05), lr=3e-3, **frequency, **hooked)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)


def batch() -> dict[str, torch.Tensor]:
    """Noise with one quarter of the image brighter: which one?"""
    labels, images = torch.randint(4, (32,)), torch.randn(32, 2, 8, 2, 8)
    images[torch.arange(32), labels // 2, :, labels % 2] += 2
    return {"pixel_values": images.reshape(32, 1, 16, 16), "labels": labels}


for step in range(args.steps):
    loss = model(**batch()).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")
print(optimizer.report())
