"""Bad input: settings and gradients that cannot be, and decompositions that fail."""

import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_optim import Quantization, Shampoo
from lowbit_optim.storage import Symmetric
from tests.contract import (
    CLASSES,
    OPTIMIZERS,
    backward,
    copies,
    each,
    each_of_parameters,
    each_optimizer,
    net,
    random,
    run,
    same,
    shampoo,
    train,
)

# ------------------------------------------------------------------------------------------------ settings

# What is wrong, and what the message must say: the value and what it may be.
BAD_SETTINGS = [
    ({"bits": 5}, ["bits", "5", "32", "16", "8", "4", "3", "2", "1.5", "1"]),
    ({"bits": "4"}, ["bits", "'4'", "1.5"]),
    ({"bits": None}, ["bits", "None", "1.5"]),
    ({"storage": "cholesqy"}, ["cholesqy", "dense", "direct", "eigen", "root"]),
    ({"storage": None}, ["None", "dense", "direct", "eigen", "root"]),
    ({"storage": "eigen", "bits": 2}, ["eigen", "2", "root"]),
    ({"storage": "dense"}, ["dense", "32", "root"]),
    ({"layout": "triangel"}, ["triangel", "triangle", "square"]),
    ({"quantization": "nf"}, ["'nf'", "Quantization"]),
    ({"quantization": (4, "nf9", 64, False, "absmax")}, ["nf9", "linear-2", "dynamic", "nf", "lloyd-max"]),
    ({"statistics_frequency": 0}, ["statistics_frequency", "positive"]),
    ({"statistics_frequency": 1.5}, ["statistics_frequency", "integer"]),
    ({"precondition_frequency": -1}, ["precondition_frequency", "positive"]),
    ({"precondition_frequency": 500}, ["precondition_frequency", "root", "statistics_frequency", "2"]),
    ({"max_preconditioner_dim": 0}, ["max_preconditioner_dim", "positive"]),
    ({"start_preconditioning_step": 0}, ["start_preconditioning_step", "positive"]),
    ({"shampoo_beta": 1.0}, ["shampoo_beta", "[0, 1)"]),
    ({"matrix_eps": 0}, ["matrix_eps", "(0, 1)"]),
    ({"matrix_eps": math.nan}, ["matrix_eps", "(0, 1)"]),
    ({"initial_scale": -1.0}, ["initial_scale", "at least 0"]),
    ({"statistic_limit": 0}, ["statistic_limit", "above 0"]),
    ({"root_power": 2.5}, ["root_power", "integer"]),
    ({"rectify_root": -1}, ["rectify_root", "at least 0"]),
    ({"orthogonal_iterations": 0}, ["orthogonal_iterations", "positive integer"]),
    ({"min_quant_size": None}, ["min_quant_size", "integer"]),
    ({"workspace": 0}, ["workspace", "positive"]),
    ({"graft": 1}, ["graft", "True or False"]),
    ({"precondition": "no"}, ["precondition", "True or False"]),
]
bad_settings = pytest.mark.parametrize(("settings", "said"), BAD_SETTINGS, ids=[str(s) for s, _ in BAD_SETTINGS])


def filled(*shape):
    return nn.Parameter(random(*shape))


def matrix():
    return filled(48, 40)


@bad_settings
def test_bad_settings(settings, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        shampoo([matrix()], **settings)
    assert all(word in str(error.value) for word in said), error.value
    with pytest.raises(ValueError) as error:  # noqa: PT011
        shampoo([{"params": [matrix()], **settings}])
    assert all(word in str(error.value) for word in said), error.value


@bad_settings
def test_bad_settings_of_a_new_group(settings, said):
    model, optimizer = run(shampoo, 2)
    before = copies(optimizer)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        optimizer.add_param_group({"params": [matrix()], **settings})
    assert all(word in str(error.value) for word in said), error.value
    assert same(copies(optimizer), before)
    train(model, optimizer, range(2, 4))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Quantization(4, "linear-3"), ["linear-3", "linear, linear-2, dynamic, nf, lloyd-max"]),
        (lambda: Quantization(5), ["5", "2, 3, 4, 6, 8"]),
        (lambda: Quantization(block_size=48), ["48", "power of two"]),
        (lambda: Quantization(scale="max"), ["max", "absmax", "fitted"]),
        (lambda: Quantization(double=2), ["2", "True or False"]),
        (lambda: Symmetric(layout="full"), ["full", "triangle", "square"]),
        (lambda: Shampoo([matrix()], base="adam"), ["adam", "adamw", "sgd", "adagrad", "torch.optim.Optimizer"]),
        (lambda: Shampoo([matrix()], base=nn.Linear), ["Linear", "adamw", "torch.optim.Optimizer"]),
        (lambda: Shampoo([matrix()], lr=-1.0), ["learning rate"]),
        (lambda: Shampoo([]), ["empty parameter list"]),
    ],
)
def test_bad_values(make, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert all(word in str(error.value) for word in said), error.value


@pytest.mark.parametrize(("base", "option"), [("adamw", "momentum"), ("sgd", "betas"), (torch.optim.Adam, "bitz")])
def test_an_unknown_keyword_lists_the_known(base, option):
    with pytest.raises(TypeError) as error:
        Shampoo([matrix()], base=base, **{option: 0.9})
    known = ["statistics_frequency", "storage", "max_preconditioner_dim", "base", "weight_decay"]
    assert all(word in str(error.value) for word in [repr(option), *known]), error.value


@pytest.mark.parametrize(
    ("key", "meant"),
    [("statistic_frequency", "statistics_frequency"), ("bit", "bits"), ("weight_decy", "weight_decay")],
)
def test_a_misspelt_key_of_a_group(key, meant):
    with pytest.raises(TypeError, match=f"'{key}'.*'{meant}'"):
        shampoo([{"params": [matrix()], key: 1}])
    _, optimizer = run(shampoo, 2)
    before = copies(optimizer)
    with pytest.raises(TypeError, match=f"'{key}'.*'{meant}'"):
        optimizer.add_param_group({"params": [matrix()], key: 1})
    assert same(copies(optimizer), before)


def test_keys_that_others_put_into_groups():
    others = ["initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name", "layer", "lr_scale", "tags"]
    bases = [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.ASGD]
    keys = {key for base in bases for key in base([matrix()]).defaults} - {"lr"} | set(others)
    for base in bases:
        defaults = base([matrix()]).defaults
        Shampoo([{"params": [matrix()], **{key: defaults.get(key, 0.0) for key in keys}}], base=base)


def test_complex_parameters():
    complex_ = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"complex64.*not supported"):
        shampoo([complex_])
    _, optimizer = run(shampoo, 2)
    before = copies(optimizer)
    with pytest.raises(TypeError, match=r"complex64.*not supported"):
        optimizer.add_param_group({"params": [matrix(), complex_]})
    assert same(copies(optimizer), before)


@each_optimizer
def test_sparse_gradients_are_refused(make):
    """Refused before anything has changed, the other parameters of the step included."""
    model, optimizer = run(make, 2)
    own = list(model.parameters())
    model.table = table = nn.Embedding(50, 40, sparse=True)
    optimizer.add_param_group({"params": table.parameters()})
    before = copies(optimizer)
    backward(model, 2)
    raw = [p.grad.clone() for p in own]
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"\(50, 40\).*sparse=False"):
        optimizer.step()
    assert same(copies(optimizer), before)
    assert same([p.grad for p in own], raw)


# ----------------------------------------------------------------------------------------------- gradients


@each(name for name in OPTIMIZERS if name.startswith(("shampoo", "caspr")))  # the others have no blocks
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_block_is_a_zero_one(make, bad, caplog):
    """Also at a step that updates statistics and roots; only the block is lost, and it is said once."""
    spoilt, zeroed = ([filled(100, 40), filled(60, 40), filled(30)] for _ in range(2))
    optimizers = [make(parameters, max_preconditioner_dim=50) for parameters in (spoilt, zeroed)]
    for step in range(12):
        for parameters, value in ((spoilt, bad), (zeroed, 0.0)):
            for index, parameter in enumerate(parameters):
                parameter.grad = random(*parameter.shape, seed=10 * step + index)
            if step in (5, 7, 8):
                parameters[0].grad[50:] = 0.0  # the second of two blocks of 50 rows
                parameters[0].grad[73, 5] = value
            if step == 9:
                parameters[2].grad[:] = 0.0
                parameters[2].grad[4] = value
        for optimizer in optimizers:
            optimizer.step()
    assert same(spoilt, zeroed)
    assert all(torch.isfinite(p).all() for p in spoilt)
    for one, other, count in zip(spoilt, zeroed, (3, 0, 1), strict=True):
        ours, expected = (dict(o.state[p]) for o, p in zip(optimizers, (one, other), strict=True))
        assert int(ours.pop("nonfinite")) == count
        assert int(expected.pop("nonfinite")) == 0
        assert same(ours, expected)
    assert [(r.name, r.levelno) for r in caplog.records] == [("lowbit_optim", logging.WARNING)]
    assert caplog.messages[0].startswith("1 gradient blocks were not finite")


def test_the_base_alone_is_guarded_too():
    parameters = [matrix(), filled(30), filled()]
    optimizer = shampoo([{"params": parameters, "precondition": False}])
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, math.nan if step == 1 else 1.0)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in parameters)
    assert [int(optimizer.state[p]["nonfinite"]) for p in parameters] == [1, 1, 1]


@each_optimizer
def test_only_non_finite_gradients_do_no_harm(make):
    model = net()
    optimizer = make(model)
    for step in range(4):
        backward(model, step)
        for parameter in model.parameters():
            parameter.grad.fill_(math.nan)
        optimizer.step()
    train(model, optimizer, range(4, 8))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not same(list(model.parameters()), list(net().parameters()))


@each_of_parameters
def test_zero_gradients_and_blocks_that_are_never_used(make, caplog):
    """At first, later, and in a block of a parameter that is never used."""
    parameters = [filled(100, 40), filled(60, 40)]
    optimizer = make(parameters, max_preconditioner_dim=50, weight_decay=0.0)
    start = [p.detach().clone() for p in parameters]
    for step in range(10):
        for parameter in parameters:
            zero = step < 5 or step == 7
            parameter.grad = torch.zeros_like(parameter) if zero else random(*parameter.shape, seed=step)
        parameters[0].grad[50:] = 0.0
        optimizer.step()
        if step < 5:
            assert all(map(same, map(torch.Tensor.detach, parameters), start))
    assert same(parameters[0][50:].detach(), start[0][50:])
    assert all(torch.isfinite(p).all() for p in parameters)
    still = parameters[0][:50].eq(start[0][:50]).sum()
    assert still <= 2  # steps of about 0.01 may add up to nothing in float32
    assert not caplog.records


@each_of_parameters
def test_scalars_vectors_and_empty_shapes(make):
    vectors = [(), (1,), (1, 50), (50, 1), (1, 1), (1, 1, 7, 1)]
    empty = [(0,), (0, 5), (5, 0), (0, 3, 3)]
    parameters = [filled(*shape) for shape in [(2, 2), (3, 500), (21, 1, 19), *vectors, *empty]]
    start = [p.detach().clone() for p in parameters]
    optimizer = make(parameters)
    for step in range(6):
        for parameter in parameters:
            parameter.grad = random(*parameter.shape, seed=step)
        optimizer.step()
    for parameter, before in zip(parameters, start, strict=True):
        assert torch.isfinite(parameter).all()
        assert not parameter.numel() or not same(parameter.detach(), before)
    other = make([nn.Parameter(p.detach().clone()) for p in parameters])
    other.load_state_dict(optimizer.state_dict())


@each(["shampoo-sgd", "shampoo-direct", "shampoo-eigen", "caspr", "soap"])
@pytest.mark.parametrize("scale", [1e36, 1e30, 1e20, 1e-20, 1e-30, 1e-38, 1e-44])
def test_huge_and_tiny_gradients(make, scale):
    """Squares of these overflow or underflow in float32."""
    parameters = [filled(64, 48), filled(100, 30)]
    optimizer = make(parameters, max_preconditioner_dim=70)
    for step in range(8):
        for parameter in parameters:
            parameter.grad = scale * random(*parameter.shape, seed=step).clamp(-1, 1)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 if scale < 1 else 0.01 / scale
    assert all(torch.isfinite(p).all() for p in parameters)


@pytest.mark.parametrize("power", [120, 66, -66, -96])
@pytest.mark.parametrize("bits", [4, 2, 1])
def test_the_root_form_works_at_any_scale(power, bits):
    """The same optimizer to rounding, float32 or not: the base's learning rate takes the scale out again."""
    moved = []
    for scale in (1.0, 2.0**power):
        parameter = nn.Parameter(torch.zeros(64, 48))
        optimizer = shampoo([parameter], base="sgd", lr=0.1 / scale, bits=bits)
        for step in range(8):
            parameter.grad = scale * random(64, 48, seed=step).clamp(-1, 1)
            optimizer.step()
        moved.append(parameter.detach())
    assert (moved[0] - moved[1]).norm() < 1e-4 * moved[0].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_that_grafting_would_overflow_stays_finite(dtype):
    """The norm of all numbers of the gradient may not fit into one of its dtype."""
    parameter = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = shampoo([parameter], base="sgd", lr=1e-6, statistics_frequency=1)
    largest = torch.finfo(dtype).max
    for step in range(3):
        parameter.grad = (random(64, 64, seed=step).sign() * largest).to(dtype)
        parameter.grad[0] = largest
        optimizer.step()
    assert torch.isfinite(parameter.grad).all()
    assert dtype == torch.bfloat16 or torch.isfinite(parameter).all()


# ------------------------------------------------------------------------------------- failed decompositions


@each(
    [name for name in CLASSES if name != "shampoo-eigen"]  # which follows eigenvectors by QR
    + ["shampoo-4-bits", "shampoo-32-bits", "shampoo-direct", "shampoo-blocks"]
)
def test_a_failed_decomposition_keeps_the_last_good_root(make, monkeypatch, caplog):
    model, optimizer = run(make, 6)
    weight = model.hidden.weight

    def roots():
        own = {k: v.clone() for k, v in optimizer.state[weight].items() if k.startswith(("left.", "right."))}
        return {k: v for k, v in own.items() if ".root" in k or k.endswith(".rms")}

    def failures():
        return sum(int(v.sum()) for k, v in optimizer.state[weight].items() if k.endswith("failures"))

    before = roots()

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        train(model, optimizer, range(6, 13))
    assert same(roots(), before)
    assert failures() > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [r.name for r in caplog.records] == ["lowbit_optim"]
    assert "updates of factors failed" in caplog.messages[0]

    count = failures()
    train(model, optimizer, range(13, 19))
    assert failures() == count
    assert not same(roots(), before)


def test_each_trouble_is_said_once(monkeypatch, caplog):
    """A bad gradient at first must not hide failures later."""
    model, optimizer = run(shampoo, 2)
    for _ in range(3):
        backward(model, 0)
        model.head.bias.grad[0] = math.nan
        optimizer.step()
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (torch.full_like(a[..., 0], math.nan), a))  # as LAPACK may
    train(model, optimizer, range(6))
    assert [message.split()[1] for message in caplog.messages] == ["gradient", "updates"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 2},
        {"bits": 3},
        {"bits": 32},
        {"storage": "direct"},
        {"layout": "square"},
        {"min_quant_size": 9999},
        {"min_quant_size": 257},  # no other state for most parameters, or for any
        {"max_preconditioner_dim": 50},
        {"max_preconditioner_dim": 1300},
        {"root_power": 2},
        {"quantization": (8, "linear", 32, True, "absmax")},
    ],
)
def test_settings_that_no_longer_fit_the_state(change):
    """Nothing has changed after the error, and the old settings go on."""
    model, optimizer = run(shampoo, 3)
    before, old = copies(optimizer), {key: optimizer.param_groups[0][key] for key in change}
    backward(model, 3)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match="no longer fit"):
        optimizer.step()
    optimizer.param_groups[0].update(old)
    assert same(copies(optimizer), before)
    optimizer.step()


@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("power", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_every_root_power_keeps_gradients_of_any_magnitude_finite(power, bits, graft, eps):
    """And in one direction, where statistics are well enough conditioned for float32."""
    steps = {}
    for scale in (1e-25, 1e-18, 1e-9, 1.0, 1e9, 1e18):
        parameter = nn.Parameter(torch.zeros(80, 80))
        settings = {"statistics_frequency": 1, "bits": bits, "root_power": power, "graft": graft, "matrix_eps": eps}
        optimizer = Shampoo([parameter], lr=1.0, base="sgd", **settings)
        for seed in range(3):
            parameter.grad = scale * random(80, 1, seed=seed) @ random(1, 80, seed=seed + 9)
            optimizer.step()
        assert torch.isfinite(parameter).all(), scale
        assert not optimizer.state[parameter]["nonfinite"]
        steps[scale] = parameter.detach().double() / scale
    if graft and eps == 1e-2:
        for scale in (1e-9, 1e9):
            cosine = torch.cosine_similarity(steps[scale].flatten(), steps[1.0].flatten(), dim=0)
            assert cosine > 0.99, scale


def test_numbers_of_numpy_become_plain_ones():
    """Else ``torch.load(weights_only=True)`` would not take the state dict."""
    parameter = nn.Parameter(torch.zeros(4, 4))
    settings = {"statistics_frequency": np.int64(2), "shampoo_beta": np.float64(0.9), "graft": True}
    optimizer = Shampoo([{"params": [parameter], "min_quant_size": np.int32(16)}], **settings)
    (group,) = optimizer.state_dict()["param_groups"]
    assert [type(group[key]) for key in ("statistics_frequency", "shampoo_beta", "min_quant_size")] == [int, float, int]
