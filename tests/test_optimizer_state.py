"""An optimizer that is saved, copied or moved goes on as if nothing had happened, to the last bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler

from lowbit_optim import Quantization, Shampoo, presets
from tests.contract import (
    copies,
    each_class,
    each_one,
    each_public,
    net,
    random,
    run,
    same,
    same_models,
    shampoo,
    tensors,
    train,
)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def through_a_file(state_dict):
    """As torch.save and torch.load(weights_only=True) give it back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def memory(optimizer):
    """Where the tensors of the state lie; empty ones lie nowhere."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(optimizer) if tensor.numel()}


def resumed(make, model, state_dict):
    """A copy of the model under a new optimizer that has loaded the state dict."""
    model = copy.deepcopy(model)
    optimizer = make(model)
    optimizer.load_state_dict(state_dict)
    return model, optimizer


@each_one
@each_dtype
def test_saved_loaded_and_continued_to_the_last_bit(make, dtype):
    """Codes stay uint8, scales float32, counters int64, although torch casts what it loads to the parameter's dtype."""
    model, optimizer = run(make, 5, net(dtype))
    state_dict = optimizer.state_dict()
    loaded = through_a_file(state_dict)
    assert same(loaded, state_dict)
    assert {torch.float32, torch.int64} <= {t.dtype for t in tensors(optimizer)}
    coded = {v.dtype for own in optimizer.state.values() for k, v in own.items() if k.endswith(".codes")}
    assert coded <= {torch.uint8}

    other_model, other = resumed(make, model, loaded)
    assert same(other.state_dict(), state_dict)
    train(model, optimizer, range(5, 10))
    train(other_model, other, range(5, 10))
    assert same_models(model, other_model)
    assert same(other.state_dict(), optimizer.state_dict())


@each_one
def test_two_optimizers_share_no_memory(make):
    model, optimizer = run(make, 3)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    before = copies(optimizer)
    other_model, other = resumed(make, model, optimizer.state_dict())
    assert not memory(optimizer) & memory(other)
    train(other_model, other, range(3, 5))
    other.param_groups[0]["lr"].fill_(0.5)
    assert same(copies(optimizer), before)


@each_one
def test_load_before_the_first_step(make):
    """accelerate loads the state dict of an optimizer that has not stepped into itself."""
    model = net()
    optimizer = make(model)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    train(model, optimizer, range(5))
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(5, 8))
    assert same_models(model, run(make, 8)[0])


@each_public
def test_load_over_other_state(make):
    model, optimizer = run(make, 4)
    other_model, other = run(make, 3, net(seed=1))
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())
    fresh = make(net()).state_dict()
    other.load_state_dict(fresh)
    assert same(other.state_dict(), fresh)


@each_public
def test_load_what_has_seen_only_some_gradients(make):
    model = net()
    model.hidden.weight.requires_grad_(False)
    model, optimizer = run(make, 4, model)
    other_model, other = resumed(make, model, through_a_file(optimizer.state_dict()))
    for own, its in ((model, optimizer), (other_model, other)):
        own.hidden.weight.requires_grad_(True)
        train(own, its, range(4, 8))
    assert same_models(model, other_model)


@each_one
@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
@pytest.mark.parametrize("steps", [0, 5])
def test_deepcopy_and_pickle_continue_alike(make, how, steps):
    model, optimizer = run(make, steps)
    other_model, other = how((model, optimizer))
    assert type(other) is type(optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    assert not memory(optimizer) & memory(other)
    if hasattr(other, "attach"):
        other.attach(other_model)
    assert all(p is q for p, q in zip(other_model.parameters(), other.param_groups[0]["params"], strict=True))
    train(model, optimizer, range(steps, steps + 4))
    train(other_model, other, range(steps, steps + 4))
    assert same_models(model, other_model)
    other_model.later = nn.Parameter(torch.zeros(2, 2))
    other.add_param_group({"params": [other_model.later]})
    assert len(optimizer.param_groups) == 1


@each_one
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "stepped"])
def test_distributed_checkpoint_state_dicts(make, flat, steps):
    """In one process; a fresh optimizer takes a step with zero gradients to have a state to load into."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = run(make, 5)
    state_dict = through_a_file(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    other_model, other = run(make, steps)
    other_model.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other_model, other, optim_state_dict=state_dict, options=options)
    assert same(other.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(5, 9))
    train(other_model, other, range(5, 9))
    assert same_models(model, other_model)


@each_class
def test_groups_and_schedule_come_back(make):
    def both(model):
        optimizer = make(model, [{"params": model.hidden.parameters(), "lr": 0.02, "min_quant_size": 0}])
        optimizer.add_param_group({"params": model.head.parameters(), "precondition": False})
        return optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.01], total_steps=12)

    def go(model, optimizer, scheduler, steps):
        for step in steps:
            train(model, optimizer, [step])
            scheduler.step()

    model = net()
    optimizer, scheduler = both(model)
    go(model, optimizer, scheduler, range(5))
    saved = through_a_file([optimizer.state_dict(), scheduler.state_dict()])
    other_model = copy.deepcopy(model)
    other, other_scheduler = both(other_model)
    other.load_state_dict(saved[0])
    other_scheduler.load_state_dict(saved[1])
    assert same(other.state_dict(), optimizer.state_dict())
    go(model, optimizer, scheduler, range(5, 11))
    go(other_model, other, other_scheduler, range(5, 11))
    assert same_models(model, other_model)


@each_class
def test_settings_come_with_the_state(make):
    """As in every torch optimizer; but not how the state is stored (below)."""
    model, optimizer = run(lambda m: make(m, betas=(0.8, 0.9), statistics_frequency=1), 4)
    other_model, other = resumed(lambda m: make(m, lr=0.5), model, optimizer.state_dict())
    train(model, optimizer, range(4, 8))
    train(other_model, other, range(4, 8))
    assert same_models(model, other_model)


@each_public
def test_hooks_of_loading_are_called(make):
    """A pre hook sees tensors, and may adapt a state dict that would not fit."""
    model, optimizer = run(make, 4)
    seen = []

    def adapt(_, state_dict):
        seen.extend(type(v) for own in state_dict["state"].values() for v in own.values())
        return {**state_dict, "param_groups": state_dict["param_groups"][:1]}

    other_model = copy.deepcopy(model)
    other = make(other_model)
    other.register_load_state_dict_pre_hook(adapt)
    other.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    state_dict = optimizer.state_dict()
    other.load_state_dict({**state_dict, "param_groups": [*state_dict["param_groups"], {"params": []}]})
    assert set(seen) == {torch.Tensor, len(optimizer.state)}
    assert same(other.state_dict(), state_dict)
    saw = len(seen)
    other.load_state_dict(state_dict)
    assert len(seen) == 2 * saw


@each_public
def test_the_state_dict_is_the_live_state(make):
    """As torch's: no copies, so that saving needs no memory."""
    _, optimizer = run(make, 3)
    state = optimizer.state_dict()["state"]
    assert {t.data_ptr() for own in state.values() for t in own.values()} == {t.data_ptr() for t in tensors(optimizer)}


# ------------------------------------------------------------------------------------- what does not fit


@each_class
def test_state_of_other_bits_is_refused(make):
    """In a state dict and in a live group; nothing has changed then, and the optimizer goes on."""
    model, optimizer = run(make, 3)
    _, other = run(lambda m: make(m, bits=8), 3)
    before = copies(optimizer)
    with pytest.raises(ValueError, match="bits=8"):
        optimizer.load_state_dict(other.state_dict())
    assert same(copies(optimizer), before)
    bits = optimizer.param_groups[0]["bits"]
    optimizer.param_groups[0]["bits"] = 8
    with pytest.raises(ValueError, match="bits was changed"):
        train(model, optimizer, [3])
    optimizer.param_groups[0]["bits"] = bits
    assert same(copies(optimizer), before)
    optimizer.zero_grad()  # and what hooks have seen of the step that was refused
    train(model, optimizer, range(3, 5))
    assert same_models(model, run(make, 5)[0])


def foreign_state_dicts():
    def of(make, *shapes):
        parameters = [nn.Parameter(random(*shape)) for shape in shapes]
        optimizer = make(parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return optimizer.state_dict()

    def edited(key, value):
        state_dict = of(shampoo, (48, 40), (30,))
        own = state_dict["state"][0]
        own.update({key: value}) if value is not None else own.pop(key)
        return state_dict

    shapes = (48, 40), (30,)
    yield "torch's", of(torch.optim.AdamW, *shapes), "lack"
    yield "other base", of(lambda p: shampoo(p, base="sgd"), *shapes), "base='torch.SGD'"
    yield "other shape", of(shampoo, (40, 48), (30,)), "shape"
    yield "other blocks", of(shampoo, (96, 40), (30,)), "parameter 0"
    yield "other vector", of(shampoo, (48, 40), (31,)), "exp_avg"
    yield "same factors", of(lambda p: shampoo(p, max_preconditioner_dim=24), (24, 80), (30,)), "parameter 0"
    yield "more parameters", of(shampoo, *shapes, (3, 3)), "sizes"
    yield "more groups", of(lambda p: shampoo([{"params": [x]} for x in p]), *shapes), "sizes"
    yield "other bits", of(lambda p: shampoo(p, bits=2), *shapes), "bits=2"
    yield "32 bits", of(lambda p: shampoo(p, bits=32), *shapes), "bits=32"
    yield "other storage", of(lambda p: shampoo(p, storage="direct"), *shapes), "storage"
    yield "the paper's", of(lambda p: Shampoo(p, **presets.WANG2024), *shapes), "storage"
    yield "other codes", of(lambda p: shampoo(p, quantization=Quantization(8)), *shapes), "quantization"
    yield "float32 codes", edited("left.root.codes", torch.zeros(1, 1128)), "left.root.codes"
    yield "short codes", edited("left.root.codes", torch.zeros(1, 1127, dtype=torch.uint8)), "left.root.codes"
    yield "lost tensor", edited("right.rms", None), "right.rms"
    yield "another tensor", edited("middle.rms", torch.zeros(1)), "middle.rms"
    yield "no tensor", edited("left.rms", 1.0), "left.rms"


@pytest.mark.parametrize(("state_dict", "said"), [pytest.param(d, s, id=name) for name, d, s in foreign_state_dicts()])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_dict_that_does_not_fit(state_dict, said, steps):
    parameters = [nn.Parameter(random(48, 40)), nn.Parameter(random(30))]
    optimizer = shampoo(parameters)
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = random(*parameter.shape, seed=step)
        optimizer.step()
    before = copies(optimizer)
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(state_dict)
    assert same(copies(optimizer), before)
    with pytest.raises(ValueError, match=said):
        optimizer.check_state_dict(state_dict)
    for parameter in parameters:
        parameter.grad = random(*parameter.shape, seed=9)
    optimizer.step()
