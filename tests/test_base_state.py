"""A run moves from the base's own class to a second-order optimizer and back, with its moments, to the last bit."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, lr_scheduler

from lowbit_optim import CASPR, EKFAC, KFAC, SOAP, AdaBK, CheckpointError, Shampoo, load_checkpoint, save_checkpoint
from tests.contract import copies, net, of_a_model, of_parameters, run, same, same_models, train

BASES = {
    "adamw": (AdamW, {"betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True}),
    "sgd": (SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (Adagrad, {"lr_decay": 0.1}),
}
MADE = {
    "shampoo": of_parameters(Shampoo),
    "caspr": of_parameters(CASPR),
    "kfac": of_a_model(KFAC),
    "adabk": of_a_model(AdaBK),
}
each_base = pytest.mark.parametrize(("name", "base", "options"), [(k, *v) for k, v in BASES.items()], ids=BASES)
each_made = pytest.mark.parametrize("made", MADE.values(), ids=MADE)

# The factors do not start, so that the second-order optimizer does what its base does.
idle = {"statistics_frequency": 1000, "start_preconditioning_step": 1000}


@each_base
@each_made
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_moments_move_from_the_base_and_back(made, name, base, options, dtype):
    reference, _ = run(lambda m: base(m.parameters(), lr=0.01, **options), 9, net(dtype))
    model = net(dtype)
    first = base(model.parameters(), lr=0.01, **options)
    train(model, first, range(3))
    second = made(model, lr=0.5, base=name, **idle)
    second.load_base_state_dict(first.state_dict())
    train(model, second, range(3, 6))
    third = base(model.parameters(), lr=0.5)
    third.load_state_dict(second.base_state_dict())
    train(model, third, range(6, 9))
    assert same_models(model, reference)


@each_base
def test_a_part_is_as_the_base_would_have_it(name, base, options):
    model, theirs = run(lambda m: base(m.parameters(), lr=0.01, **options), 4)
    mine = Shampoo(model.parameters(), base=name)
    mine.load_base_state_dict(theirs.state_dict())
    assert same(mine.base_state_dict(), theirs.state_dict())


def test_settings_stay_and_options_come():
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.9)), 2)
    lr_scheduler.ConstantLR(theirs, factor=0.5)
    mine = Shampoo([{"params": list(model.parameters()), "bits": 4}], lr=3.0, statistics_frequency=7, eps=1.0)
    mine.load_base_state_dict(theirs.state_dict())
    (group,) = mine.param_groups
    assert (group["lr"], group["initial_lr"], group["betas"], group["eps"]) == (0.005, 0.01, (0.8, 0.9), 1e-8)
    assert (group["bits"], group["statistics_frequency"]) == (4, 7)
    assert mine.state_dict().keys() == theirs.state_dict().keys()


def test_under_a_scheduler():
    def schedule(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=10)

    def go(model, optimizer, scheduler, steps):
        for step in steps:
            train(model, optimizer, [step])
            scheduler.step()

    reference, model = net(), net()
    whole = AdamW(reference.parameters())
    go(reference, whole, schedule(whole), range(8))
    theirs = AdamW(model.parameters())
    before = schedule(theirs)
    go(model, theirs, before, range(4))
    mine = Shampoo(model.parameters(), **idle)
    after = schedule(mine)
    mine.load_base_state_dict(theirs.state_dict())
    after.load_state_dict(before.state_dict())
    go(model, mine, after, range(4, 8))
    assert same_models(model, reference)


def test_factors_start_at_the_switch():
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 3)
    mine = Shampoo(model.parameters(), min_quant_size=0, statistics_frequency=2)
    mine.load_base_state_dict(theirs.state_dict())
    own = mine.state[model.hidden.weight]
    assert (int(own["step"]), int(own["base.step"]), int(own["left.updates"])) == (0, 3, 0)
    train(model, mine, range(3, 5))
    assert (int(own["step"]), int(own["base.step"]), int(own["left.updates"])) == (2, 5, 1)


def test_factors_stay_when_the_moments_come_later():
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 3)
    mine = Shampoo(model.parameters(), min_quant_size=0, statistics_frequency=2)
    train(model, mine, range(4))
    before = {key: value.clone() for key, value in mine.state[model.hidden.weight].items()}
    mine.load_base_state_dict(theirs.state_dict())
    after = mine.state[model.hidden.weight]
    assert all(same(after[key], value) == (not key.startswith("base.")) for key, value in before.items())


def of_bits(bits, model):
    return Shampoo(model.parameters(), lr=0.01, bits=bits, statistics_frequency=2, min_quant_size=0)


WAY = r"new\.load_base_state_dict\(old\.base_state_dict\(\)\)"


def test_the_way_from_bits_to_bits_is_said(tmp_path):
    """In a live group, in a state dict and in a checkpoint; and it leads there."""
    model, old = run(lambda m: of_bits(4, m), 4)
    new = of_bits(2, model)
    save_checkpoint(tmp_path, model=model, optimizer=old)
    with pytest.raises(CheckpointError, match=f"bits=4; the optimizer has 2.*{WAY}"):
        load_checkpoint(tmp_path, model=model, optimizer=new)
    with pytest.raises(ValueError, match=f"bits=4; the optimizer has 2.*{WAY}"):
        new.load_state_dict(old.state_dict())
    old.param_groups[0]["bits"] = 2
    with pytest.raises(ValueError, match=f"bits was changed from 4 to 2.*Set it back.*{WAY}"):
        old.step()
    new.load_base_state_dict(old.base_state_dict())
    assert same(new.base_state_dict(), old.base_state_dict())
    train(model, new, range(4, 8))
    assert int(new.state[model.hidden.weight]["base.step"]) == 8
    of_bits(2, model).load_state_dict(new.state_dict())


def test_soap_says_that_other_bits_start_anew():
    model, old = run(lambda m: SOAP(m.parameters()), 2)
    with pytest.raises(ValueError, match=r"bits=4; the optimizer has 2.*which starts anew$"):
        SOAP(model.parameters(), bits=2).load_state_dict(old.state_dict())
    old.param_groups[0]["basis"] = "eigen"
    with pytest.raises(ValueError, match=r"from 'reflector' to 'eigen'.*Set it back.*which starts anew$"):
        old.step()


def test_another_base_is_no_way():
    model, old = run(lambda m: Shampoo(m.parameters(), base="sgd"), 2)
    with pytest.raises(ValueError, match=r"base='torch\.SGD'.* 'torch\.AdamW'\. Load .* the base that it has$"):
        Shampoo(model.parameters()).load_state_dict(old.state_dict())


def test_parameters_without_gradients_get_no_state():
    model = net()
    model.hidden.weight.requires_grad_(False)
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 2, model)
    mine = Shampoo(model.parameters())
    mine.load_base_state_dict(theirs.state_dict())
    assert set(mine.state) == set(model.parameters()) - {model.hidden.weight}
    model.hidden.weight.requires_grad_(True)
    train(model, mine, range(2, 4))
    other = Shampoo(model.parameters())
    other.load_state_dict(mine.state_dict())


def test_two_optimizers_share_no_memory():
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 2)
    mine = Shampoo(model.parameters())
    mine.load_base_state_dict(theirs.state_dict())
    moment = theirs.state[model.hidden.weight]["exp_avg"].clone()
    train(model, mine, range(2, 4))
    assert same(theirs.state[model.hidden.weight]["exp_avg"], moment)


def test_after_a_copy():
    model, optimizer = run(lambda m: Shampoo(m.parameters(), lr=0.01), 3)
    other_model, other = copy.deepcopy((model, optimizer))
    assert same(other.base_state_dict(), optimizer.base_state_dict())
    other.load_base_state_dict(run(lambda m: AdamW(m.parameters(), lr=0.01), 3, other_model)[1].state_dict())


def foreign():
    def of(made, groups=1):
        model = net()
        parameters = list(model.parameters())
        parts = [{"params": parameters[i::groups]} for i in range(groups)]
        return run(lambda _: made(parts, lr=0.01), 2, model)[1].state_dict()

    def edited(**moments):
        state_dict = of(AdamW)
        state_dict["state"][3] |= moments
        return state_dict

    yield "SGD's", of(SGD), "lack betas, eps.*torch.AdamW"
    yield "Adagrad's", of(Adagrad), "lack betas.*torch.AdamW"
    yield "Adamax's", of(Adamax), "parameter 0 lacks exp_avg_sq"
    yield "other groups", of(AdamW, 2), r"sizes \[4, 3\].*\[7\].*same groups"
    yield "ours", of(Shampoo), "base_state_dict"
    yield "other shapes", edited(exp_avg_sq=torch.zeros(3, 3)), r"parameter 3 of shape .* exp_avg_sq .* \[3, 3\]"
    yield "no state dict", {"state": {}}, "param_groups"


@pytest.mark.parametrize(("state_dict", "said"), [pytest.param(d, s, id=name) for name, d, s in foreign()])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_does_not_fit_changes_nothing(state_dict, said, steps):
    model, optimizer = run(lambda m: Shampoo(m.parameters(), lr=0.01), steps)
    before = copies(optimizer)
    with pytest.raises(ValueError, match=said):
        optimizer.load_base_state_dict(state_dict)
    assert same(copies(optimizer), before)
    assert len(optimizer.state) == (7 if steps else 0)
    train(model, optimizer, range(1))


def test_an_error_at_the_very_end_changes_nothing():
    model = net()
    theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 2, model)[1]
    optimizer = Shampoo(model.parameters())
    before = copies(optimizer)
    differentiable = theirs.state_dict()
    differentiable["param_groups"] = [{**group, "differentiable": True} for group in differentiable["param_groups"]]
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.load_base_state_dict(differentiable)

    def refuse(*_):
        raise ValueError("not today")

    hook = optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match="not today"):
        optimizer.load_base_state_dict(theirs.state_dict())
    hook.remove()
    assert same(copies(optimizer), before)
    assert not optimizer.state
    optimizer.load_base_state_dict(theirs.state_dict())
    assert len(optimizer.state) == 7


def test_ekfac_takes_moments_and_gives_them_back():
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 3)
    mine = EKFAC(model.parameters(), model=model)
    mine.load_base_state_dict(theirs.state_dict())
    assert same(mine.base_state_dict()["state"], theirs.state_dict()["state"])


def test_decoupled_weight_decay_stays():
    """As in torch's AdamW, which takes state dicts of Adam."""
    model, theirs = run(lambda m: Adam(m.parameters(), lr=0.01), 2)
    mine = Shampoo(model.parameters())
    mine.load_base_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["decoupled_weight_decay"]


def test_an_unhooked_optimizer_changes_nothing():
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 2)
    mine = copy.deepcopy(KFAC(model.parameters(), model=model))
    with pytest.raises(ValueError, match=r"attach\(model\)"):
        mine.load_base_state_dict(theirs.state_dict())
    assert not mine.state


def test_soap_refuses():
    """Its moments are those of gradients in the eigenbases."""
    model, theirs = run(lambda m: AdamW(m.parameters(), lr=0.01), 2)
    soap = SOAP(model.parameters())
    train(model, soap, range(2))
    before = copies(soap)
    with pytest.raises(ValueError, match=r"SOAP keeps the moments of torch\.AdamW in the eigenbases"):
        soap.load_base_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="eigenbases"):
        soap.base_state_dict()
    assert same(copies(soap), before)


def test_named_parameters():
    model = nn.Linear(8, 8)
    theirs = AdamW(model.parameters())
    mine = Shampoo(model.named_parameters())
    mine.load_base_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["param_names"] == ["weight", "bias"]
    theirs.load_state_dict(mine.base_state_dict())
