"""The Triton kernels give the bits of the specification: on a GPU where there is one, else in Triton's interpreter."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it is made for Linux only)")
from lowbit_optim.kernels import first_order, gpu
from lowbit_optim.kernels.first_order import Moment, Step
from tests.first_order_steps import MOMENTS, SETTINGS

pytestmark = pytest.mark.usefixtures("silent_numpy")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on "cpu" tests/conftest.py asked for the interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY, NAN = float("inf"), float("nan")


def on_device(step: Step) -> Step:
    moments = tuple(Moment(m.bits, *(None if t is None else t.to(DEVICE, copy=True) for t in m[1:])) for m in step[3])
    tensors = (step.parameter.to(DEVICE, copy=True), step.gradient.to(DEVICE, copy=True))
    return Step(step.rule, *tensors, moments, step.keys, step.settings)


def check(steps: Sequence[Step]) -> None:
    """Take steps with both; compare all that they changed, and the counts."""
    copies = [on_device(step) for step in steps]
    counts = gpu.take(copies)
    expected = first_order.take(steps)
    assert [(c.dtype, c.shape, c.device.type) for c in counts] == [(torch.int64, (), DEVICE)] * len(steps)
    assert [int(c) for c in counts] == [int(c) for c in expected]
    for step, copy in zip(steps, copies, strict=True):
        same(copy.parameter, step.parameter)
        for m, new in zip(step.moments, copy.moments, strict=True):
            for tensor, other in zip(m[1:], new[1:], strict=True):
                if tensor is not None:
                    same(other, tensor)


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal bits; any NaN is as good as another."""
    actual = actual.cpu()
    if expected.is_floating_point():
        missing = expected.isnan()
        assert torch.equal(actual.isnan(), missing)
        integers = {4: torch.int32, 2: torch.int16}[expected.element_size()]
        actual, expected = (x.masked_fill(missing, 0).view(integers) for x in (actual, expected))
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {expected.numel()} differ"


def zeros(rule: str, rows: int, n: int, *bits: int) -> tuple[Moment, ...]:
    return tuple(first_order.zeros(rows, n, b, "cpu") for b in (bits * 2)[: MOMENTS[rule]])


def train(rule: str, parameter: Tensor, gradients: Sequence[Tensor], *bits: int, **changed: Any) -> None:
    """Check one step for each gradient, from zero moments."""
    moments = zeros(rule, *parameter.shape, *bits)
    for number, gradient in enumerate(gradients, 1):
        keys = first_order.keys(0, parameter.shape[-1], number)
        check([Step(rule, parameter, gradient, moments, keys, SETTINGS[rule] | changed)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("rule", SETTINGS)
def test_bits_of_the_specification(rule, bits, dtype):
    gradients = [normal(3, 300, seed=seed).to(dtype) for seed in range(1, 4)]
    train(rule, normal(3, 300).to(dtype), gradients, bits)


@pytest.mark.parametrize("n", [1, 32, 33, 127, 128, 129])
@pytest.mark.parametrize("bits", [4, 8])
def test_row_lengths(bits, n):
    train("adamw", normal(2, n), [normal(2, n, seed=1), normal(2, n, seed=2)], bits)
    train("sgd", normal(1, n).bfloat16(), [normal(1, n, seed=1)], bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_apart_take_the_step_of_all_of_them(bits):
    """With the keys of their place."""
    parameter, gradient = normal(5, 300).bfloat16(), normal(5, 300, seed=1)
    moments, keys = zeros("adamw", 5, 300, bits), first_order.keys(0, 0, 1)
    parts = []
    for first, last in [(0, 2), (2, 4), (4, 5), (5, 5)]:
        own = tuple(Moment(m.bits, *(None if t is None else t[first:last] for t in m[1:])) for m in moments)
        keys_here = first_order.shifted(keys, first * 300)
        parts.append(
            on_device(Step("adamw", parameter[first:last], gradient[first:last], own, keys_here, SETTINGS["adamw"]))
        )
    gpu.take(parts)
    first_order.take([Step("adamw", parameter, gradient, moments, keys, SETTINGS["adamw"])])
    same(torch.cat([part.parameter for part in parts]), parameter)
    for i, m in enumerate(moments):
        for j in (2, 3):
            same(torch.cat([part.moments[i][j] for part in parts]), m[j])


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("adamw", {"sign": -1.0, "stochastic": False}),
        ("adamw", {"eps": 0.0, "beta1": 0.0, "decay": 1}),
        ("sgd", {"sign": -1.0, "nesterov": False, "stochastic": False}),
        ("sgd", {"weight_decay": 0, "share": 1, "momentum": 0.99}),
        ("adagrad", {"sign": -1.0, "weight_decay": 0.0, "stochastic": False}),
    ],
)
def test_settings(rule, changed):
    gradients = [normal(1, 200, seed=seed).bfloat16() for seed in (1, 2)]
    train(rule, normal(1, 200).bfloat16(), gradients, 8, **changed)


@pytest.mark.parametrize("scale", [1.0, 3e-43, 0.0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_every_code(rule, bits, scale):
    """Decoded into a parameter of negative zeros, where the sign of a zero shows."""
    moment = first_order.zeros(1, 256, bits, "cpu")
    assert moment.codes is not None
    assert moment.scales is not None
    moment.codes.copy_(first_order.pack(torch.arange(256).remainder(2**bits).to(torch.uint8), bits))
    moment.scales.fill_(scale)
    settings = SETTINGS[rule] | ({"momentum": 1.0, "lr": 1.0} if rule == "sgd" else {})
    zero = torch.full((1, 256), -0.0)
    check([Step(rule, zero.clone(), zero, (moment,), first_order.keys(0, 0, 1), settings)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_round_to_even(dtype):
    gradient = torch.arange(256).float().view(1, -1) * 2.0 ** (-9 if dtype == torch.bfloat16 else -12)
    plain = {"weight_decay": 0.0, "share": 1.0, "nesterov": False, "lr": 1.0, "stochastic": False}
    train("sgd", torch.full((1, 256), 1.0, dtype=dtype), [gradient, -gradient], 32, **plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("rule", SETTINGS)
def test_extreme_numbers(rule, bits, dtype):
    """Rows of zeros, of numbers that are subnormal or whose squares or scales are, and of huge ones."""
    magnitudes = torch.tensor([0.0, 1e-44, 1e-38, 1e-25, 1e-19, 1e19, 3e37]).unsqueeze(-1)
    gradients = [(normal(7, 130, seed=seed) * magnitudes).to(dtype) for seed in (1, 2)]
    gradients[1][:, :5] = torch.tensor([NAN, INFINITY, -INFINITY, 0.0, -0.0])
    for parameter in (normal(7, 130), normal(7, 130) * 1e-39):
        train(rule, parameter.to(dtype), gradients, bits)


def test_numbers_that_are_not_finite_are_counted():
    """In one tile, in the last numbers of a short block, in several programs, and where nothing else is."""
    gradient = normal(5, 300)
    gradient[0, 7], gradient[1, -1], gradient[4, -1] = NAN, INFINITY, -INFINITY
    train("sgd", normal(5, 300), [gradient, torch.full((5, 300), NAN), normal(5, 300)], 4)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_that_are_not_finite(dtype, stochastic):
    """They stay so, and spoil their block of moments."""
    parameter = normal(2, 300)
    parameter[0, :3] = torch.tensor([NAN, INFINITY, -INFINITY])
    parameter[1, 150] = 3.3e38  # infinite in bfloat16, if rounded up
    gradients = [normal(2, 300, seed=1).to(dtype)]
    train("adamw", parameter.to(dtype), gradients, 8, stochastic=stochastic)
    train("sgd", parameter.to(dtype), gradients, 8, stochastic=stochastic)


def test_moments_of_different_bits():
    for bits in ((8, 4), (4, 32), (32, 8)):
        train("adamw", normal(2, 150), [normal(2, 150, seed=1), normal(2, 150, seed=2)], *bits)


def test_gradients_of_another_dtype():
    train("adamw", normal(2, 150).bfloat16(), [normal(2, 150, seed=1)], 4)


def test_several_parameters():
    """Of several rules and shapes, one of them empty, with keys at the ends of their range."""
    keys = [first_order.Keys(0, 2**32 - 1), first_order.Keys(2**31, 2**31 - 1)]
    steps = []
    for number, (rule, rows, n) in enumerate([("adamw", 20, 130), ("sgd", 0, 5), ("adagrad", 1, 7), ("sgd", 3, 64)]):
        moments = zeros(rule, rows, n, 4)
        steps.append(Step(rule, normal(rows, n), normal(rows, n, seed=1), moments, keys[number % 2], SETTINGS[rule]))
    check(steps)
    assert gpu.take([]) == []


def test_assembly_is_ieee(tmp_path):
    """What the interpreter cannot show, of GPUs that need not be there: no kernel fuses, approximates or flushes
    subnormal numbers, and none is compiled again for another key or another step size."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_targets", "steps"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cuda, hip = json.loads(done.stdout)
    assert cuda["counts"] == hip["counts"] == [9, 9, 9]
    for assembly in cuda["assembly"]:
        assert ".f32" in assembly
        assert not re.findall(r"\b(?:fma|mad)\S*f32|\S+\.(?:ftz|approx|full)\b\S*", assembly)
    for assembly in hip["assembly"]:
        assert ".amdhsa_float_denorm_mode_32 3" in assembly
