"""What the processes of the tests need, imported and compiled before they are forked; see ranks.py.

Nothing here may multiply matrices: how that is to be done is in the environment of each process, and read only once.
"""

import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor

from lowbit_optim import AdamW
from lowbit_optim.storage import Quantization, Symmetric

torch.set_num_threads(1)  # no thread would live on in a fork
for bits in (2, 4):
    form = Symmetric(Quantization(bits, scale="fitted"))
    form.decode(form.encode(torch.eye(64)[None]))
for bits in (4, 8):
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.zeros(64, 64)
    AdamW([parameter], bits=bits).step()
