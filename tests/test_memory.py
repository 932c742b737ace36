"""State in bytes, measured and estimated; the report of an optimizer."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowbit_optim
from lowbit_optim import AdamW, Shampoo, param_groups
from lowbit_optim.memory import estimate, state_bytes
from lowbit_optim.peak import peak_bytes
from tests.contract import FIRST_ORDER, OPTIMIZERS, backward, each, each_optimizer, net, run, tensors, train

SHAPES = {"matrix": (256, 192), "vector": (192,), "image": (32, 16, 3, 3)}


def frequent(optimizer):
    """With statistics and roots in the second step."""
    for group in optimizer.param_groups:
        group["statistics_frequency"] = group["precondition_frequency"] = 2
    return optimizer


@each_optimizer
def test_the_estimate_is_what_is_measured(make):
    """To the last byte: state by kind, and the peak of the steps."""
    model = net()
    optimizer = frequent(make(model))
    peak = peak_bytes(optimizer, lambda: backward(model, 0))
    planned = estimate(net(), make.optimizer, device="cpu", **make.settings)
    measured = state_bytes(optimizer)
    assert planned.kinds | {"total": planned.state} == measured
    assert measured["total"] == sum(x.nbytes for x in tensors(optimizer))
    assert planned.peak == planned.state + planned.workspace == peak
    assert planned.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {"amsgrad": True}),
        ("adamw", {"foreach": True}),
        ("sgd", {"momentum": 0.9, "lr": 0.1}),
        ("adagrad", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_order_of_torch(name, settings, dtype):
    model = net(dtype)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[name]
    optimizer = kind(model.parameters(), **settings)
    peak = peak_bytes(optimizer, lambda: backward(model, 0))
    planned = estimate(net(dtype), kind, device="cpu", **settings)
    assert (planned.state, planned.peak) == (state_bytes(optimizer)["total"], peak)


def test_all_parameters_at_once_on_cuda():
    """torch's own optimizers take temporaries of the size of the model there."""
    shapes = [(64, 64)] * 20
    one, all_at_once = (estimate(shapes, torch.optim.AdamW, device=d).workspace for d in ("cpu", "cuda"))
    assert one == 3 * 64 * 64 * 4
    assert 20 * 64 * 64 * 4 <= all_at_once < 21 * 64 * 64 * 4
    assert estimate(shapes, torch.optim.AdamW, foreach=False).workspace == one


def test_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    measured = state_bytes(optimizer)
    assert estimate(SHAPES, "adamw8bit").state == measured["total"]
    assert estimate(SHAPES, bitsandbytes.optim.AdamW8bit).state == measured["total"]
    assert measured["other"] == 0
    shampoo, alone = (estimate(SHAPES, base=base) for base in (bitsandbytes.optim.AdamW8bit, "adamw"))
    assert shampoo.kinds["roots"] == alone.kinds["roots"]
    assert shampoo.kinds["moments"] < alone.kinds["moments"]


def test_what_may_be_given():
    model = net()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    states = [estimate(x).state for x in (model, shapes, list(shapes.values()), model.to("meta"))]
    assert len(set(states)) == 1
    groups = param_groups(model)
    assert estimate(groups).state == state_of(groups)
    model.hidden.weight.requires_grad_(False)
    assert estimate(model).parameters == estimate(shapes).parameters - 36 * 64


def state_of(groups):
    real = [{**g, "params": [(n, nn.Parameter(torch.zeros(p.shape))) for n, p in g["params"]]} for g in groups]
    optimizer = Shampoo(real)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return state_bytes(optimizer)["total"]


class OnHost(TorchDispatchMode):
    """The largest tensor that an operator has returned, but those of the meta device."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_meta:
                self.largest = max(self.largest, x.nbytes)
        return result


def test_nothing_is_allocated():
    """But counters of steps."""
    with OnHost() as host:
        planned = estimate({f"layer.{i}": (8192, 8192) for i in range(100)}, bits=32)
    assert planned.state > 2**37
    assert host.largest <= 8


def test_the_model_stays_as_it_is():
    model = net()
    optimizer = OPTIMIZERS["kfac"](model)
    hooks = {name: list(m._forward_hooks) for name, m in model.named_modules()}
    estimate(model, "kfac")
    assert {name: list(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    train(model, optimizer, range(2))


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "says"),
    [
        ((SHAPES, "shampo"), {}, ValueError, "adamw, sgd, adagrad, shampoo, caspr, kfac, adabk, ekfac, soap"),
        ((SHAPES,), {"sharding": "zero"}, ValueError, "'ddp' or 'fsdp2'"),
        ((SHAPES,), {"world_size": 0}, ValueError, "positive integer"),
        ((SHAPES,), {"bitz": 4}, TypeError, "statistics_frequency"),
        ((SHAPES, torch.optim.AdamW), {"bitz": 4}, TypeError, "weight_decay"),
        ((SHAPES,), {"bits": 5}, ValueError, "bits is 5"),
        ((SHAPES, "kfac"), {}, TypeError, "nn.Module"),
        ((7,), {}, TypeError, "neither"),
        (("gpt2",), {}, TypeError, "neither"),
        (([3],), {}, TypeError, "tuple of integers"),
    ],
)
def test_errors(arguments, keywords, error, says):
    with pytest.raises(error, match=says):
        estimate(*arguments, **keywords)


class Reads(torch.optim.SGD):
    def step(self, closure=None):
        self.param_groups[0]["params"][0].numpy()


def test_a_step_that_needs_real_numbers():
    with pytest.raises(TypeError, match="meta device"):
        estimate(SHAPES, Reads)


@pytest.mark.parametrize("sharding", [None, "ddp", "fsdp2"])
def test_ranks(sharding):
    one = estimate(SHAPES, bits=32, max_preconditioner_dim=64)
    many = estimate(SHAPES, bits=32, max_preconditioner_dim=64, world_size=4, sharding=sharding)
    assert (many.kinds, len(many.ranks)) == (one.kinds, 4)
    if sharding is None:
        assert many.ranks == (one.state,) * 4
        return
    moments = one.kinds["moments"] * (4 if sharding == "ddp" else 1)
    factors = one.kinds["statistics"] + one.kinds["roots"]
    assert sum(many.ranks) == pytest.approx(moments + factors, rel=0.01)
    assert max(many.ranks) - min(many.ranks) < 0.3 * one.state / 4
    assert many.peak == max(many.ranks) + many.workspace


def test_kinds():
    parameter = nn.Parameter(torch.zeros(80, 96))
    kinds = {}
    for storage in ("root", "logarithm", "spiked", "eigen", "direct", "cholesky-feedback"):
        optimizer = Shampoo([parameter], bits=4, storage=storage)
        optimizer.init_state()
        kinds[storage] = state_bytes(optimizer)
    assert kinds["root"]["statistics"] == kinds["logarithm"]["statistics"] == 0
    assert kinds["root"]["roots"] == kinds["logarithm"]["roots"] == kinds["direct"]["roots"] > 0
    assert kinds["direct"]["statistics"] == kinds["direct"]["roots"]
    assert all(own["other"] == own["moments"] == 0 for own in kinds.values())
    assert kinds["cholesky-feedback"]["statistics"] > kinds["direct"]["statistics"]


def test_any_optimizer():
    """Shared storage counts once; an unknown tensor is a moment if it looks like one; lists are looked into."""
    parameter = nn.Parameter(torch.zeros(4, 6))
    optimizer = torch.optim.SGD([parameter])
    table = torch.zeros(10)
    optimizer.state[parameter] = {"odd": torch.zeros(4, 6), "list": [table, {"again": table[:5]}], "number": 3}
    assert state_bytes(optimizer) == {
        **dict.fromkeys(("statistics", "roots", "bases", "scales", "counters"), 0),
        "moments": 96,
        "other": 40,
        "total": 136,
    }


def test_the_report():
    model = net()
    optimizer = Shampoo(model.named_parameters(), statistics_frequency=2, min_quant_size=256)
    assert "not made yet" in optimizer.report()
    train(model, optimizer, range(2))
    lines = {line.split("  ")[0]: line for line in optimizer.report().splitlines()}
    assert "36 x 64" in lines["hidden.weight"]
    assert "Shampoo: 36 x 64, root, 2 bits" in lines["hidden.weight"]
    assert "base" in lines["norm.bias"]
    assert "32 bits" in lines["norm.bias"]
    totals = state_bytes(optimizer)
    assert f"{totals['total']:,}" in lines["total"]
    assert "statistics" not in lines  # of none there are no lines
    own = sum(v.nbytes for v in optimizer.state[model.hidden.weight].values())
    assert f"{own:,}" in lines["hidden.weight"]
    assert f"{own / 36 / 64:.2f}" in lines["hidden.weight"]


@each(FIRST_ORDER)
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_order_of_few_bits(make, bits, dtype):
    """Where steps are fused they take no temporaries but counts."""
    model = net(dtype)
    optimizer = make(model, bits=bits)
    peak = peak_bytes(optimizer, lambda: backward(model, 0))
    planned = estimate(net(dtype), make.optimizer, device="cpu", **{**make.settings, "bits": bits})
    assert planned.kinds | {"total": planned.state} == state_bytes(optimizer)
    assert 0 <= peak - planned.peak < 8 * 200


def test_moments_of_few_bits_under_a_second_order_optimizer():
    planned = estimate(SHAPES, base_bits=4)
    assert planned.kinds["moments"] == 2 * (256 * 96 + 4 * 192 + 32 * 144 // 2)
    assert planned.workspace < estimate(SHAPES, foreach=False).workspace + 8 * 20  # counts


def test_the_report_says_why_moments_keep_32_bits():
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 128), (64,), (5, 6), (500, 20))]
    text = AdamW(parameters, bits=4).report()
    assert "preconditioner" not in text
    first, vector, small, short = text.splitlines()[2:6]
    assert " 4 bits" in first
    assert "32 bits: fewer than 4096 elements" in vector
    assert "32 bits: fewer than 4096 elements" in small
    assert "32 bits: short rows" in short


def test_public_names():
    assert lowbit_optim.estimate is estimate
    assert lowbit_optim.state_bytes is state_bytes
    _, optimizer = run(OPTIMIZERS["shampoo"], 1)
    assert lowbit_optim.state_bytes(optimizer)["total"] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 4, "apply_dtype": "bfloat16"},
        {"bits": 32},
        {"bits": 4, "root_power": 2},
        {"bits": 2, "storage": "logarithm"},
        {"bits": 2, "storage": "spiked"},
        {"bits": 4, "stagger": True},
        {"storage": "eigen", "bits": 4},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_step_keeps_to_its_workspace(device, settings):
    """And ten per cent, wherever blocks are small beside it."""
    limit = 64 * 2**20
    planned = estimate([(512, 512)] * 24, Shampoo, device=device, base="sgd", workspace=limit, **settings)
    assert planned.workspace <= 1.1 * limit
