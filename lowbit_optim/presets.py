"""Published settings as keywords, ``Shampoo(params, lr=1e-3, **presets.WANG2024)``, and the default budget.

Example:
    >>> import torch
    >>> from lowbit_optim import Shampoo, presets
    >>> optimizer = Shampoo([torch.nn.Parameter(torch.ones(64, 64))], lr=1e-3, **presets.WANG2024)
    >>> optimizer.stats()[0]["treatment"]
    'Shampoo: 64 x 64, eigen, codes of 4 bits'
    >>> presets.DEFAULT_BITS
    2
"""

import math
from types import MappingProxyType

from lowbit_optim.storage import Quantization

#: The default ``bits`` of Shampoo, CASPR, K-FAC and AdaBK; docs/default.md says why.
DEFAULT_BITS: float = 2

#: 4-bit Shampoo as Wang, Zhou, Li and Huang (NeurIPS 2024) describe it, with rectified 4-bit eigenvectors, roots as
#: 4-bit off-diagonal squares, linear-2, blocks of 64 with float32 scales, A_0 = eps I. Sides above 1200 are cut into
#: equal blocks here, not into blocks of 1200 and a remainder.
WANG2024 = MappingProxyType(
    {
        "bits": 4,
        "storage": "eigen",
        "quantization": Quantization(bits=4, codebook="linear-2", block_size=64, double=False, scale="absmax"),
        "layout": "square",
        "max_preconditioner_dim": 1200,
        "min_quant_size": 4096,
        "statistics_frequency": 100,
        "precondition_frequency": 500,
        "start_preconditioning_step": 1,
        "shampoo_beta": 0.95,
        "matrix_eps": 1e-6,
        "initial_scale": 1e-6,
        "statistic_limit": math.inf,
        "root_power": 4,
        "rectify_update": 1,
        "rectify_root": 4,
        "orthogonal_iterations": 1,
        "graft": True,
    }
)
