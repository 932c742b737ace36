"""Trajectories of Shampoo against float64 oracles, and what must not change them."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_optim import Quantization, Shampoo, presets
from lowbit_optim.demo.worker import GPT
from tests import contract, oracles
from tests.contract import random, same

WANG = {**presets.WANG2024, "statistics_frequency": 2, "precondition_frequency": 4}
SHAPE = (192, 128)
STORAGES = {
    "root": {},
    "root-4-bits": {"bits": 4},
    "direct": {"bits": 4, "storage": "direct", "precondition_frequency": 4},
    "dense": {"bits": 32, "precondition_frequency": 4},
    "eigen": WANG,
}
each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


def gradients(shape, steps, seed=0, scale=1.0):
    """Full-rank float64 gradients whose columns have very different sizes."""
    size = np.linspace(0.1, 3.0, shape[-1])
    return list(scale * size * np.random.default_rng(seed).standard_normal((steps, *shape)))


def follow(start, grads, dtype=torch.float64, **settings):
    """The parameter after each step, float64 numpy."""
    return contract.follow(partial(Shampoo, **{"statistics_frequency": 2, **settings}), start, grads, dtype)


def deviation(history, expected, start):
    """The largest error of any step, relative to the distance moved until then."""
    pairs = zip(history, expected, strict=True)
    return max(np.linalg.norm(p - q) / np.linalg.norm(q - start) for p, q in pairs)


# ------------------------------------------------------------------------------------------------ bytes


def preconditioner_bytes(**settings):
    """Of the demo's model on its default text."""
    optimizer = Shampoo(GPT(vocabulary=104).parameters(), **settings)
    optimizer.init_state()
    own = [(key, part) for state in optimizer.state.values() for key, part in state.items()]
    return sum(part.nbytes for key, part in own if key.startswith(("left.", "right.")))


@pytest.mark.parametrize(("settings", "share"), [({}, 1 / 4), ({"bits": 1}, 0.14)], ids=["default", "1 bit"])
def test_the_state_beside_that_of_the_paper(settings, share):
    assert 0 < preconditioner_bytes(**settings) <= share * preconditioner_bytes(**presets.WANG2024)


# ------------------------------------------------------------------------------------------------ the paper


BASES = {
    "adamw": {"betas": (0.9, 0.99), "weight_decay": 0.05},
    "sgd": {"momentum": 0.9, "weight_decay": 5e-4},
}


def paper(base, bits=4, dtype=torch.float64, shape=SHAPE, max_dim=1200, steps=20):
    """The deviation of a WANG2024 trajectory from the oracle's."""
    start, grads = random(*shape, seed=1, dtype=torch.float64).numpy(), gradients(shape, steps)
    settings = {"base": base, "lr": 1e-2, **BASES[base]}
    expected = oracles.shampoo_4bit(start, grads, T1=2, T2=4, bits=bits, max_dim=max_dim, **settings)
    mine = {**WANG, "bits": bits, "max_preconditioner_dim": max_dim}
    history = follow(start, grads, dtype, **mine, **settings)
    return deviation(history, expected, start)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("bits", "limit"), [(4, 1e-4), (32, 1e-6)])
def test_float64_follows_the_paper(base, bits, limit):
    assert paper(base, bits) < limit


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("bits", "limit"), [(4, 0.3), (32, 1e-4)])
def test_float32_follows_the_paper_loosely(base, bits, limit):
    """At 4 bits a rounding error now and then makes another code."""
    assert paper(base, bits, torch.float32) < limit


def test_the_paper_is_not_its_base_alone():
    start, grads = np.zeros(SHAPE), gradients(SHAPE, 20)
    expected = oracles.shampoo_4bit(start, grads, base="sgd", lr=1e-2, T1=2, T2=4)
    alone = follow(start, grads, base="sgd", lr=1e-2, momentum=0.9, precondition=False)
    assert deviation(alone, expected, start) > 0.1


@pytest.mark.parametrize(("bits", "limit"), [(4, 1e-4), (32, 1e-6)])
@pytest.mark.parametrize("max_dim", [64, 130])
def test_blocks_that_divide_evenly_follow_the_paper(bits, limit, max_dim):
    assert paper("sgd", bits, max_dim=max_dim, shape=(192, 192), steps=12) < limit


@pytest.mark.parametrize(("shape", "max_dim"), [((70, 41), 32), ((1201, 3), 1200), ((5, 7, 3, 2), 40), ((9, 2), 4)])
def test_padded_blocks_follow_the_paper_in_32_bits(shape, max_dim):
    """Padding leaks nowhere: the oracle has none."""
    assert paper("sgd", 32, max_dim=max_dim, shape=shape, steps=5) < 1e-6


# --------------------------------------------------------------------------------------- our own settings


def moving_average_shampoo(start, grads, lr, T1, T2, *, power=4, graft=True, clamp=False, limit=4.0):
    """The default settings in 32 bits over plain SGD: a bias-corrected average, and statistics limited by it."""
    p, history = start.copy(), []
    averages, before, roots = [None, None], [0.0, 0.0], [np.eye(n) for n in start.shape]
    for t, g in enumerate(grads, start=1):
        if t % T1 == 0:
            for side, m in enumerate((g @ g.T, g.T @ g)):
                a = averages[side]
                if a is None:
                    averages[side] = m
                else:
                    usual = max(np.trace(a), before[side])
                    outlier = np.trace(m) > limit * usual
                    share = 0.05 / (1 - 0.95 ** (t // T1))
                    averages[side] = (1 - share) * a + share * m * (np.trace(a) / np.trace(m) if outlier else 1.0)
                before[side] = np.trace(m)
        if t % T2 == 0:
            roots = [oracles.inverse_root(a, power, 1e-6, clamp) for a in averages]
        step = roots[0] @ g @ roots[1]
        p = p - lr * step * (np.linalg.norm(g) / np.linalg.norm(step) if graft else 1.0)
        history.append(p)
    return history


@pytest.mark.parametrize("power", [4, 2, 8])
@pytest.mark.parametrize("graft", [True, False])
def test_moving_average_from_the_first_statistic(power, graft):
    grads = gradients((40, 30), 12)
    grads[7] *= 1e6  # a spike at a statistics step
    expected = moving_average_shampoo(np.zeros((40, 30)), grads, 0.1, 2, 2, power=power, graft=graft)
    settings = {"base": "sgd", "lr": 0.1, "root_power": power, "graft": graft}
    dense = follow(np.zeros((40, 30)), grads, bits=32, precondition_frequency=2, **settings)
    assert deviation(dense, expected, 0) < 1e-6


@pytest.mark.parametrize("power", [4, 2, 8])
def test_an_unquantized_root_is_the_same_optimizer(power):
    """The root alone is statistic and root at once; its scale is kept in float32."""
    start, grads = np.zeros((36, 36)), gradients((36, 36), 12)
    expected = moving_average_shampoo(start, grads, 0.1, 2, 2, power=power, clamp=True)
    root = follow(start, grads, base="sgd", lr=0.1, root_power=power, min_quant_size=10**9)
    assert deviation(root, expected, start) < 1e-5


# Limits are about half again what was measured.
@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"bits": 16}, 1e-4),
        ({"bits": 8}, 0.01),
        ({"bits": 4}, 0.02),
        ({"bits": 3}, 0.06),
        ({"bits": 2}, 0.2),
        ({"bits": 1.5}, 0.4),
        ({"bits": 1}, 0.6),
        ({"quantization": Quantization(6, "dynamic", 32)}, 0.1),
        ({"storage": "direct", "bits": 8, "precondition_frequency": 2}, 0.4),
        ({"storage": "eigen", "bits": 8, "precondition_frequency": 2}, 0.4),
    ],
    ids=str,
)
def test_low_bits_stay_near_the_exact_optimizer(settings, limit):
    start, grads = np.zeros((128, 128)), gradients((128, 128), 20)
    exact = moving_average_shampoo(start, grads, 0.1, 2, 2, clamp="storage" not in settings)
    low = follow(start, grads, base="sgd", lr=0.1, **settings)
    assert deviation(low, exact, start) < limit


@pytest.mark.parametrize("scale", [1e6, 1e-6])
@pytest.mark.parametrize("storage", ["dense", "root"])
def test_the_scale_of_the_loss_does_not_matter(scale, storage):
    grads = gradients((48, 40), 20)
    form = {"bits": 32, "precondition_frequency": 4} if storage == "dense" else {}
    for base, settings, scaled in [
        ("sgd", {"lr": 1e-2, "momentum": 0.9}, {"lr": 1e-2 / scale, "momentum": 0.9}),
        ("adamw", {"lr": 1e-2, "eps": 1e-30}, {"lr": 1e-2, "eps": 1e-30}),
    ]:
        expected = follow(np.zeros((48, 40)), grads, base=base, **settings, **form)
        history = follow(np.zeros((48, 40)), [scale * g for g in grads], base=base, **scaled, **form)
        assert deviation(history, expected, 0) < 1e-2


# ------------------------------------------------------------------------------------ what changes nothing


@each_storage
def test_a_convolution_is_its_matrix(storage):
    grads = gradients((70, 8, 3, 3), 6)
    settings = {**storage, "lr": 0.01}
    four = follow(np.zeros((70, 8, 3, 3)), grads, **settings)
    for shape in [(70, 72), (1, 70, 1, 72), (70, 72, 1)]:
        two = follow(np.zeros(shape), [g.reshape(shape) for g in grads], **settings)
        assert all(np.array_equal(p.ravel(), q.ravel()) for p, q in zip(four, two, strict=True))


def test_a_gradient_of_any_memory_layout():
    parameters = [nn.Parameter(random(16, 8, 3, 3)) for _ in range(2)]
    for parameter, layout in zip(parameters, (torch.contiguous_format, torch.channels_last), strict=True):
        optimizer = Shampoo([parameter], statistics_frequency=1)
        for step in range(3):
            parameter.grad = random(16, 8, 3, 3, seed=step).to(memory_format=layout)
            optimizer.step()
    assert same(*parameters)


@pytest.mark.parametrize("shape", [(40, 30), (33,)])
def test_a_gradient_whose_numbers_are_one(shape):
    """As ``sum().backward()`` makes it."""
    parameters = [nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    optimizer = Shampoo(parameters, statistics_frequency=1)
    for _ in range(3):
        parameters[0].grad = torch.ones(()).expand(shape)
        parameters[1].grad = torch.ones(shape)
        optimizer.step()
    assert same(*parameters)


@each_storage
def test_the_norm_is_that_of_the_whole_parameter(storage):
    """Not of each block: blocks give norm to each other."""
    parameter = nn.Parameter(torch.zeros(96, 40, dtype=torch.float64))
    optimizer = Shampoo([parameter], **{"statistics_frequency": 2, **storage, "max_preconditioner_dim": 48})
    for step in range(4):
        raw = random(96, 40, seed=step, dtype=torch.float64)
        raw[48:] *= 100
        parameter.grad = raw.clone()
        optimizer.step()
    assert parameter.grad.norm().item() == pytest.approx(raw.norm().item(), rel=1e-9)
    assert not np.isclose(parameter.grad[:48].norm(), raw[:48].norm(), rtol=0.5)


SHAPES = [(70, 66), (96, 80), (70, 66), (66,), (70, 66), (80, 96), (130, 66)]


def together(indices, storage, **settings):
    """The parameters of some of ``SHAPES`` after six steps in one optimizer, float64, and the codes of their state."""
    parameters = [nn.Parameter(torch.zeros(SHAPES[index], dtype=torch.float64)) for index in indices]
    settings = {"statistics_frequency": 2, **storage, "lr": 0.01, "max_preconditioner_dim": 80, **settings}
    optimizer = Shampoo(parameters, **settings)
    for step in range(6):
        for index, parameter in zip(indices, parameters, strict=True):
            parameter.grad = torch.tensor(gradients(SHAPES[index], 1, seed=[step, index])[0])
        optimizer.step()
    codes = [{k: v for k, v in optimizer.state[p].items() if v.dtype == torch.uint8} for p in parameters]
    return [p.detach().numpy() for p in parameters], codes


@each_storage
def test_parameters_together_are_each_alone(storage):
    """Up to the last bits, which BLAS rounds by the place of a matrix in memory; the codes are the same."""
    parameters, codes = together(range(len(SHAPES)), storage)
    for index in range(len(SHAPES)):
        (alone,), (its_codes,) = together([index], storage)
        np.testing.assert_allclose(parameters[index], alone, rtol=0, atol=1e-10)
        assert same(codes[index], its_codes)


@each_storage
@pytest.mark.parametrize("workspace", [1, 150_000])
def test_the_workspace_changes_nothing(storage, workspace):
    parameters, codes = together(range(len(SHAPES)), storage)
    again, codes_again = together(range(len(SHAPES)), storage, workspace=workspace)
    for one, other in zip(parameters, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
    assert same(codes, codes_again)


@pytest.mark.parametrize("stagger", [False, True])
@each_storage
def test_in_float32_no_bit_depends_on_what_else_is_in_a_stack(storage, stagger):
    """With rows that begin at multiples of 64 bytes, as BLAS wants them; 23 blocks, more than a vector register has."""
    if stagger and "storage" in storage:
        pytest.skip("only one-period storages take turns")

    def train(workspace):
        parameters = [nn.Parameter(random(*shape, seed=1)) for shape in [(96, 160), (320, 32), (32, 32), (96, 64)]]
        settings = {"statistics_frequency": 2, **storage, "lr": 0.01, "max_preconditioner_dim": 32, "stagger": stagger}
        optimizer = Shampoo(parameters, **{**settings, "min_quant_size": 64}, workspace=workspace)
        for step in range(6):
            for parameter in parameters:
                parameter.grad = random(*parameter.shape, seed=10 + step)
            optimizer.step()
        return parameters, [{k: v for k, v in optimizer.state[p].items() if k != "step"} for p in parameters]

    whole, state = train(2**28)
    for workspace in (1, 100_000):
        again, state_again = train(workspace)
        assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))
        assert same(state, state_again)


@each_storage
@pytest.mark.parametrize("base", BASES)
def test_before_its_start_it_is_the_base_alone(storage, base):
    start, grads = random(70, 40, seed=3, dtype=torch.float64).numpy(), gradients((70, 40), 8)
    settings = {"base": base, "lr": 0.01, **BASES[base]}
    history = follow(start, grads, **{**storage, **settings, "start_preconditioning_step": 6})
    alone = follow(start, grads, **settings, precondition=False)
    assert all(np.array_equal(p, q) for p, q in zip(history[:5], alone[:5], strict=True))
    assert not np.allclose(history[5], alone[5], rtol=0, atol=1e-4)
    earlier = follow(start, grads[5:], **{**storage, **settings})  # knows no statistics of the first five steps
    assert not np.allclose(history[5] - history[4], earlier[0] - start, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_what_is_not_preconditioned_is_the_base_bitwise(base, dtype):
    shapes = [(40, 30), (50,), (), (1, 60, 1), (1, 1)]
    settings = {"lr": 0.01, **BASES[base]}
    mine, theirs = ([nn.Parameter(random(*shape, dtype=dtype)) for shape in shapes] for _ in range(2))
    optimizer = Shampoo([{"params": mine[:1], "precondition": False}, {"params": mine[1:]}], base=base, **settings)
    reference = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[base](theirs, **settings)
    for step in range(5):
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            one.grad = random(*one.shape, seed=10 * step + index, dtype=dtype)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    assert same(mine, theirs)


@pytest.mark.parametrize(
    ("settings", "beta"),
    [
        ({"bits": 1}, 0.8),
        ({"bits": 2}, 0.95),
        ({"bits": 32}, 0.95),
        ({"bits": 1, "min_quant_size": 4096}, 0.95),
        ({"bits": 1, "quantization": Quantization(2, "nf", 64)}, 0.95),
    ],
    ids=["one bit", "two bits", "dense", "uncoded", "codes that are given"],
)
def test_the_default_decay_is_shorter_for_codes_of_one_bit(settings, beta):
    start, grads = np.zeros((36, 36)), gradients((36, 36), 12)
    by_default, as_said, other = (
        follow(start, grads, **{"min_quant_size": 256, **settings, **more})
        for more in ({}, {"shampoo_beta": beta}, {"shampoo_beta": 0.5})
    )
    assert np.array_equal(by_default, as_said)
    assert not np.array_equal(by_default, other)


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_a_compiled_step_is_the_step():
    def train(compiled):
        parameters = [nn.Parameter(random(70, 66, seed=seed)) for seed in range(2)]
        optimizer = Shampoo(parameters, statistics_frequency=2, base_bits=8)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(5):
            for parameter in parameters:
                parameter.grad = random(70, 66, seed=100 * seed)
            step()
        return parameters

    assert same(train(False), train(True))
