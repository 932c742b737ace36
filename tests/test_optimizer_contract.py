"""What every trainer expects of a ``torch.optim.Optimizer`` while it trains. Saved state: test_optimizer_state.py."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import lowbit_optim
from lowbit_optim import KFAC
from tests.contract import (
    CLASSES,
    FIRST_ORDER,
    OPTIMIZERS,
    backward,
    copies,
    each_class,
    each_one,
    each_optimizer,
    each_public,
    loss_of,
    net,
    random,
    run,
    same,
    same_models,
    shampoo,
    train,
)


def test_every_public_optimizer_keeps_the_contract():
    """One that is missing here would be tested nowhere."""
    public = [getattr(lowbit_optim, name) for name in lowbit_optim.__all__]
    optimizers = {one for one in public if isinstance(one, type) and issubclass(one, torch.optim.Optimizer)}
    tested = [OPTIMIZERS[name] for name in CLASSES] + list(FIRST_ORDER.values())
    assert {make.optimizer for make in tested} == optimizers


# ---------------------------------------------------------------------------------------------------- a step


@each_one
def test_it_learns(make):
    model = net()
    before = loss_of(model, 0).item()
    optimizer = make(model)
    train(model, optimizer, [0] * 30)
    assert loss_of(model, 0).item() < before / 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


@each_one
def test_a_run_repeats_to_the_last_bit(make):
    (one, first), (other, second) = run(make, 8), run(make, 8)
    assert same_models(one, other)
    assert same(first.state_dict(), second.state_dict())


@each_one
def test_a_closure_is_called_once_and_its_loss_returned(make):
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


@each_class
def test_the_gradient_is_changed_in_place(make):
    """As by clipping: afterwards p.grad is what the base has seen, and has the norm of the raw gradient.

    K-FAC and its kin keep the norm of a weight and its bias together.
    """
    model = net()
    optimizer = make(model)
    for step in range(5):
        backward(model, step)
        raw = {p: (p.grad, p.grad.clone()) for p in model.parameters()}
        optimizer.step()
    for layer in (model.conv, model.norm, model.hidden, model.head):
        own = list(layer.parameters())
        assert all(p.grad is raw[p][0] for p in own)
        before, after = (torch.cat([g.flatten() for g in x]) for x in ([raw[p][1] for p in own], [p.grad for p in own]))
        assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
        assert same(layer.weight.grad, raw[layer.weight][1]) == (layer is model.norm)


def test_the_base_sees_the_preconditioned_gradient():
    model = net()
    optimizer = shampoo(model.parameters(), base="sgd", lr=0.5, statistics_frequency=1)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(1))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert same(parameter.detach(), old - 0.5 * parameter.grad)


@each_public
@pytest.mark.parametrize("how", [True, False], ids=["to-none", "to-zeros"])
def test_zero_grad_to_none_and_to_zeros(make, how):
    model, optimizer = run(make, 3)
    optimizer.zero_grad(set_to_none=how)
    assert all(p.grad is None if how else not p.grad.any() for p in model.parameters())
    before = copies(optimizer)
    optimizer.step()
    assert same(copies(optimizer), before) == how  # zeros are gradients
    assert all(torch.isfinite(p).all() for p in model.parameters())


@each_one
def test_a_parameter_without_a_gradient_is_left_alone(make):
    model = net()
    frozen = model.hidden.weight.requires_grad_(False)
    before = frozen.clone()
    model, optimizer = run(make, 5, model)
    assert same(frozen, before)
    assert frozen not in optimizer.state


@each_one
def test_a_step_without_gradients_does_nothing(make):
    model = net()
    optimizer = make(model)
    optimizer.step()
    assert same_models(model, net())
    assert not optimizer.state


@each_class
def test_zero_gradients_do_no_harm(make):
    """At first they change nothing, and later they do no harm."""
    model = net()
    optimizer = make(model, weight_decay=0.0)
    for step in range(10):
        model.zero_grad()
        (loss_of(model, step) * (step >= 5 and step != 7)).backward()
        optimizer.step()
        assert same_models(model, net()) == (step < 5)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@each_class
def test_a_nan_in_a_gradient_makes_it_zero(make, caplog):
    """At a step that takes statistics and at another; it is counted, and said once."""
    (spoilt, first), (zeroed, second) = ((model, make(model)) for model in (net(), net()))
    for step in range(8):
        for model, optimizer in ((spoilt, first), (zeroed, second)):
            backward(model, step)
            if step in (3, 4):
                model.hidden.weight.grad.zero_()
                if model is spoilt:
                    model.hidden.weight.grad[3, 5] = torch.nan
            optimizer.step()
    assert same_models(spoilt, zeroed)
    assert int(first.state[spoilt.hidden.weight]["nonfinite"]) == 2
    assert len(caplog.messages) == 1


@each_public
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


@each_one
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


@each_class
def test_bits_of_each_group(make):
    """A group's state is that of an optimizer with these bits everywhere; at a rate of zero, for the same gradients."""

    def states(body_bits, head_bits):
        model = net()
        body = [p for name, p in model.named_parameters() if not name.startswith("head")]
        groups = [{"params": body, "bits": body_bits}, {"params": list(model.head.parameters()), "bits": head_bits}]
        optimizer = make(model, groups, lr=0.0, min_quant_size=0, quantization=None)
        train(model, optimizer, range(6))
        return [dict(optimizer.state[p]) for p in (model.hidden.weight, model.head.weight)]

    eight, three = states(8, 8), states(3, 3)
    assert same(states(8, 3), [eight[0], three[1]])
    assert not same(eight[1], three[1])


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


@each_class
def test_named_parameters(make):
    model = net()
    optimizer = make(model, model.named_parameters())
    train(model, optimizer, range(4))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "conv.weight"
    assert list(optimizer.stats()) == [name for name, _ in model.named_parameters()]
    assert same_models(model, run(make, 4)[0])


# ----------------------------------------------------------------------------------- schedulers and scalers


def schedulers():
    cosine, step = lr_scheduler.CosineAnnealingLR, lr_scheduler.LambdaLR
    yield "lambda", lambda o: step(o, lambda t: 0.5**t)
    yield "cosine", lambda o: cosine(o, T_max=6)
    yield "plateau", lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)
    yield "one-cycle", lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=8, cycle_momentum=True)
    yield "chained", lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), cosine(o, T_max=4)], [2])


@each_class
@pytest.mark.parametrize("schedule", [pytest.param(made, id=name) for name, made in schedulers()])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_with_float_and_tensor_rates(make, schedule, tensor):
    """The base obeys: without preconditioning the trajectory is that of torch's optimizer under the same scheduler."""
    follow_torch(make, torch.optim.AdamW, schedule, tensor, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("schedule", [pytest.param(made, id=name) for name, made in schedulers()])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_over_sgd(schedule, tensor):
    """Whose momentum they change."""
    follow_torch(OPTIMIZERS["shampoo-sgd"], torch.optim.SGD, schedule, tensor, momentum=0.9, nesterov=True)


def follow_torch(make, base, schedule, tensor, **options):
    mine, theirs = net(), net()
    rates = [torch.tensor(0.01) if tensor else 0.01 for _ in range(2)]
    optimizer = make(mine, lr=rates[0], precondition=False, **options)
    reference = base(theirs.parameters(), lr=rates[1], **options)
    for model, own in ((mine, optimizer), (theirs, reference)):
        scheduler = schedule(own)
        for step in range(7):
            train(model, own, [step])
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert same_models(mine, theirs)
    for key in ("lr", "momentum", "betas"):
        assert same(optimizer.param_groups[0].get(key), reference.param_groups[0].get(key))
    assert float(optimizer.param_groups[0]["lr"]) != 0.01


@each_class
def test_a_tensor_rate_is_as_good_as_a_float(make):
    """The steps of a preconditioned model are those of the same number as a float."""
    model, _ = run(lambda m: make(m, lr=torch.tensor(2.0**-7, dtype=torch.float64)), 6, net(torch.float64))
    expected, _ = run(lambda m: make(m, lr=2.0**-7), 6, net(torch.float64))
    assert same_models(model, expected)


def test_defaults_are_what_schedulers_look_at():
    assert {"lr", "betas", "bits", "foreach"} <= shampoo(net().parameters()).defaults.keys()
    sgd = shampoo(net().parameters(), base="sgd", momentum=0.8)
    assert sgd.defaults["momentum"] == 0.8
    assert "betas" not in sgd.defaults
    assert sgd.defaults.keys() == sgd.param_groups[0].keys() - {"params"}
    assert "lr: 0.01" in repr(sgd)


def scaled(make, model, scaler):
    """With the scale, for those whose hooks see scaled gradients."""
    return make(model, grad_scale=scaler.get_scale) if issubclass(make.optimizer, KFAC) else make(model)


@each_public
@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled-before", "unscaled-by-step"])
def test_a_grad_scaler_and_its_overflow_step_change_nothing(make, unscale):
    """A power of two as scale changes nothing, nor does a step with an infinite gradient, which halves it."""
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = scaled(make, model, scaler)
    for step, overflow in enumerate([False, False, False, True, False, False, False]):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step - (step > 3))).backward()
        if overflow:
            model.hidden.weight.grad[3, 5] = torch.inf
        before = copies(optimizer)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert same(copies(optimizer), before) == overflow
    assert scaler.get_scale() == 2.0**9
    assert same_models(model, run(make, 6)[0])


@each_class
@pytest.mark.parametrize("fused", [True, False])
def test_no_part_in_amp_scaling_is_claimed(make, fused):
    """A fused AdamW tells a scaler that it unscales by itself; here its gradients must be unscaled before."""
    model, optimizer = run(lambda m: make(m, fused=fused), 2)
    assert getattr(optimizer.base, "_step_supports_amp_scaling", False) == fused
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    scaler, before = torch.amp.GradScaler("cpu"), copies(optimizer)
    scaler.scale(loss_of(model, 2)).backward()
    model.head.bias.grad[0] = torch.nan
    scaler.step(optimizer)
    assert same(copies(optimizer), before)
