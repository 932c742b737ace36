"""Optimizers for PyTorch on states of a few bits a number: second-order ones, and first-order ones as their bases."""

from importlib.metadata import version

from lowbit_optim import presets
from lowbit_optim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lowbit_optim.groups import param_groups
from lowbit_optim.memory import Estimate, estimate, state_bytes
from lowbit_optim.optimizers.adabk import AdaBK
from lowbit_optim.optimizers.adagrad import Adagrad
from lowbit_optim.optimizers.adamw import AdamW
from lowbit_optim.optimizers.caspr import CASPR
from lowbit_optim.optimizers.ekfac import EKFAC
from lowbit_optim.optimizers.kfac import KFAC
from lowbit_optim.optimizers.sgd import SGD
from lowbit_optim.optimizers.shampoo import Shampoo
from lowbit_optim.optimizers.soap import SOAP
from lowbit_optim.storage import Quantization

__version__ = version("lowbit-optim")
__all__ = [
    "CASPR",
    "EKFAC",
    "KFAC",
    "SGD",
    "SOAP",
    "AdaBK",
    "Adagrad",
    "AdamW",
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
