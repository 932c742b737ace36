"""Parameters as models have them: tied, listed twice, empty, frozen for a while, swapped or cast under an optimizer."""

import copy

import pytest
import torch
from torch import nn

from tests.contract import (
    LAYERED,
    Net,
    backward,
    copies,
    each,
    each_but_soap,
    each_class,
    each_counting,
    each_of_parameters,
    each_public,
    loss_of,
    net,
    random,
    run,
    same,
    same_models,
    train,
)


def finite(model):
    return all(torch.isfinite(p).all() for p in model.parameters())


# --------------------------------------------------------------------------------------------- tied and twice


class Tied(Net):
    """The hidden layer twice: the same module, or another one with the same weight."""

    def __init__(self, module):
        super().__init__()
        self.again = self.hidden if module else nn.Linear(64, 36)
        self.again.weight = self.hidden.weight

    def forward(self, images):
        x = self.norm(self.conv(images).flatten(1))
        return self.head(torch.tanh(self.hidden(x) + self.again(2 * x)))


@each_counting
@pytest.mark.parametrize("module", [True, False], ids=["module", "weight"])
def test_tied_parameters_are_one(make, module):
    """K-FAC and its kin leave a weight that two modules share to the base."""
    model = Tied(module)
    optimizer = make(model)
    train(model, optimizer, range(4))
    assert len(optimizer.state) == len(list(model.parameters())) == 8 - module
    assert int(optimizer.state[model.again.weight]["step"]) == 4
    assert model.again.weight is model.hidden.weight
    assert finite(model)


@each_counting
def test_a_parameter_listed_twice_is_refused(make):
    """In two groups as torch does; in one group torch only warns, and steps twice."""
    model = net()
    weight = model.hidden.weight
    others = [p for p in model.parameters() if p is not weight]
    with pytest.raises(ValueError, match="more than one parameter group"):
        make(model, [{"params": [weight]}, {"params": [weight]}])
    optimizer = make(model, others)
    train(model, optimizer, range(2))
    before = copies(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.head.weight]})
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="same parameter twice"):
        optimizer.add_param_group({"params": [weight, weight]})
    assert same(copies(optimizer), before)
    optimizer.add_param_group({"params": [weight]})
    train(model, optimizer, range(2, 4))
    assert int(optimizer.state[weight]["step"]) == 2


@each_class
def test_empty_parameters_change_nothing(make):
    """Parameters of no elements, some with gradients: nothing else notices, and they resume."""

    def with_empty():
        model = net()
        for i, shape in enumerate([(0,), (0, 5), (3, 0), (0, 3, 2)]):
            model.register_parameter(f"empty{i}", nn.Parameter(torch.zeros(shape)))
        return model

    def go(model, optimizer, steps):
        for step in steps:
            backward(model, step)
            model.empty0.grad, model.empty1.grad, model.empty3.grad = (
                torch.zeros_like(p) for p in (model.empty0, model.empty1, model.empty3)
            )
            optimizer.step()

    model = with_empty()
    optimizer = make(model)
    go(model, optimizer, range(5))
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(optimizer.state_dict())
    go(other, resumed, range(5, 7))
    expected, _ = run(make, 7)
    found = dict(other.named_parameters())
    assert all(same(found[name], parameter) for name, parameter in expected.named_parameters())
    assert model.empty2 not in optimizer.state
    assert int(resumed.state[other.empty1]["step"]) == 7


# --------------------------------------------------------------------------------- gradients that come and go


@each_counting
def test_parameters_that_are_thawed_late(make):
    """A frozen weight and a frozen bias join at the step in which they are thawed; frozen again, they stay."""
    model = net()
    late = [model.hidden.weight, model.head.bias]
    start = [p.detach().clone() for p in late]
    optimizer = make(model)
    for parameter in late:
        parameter.requires_grad_(False)
    train(model, optimizer, range(3))
    assert same([p.detach() for p in late], start)
    for parameter in late:
        parameter.requires_grad_(True)
    train(model, optimizer, range(3, 8))
    assert not any(same(p.detach(), before) for p, before in zip(late, start, strict=True))
    assert [int(optimizer.state[p]["step"]) for p in (*late, model.head.weight)] == [5, 5, 8]
    for parameter in late:
        parameter.requires_grad_(False)
    before = [p.detach().clone() for p in late]
    train(model, optimizer, range(8, 11))
    assert same([p.detach() for p in late], before)
    assert finite(model)


@each_class
def test_gradients_that_come_now_and_then(make):
    """Steps of a parameter count only when it has a gradient, as if it were alone."""

    def layers():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.ModuleList([nn.Linear(30, 40), nn.Linear(50, 30, bias=False), nn.Linear(9, 4)])

    parts, alone = layers(), layers()
    together, single = make(parts), [make(layer) for layer in alone]
    for step in range(12):
        for optimizer in (together, *single):
            optimizer.zero_grad()
        for index, pair in enumerate(zip(parts, alone, strict=True)):
            if step % (index + 2):
                for layer in pair:
                    layer(random(8, layer.in_features, seed=step)).square().mean().backward()
                single[index].step()
        together.step()
    assert same_models(parts, alone)
    assert [int(together.state[layer.weight]["step"]) for layer in parts] == [6, 8, 9]


# ------------------------------------------------------------------------------------------ swapped and cast


@each_of_parameters
def test_parameters_swapped_in_the_groups_are_the_ones_updated(make):
    """accelerate puts other Parameter objects into the groups that it is given."""
    old, model = net(), net()
    optimizer = make(old)
    replacement = dict(zip(old.parameters(), model.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [replacement[p] for p in group["params"]]
    train(model, optimizer, range(5))
    assert same_models(model, run(make, 5)[0])
    assert same_models(old, net())


@each_public
@pytest.mark.parametrize("steps", [0, 3])
def test_parameters_swapped_in_the_model_and_the_groups(make, steps):
    """With their state, as moving a model by hand would; K-FAC's hooks follow the modules that they sit on."""
    model, optimizer = run(make, steps)
    replacement = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            replacement[old] = nn.Parameter(old.detach().clone())
            module.register_parameter(name, replacement[old])
            if old in optimizer.state:
                optimizer.state[replacement[old]] = optimizer.state.pop(old)
    for group in optimizer.param_groups:
        group["params"] = [replacement[p] for p in group["params"]]
    train(model, optimizer, range(steps, 7))
    expected, other = run(make, 7)
    assert same_models(model, expected)
    assert same(optimizer.state_dict()["state"], other.state_dict()["state"])


@each(LAYERED)
def test_parameters_swapped_in_the_groups_alone_go_to_the_base(make):
    """Layers are found by the parameters of their modules: the hooks see no layer of a parameter from elsewhere."""
    model = net()
    optimizer = make(model)
    others = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = others
    for step in range(4):
        backward(model, step)
        for parameter, other in zip(model.parameters(), others, strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
    assert {own["treatment"] for own in optimizer.stats().values()} == {"base"}
    assert same_models(model, net())
    assert not any(map(same, others, model.parameters()))


casts = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])


@each_but_soap
@casts
def test_casting_the_model_over_sgd_goes_on(make, dtype):
    """torch's SGD goes on with the moments that it has, and so do second-order optimizers over it."""
    model, optimizer = run(lambda m: make(m, base="sgd", momentum=0.9), 5)
    model.to(dtype)
    before = loss_of(model, 0).item()
    train(model, optimizer, [0] * 8)
    assert all(p.dtype == dtype for p in model.parameters())
    assert finite(model)
    assert loss_of(model, 0).item() < before


@each_class
@casts
def test_casting_the_model_over_adamw_is_refused_by_it(make, dtype):
    """torch's AdamW refuses to step with moments of another dtype: weights stay as they are, and casting back helps."""
    model, optimizer = run(lambda m: make(m, weight_decay=0.0), 5)
    model.to(dtype)
    before = copies(optimizer)["groups"]
    with pytest.raises(RuntimeError, match="dtype"):
        train(model, optimizer, [5])
    assert same(copies(optimizer)["groups"], before)
    model.float()
    before = loss_of(model, 0).item()
    train(model, optimizer, [0] * 8)
    assert loss_of(model, 0).item() < before


@each_but_soap
def test_casting_the_moments_to_the_models_dtype(make):
    """By loading the base's state as torch loads it. Not SOAP's, whose moments are in eigenbases."""
    model, optimizer = run(make, 5)
    model.bfloat16()
    factors = {k: v.clone() for k, v in optimizer.state[model.hidden.weight].items() if "base." not in k}
    optimizer.load_base_state_dict(optimizer.base_state_dict())
    own = optimizer.state[model.hidden.weight]
    assert own["base.exp_avg"].dtype == torch.bfloat16
    assert same({k: v for k, v in own.items() if "base." not in k}, factors)
    before = loss_of(model, 0).item()
    train(model, optimizer, [0] * 8)
    assert loss_of(model, 0).item() < before


@each_public
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_moving_the_model_after_steps(make, device):
    """State follows its parameter at the next step, and comes back."""
    model, optimizer = run(make, 5)
    model.to(device)
    train(model, optimizer, range(5, 7))
    own = optimizer.state[model.hidden.weight]
    assert {t.device.type for k, t in own.items() if k not in ("step", "base.step")} == {device}
    model.cpu()
    train(model, optimizer, range(7, 9))
    assert finite(model)
    assert device != "cpu" or same_models(model, run(make, 9)[0])
