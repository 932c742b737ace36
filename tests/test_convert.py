"""The command `lowbit-optim convert`: between forms of this library, and from what others save."""

import copy
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_optim import CASPR, SGD, SOAP, AdamW, CheckpointError, Shampoo, cli, load_checkpoint, save_checkpoint
from lowbit_optim.storage.factors import take
from lowbit_optim.storage.small_floats import SmallFloats
from tests import oracles
from tests.contract import FIRST_ORDER, LAYERED, OPTIMIZERS, net, run, same, same_models, shampoo, train
from tests.factors import distance, make, relative, spectral

# ---- holding ---------------------------------------------------------------------------------------------------------

# Bounds on the relative errors of statistic and root: what codes of these bits cost once, and float32 without codes.
FORMS = {
    ("dense", 32): (1e-6, 1e-4),
    ("root", 16): (2e-3, 1e-3),
    ("root", 4): (0.05, 0.01),
    ("root", 2): (0.5, 0.1),
    ("logarithm", 4): (0.1, 0.03),
    ("spiked", 4): (0.1, 0.1),
    ("direct", 4): (0.02, 0.02),
    ("eigen", 4): (0.15, 0.15),
    ("reflector", 4): (0.1, 0.1),
    ("cholesky", 4): (0.02, 0.02),
    ("cholesky-feedback", 4): (0.02, 0.02),
}


@pytest.mark.parametrize(("storage", "bits"), FORMS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_form_holds_a_statistic(storage, bits, scale):
    rng = np.random.default_rng(0)
    a, _ = spectral(np.geomspace(0.01, 1, 48), rng)
    factor = make(storage, bits, initial_scale=0.1, statistic_limit=1.0)
    state = factor.holding(torch.from_numpy(np.stack([a, a]) * scale).float())
    of_statistic, of_root = FORMS[storage, bits]
    assert state["updates"].tolist() == [1, 1]
    assert not state["failures"].any()
    assert relative(factor.statistic(state, torch.float32)[1] / scale, a) < of_statistic
    exact = oracles.inverse_root(a)
    assert relative(factor.root(state, torch.float32)[1].double() * scale**0.25, exact) < of_root


@pytest.mark.parametrize(("storage", "bits"), FORMS)
def test_holding_nothing(storage, bits):
    factor = make(storage, bits)
    state = factor.holding(torch.zeros(1, 48, 48))
    assert state["updates"].tolist() == [0]
    assert not state["failures"].any()
    assert relative(factor.root(state, torch.float32)[0], np.eye(48)) < 1e-6


# ---- between our own -------------------------------------------------------------------------------------------------


@pytest.fixture
def convert(tmp_path, capsys):
    """Convert to a new folder; returns it, and what was printed."""

    def command(source, *arguments, code=0):
        target = tmp_path / f"converted-{len(list(tmp_path.iterdir()))}"
        got = cli.main(["convert", str(source), str(target), *map(str, arguments)])
        said = capsys.readouterr()
        assert got == code, said.err
        assert code == 0 or not target.exists()
        return target, said.out + said.err

    return command


def saved(folder, make, steps=6, model=None):
    model, optimizer = run(make, steps, model)
    save_checkpoint(folder, model=model, optimizer=optimizer, step=steps)
    return model, optimizer


def loaded(folder, make):
    """A model and an optimizer as the checkpoint has them."""
    model = net()
    optimizer = make(model)
    load_checkpoint(folder, model=model, optimizer=optimizer)
    return model, optimizer


def factors(optimizer):
    """(name, statistic, root), decoded, of every factor."""
    optimizer._prepare()
    for index, (parameter, group) in enumerate(optimizer._parameters()):
        cut = optimizer.preconditioner.blocking(parameter, group)
        if cut is not None:
            for side, form in optimizer.preconditioner.forms(group, cut).sides():
                state = take(side, optimizer.state[parameter])
                yield f"{index} {side}", form.statistic(state, torch.float32), form.root(state, torch.float32)


PAIRS = {
    "dense": {"bits": 32, "precondition_frequency": 2},
    "root": {"bits": 4},
    "root-1": {"bits": 1},
    "logarithm": {"bits": 2, "storage": "logarithm"},
    "spiked": {"bits": 2, "storage": "spiked"},
    "direct": {"bits": 4, "storage": "direct", "precondition_frequency": 2},
    "eigen": {"bits": 4, "storage": "eigen", "precondition_frequency": 2},
    "reflector": {"bits": 3, "storage": "reflector", "precondition_frequency": 2},
    "cholesky": {"bits": 4, "storage": "cholesky-feedback", "precondition_frequency": 2},
}


# How far the statistic and the root may be off in a form, of a state in another. Roots that were in codes are off by as
# much already: they are computed anew. Statistics have rank 5 to 12, and 1 bit does not say much of them.
OFF = {
    "dense": (0.005, 0.2),
    "root": (0.2, 0.3),
    "root-1": (1.7, 0.35),
    "logarithm": (0.4, 0.3),
    "spiked": (0.4, 0.6),
    "direct": (0.01, 0.2),
    "eigen": (0.1, 0.2),
    "reflector": (0.08, 0.2),
    "cholesky": (0.01, 0.2),
}


def of(name, **more):
    return lambda model: shampoo(model, **{**PAIRS[name], **more})


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("source", PAIRS)
def test_every_pair(convert, tmp_path, source, name):
    """The new state is the statistic of the old one, coded once, and the run goes on."""
    model, old = saved(tmp_path / "run", of(source))
    settings = PAIRS[name]
    target, _ = convert(tmp_path / "run", "--bits", settings["bits"], "--storage", settings.get("storage", "root"))
    other, new = loaded(target, of(name))
    assert same_models(model, other)
    assert same(new.base_state_dict()["state"], old.base_state_dict()["state"])
    for (place, a, root), (_, new_a, new_root) in zip(factors(old), factors(new), strict=True):
        of_statistic, of_root = (0.0, 0.0) if name == source else OFF[name]
        assert relative(new_a, a.double().numpy()) <= of_statistic, place
        assert relative(new_root, root.double().numpy()) <= of_root, place
    for parameter, own in zip(other.parameters(), new.state.values(), strict=True):
        before = old.state[dict(zip(other.parameters(), model.parameters(), strict=True))[parameter]]
        for key in own:
            if key in before and key.rpartition(".")[2] in (
                "step",
                "updates",
                "previous_norm",
                "failures",
                "nonfinite",
            ):
                assert same(own[key], before[key]), key
    train(other, new, range(6, 10))
    assert all(torch.isfinite(p).all() for p in other.parameters())


@pytest.mark.parametrize("storage", ["root", "direct", "cholesky"])
def test_a_root_is_coded_once(convert, tmp_path, storage):
    """Its error is that of the codec on the exact root, which numpy computes from the dense statistic."""
    dense = of("dense", initial_scale=0.1)  # statistics of full rank, so that no ridge matters
    _, old = saved(tmp_path / "run", dense)
    target, _ = convert(tmp_path / "run", "--bits", 4, "--storage", storage)
    periods = {} if storage == "root" else {"precondition_frequency": 2}
    _, new = loaded(target, lambda m: shampoo(m, bits=4, storage=storage, initial_scale=0.1, **periods))
    codec = make("root", 4).codec
    pairs = [(a, root) for (_, a, _), (_, _, root) in zip(factors(old), factors(new), strict=True) if a.shape[-1] >= 16]
    assert len(pairs) == 5
    for a, root in pairs:
        exact = torch.from_numpy(oracles.inverse_root(a[0].double().numpy(), eps=0.0))
        scale = a[0].diagonal().mean().double() ** 0.25  # the root is kept as that of a statistic of trace n
        once = codec.decode(codec.encode((exact * scale)[None].float()))[0].double() / scale
        of_codec, of_conversion = (distance(x.double().numpy(), exact.numpy()) for x in (once, root[0]))
        assert of_conversion < 1.05 * of_codec + 1e-4


@pytest.mark.parametrize(
    "name", ["shampoo-32-bits", "shampoo-eigen", "soap-eigen", "kfac-32-bits", "ekfac-eigen", "soap"]
)
def test_the_same_bits_are_the_same_state(convert, tmp_path, name):
    """And the run that is loaded from it is the run that was saved, to the last bit."""
    built = OPTIMIZERS[name]
    model, optimizer = saved(tmp_path / "run", built)
    target, _ = convert(tmp_path / "run", "--bits", optimizer.param_groups[0]["bits"])
    other, new = loaded(target, built)
    assert same(new.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(6, 10))
    train(other, new, range(6, 10))
    assert same_models(model, other)


@pytest.mark.parametrize(("base", "options"), [("adamw", {}), ("sgd", {"momentum": 0.9}), ("adagrad", {})])
@pytest.mark.parametrize(("first", "second"), [(32, 8), (32, 4), (8, 4), (4, 8), (8, 32)])
def test_moments_of_other_bits(convert, tmp_path, base, options, first, second):
    def built(bits):
        return lambda m: Shampoo(m.parameters(), lr=0.01, base=base, base_bits=bits, min_quant_size=256, **options)

    model, old = saved(tmp_path / "run", built(first))
    target, _ = convert(tmp_path / "run", "--bits", 2, "--base-bits", second)
    other, new = loaded(target, built(second))
    before, after = moments(old), moments(new)
    for key in before:
        assert relative(after[key], before[key].double().numpy()) < {4: 0.25, 8: 0.03, 32: 1e-6}[second], key
    if second == 32:  # the reader is torch's own optimizer
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[base]
        kind(other.parameters(), **options).load_state_dict(new.base_state_dict())
    steps = [own["base.step"].item() for own in new.state.values() if "base.step" in own]
    assert set(steps) <= ({1.0} if base == "sgd" and first == 32 else {6.0})  # torch's SGD does not count
    train(other, new, range(6, 9))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def moments(optimizer):
    """Of every parameter its moments as numbers."""
    found = {}
    for index, (own, group) in enumerate((optimizer.state[p], g) for g in optimizer.param_groups for p in g["params"]):
        shape = optimizer.param_groups[0]["params"][index].shape
        for key, kind in (
            ("exp_avg", "signed"),
            ("exp_avg_sq", "unsigned"),
            ("momentum_buffer", "signed"),
            ("sum", "unsigned"),
        ):
            if f"base.{key}.codes" in own:
                found[index, key] = SmallFloats(kind, group["base_bits"]).read(f"base.{key}", own, shape)
            elif f"base.{key}" in own:
                found[index, key] = own[f"base.{key}"]
    assert found
    return found


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_first_order(convert, tmp_path, name, bits):
    built = FIRST_ORDER[name]
    model, old = saved(tmp_path / "run", built)
    target, said = convert(tmp_path / "run", "--bits", bits)
    other, new = loaded(target, lambda m: built(m, bits=bits))
    assert f"bits={bits}" in said
    if bits == old.param_groups[0]["bits"]:
        assert same(new.state_dict(), old.state_dict())
    elif bits == 32 and name != "sgd":
        assert {key for own in new.state.values() for key in own} <= {"step", "exp_avg", "exp_avg_sq", "sum"}
    train(other, new, range(6, 9))
    assert all(torch.isfinite(p).all() for p in other.parameters())
    assert same_models(model, loaded(tmp_path / "run", built)[0])


def in_the_parameters_coordinates(optimizer):
    """SOAP's moments, turned back."""
    optimizer._prepare()
    for parameter, group in optimizer._parameters():
        cut = optimizer.preconditioner.blocking(parameter, group)
        if cut is not None:
            own = optimizer.state[parameter]
            left, right = (
                form.root(take(side, own), torch.float32)[0]
                for side, form in optimizer.preconditioner.forms(group, cut).sides()
            )
            yield left @ cut.split(own["base.exp_avg"])[0] @ right.mT


@pytest.mark.parametrize(("first", "second"), [(32, 4), (4, 32), (4, 2), (4, 1)])
def test_soap_turns_its_moments_with_the_bases(convert, tmp_path, first, second):
    def built(bits):
        return lambda m: SOAP(m.parameters(), lr=0.01, min_quant_size=256, precondition_frequency=2, bits=bits)

    _, old = saved(tmp_path / "run", built(first))
    target, _ = convert(tmp_path / "run", "--bits", second)
    other, new = loaded(target, built(second))
    pairs = list(zip(in_the_parameters_coordinates(old), in_the_parameters_coordinates(new), strict=True))
    assert len(pairs) == 3
    for before, after in pairs:
        assert relative(after, before.double().numpy()) < 1e-4
    train(other, new, range(6, 10))
    assert all(torch.isfinite(p).all() for p in other.parameters())


def test_soap_between_bases_and_moments(convert, tmp_path):
    settings = {"lr": 0.01, "min_quant_size": 256, "storage": "cholesky", "basis": "eigen", "precondition_frequency": 3}
    saved(tmp_path / "run", lambda m: SOAP(m.parameters(), **settings, bits=32))
    target, _ = convert(tmp_path / "run", "--bits", 4, "--base-bits", 4)
    other, new = loaded(target, lambda m: SOAP(m.parameters(), **settings, bits=4, base_bits=4))
    train(other, new, range(6, 12))
    assert all(torch.isfinite(p).all() for p in other.parameters())


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("bits", [32, 4, 1])
def test_of_layers(convert, tmp_path, name, bits):
    """No model is needed: its layers are in the state."""
    built = LAYERED[name]
    basis = {"basis": "reflector"} if bits == 1 and "eigen" in name else {}
    model, old = saved(tmp_path / "run", lambda m: built(m, **basis))
    storage = "root" if bits == 1 and old.param_groups[0]["storage"] == "eigen" else old.param_groups[0]["storage"]
    target, _ = convert(tmp_path / "run", "--bits", bits, "--storage", storage)
    changed = {"bits": bits, "storage": storage, **basis}
    if storage == "root" and name == "kfac-32-bits":
        changed["precondition_frequency"] = None
    other, new = loaded(target, lambda m: built(m, **changed))
    assert same_models(model, other)
    train(other, new, range(6, 10))
    assert all(torch.isfinite(p).all() for p in other.parameters())


def test_absolute_damping_is_that_of_both_factors(convert, tmp_path):
    """Of a converted factor the root is (A + damping I)^-1 with the damping that numpy computes."""
    built = LAYERED["kfac-absolute"]
    saved(tmp_path / "run", lambda m: built(m, bits=16))
    target, _ = convert(tmp_path / "run", "--bits", 32)
    _, new = loaded(target, lambda m: built(m, bits=32))
    statistics = {place: a[0].double().numpy() for place, a, _ in factors(new)}
    roots = {place: root[0].double().numpy() for place, _, root in factors(new)}
    assert len(roots) == 6
    for place, root in roots.items():
        index, side = place.split()
        left, right = (statistics[f"{index} {s}"] for s in ("left", "right"))
        pi = (np.trace(right) / len(right) / (np.trace(left) / len(left))) ** 0.5
        damping = 0.1**0.5 * (pi if side == "right" else 1 / pi)
        exact = np.linalg.inv(statistics[place] + damping * np.eye(len(statistics[place])))
        assert distance(root, exact) < 1e-3, place


def test_ekfac_keeps_the_sum_of_its_moment(convert, tmp_path):
    built = LAYERED["ekfac"]
    _, old = saved(tmp_path / "run", built)
    target, _ = convert(tmp_path / "run", "--bits", 2)
    _, new = loaded(target, lambda m: built(m, bits=2))
    sums = [
        [own["moment.rms"].square().sum().item() for own in o.state.values() if "moment.rms" in own] for o in (old, new)
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)


def test_blocks_before_their_first_statistic(convert, tmp_path):
    built = of("dense", initial_scale=0.3, statistics_frequency=100)
    saved(tmp_path / "run", built, 2)
    target, _ = convert(tmp_path / "run", "--bits", 4, "--storage", "root")
    fresh = shampoo(net(), initial_scale=0.3, statistics_frequency=100)
    fresh.init_state()
    _, new = loaded(target, lambda m: shampoo(m, initial_scale=0.3, statistics_frequency=100))
    for before, after in zip(fresh.state.values(), new.state.values(), strict=True):
        assert all(same(before[key], after[key]) for key in before if key.startswith(("left.", "right.")))


def test_settings_that_must_go_along(convert, tmp_path):
    saved(tmp_path / "run", lambda m: shampoo(m, stagger=True, statistics_frequency=3))
    target, said = convert(tmp_path / "run", "--bits", 4, "--storage", "direct")
    _, new = loaded(target, of("direct"))
    assert (new.param_groups[0]["stagger"], new.param_groups[0]["precondition_frequency"]) == (False, 3)
    assert "stagger" in said
    back, said = convert(target, "--bits", 2, "--storage", "root")
    assert loaded(back, lambda m: shampoo(m, bits=2))[1].param_groups[0]["precondition_frequency"] in (None, 3)


def test_of_the_published_preset(convert, tmp_path):
    saved(tmp_path / "run", OPTIMIZERS["shampoo-eigen"])
    target, said = convert(tmp_path / "run", "--bits", 2, "--storage", "root")
    assert "layout" in said
    assert "quantization" in said
    _, new = loaded(target, lambda m: Shampoo(m.parameters(), bits=2))
    assert new.param_groups[0]["max_preconditioner_dim"] == 1200


def test_float64_and_bfloat16(convert, tmp_path):
    for dtype in (torch.float64, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model = net(dtype)
        saved(folder, lambda m: shampoo(m, base_bits=4), 4, model)
        for bits in (32, 2):
            target, _ = convert(folder, "--bits", bits, "--base-bits", 32)
            other = net(dtype)
            optimizer = shampoo(other, bits=bits)
            load_checkpoint(target, model=other, optimizer=optimizer)
            train(other, optimizer, range(4, 7))
            assert all(torch.isfinite(p).all() for p in other.parameters())


def test_blocks_and_groups(convert, tmp_path):
    def built(bits):
        def of_groups(model):
            parameters = list(model.parameters())
            groups = [
                {"params": parameters[:3], "precondition": False},
                {"params": parameters[3:], "weight_decay": 0.2},
            ]
            return Shampoo(
                groups, lr=0.01, bits=bits, max_preconditioner_dim=20, statistics_frequency=2, min_quant_size=1
            )

        return of_groups

    _, old = saved(tmp_path / "run", built(32))
    target, _ = convert(tmp_path / "run", "--bits", 4)
    other, new = loaded(target, built(4))
    pairs = list(zip(factors(old), factors(new), strict=True))
    assert pairs[0][0][1].shape == (8, 18, 18)
    assert all(distance(after[1].double().numpy(), before[1].double().numpy()) < 0.2 for before, after in pairs)
    assert [group["weight_decay"] for group in new.param_groups] == [0.01, 0.2]
    train(other, new, range(6, 9))


# ---- what comes along ------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_rest_of_a_checkpoint_comes_along(convert, tmp_path):
    model, optimizer = run(shampoo, 4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5, 5])
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    save_checkpoint(tmp_path / "run", model=model, optimizer=optimizer, scheduler=scheduler, step=4, note={"a": (1, 2)})
    expected = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    before = contents(tmp_path / "run")
    target, _ = convert(tmp_path / "run", "--bits", 2)
    assert contents(tmp_path / "run") == before
    other = net(seed=1)
    new = shampoo(other, bits=2)
    follower = torch.optim.lr_scheduler.MultiStepLR(new, [1])
    assert load_checkpoint(target, model=other, optimizer=new, scheduler=follower) == {"step": 4, "note": {"a": (1, 2)}}
    assert same((random.random(), np.random.rand(), torch.rand(3)), expected)  # noqa: NPY002
    assert same_models(model, other)
    assert same(follower.state_dict(), scheduler.state_dict())


def test_tied_weights_stay_tied(convert, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = Shampoo(model.parameters())
    optimizer.init_state()
    save_checkpoint(tmp_path / "run", model=model, optimizer=optimizer)
    target, _ = convert(tmp_path / "run", "--bits", 4)
    load_checkpoint(target, model=model, optimizer=Shampoo(model.parameters(), bits=4))


def test_without_a_model(convert, tmp_path):
    _, old = run(lambda m: shampoo(m, base_bits=4), 4)
    save_checkpoint(tmp_path / "run", optimizer=old)
    target, _ = convert(tmp_path / "run", "--bits", 2)
    new = shampoo(net(), bits=2, base_bits=4)
    load_checkpoint(target, optimizer=new)
    assert same(new.base_state_dict()["state"], old.base_state_dict()["state"])


def test_the_way_in_the_messages_leads_here(convert, tmp_path):
    saved(tmp_path / "run", shampoo)
    with pytest.raises(CheckpointError, match="lowbit-optim convert"):
        loaded(tmp_path / "run", lambda m: shampoo(m, bits=2))
    loaded(convert(tmp_path / "run", "--bits", 2)[0], lambda m: shampoo(m, bits=2))


# ---- from torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("place", [None, "optimizer", "optimizer_state_dict", "optim"])
def test_adamw_of_torch(convert, tmp_path, bits, place):
    model, theirs = run(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.9)), 4)
    state_dict = theirs.state_dict()
    torch.save(state_dict if place is None else {place: state_dict, "epoch": 3}, tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()
    target, said = convert(tmp_path / "run.pt", "--bits", bits)
    assert place is None or repr(place) in said
    ours = AdamW(model.parameters(), bits=bits)
    load_checkpoint(target, optimizer=ours)
    assert ours.param_groups[0]["betas"] == (0.8, 0.9)
    expected = AdamW(copy.deepcopy(model).parameters(), bits=bits)
    expected.load_state_dict(theirs.state_dict())
    assert same(ours.state_dict(), expected.state_dict())
    if bits == 32:  # torch's own state, on which the run goes on as if nothing had been
        other = copy.deepcopy(model)
        follower = torch.optim.AdamW(other.parameters())
        follower.load_state_dict(theirs.state_dict())
        train(other, follower, range(4, 7))
        train(model, ours, range(4, 7))
        assert same_models(model, other)
    assert (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "options", "base"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, "adamw"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "adamw"),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "sgd"),
        (torch.optim.SGD, {}, "sgd"),
        (torch.optim.Adagrad, {"lr_decay": 0.1}, "adagrad"),
    ],
)
def test_torch_as_a_base(convert, tmp_path, kind, options, base):
    model, theirs = run(lambda m: kind(m.parameters(), lr=0.01, **options), 4)
    torch.save(theirs.state_dict(), tmp_path / "run.pt")
    target, said = convert(tmp_path / "run.pt", "--bits", 4, "--optimizer", "shampoo")
    assert ("added to gradients" in said) == (kind is torch.optim.Adam)
    ours = Shampoo(model.parameters(), base=base, bits=4)
    load_checkpoint(target, optimizer=ours)
    expected = {i: {k: v for k, v in own.items() if v is not None} for i, own in theirs.state_dict()["state"].items()}
    assert same(ours.base_state_dict()["state"], {i: own for i, own in expected.items() if own})
    assert all(int(own["left.updates"].max()) == 0 for own in ours.state.values() if "left.updates" in own)
    train(model, ours, range(4, 7))


def test_low_bit_moments_under_a_preconditioner(convert, tmp_path):
    saved(tmp_path / "run", FIRST_ORDER["adamw"])
    target, _ = convert(tmp_path / "run", "--bits", 2, "--optimizer", "caspr")
    model, new = loaded(target, lambda m: CASPR(m.parameters(), bits=2, base_bits=4, min_quant_size=256))
    train(model, new, range(6, 9))


def test_bfloat16_of_torch(convert, tmp_path):
    model, theirs = run(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), 4, net(torch.bfloat16))
    torch.save(theirs.state_dict(), tmp_path / "run.pt")
    for arguments, kind in ((["--bits", 8], AdamW), (["--bits", 2, "--optimizer", "shampoo"], Shampoo)):
        ours = kind(model.parameters(), bits=arguments[1])
        load_checkpoint(convert(tmp_path / "run.pt", *arguments)[0], optimizer=ours)
        train(model, ours, range(4, 6))


# ---- from bitsandbytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_bitsandbytes(convert, tmp_path, flat):
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.optim import AdamW8bit

    model, theirs = run(lambda m: AdamW8bit(m.parameters(), lr=0.01, weight_decay=0.1, min_8bit_size=512), 5)
    state_dict = theirs.state_dict()
    if flat:  # as versions before 0.49 wrote it
        for own in state_dict["state"].values():
            own |= own.pop("__bnb_optimizer_quant_state__", {})
    torch.save(state_dict, tmp_path / "run.pt")
    target, _ = convert(tmp_path / "run.pt", "--bits", 32)
    ours = AdamW(model.parameters(), bits=32)
    load_checkpoint(target, optimizer=ours)
    coded = 0
    for parameter in model.parameters():
        own, new = theirs.state[parameter], ours.state[parameter]
        for which, key in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            expected = own[f"state{which}"]
            if expected.dtype == torch.uint8:
                coded += 1
                absmax, code = own[f"absmax{which}"], own[f"qmap{which}"]
                expected = functional.dequantize_blockwise(expected, absmax=absmax, code=code, blocksize=256)
            assert torch.equal(new[key], expected)
        assert new["step"].item() == 5.0
    assert coded == 2
    assert ours.param_groups[0]["weight_decay"] == 0.1
    other = copy.deepcopy(model)
    train(model, theirs, range(5, 8))
    follower = AdamW(other.parameters(), bits=32)
    load_checkpoint(target, optimizer=follower)
    train(other, follower, range(5, 8))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    moved = [relative(b.detach(), a.detach().double().numpy()) for a, b in pairs]
    assert max(moved) < 0.02


def test_bitsandbytes_of_another_rule(convert, tmp_path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.optim import SGD8bit

    _, theirs = run(lambda m: SGD8bit(m.parameters(), lr=0.01, momentum=0.9), 2)
    torch.save(theirs.state_dict(), tmp_path / "run.pt")
    assert "state1 and state2" in convert(tmp_path / "run.pt", "--bits", 8, code=2)[1]


# ---- from SOAP's authors ---------------------------------------------------------------------------------------------


class AuthorsSOAP(torch.optim.Optimizer):
    """The paper's algorithm in its authors' layout: a matrix per dim, the first gradient makes bases and no step.

    Args:
        eigenbasis: whether "exp_avg" is kept in the eigenbases, as in their present code.
    """

    def __init__(self, params, lr=0.01, eigenbasis=True, precondition_frequency=10):
        frequency = {"precondition_frequency": precondition_frequency, "max_precond_dim": 10000, "shampoo_beta": -1}
        switches = {"merge_dims": False, "precondition_1d": False, "normalize_grads": False, "correct_bias": True}
        self.eigenbasis = eigenbasis
        super().__init__(
            params, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, **frequency, **switches}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g, state, beta = p.grad, self.state[p], group["betas"][1]
                matrix = p.dim() == 2
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    state["GG"] = [torch.zeros(n, n) for n in p.shape] if matrix else [[]]
                    self.average(g, state, beta)
                    state["Q"] = [torch.linalg.eigh(a)[1].flip(1) for a in state["GG"]] if matrix else [[]]
                    continue
                state["step"] += 1
                t, (b1, b2), q = state["step"], group["betas"], state["Q"]
                turned = q[0].T @ g @ q[1] if matrix else g
                state["exp_avg"].lerp_(turned if self.eigenbasis else g, 1 - b1)
                state["exp_avg_sq"].lerp_(turned**2, 1 - b2)
                mean = state["exp_avg"]
                if matrix and not self.eigenbasis:
                    mean = q[0].T @ mean @ q[1]
                step = mean / (1 - b1**t) / ((state["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"])
                p.sub_(group["lr"] * (q[0] @ step @ q[1].T if matrix else step))
                self.average(g, state, beta)

    def average(self, g, state, beta):
        for a, m in zip(state["GG"], (g @ g.T, g.T @ g) if g.dim() == 2 else (), strict=False):
            a.lerp_(m, 1 - beta)


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))


def go(model, optimizer, steps):
    for step in steps:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("eigenbasis", [True, False])
def test_soap_of_its_authors(convert, tmp_path, eigenbasis):
    """The run goes on as it would have; the eigenbases do not turn meanwhile."""
    model = pair()
    theirs = AuthorsSOAP(model.parameters(), eigenbasis=eigenbasis)
    go(model, theirs, range(5))
    torch.save({"optimizer": theirs.state_dict()}, tmp_path / "run.pt")
    arguments = [] if eigenbasis else ["--soap-moments", "parameter"]
    target, _ = convert(tmp_path / "run.pt", "--bits", 32, *arguments)
    other = copy.deepcopy(model)
    ours = SOAP(other.parameters(), bits=32)
    load_checkpoint(target, optimizer=ours)
    own, given = ours.state[other[0].weight], theirs.state[model[0].weight]
    assert relative(own["left.statistic"][0] * (1 - 0.95**5), given["GG"][0].double().numpy()) < 1e-6
    assert (int(own["step"]), int(own["base.step"]), int(own["left.updates"])) == (5, 4, 5)
    go(model, theirs, range(5, 9))
    go(other, ours, range(5, 9))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(b.detach(), a.detach().double().numpy()) < 1e-4


def test_soap_of_few_bits(convert, tmp_path):
    model = pair()
    theirs = AuthorsSOAP(model.parameters())
    go(model, theirs, range(5))
    torch.save(theirs.state_dict(), tmp_path / "run.pt")
    target, _ = convert(tmp_path / "run.pt", "--bits", 4, "--base-bits", 8)
    ours = SOAP(model.parameters(), bits=4, base_bits=8)
    load_checkpoint(target, optimizer=ours)
    go(model, ours, range(5, 20))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_soap_of_other_matrices_starts_anew(convert, tmp_path):
    """A matrix for every dim of a convolution, where this library has two."""
    weight = nn.Parameter(torch.ones(4, 3, 2, 2))
    theirs = AuthorsSOAP([weight])
    state = {"step": 3, "exp_avg": torch.ones(4, 3, 2, 2), "exp_avg_sq": torch.ones(4, 3, 2, 2)}
    matrices = [torch.eye(n) for n in weight.shape]
    state_dict = {**theirs.state_dict(), "state": {0: {**state, "GG": matrices, "Q": matrices}}}
    torch.save(state_dict, tmp_path / "run.pt")
    target, said = convert(tmp_path / "run.pt", "--bits", 4)
    assert "parameter 0 of shape [4, 3, 2, 2] starts anew" in said
    ours = SOAP([weight])
    load_checkpoint(target, optimizer=ours)
    assert not ours.state


# ---- from the paper's Shampoo ----------------------------------------------------------------------------------------


def papers(steps=6, max_order=8, momentum=True):
    """A parameter of 16 x 8 in two blocks and a vector, with algorithm 4's state as plain tensors."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(steps, 16, 8, generator=generator)
    statistics, roots = [], []
    for block in gradients.split(max_order, 1):
        for side in ("left", "right"):
            a = 1e-3 * torch.eye(8)
            for g in block:
                a = 0.9 * a + 0.1 * (g @ g.T if side == "left" else g.T @ g)
            statistics.append(a)
            roots.append(torch.from_numpy(oracles.inverse_root(a.double().numpy())).float())
    of_matrix = {"step": steps, "statistics": statistics, "preconditioners": roots}
    of_vector = {"step": steps, "statistics": [], "preconditioners": []}
    for own, shape in ((of_matrix, (16, 8)), (of_vector, (7,))):
        if momentum:
            own["momentum"] = torch.randn(shape, generator=generator)
        else:
            own |= {key: torch.rand(shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
    base = {"momentum": 0.8, "nesterov": False} if momentum else {"betas": (0.8, 0.9), "eps": 1e-7}
    group = {"lr": 0.02, "weight_decay": 0.3, "params": [0, 1], **base, "prec_maxorder": max_order, "stat_decay": 0.9}
    group |= {"start_prec_step": 1, "stat_compute_steps": 1, "prec_compute_steps": 3, "matrix_eps": 1e-3}
    return {"state": {0: of_matrix, 1: of_vector}, "param_groups": [group]}


@pytest.mark.parametrize("momentum", [True, False])
def test_shampoo_of_the_paper(convert, tmp_path, momentum):
    given = papers(momentum=momentum)
    torch.save(given, tmp_path / "run.pt")
    target, _ = convert(tmp_path / "run.pt", "--bits", 32)
    parameters = [nn.Parameter(torch.ones(16, 8)), nn.Parameter(torch.ones(7))]
    ours = Shampoo(parameters, bits=32, base="sgd" if momentum else "adamw")
    load_checkpoint(target, optimizer=ours)
    own, matrices = ours.state[parameters[0]], given["state"][0]
    for side, offset in (("left", 0), ("right", 1)):
        assert same(own[f"{side}.statistic"], torch.stack(matrices["statistics"][offset::2]))
        assert same(own[f"{side}.root"], torch.stack(matrices["preconditioners"][offset::2]))
        assert own[f"{side}.updates"].tolist() == [6, 6]
    (group,) = ours.param_groups
    assert (group["shampoo_beta"], group["initial_scale"], group["matrix_eps"]) == (0.9, 1e-3, 1e-3)
    assert (group["statistics_frequency"], group["precondition_frequency"], group["lr"]) == (1, 3, 0.02)
    for parameter, index in zip(parameters, (0, 1), strict=True):
        before = given["state"][index]
        if momentum:
            assert same(ours.state[parameter]["base.momentum_buffer"], before["momentum"])
        else:
            assert all(same(ours.state[parameter][f"base.{key}"], before[key]) for key in ("exp_avg", "exp_avg_sq"))
            assert ours.state[parameter]["base.step"].item() == 6.0
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    ours.step()
    low, _ = convert(tmp_path / "run.pt", "--bits", 4, "--base-bits", 8)
    load_checkpoint(low, optimizer=Shampoo(parameters, bits=4, base="sgd" if momentum else "adamw", base_bits=8))


def test_shampoo_of_other_blocks_starts_anew(convert, tmp_path):
    """Its last block is smaller, where the blocks of this library are equal."""
    given = papers()
    given["param_groups"][0]["prec_maxorder"] = 12
    torch.save(given, tmp_path / "run.pt")
    target, said = convert(tmp_path / "run.pt", "--bits", 4)
    assert "factors of parameter 0 start anew" not in said  # 16 rows in two blocks of 8, as they are
    given["state"][0]["statistics"] = [torch.eye(n) for n in (12, 8, 4, 8)]
    torch.save(given, tmp_path / "run.pt")
    target, said = convert(tmp_path / "run.pt", "--bits", 4)
    assert "factors of parameter 0 start anew" in said
    parameters = [nn.Parameter(torch.ones(16, 8)), nn.Parameter(torch.ones(7))]
    ours = Shampoo(parameters, bits=4, base="sgd")
    load_checkpoint(target, optimizer=ours)
    assert same(ours.state[parameters[0]]["base.momentum_buffer"], given["state"][0]["momentum"])


# ---- what is refused -------------------------------------------------------------------------------------------------


class Payload:
    """What a pickle runs when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_is_not_run(convert, tmp_path):
    torch.save({"state": {0: {"preconditioner": Payload(tmp_path / "ran")}}, "param_groups": []}, tmp_path / "run.pt")
    _, said = convert(tmp_path / "run.pt", "--bits", 4, code=2)
    assert "weights_only=True" in said
    assert re.search(r"it holds a \w+\.system", said)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model": {}}, "the keys model.*'state' and 'param_groups'.*bitsandbytes"),
        ([1, 2], "a list"),
        ({"state": {0: {"mu": torch.ones(2)}}, "param_groups": [{"params": [0], "lr": 1}]}, "keys mu.*no layout"),
        ({"state": {3: {"mu": torch.ones(2)}}, "param_groups": [{"params": [0]}]}, "not of each other"),
        ({"state": {0: {"GG": 3}}, "param_groups": [{"params": [0]}]}, "not as its layout says"),
    ],
)
def test_other_content(convert, tmp_path, content, says):
    torch.save(content, tmp_path / "run.pt")
    _, said = convert(tmp_path / "run.pt", "--bits", 4, code=2)
    assert re.search(says, said), said


@pytest.mark.parametrize("make", [shampoo, FIRST_ORDER["adamw"]])
def test_our_own_state_dicts_are_saved_with_their_class(convert, tmp_path, make):
    _, optimizer = run(make, 2)
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    assert "save_checkpoint(folder, optimizer=optimizer)" in convert(tmp_path / "run.pt", "--bits", 4, code=2)[1]


def test_other_files(convert, tmp_path):
    (tmp_path / "run.pt").write_text("hello")
    for path in ("run.pt", "missing"):
        _, said = convert(tmp_path / path, "--bits", 4, code=2)
        assert said.startswith("lowbit-optim: error: ")
    save_checkpoint(tmp_path / "model", model=net())
    assert "without optimizer=" in convert(tmp_path / "model", "--bits", 4, code=2)[1]


@pytest.mark.parametrize("key", ["base.exp_avg", "left.root.scale_maxima"])
def test_what_is_not_finite(convert, tmp_path, key):
    model, optimizer = run(shampoo, 4)
    optimizer.state[model.hidden.weight][key].view(-1)[0] = torch.nan
    save_checkpoint(tmp_path / "run", model=model, optimizer=optimizer)
    _, said = convert(tmp_path / "run", "--bits", 2, code=2)
    assert key in said
    assert "not finite" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", 5], "bits is 5"),
        (["--bits", 4, "--storage", "nothing"], "unknown storage 'nothing'"),
        (["--bits", 2, "--storage", "eigen"], "storage 'eigen'"),
        (["--bits", 4, "--storage", "dense"], "storage 'dense' holds 32 bits"),
        (["--bits", 4, "--base-bits", 5], "bits is 5"),
        (["--bits", 4, "--optimizer", "shampoo"], "has one already"),
    ],
)
def test_options_that_cannot_be(convert, tmp_path, arguments, says):
    saved(tmp_path / "run", shampoo)
    assert says in convert(tmp_path / "run", *arguments, code=2)[1]


def test_options_of_a_first_order_optimizer(convert, tmp_path):
    saved(tmp_path / "run", FIRST_ORDER["adamw"])
    for arguments, says in (
        (["--bits", 2], "bits is 2"),
        (["--bits", 1.5], "bits is 1.5"),
        (["--bits", 8, "--storage", "root"], "moments alone"),
        (["--bits", 8, "--optimizer", "kfac"], "one of shampoo, caspr"),
    ):
        assert says in convert(tmp_path / "run", *arguments, code=2)[1]


def test_options_that_few_bits_do_not_have(convert, tmp_path):
    saved(tmp_path / "run", lambda m: Shampoo(m.parameters(), amsgrad=True))
    assert "amsgrad" in convert(tmp_path / "run", "--bits", 2, "--base-bits", 8, code=2)[1]


def test_a_base_of_the_users(convert, tmp_path):
    saved(tmp_path / "run", lambda m: Shampoo(m.parameters(), base=torch.optim.RMSprop, bits=4))
    assert "torch.RMSprop" in convert(tmp_path / "run", "--bits", 2, "--base-bits", 8, code=2)[1]
    target, _ = convert(tmp_path / "run", "--bits", 2)
    loaded(target, lambda m: Shampoo(m.parameters(), base=torch.optim.RMSprop, bits=2))


def test_the_target_is_not_overwritten(tmp_path, capsys):
    saved(tmp_path / "run", shampoo)
    target = tmp_path / "other"
    target.mkdir()
    (target / "mine").write_text("mine")
    command = ["convert", str(tmp_path / "run"), str(target), "--bits", "2"]
    assert cli.main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert contents(target) == {"mine": b"mine"}
    assert cli.main([*command, "--force"]) == 0
    assert (target / "mine").read_text() == "mine"
    loaded(target, lambda m: shampoo(m, bits=2))
    before = contents(tmp_path / "run")
    for inside in (tmp_path / "run", tmp_path / "run" / "new", target / "mine"):
        assert cli.main(["convert", str(tmp_path / "run"), str(inside), "--bits", "2", "--force"]) == 2
    assert contents(tmp_path / "run") == before


def test_a_read_only_target(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "run", shampoo)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowbit_optim.conversion.commit", refuse)
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "other"), "--bits", "2"]) == 2
    assert "No space left" in capsys.readouterr().err


def test_state_that_is_not_of_its_settings(convert, tmp_path):
    model, optimizer = run(shampoo, 4)
    optimizer.param_groups[0]["bits"] = 2
    optimizer.param_groups[0]["kept_as"] = ()
    save_checkpoint(tmp_path / "run", model=model, optimizer=optimizer)
    _, said = convert(tmp_path / "run", "--bits", 1, code=2)
    assert "parameter 0: its left factor: " in said


def test_sgd_without_momentum(convert, tmp_path):
    saved(tmp_path / "run", lambda m: SGD(m.parameters(), lr=0.01, bits=4, min_quant_size=256))
    target, _ = convert(tmp_path / "run", "--bits", 8)
    loaded(target, lambda m: SGD(m.parameters(), lr=0.01, bits=8, min_quant_size=256))


# ---- a checkpoint of ours with torch's optimizer ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
def test_torch_in_a_checkpoint_of_ours(convert, tmp_path, bits):
    """A frozen parameter and an empty one have no state, and still have shapes."""
    model = net()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 2)))
    model.register_parameter("empty", nn.Parameter(torch.ones(0)))
    _, theirs = saved(tmp_path / "run", lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), 4, model)
    target, _ = convert(tmp_path / "run", "--bits", bits)
    ours = AdamW(model.parameters(), bits=bits)
    load_checkpoint(target, model=model, optimizer=ours)
    expected = AdamW(model.parameters(), bits=bits)
    expected.load_state_dict(theirs.state_dict())
    assert same(ours.state_dict(), expected.state_dict())
    model.unused = nn.Parameter(torch.ones(6))
    with pytest.raises(CheckpointError, match=r"is \[3, 2\], the live one \[6\]"):
        load_checkpoint(target, optimizer=AdamW(model.parameters(), bits=bits))


def test_torch_without_any_state(convert, tmp_path):
    _, theirs = saved(tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), lr=0.01), 4)
    assert not any(own.get("momentum_buffer") is not None for own in theirs.state.values())
    target, _ = convert(tmp_path / "run", "--bits", 8)
    loaded(target, lambda m: SGD(m.parameters(), bits=8))
    target, _ = convert(tmp_path / "run", "--bits", 4, "--optimizer", "shampoo")
    loaded(target, lambda m: Shampoo(m.parameters(), bits=4, base="sgd"))


def test_infinities_beside_the_optimizer(convert, tmp_path):
    _, theirs = run(lambda m: torch.optim.AdamW(m.parameters()), 2)
    others = [torch.tensor(float("nan"))]
    others.append(others)
    torch.save(
        {"optimizer": theirs.state_dict(), "model": {"mask": torch.tensor(-torch.inf)}, "log": others},
        tmp_path / "a.pt",
    )
    convert(tmp_path / "a.pt", "--bits", 8)


def test_state_that_holds_itself(convert, tmp_path):
    _, theirs = run(lambda m: torch.optim.AdamW(m.parameters()), 2)
    state_dict, log = theirs.state_dict(), []
    log.append(log)
    state_dict["state"][0]["log"] = log
    torch.save(state_dict, tmp_path / "run.pt")
    assert "hold themselves" in convert(tmp_path / "run.pt", "--bits", 8, code=2)[1]


def test_a_counter_in_the_state(convert, tmp_path):
    model, theirs = run(lambda m: torch.optim.AdamW(m.parameters()), 2)
    theirs.state[model.hidden.weight]["seen"] = Counter(a=2, b=1)
    save_checkpoint(tmp_path / "run", model=model, optimizer=theirs)
    target, _ = convert(tmp_path / "run", "--bits", 8)
    ours = AdamW(model.parameters(), bits=8)
    load_checkpoint(target, model=model, optimizer=ours)
    assert ours.state[model.hidden.weight]["seen"] == {"a": 2, "b": 1}


def test_groups_of_what_a_checkpoint_cannot_hold(convert, tmp_path):
    _, theirs = run(lambda m: torch.optim.AdamW(m.parameters()), 2)
    theirs.param_groups[0]["tags"] = {1, 2}
    torch.save(theirs.state_dict(), tmp_path / "run.pt")
    assert "what a checkpoint cannot" in convert(tmp_path / "run.pt", "--bits", 8, code=2)[1]


def test_groups_of_unlike_bits_under_a_preconditioner(convert, tmp_path):
    def built(model):
        first, *others = model.parameters()
        return AdamW([{"params": [first], "bits": 4}, {"params": others, "bits": 8}], min_quant_size=256)

    saved(tmp_path / "run", built)
    arguments = ["--bits", 4, "--optimizer", "shampoo"]
    _, said = convert(tmp_path / "run", *arguments, code=2)
    assert "4, 8 bits" in said
    assert "--base-bits" in said
    convert(tmp_path / "run", *arguments, "--base-bits", 8)


def test_a_rotation_is_not_hidden(tmp_path, capsys):
    model, optimizer = saved(tmp_path / "run", shampoo)
    save_checkpoint(tmp_path / "other", model=model, optimizer=optimizer, step=3, keep=2)
    before = contents_below(tmp_path / "other")
    for more in ([], ["--force"]):
        assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "other"), "--bits", "2", *more]) == 2
        assert "latest" in capsys.readouterr().err
    assert contents_below(tmp_path / "other") == before


def contents_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
