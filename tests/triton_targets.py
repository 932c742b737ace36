"""Compiles the Triton kernels for GPUs that are not there. Run as ``python -m tests.triton_targets``, which prints
JSON: for each target, the number of kernels after each of a few steps, and the assembly of each kernel."""

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lowbit_optim.kernels import first_order, gpu
from tests.first_order_steps import MOMENTS, SETTINGS

TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)]
# Bits, dtype, rows and numbers in a row: each combination is another kernel.
CASES = [(4, torch.bfloat16, 3, 512), (8, torch.float32, 1, 300), (32, torch.float16, 16, 1)]


class Absent:
    """A driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: Any) -> int:
        return 0


def kernels(target: GPUTarget) -> list[Any]:
    return [k for rule in gpu._RULES.values() for k in rule.device_caches[target][0].values()]


def compile_all(target: GPUTarget) -> dict[str, Any]:
    driver.set_active(Absent(target))
    counts = []
    for number, step_size in enumerate([1, 0.3, 16]):
        keys = first_order.Keys(*[(1, 2**32 - 1), (16, 2**31), (2**31 - 1, 1)][number])
        steps = []
        for rule, settings in SETTINGS.items():
            for bits, dtype, rows, n in CASES:
                parameter = torch.zeros(rows, n, dtype=dtype)
                moments = tuple(first_order.zeros(rows, n, bits, "cpu") for _ in range(MOMENTS[rule]))
                changed = {"lr" if rule == "sgd" else "step_size": step_size}
                steps.append(first_order.Step(rule, parameter, parameter, moments, keys, settings | changed))
        gpu.take(steps)
        counts.append(len(kernels(target)))
    assembly = [k.asm["ptx" if target.backend == "cuda" else "amdgcn"] for k in kernels(target)]
    return {"backend": target.backend, "counts": counts, "assembly": assembly}


if __name__ == "__main__":
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options)
    print(json.dumps([compile_all(target) for target in TARGETS]))
