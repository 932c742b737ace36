"""Second-order optimizers for PyTorch on states of a few bits a number."""

from importlib.metadata import version

from lowbit_optim import presets
from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lowbit_optim.groups import param_groups
from lowbit_optim.memory import Estimate, estimate, state_bytes
from lowbit_optim.optimizers.adabk import AdaBK
from lowbit_optim.optimizers.caspr import CASPR
from lowbit_optim.optimizers.ekfac import EKFAC
from lowbit_optim.optimizers.kfac import KFAC
from lowbit_optim.optimizers.shampoo import Shampoo
from lowbit_optim.optimizers.soap import SOAP
from lowbit_optim.storage import Quantization

__version__ = version("lowbit-optim")
__all__ = [
    "CASPR",
    "EKFAC",
    "KFAC",
    "SOAP",
    "AdaBK",
    "CheckpointError",
    "Estimate",
    "Quantization",
    "Shampoo",
    "estimate",
    "load_checkpoint",
    "param_groups",
    "presets",
    "save_checkpoint",
    "state_bytes",
]
