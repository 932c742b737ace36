"""Compiles Triton kernels for GPUs that are not there. Run as ``python -m tests.triton_targets steps`` (or ``codec``),
which prints JSON: for each target, the number of kernels after each of a few steps, and the assembly of each kernel."""

import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lowbit_optim.kernels import first_order, gpu, gpu_codec
from lowbit_optim.storage.codebooks import table
from tests.first_order_steps import MOMENTS, SETTINGS

AMPERE, HOPPER, CDNA3 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
# Of steps: bits, dtype, rows and numbers in a row; each combination is another kernel.
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


def kernels(functions: Iterable[Any], target: GPUTarget) -> list[Any]:
    return [k for function in functions for k in function.device_caches[target][0].values()]


def assembly(kernel: Any) -> str:
    return kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]


def compile_steps(target: GPUTarget) -> dict[str, Any]:
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
        counts.append(len(kernels(gpu._RULES.values(), target)))
    made = kernels(gpu._RULES.values(), target)
    return {"backend": target.backend, "counts": counts, "assembly": [assembly(k) for k in made]}


CODEC = ("_measure", "_quantize_scales", "_quantize", "_dequantize", "_dequantize_triangle")
# Bits, dtype, block size, fitted, double.
CODEC_CASES = [(4, torch.float32, 64, False, False), (3, torch.bfloat16, 128, True, True)]


def compile_codec(target: GPUTarget) -> dict[str, Any]:
    driver.set_active(Absent(target))
    functions = [getattr(gpu_codec, name) for name in CODEC]
    counts = []
    for k in (1, 16, 17):
        for bits, dtype, *how in CODEC_CASES:
            values, boundaries = table("linear-2", bits, torch.float32, torch.device("cpu"))
            rows, matrices = torch.zeros(k, 1024, dtype=dtype), torch.zeros(k, 256, 256, dtype=dtype)
            parts = gpu_codec.quantize_blockwise(rows, values, boundaries, bits, *how)
            gpu_codec.dequantize_blockwise(*parts, values, bits, how[0], 1024, dtype)
            parts = gpu_codec.quantize_symmetric(matrices, values, boundaries, bits, *how, "triangle")
            gpu_codec.dequantize_symmetric(*parts, rows[:, :256], values, bits, how[0], "triangle", dtype)
        counts.append(len(kernels(functions, target)))
    made = [(name, assembly(k)) for name, f in zip(CODEC, functions, strict=True) for k in kernels([f], target)]
    return {"backend": target.backend, "counts": counts, "assembly": made}


if __name__ == "__main__":
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options)
    if sys.argv[1] == "steps":
        print(json.dumps([compile_steps(target) for target in (AMPERE, CDNA3)]))
    else:
        print(json.dumps([compile_codec(target) for target in (HOPPER, CDNA3)]))
