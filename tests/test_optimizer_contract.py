"""What every trainer expects of a ``torch.optim.Optimizer`` while it trains. Saved state: test_optimizer_state.py."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowbit_optim import Shampoo
from tests.contract import (
    Net,
    backward,
    copies,
    each,
    each_of_parameters,
    each_optimizer,
    each_quickly,
    loss_of,
    net,
    random,
    run,
    same,
    same_models,
    shampoo,
    train,
)

FACTORED = ("conv.weight", "hidden.weight", "head.weight")


# ---------------------------------------------------------------------------------------------------- a step


@each_optimizer
def test_it_learns(make):
    model = net()
    before = loss_of(model, 0).item()
    optimizer = make(model)
    train(model, optimizer, [0] * 30)
    assert loss_of(model, 0).item() < before / 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


@each_optimizer
def test_a_run_repeats_to_the_last_bit(make):
    (one, first), (other, second) = run(make, 8), run(make, 8)
    assert same_models(one, other)
    assert same(first.state_dict(), second.state_dict())


@each_optimizer
def test_closure(make):
    """Called once, with gradients enabled, and its loss returned."""
    model, calls = net(), []
    optimizer = make(model)

    def closure():
        calls.append(torch.is_grad_enabled())
        backward(model, len(calls) - 1)
        return loss_of(model, len(calls) - 1).detach()

    losses = [optimizer.step(closure) for _ in range(5)]
    expected, _ = run(make, 5)
    assert calls == [True] * 5
    assert same(losses[0], loss_of(net(), 0).detach())
    assert same_models(model, expected)
    assert optimizer.step() is None


@each(["shampoo", "shampoo-eigen"])
def test_the_gradient_is_changed_in_place(make):
    """As by clipping: afterwards p.grad is what the base has seen, and has the norm of the raw gradient."""
    model = net()
    optimizer = make(model)
    for step in range(5):
        backward(model, step)
        raw = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
        optimizer.step()
    for name, parameter in model.named_parameters():
        held, before = raw[name]
        assert parameter.grad is held
        assert parameter.grad.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
        assert same(parameter.grad, before) == (name not in FACTORED)


def test_the_base_sees_the_preconditioned_gradient():
    model = net()
    optimizer = shampoo(model.parameters(), base="sgd", lr=0.5, statistics_frequency=1)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(1))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert same(parameter.detach(), old - 0.5 * parameter.grad)


@each_quickly
@pytest.mark.parametrize("how", [True, False], ids=["to-none", "to-zeros"])
def test_zero_grad(make, how):
    model, optimizer = run(make, 3)
    optimizer.zero_grad(set_to_none=how)
    assert all(p.grad is None if how else not p.grad.any() for p in model.parameters())
    before = copies(optimizer)
    optimizer.step()
    assert same(copies(optimizer), before) == how  # zeros are gradients
    assert all(torch.isfinite(p).all() for p in model.parameters())


@each_optimizer
def test_a_parameter_without_a_gradient_is_left_alone(make):
    model = net()
    frozen = model.hidden.weight.requires_grad_(False)
    before = frozen.clone()
    model, optimizer = run(make, 5, model)
    assert same(frozen, before)
    assert frozen not in optimizer.state


@each_of_parameters
def test_no_gradient_at_all(make):
    make([nn.Parameter(torch.zeros(3, 3))]).step()


@each(["shampoo", "shampoo-eigen"])
def test_gradients_now_and_then(make):
    """Steps of a parameter count only when it has a gradient, as if it were alone."""
    shapes = [(40, 30), (30, 50), (20,)]
    parameters, alone = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    together, single = make(parameters), [make([p]) for p in alone]
    for step in range(12):
        for index, shape in enumerate(shapes):
            has_one = step % (index + 2) > 0
            parameters[index].grad = random(*shape, seed=step) if has_one else None
            if has_one:
                alone[index].grad = random(*shape, seed=step)
                single[index].step()
        together.step()
    assert same(parameters, alone)
    assert [int(together.state[p]["step"]) for p in parameters] == [6, 8, 9]


@each_quickly
def test_under_autocast_and_inference_settings(make):
    """What the user set for his model does not reach the preconditioner."""
    model, expected = net(), run(make, 5)[0]
    optimizer = make(model)
    for step in range(5):
        backward(model, step)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            optimizer.step()
            assert torch.is_autocast_enabled("cpu")
    assert same_models(model, expected)


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_any_floating_dtype(make, dtype):
    model = net(dtype)
    before = loss_of(model, 0).item()
    optimizer = make(model)
    if dtype == torch.float16 and "eps" in optimizer.defaults:  # where the eps of torch's AdamW is zero
        optimizer = make(model, eps=1e-4)
    train(model, optimizer, [0] * 12)
    assert loss_of(model, 0).item() < 0.8 * before
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())
    factors = {v.dtype for k, v in optimizer.state[model.hidden.weight].items() if k.startswith(("left.", "right."))}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert factors <= {torch.uint8, torch.int32, torch.float32, wide}


def test_mixed_dtypes_in_one_optimizer():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    parameters = [nn.Parameter(random(40, 30, dtype=dtype)) for dtype in dtypes]
    optimizer = shampoo(parameters, statistics_frequency=1, base="sgd")
    for step in range(3):
        for parameter in parameters:
            parameter.grad = random(40, 30, seed=step, dtype=parameter.dtype)
        optimizer.step()
    for parameter in parameters[1:]:
        assert parameter.double().sub(parameters[2].double()).norm() < 0.01 * parameters[2].norm()


# --------------------------------------------------------------------------------------------- param groups


@each_optimizer
def test_add_param_group_after_steps(make):
    model = net()
    optimizer = make(model, [p for name, p in model.named_parameters() if not name.startswith("head")])
    train(model, optimizer, range(3))
    before = [p.detach().clone() for p in model.head.parameters()]
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.03})
    train(model, optimizer, range(3, 6))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.03]
    assert optimizer.param_groups[0].keys() == optimizer.param_groups[1].keys()
    assert not any(map(same, model.head.parameters(), before))
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {3, 6}


def test_each_keyword_per_group():
    names = ["four", "two", "sixteen", "dense", "eigen", "blocks", "base", "later", "plain"]
    groups = {name: {"params": [nn.Parameter(torch.zeros(48, 40))]} for name in names}
    groups["two"] |= {"bits": 2}
    groups["sixteen"] |= {"bits": 16}
    groups["dense"] |= {"bits": 32, "precondition_frequency": 2}
    groups["eigen"] |= {"storage": "eigen", "layout": "square", "precondition_frequency": 2}
    groups["blocks"] |= {"max_preconditioner_dim": 24}
    groups["base"] |= {"precondition": False, "weight_decay": 0.0, "betas": (0.5, 0.5)}
    groups["later"] |= {"start_preconditioning_step": 9, "statistics_frequency": 3}
    groups["plain"] |= {"min_quant_size": 4096}
    optimizer = shampoo(list(groups.values()), weight_decay=0.1)
    for step in range(4):
        for group in optimizer.param_groups:
            group["params"][0].grad = random(48, 40, seed=step)
        optimizer.step()
    state = {name: optimizer.state[groups[name]["params"][0]] for name in names}

    def shapes(name, part):
        prefix = f"left.{part}."
        return {
            key.removeprefix(prefix): (value.dtype, tuple(value.shape))
            for key, value in state[name].items()
            if key.startswith(prefix)
        }

    triangle = 48 * 47 // 2
    assert shapes("four", "root")["codes"] == (torch.uint8, (1, triangle))
    assert shapes("two", "root")["codes"] == (torch.uint8, (1, triangle // 2))
    assert shapes("sixteen", "root")["values"] == (torch.float32, (1, triangle))
    assert state["dense"]["left.root"].shape == state["dense"]["left.statistic"].shape == (1, 48, 48)
    assert shapes("eigen", "eigenvectors")["codes"] == (torch.uint8, (1, 48, 24))
    assert shapes("blocks", "root")["codes"] == (torch.uint8, (4, 24 * 23 // 2))
    assert shapes("plain", "root")["values"] == (torch.float32, (1, triangle))
    assert state["base"].keys() == {"step", "nonfinite", "base.step", "base.exp_avg", "base.exp_avg_sq"}
    moved = {name: groups[name]["params"][0].detach() for name in names}
    assert same(moved.pop("sixteen"), moved["plain"])
    assert len({tuple(p.flatten().tolist()) for p in moved.values()}) == len(moved)


def test_named_parameters():
    model = net()
    optimizer = shampoo(model.named_parameters())
    train(model, optimizer, range(4))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "conv.weight"
    assert same_models(model, run(shampoo, 4)[0])


def test_tied_parameters_are_one():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = self.hidden

        def forward(self, images):
            x = self.norm(self.conv(images).flatten(1))
            return self.head(torch.tanh(self.hidden(x) + self.again(2 * x)))

    model = Tied()
    optimizer = shampoo(model.parameters())
    train(model, optimizer, range(4))
    assert len(optimizer.state) == len(list(model.parameters())) == 7
    assert int(optimizer.state[model.again.weight]["step"]) == 4
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.again.weight]})
    assert len(optimizer.param_groups) == 1


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


# ----------------------------------------------------------------------------------- schedulers and scalers


def schedulers():
    cosine, step = lr_scheduler.CosineAnnealingLR, lr_scheduler.LambdaLR
    yield "lambda", lambda o: step(o, lambda t: 0.5**t)
    yield "cosine", lambda o: cosine(o, T_max=6)
    yield "plateau", lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)
    yield "one-cycle", lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=8, cycle_momentum=True)
    yield "chained", lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), cosine(o, T_max=4)], [2])


@pytest.mark.parametrize("schedule", [pytest.param(make, id=name) for name, make in schedulers()])
@pytest.mark.parametrize("settings", [{}, {"base": "sgd", "momentum": 0.9}], ids=["adamw", "sgd"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_learning_rate_schedulers(schedule, settings, tensor):
    """The base obeys: without preconditioning the trajectory is that of torch's optimizer under the same scheduler."""
    base = {"lr": torch.tensor(0.01) if tensor else 0.01, **{k: v for k, v in settings.items() if k != "base"}}
    mine, theirs = net(), net()
    optimizer = Shampoo(mine.parameters(), **{**base, **settings}, precondition=False)
    lr = base["lr"].clone() if tensor else 0.01
    reference = (torch.optim.SGD if settings else torch.optim.AdamW)(theirs.parameters(), **{**base, "lr": lr})
    for model, own in ((mine, optimizer), (theirs, reference)):
        scheduler = schedule(own)
        for step in range(7):
            train(model, own, [step])
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert same_models(mine, theirs)
    for key in ("lr", "momentum", "betas"):
        assert same(optimizer.param_groups[0].get(key), reference.param_groups[0].get(key))
    assert float(optimizer.param_groups[0]["lr"]) != 0.01


def test_defaults_are_what_schedulers_look_at():
    assert {"lr", "betas", "bits", "foreach"} <= shampoo(net().parameters()).defaults.keys()
    sgd = shampoo(net().parameters(), base="sgd", momentum=0.8)
    assert sgd.defaults["momentum"] == 0.8
    assert "betas" not in sgd.defaults
    assert sgd.defaults.keys() == sgd.param_groups[0].keys() - {"params"}
    assert "lr: 0.01" in repr(sgd)


@each_quickly
def test_grad_scaler(make):
    """A power of two as scale changes nothing; a step with an infinite gradient touches nothing."""
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = make(model)
    for step in range(6):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert same_models(model, run(make, 6)[0])

    before = copies(optimizer)
    backward(model, 6)
    model.hidden.weight.grad[3, 5] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert same(copies(optimizer), before)
    assert scaler.get_scale() == 2.0**9
