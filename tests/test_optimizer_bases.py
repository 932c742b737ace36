"""A second-order optimizer over its base: any first-order optimizer, its options, its state, its hooks."""

import io
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lowbit_optim import Shampoo
from tests.contract import (
    backward,
    each_but_soap,
    each_class,
    each_one,
    each_optimizer,
    loss_of,
    net,
    run,
    same,
    same_models,
    shampoo,
    tensors,
    train,
)


@pytest.mark.parametrize(
    "name",
    [
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "Adamax",
        "AdamW",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    ],
)
def test_any_torch_optimizer_as_base(name):
    base = getattr(torch.optim, name)
    mine, theirs = net(), net()
    train(mine, Shampoo(mine.parameters(), lr=0.01, base=base, precondition=False), range(5))
    train(theirs, base(theirs.parameters(), lr=0.01), range(5))
    assert same_models(mine, theirs)
    model, optimizer = run(lambda parameters: shampoo(parameters, base=base), 5)
    assert not same_models(model, mine)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {"step", "nonfinite", "left.rms", "right.root.codes"} <= optimizer.state[model.conv.weight].keys()
    for _ in range(2):  # the first load may change what the optimizer knows of its base
        before = tensors(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert same(tensors(optimizer), before)


def test_bitsandbytes_as_base():
    """8-bit moments under 4-bit factors, saved without pickled objects and resumed bit for bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(parameters):
        return shampoo(parameters, base=bitsandbytes.optim.AdamW8bit, min_8bit_size=256, weight_decay=0.1)

    model, optimizer = run(make, 4)
    assert optimizer.state[model.hidden.weight]["base.state1"].dtype == torch.uint8
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    parameters, state = torch.load(file, weights_only=True)
    other = net(seed=1)
    other.load_state_dict(parameters)
    resumed = make(other)
    resumed.load_state_dict(state)
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert same_models(model, other)
    assert same(optimizer.state_dict(), resumed.state_dict())


def test_bitsandbytes_there_and_back():
    """Moments of 8 bits, and their own load_state_dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitsandbytes = pytest.importorskip("bitsandbytes")
    base, options = bitsandbytes.optim.AdamW8bit, {"min_8bit_size": 256, "weight_decay": 0.1}
    reference, _ = run(lambda m: base(m.parameters(), lr=0.01, **options), 9)
    model, first = run(lambda m: base(m.parameters(), lr=0.01, **options), 3)
    second = Shampoo(model.parameters(), base=base, precondition=False, **options)
    second.load_base_state_dict(first.state_dict())
    train(model, second, range(3, 6))
    third = base(model.parameters(), **options)
    third.load_state_dict(second.base_state_dict())
    train(model, third, range(6, 9))
    assert same_models(model, reference)


@each_class
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("maximize", True),
        ("foreach", True),
        ("foreach", False),
        ("fused", True),
        ("capturable", True),
        ("amsgrad", True),
        ("lr", torch.tensor(0.02)),
    ],
)
def test_options_are_handed_to_the_base(make, key, value):
    """Without preconditioning the trajectory is that of torch's AdamW with the option, and so are its errors."""
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, key: value}
    mine, theirs = net(), net()
    optimizer = make(mine, precondition=False, **options)
    reference = torch.optim.AdamW(theirs.parameters(), **options)
    assert optimizer.param_groups[0][key] is optimizer.base.param_groups[0][key] is value
    for model, own in ((mine, optimizer), (theirs, reference)):
        # On the CPU nothing can be captured.
        refused = pytest.raises(AssertionError, match="capturable") if key == "capturable" else nullcontext()
        with refused:
            train(model, own, range(5))
    assert same_models(mine, theirs)


@each_class
def test_a_tensor_rate_that_the_base_refuses(make):
    """With the base's own error."""
    with pytest.raises(ValueError, match="lr as a Tensor"):
        make(net(), lr=torch.tensor(0.01), foreach=True)


@each_class
def test_maximize_climbs(make):
    """Climbing with one sign of the loss is going down with the other, preconditioned, too."""
    up, down = net(), net()
    for model, optimizer, sign in ((up, make(up, maximize=True), -1), (down, make(down), 1)):
        for step in range(6):
            model.zero_grad()
            (sign * loss_of(model, step)).backward()
            optimizer.step()
    assert same_models(up, down)


@each_class
def test_an_error_of_the_base_leaves_the_weights(make):
    """At the first step and later, for example where AdamW finds that it cannot be captured."""
    for steps in (0, 3):
        model, optimizer = run(make, steps)
        for group in optimizer.param_groups:
            group["capturable"] = True
        backward(model, steps)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(AssertionError, match="capturable"):
            optimizer.step()
        assert same([p.detach() for p in model.parameters()], before)
        for group in optimizer.param_groups:
            group["capturable"] = False
        train(model, optimizer, range(steps, steps + 4))
        assert all(torch.isfinite(p).all() for p in model.parameters())


class NewtonLike(torch.optim.LBFGS):
    """A closure is what its step begins with."""


class Climber(torch.optim.SGD):
    """As SAM: one half of a step at the weights, the other at weights near by."""

    def first_step(self):
        raise NotImplementedError

    def second_step(self):
        raise NotImplementedError

    def step(self, closure=None):
        assert closure is not None


class Asker(torch.optim.SGD):
    """Evaluates the loss where it likes."""

    def step(self, closure):
        closure()
        return super().step(closure)


@each_but_soap
@pytest.mark.parametrize("base", [torch.optim.LBFGS, NewtonLike, Climber, Asker])
def test_a_base_that_needs_a_closure_is_refused(make, base):
    """Preconditioned gradients are those of one point; refused at construction. SOAP has no other base than AdamW."""
    model = net()
    with pytest.raises(ValueError, match=f"{base.__name__}.*without a closure"):
        make(model, base=base)
    assert not any(module._forward_hooks for module in model.modules())


@each_class
def test_differentiable_is_refused(make):
    """As an option, in a group and in a later group: the step is in place, and autograd cannot go through it."""
    model = net()
    with pytest.raises(ValueError, match=r"differentiable=True.*in place"):
        make(model, differentiable=True)
    with pytest.raises(ValueError, match=r"differentiable=True.*in place"):
        make(model, [{"params": model.hidden.parameters(), "differentiable": True}])
    optimizer = make(model, model.hidden.parameters(), differentiable=False)
    with pytest.raises(ValueError, match=r"differentiable=True.*in place"):
        optimizer.add_param_group({"params": model.head.parameters(), "differentiable": True})
    assert len(optimizer.param_groups) == 1


class Careful(torch.optim.SGD):
    """As many optimizers do: whoever has no state yet is new."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if len(self.state[p]) == 0:
                        self.state[p].update(first=p.detach().clone(), seen=0)
                    assert self.state[p].keys() == {"first", "seen"}
                    self.state[p]["seen"] += 1
                    p.detach().sub_(p.grad, alpha=float(group["lr"]))


class Child(torch.optim.Adam):
    """Without a step of its own."""


def test_a_base_with_state_of_its_own():
    model, start = net(), net()
    optimizer = shampoo(model.parameters(), base=Careful)
    train(model, optimizer, range(4))
    for parameter, first in zip(model.parameters(), start.parameters(), strict=True):
        own = optimizer.state[parameter]
        assert (own["base.seen"], own["step"]) == (4, 4)
        assert same(own["base.first"], first.detach())
    assert same_models(run(lambda p: shampoo(p, base=Child))[0], run(lambda p: shampoo(p, base=torch.optim.Adam))[0])


@each_optimizer
def test_state_shows_every_key(make):
    """Tools that rebuild a state dict ask state[p] for its keys."""
    _, optimizer = run(make, 3)
    for parameter, own in optimizer.state.items():
        assert {"step", "nonfinite"} < own.keys()
        assert any(key.startswith("base.") for key in own)
        assert all(isinstance(key, str) for key in own)
        values = [value for value in own.values() if value is not None]
        assert all(isinstance(value, torch.Tensor | int | float | bool) for value in values)
        assert all(type(tensor) is torch.Tensor for tensor in tensors(optimizer))
        moments = {key: value for key, value in own.items() if key.startswith("base.")}
        coded = any(key.endswith(".codes") for key in moments)
        assert coded or parameter.shape in {value.shape for value in moments.values()}


@each_one
def test_step_hooks_fire_once(make):
    model, fired = net(), []
    optimizer = make(model)
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: fired.append(("global pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: fired.append(("global post", o))),
        optimizer.register_step_pre_hook(lambda o, *_: fired.append(("pre", o))),
        optimizer.register_step_post_hook(lambda o, *_: fired.append(("post", o))),
    ]
    try:
        train(model, optimizer, range(2))
    finally:
        for handle in handles:
            handle.remove()
    once = [(name, optimizer) for name in ("global pre", "pre", "post", "global post")]
    assert [(name, id(o)) for name, o in fired] == [(name, id(o)) for name, o in 2 * once]


@each_optimizer
def test_init_state_before_the_first_step(make):
    model = net()
    optimizer = make(model)
    optimizer.init_state()
    assert set(optimizer.state) == set(model.parameters())
    keys = {p: {k for k in own if not k.startswith("base.")} for p, own in optimizer.state.items()}
    optimizer.init_state()
    train(model, optimizer, range(6))
    optimizer.init_state()
    assert {p: {k for k in own if not k.startswith("base.")} for p, own in optimizer.state.items()} == keys
    assert same_models(model, run(make, 6)[0])
