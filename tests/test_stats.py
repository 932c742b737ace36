"""What an optimizer says of each parameter: ``stats()``, and ``treatments()`` in the same words."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_optim import KFAC, SOAP, AdaBK, Quantization, Shampoo
from tests.contract import OPTIMIZERS, backward, copies, each_class, each_optimizer, net, random, run, same, train

KEYS = {"treatment", "steps", "nonfinite", "bytes"} | {
    f"{side}.{name}" for side in ("left", "right") for name in ("updates", "failures", "rounding_error")
}


def stepped(optimizer, parameter, steps, bad=()):
    for step in range(steps):
        parameter.grad = random(*parameter.shape, seed=step)
        if step in bad:
            parameter.grad[0, 0] = torch.nan
        optimizer.step()


@each_optimizer
@pytest.mark.parametrize("steps", [0, 5])
def test_every_parameter_in_plain_numbers(make, steps):
    """Which a JSON log takes; asking changes nothing."""
    model, optimizer = run(make, steps)
    before = copies(optimizer)
    stats = optimizer.stats()
    assert list(stats) == list(range(7))
    assert all(own.keys() == KEYS for own in stats.values())
    assert json.loads(json.dumps(list(stats.values()))) == list(stats.values())
    assert {own["steps"] for own in stats.values()} == {steps}
    assert same(copies(optimizer), before)
    for index, parameter in enumerate(model.parameters()):
        own = optimizer.state.get(parameter, {})
        assert stats[index]["bytes"] == sum(v.nbytes for k, v in own.items() if not k.startswith("base."))
        assert (stats[index]["left.updates"] > 0) == ("left.failures" in own)


class Reads(TorchDispatchMode):
    """The tensors of which a single number is asked for, which waits for a device."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0])
        return function(*args, **(kwargs or {}))


@each_class
def test_no_number_is_fetched_by_itself(make):
    """But the steps, which are on the CPU."""
    _, optimizer = run(make, 4)
    optimizer.stats()  # tables are made once
    with Reads() as reads:
        optimizer.stats()
    assert [x.data_ptr() for x in reads.read] == [own["step"].data_ptr() for own in optimizer.state.values()]


def test_by_name():
    model = net()
    optimizer = Shampoo([{"params": model.conv.named_parameters()}, {"params": model.head.named_parameters("head")}])
    assert list(optimizer.stats()) == ["weight", "bias", "head.weight", "head.bias"]


def test_names_that_repeat_are_not_used():
    model = net()
    optimizer = Shampoo([{"params": model.conv.named_parameters()}, {"params": model.head.named_parameters()}])
    assert list(optimizer.stats()) == [0, 1, 2, 3]


def test_the_workspace_is_heeded():
    parameters = [nn.Parameter(torch.zeros(256, 64)) for _ in range(2)]
    found = []
    for parameter, workspace in zip(parameters, (1, 2**28), strict=True):
        optimizer = Shampoo([parameter], statistics_frequency=1, max_preconditioner_dim=64, workspace=workspace)
        stepped(optimizer, parameter, 2)
        found.append(optimizer.stats())
    assert found[0] == found[1]


def test_a_copy_without_hooks_does_not_know():
    _, optimizer = run(OPTIMIZERS["kfac"], 2)
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        copy.deepcopy(optimizer).stats()


def treatments():
    yield {}, "Shampoo: 8 blocks of 128 x 128, root, 2 bits"
    yield {"bits": 32}, "Shampoo: 8 blocks of 128 x 128, 32 bits"
    yield {"bits": 4, "storage": "eigen"}, "Shampoo: 8 blocks of 128 x 128, eigen, 4 bits"
    yield {"quantization": Quantization(8)}, "Shampoo: 8 blocks of 128 x 128, root, codes of 8 bits"
    yield {"min_quant_size": 10**6}, "Shampoo: 8 blocks of 128 x 128, root, uncoded"
    yield {"max_preconditioner_dim": 512, "min_quant_size": 10**5}, "Shampoo: 256 x 512, root, 2 bits, left uncoded"
    yield {"precondition": False}, "base"


@pytest.mark.parametrize(("settings", "said"), list(treatments()))
def test_treatment(settings, said):
    parameter = nn.Parameter(torch.zeros(256, 512))
    optimizer = Shampoo([parameter], **{"max_preconditioner_dim": 128, **settings})
    assert optimizer.stats()[0]["treatment"] == said
    assert Shampoo([nn.Parameter(torch.zeros(256))]).stats()[0]["treatment"] == "base"


def test_counts():
    """A block with a gradient that is not finite is counted, and its statistic of zeros is none yet."""
    parameter = nn.Parameter(torch.zeros(48, 40))
    optimizer = Shampoo([parameter], statistics_frequency=2, max_preconditioner_dim=24)
    stepped(optimizer, parameter, 5, bad=(1, 2))
    (own,) = optimizer.stats().values()
    assert (own["steps"], own["nonfinite"], own["left.updates"], own["right.updates"]) == (5, 2, 1, 1)
    assert (own["left.failures"], own["right.failures"]) == (0, 0)


def test_failures_of_a_layer_that_saw_nothing():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    optimizer = KFAC(model.parameters(), model=model, statistics_frequency=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        model[0](random(8, 6)).sum().backward()
        optimizer.step()
    seen, _, unseen, _ = optimizer.stats().values()
    assert (seen["left.failures"], seen["left.updates"]) == (0, 2)
    assert (unseen["left.failures"], unseen["right.failures"], unseen["left.updates"]) == (2, 2, 0)


def test_rounding_errors_grow_as_bits_shrink():
    errors = []
    for bits in (32, 16, 8, 4, 3, 2, 1):
        parameter = nn.Parameter(torch.zeros(64, 96))
        optimizer = Shampoo([parameter], bits=bits, statistics_frequency=1, min_quant_size=64**2 + 1)
        stepped(optimizer, parameter, 3)
        (own,) = optimizer.stats().values()
        assert own["left.rounding_error"] == 0.0  # too small for codes
        errors.append(own["right.rounding_error"])
    assert errors[0] == 0.0
    assert errors == sorted(errors)
    assert 0.01 < errors[-1] < 0.5


def test_the_worst_block_counts():
    parameter = nn.Parameter(torch.zeros(64, 128))
    optimizer = Shampoo([parameter], statistics_frequency=1, max_preconditioner_dim=64)
    parameter.grad = random(64, 128)
    parameter.grad[:, 64:] = torch.eye(64)  # whose root is diagonal, and kept exactly
    optimizer.step()
    state = {key.removeprefix("left."): v for key, v in optimizer.state[parameter].items() if key.startswith("left.")}
    group = optimizer.param_groups[0]
    worse, exact = optimizer.preconditioner.form(group, 64).rounding_error(state).tolist()
    assert exact == 0 < worse == optimizer.stats()[0]["left.rounding_error"]


def test_of_a_basis_no_rounding_error_is_estimated():
    _, optimizer = run(OPTIMIZERS["soap"], 4)
    assert {own["left.rounding_error"] for own in optimizer.stats().values()} == {None}
    assert optimizer.stats()[4]["treatment"] == "SOAP: 36 x 64, root, 4 bits"
    assert SOAP([nn.Parameter(torch.zeros(12_000, 2))]).stats()[0]["treatment"] == "base"


def test_large_counts_arrive_exactly():
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = Shampoo([parameter])
    stepped(optimizer, parameter, 1)
    optimizer.state[parameter]["nonfinite"].fill_(2**40 + 1)
    assert optimizer.stats()[0]["nonfinite"] == 2**40 + 1


def test_after_loading_and_without_preconditioning():
    """Factors stay where they are while a group does without them."""
    model, optimizer = run(OPTIMIZERS["shampoo"], 4)
    other = copy.deepcopy(optimizer)
    other.load_state_dict(optimizer.state_dict())
    assert other.stats() == optimizer.stats()
    optimizer.param_groups[0]["precondition"] = False
    own, before = optimizer.stats()[0], other.stats()[0]
    assert own == before | {"treatment": "base", "left.rounding_error": None, "right.rounding_error": None}
    train(model, optimizer, range(2))


@pytest.mark.parametrize("made", [KFAC, AdaBK])
def test_the_words_of_the_report(made):
    model = net()
    optimizer = made(model.named_parameters(), model=model, min_quant_size=0)
    report, stats = optimizer.treatments(), optimizer.stats()
    name = made.__name__
    assert report["head.weight"] == stats["head.weight"]["treatment"] == f"{name}: 5 x 37, root, 2 bits"
    assert report["head.bias"] == stats["head.bias"]["treatment"] == "a column of the weight"
    assert report["norm.weight"] == "no layer that has Kronecker factors"
    assert stats["norm.weight"]["treatment"] == "base"
    backward(model, 0)
    optimizer.step()
    assert optimizer.treatments() == report


def test_a_bias_that_is_no_column_gets_the_base():
    model = net()
    groups = [{"params": [model.head.weight]}, {"params": [model.head.bias], "precondition": False}]
    groups += [{"params": [model.conv.bias]}, {"params": [model.conv.weight], "precondition": False}]
    report = KFAC(groups, model=model).treatments()
    assert report["head.weight"] == "KFAC: 5 x 36, root, uncoded"
    assert {report[key] for key in ("head.bias", "conv.weight", "conv.bias")} == {"base"}
