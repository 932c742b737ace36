"""FSDP2: sharded parameters, saved by torch.distributed.checkpoint, and gone on with by another number of processes.

torchrun --nproc-per-node 2 examples/fsdp2.py               # all steps
torchrun --nproc-per-node 2 examples/fsdp2.py --stop 30     # or half of them, and then the others
torchrun --nproc-per-node 3 examples/fsdp2.py --resume
"""

import argparse
import os
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lowbit_optim import Shampoo, param_groups

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--stop", type=int, help="save and end after so many of them (default: after all)")
parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
parser.add_argument("--batch", type=int, default=12, help="windows of text in a step, of all processes together")
parser.add_argument("--every", type=int, default=10, help="steps between losses that are printed")
parser.add_argument("--path", default="run/fsdp2", help="of the checkpoint")
args = parser.parse_args()

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
if args.batch % ranks:
    parser.error(f"--batch is {args.batch}, which {ranks} processes cannot share evenly")

# The documentation of Python, byte by byte.
text = torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()))
windows = text[: len(text) // 65 * 65].view(-1, 65)


class Transformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(64, width)
        layer: dict[str, Any] = {"dim_feedforward": 4 * width, "dropout": 0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, **layer) for _ in range(2))
        self.head = nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting each next byte."""
        x = self.bytes(text[:, :-1]) + self.places.weight
        mask = nn.Transformer.generate_square_subsequent_mask(64, device=text.device)
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten())


torch.manual_seed(0)  # every process makes the same model, and keeps its rows of it
model = Transformer().to(device)
for layer in model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = Shampoo(param_groups(model), lr=3e-3, statistics_frequency=5)


def state(steps: int) -> dict[str, Any]:
    """What is saved; every process must call this."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "steps": steps}


first, last = 0, args.stop or args.steps
if args.resume:
    saved = state(0)  # read into, each process what it has of every tensor
    dcp.load(saved, checkpoint_id=args.path)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    first = saved["steps"]

for step in range(first, last):
    # The same windows for the same step, however many processes share them.
    chosen = torch.randint(len(windows), (args.batch,), generator=torch.Generator().manual_seed(step))
    loss = model(windows[chosen[rank::ranks]].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % args.every == 0 or step == last - 1:
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item():.6f}")

dcp.save(state(last), checkpoint_id=args.path)
dist.barrier()  # nobody leaves while another still waits for its messages
dist.destroy_process_group()
