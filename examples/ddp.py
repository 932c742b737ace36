"""DDP: every process has the model and the moments, and its share of the factors.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowbit_optim import Shampoo, param_groups, state_bytes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
centres = torch.randn(4, 32)
model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 4)).to(device)
wrapped = DistributedDataParallel(model)
optimizer = Shampoo(
    param_groups(model), lr=3e-3, statistics_frequency=5, max_preconditioner_dim=64, process_group=dist.group.WORLD
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

generator = torch.Generator().manual_seed(rank)  # of data, which are others in every process
for step in range(args.steps):
    labels = torch.randint(4, (32,), generator=generator)
    points = centres[labels] + torch.randn(32, 32, generator=generator)
    loss = nn.functional.cross_entropy(wrapped(points.to(device)), labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if rank == 0 and (step == 0 or step == args.steps - 1):
        print(f"step {step}: loss {loss.item():.4f}")

# Each process says what it has; all of them have the same parameters.
sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
kinds = state_bytes(optimizer)
found: list = [None] * ranks
dist.all_gather_object(found, (sums.tolist(), kinds["roots"]))
if rank == 0:
    print("bytes of factors:", ", ".join(f"{size} on rank {i}" for i, (_, size) in enumerate(found)))
    same = all(other == found[0][0] for other, _ in found)
    print("all processes have the same parameters" if same else "the processes' parameters differ")
dist.barrier()  # nobody leaves while another still waits for its messages
dist.destroy_process_group()
