"""What keywords of Shampoo make of state and workspace, by `lowbit_optim.estimate`."""

from typing import Any

from figures import markdown

from lowbit_optim import estimate
from lowbit_optim.shapes import gpt2

CALLS: dict[str, dict[str, Any]] = {
    "Shampoo()": {},
    "bits=4": {"bits": 4},
    "bits=1": {"bits": 1},
    "bits=32": {"bits": 32},
    "base_bits=8": {"base_bits": 8},
    "base_bits=4": {"base_bits": 4},
    'base="sgd", momentum=0.9, base_bits=4': {"base": "sgd", "momentum": 0.9, "base_bits": 4},
    'storage="logarithm"': {"storage": "logarithm"},
    'storage="eigen", bits=4': {"storage": "eigen", "bits": 4},
    "max_preconditioner_dim=512": {"max_preconditioner_dim": 512},
    'apply_dtype="bfloat16"': {"apply_dtype": "bfloat16"},
    "stagger=True": {"stagger": True},
    "workspace=32 * 2**20": {"workspace": 32 * 2**20},
}


def write() -> str:
    layer = {name: shape for name, shape in gpt2().items() if name.startswith("h.0.")}
    rows = []
    for call, keywords in CALLS.items():
        planned = estimate(layer, "shampoo", device="cpu", **keywords)
        rows.append(
            {
                "keyword": f"`{call}`",
                "state, bytes per parameter": f"{planned.bytes_per_parameter:.2f}",
                "workspace, MiB": f"{planned.workspace / 2**20:.0f}",
            }
        )
    return markdown(rows)
