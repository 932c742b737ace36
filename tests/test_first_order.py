"""AdamW, SGD and Adagrad: torch's own at 32 bits; with codes, their moments in the mean, and what is refused."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lowbit_optim import KFAC, SGD, SOAP, Adagrad, AdamW, Shampoo, load_checkpoint, save_checkpoint
from lowbit_optim.optimizers.moments import moment_form
from tests.contract import backward, copies, follow, net, random, same, same_models, train

SHAPE = (48, 200)  # a block of 128 numbers and a short one in every row, and more than 4096 numbers
TORCH = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD, Adagrad: torch.optim.Adagrad}
OPTIONS = {
    "adamw": (AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw-climbs": (AdamW, {"lr": 0.01, "maximize": True, "eps": 1e-3}),
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    "sgd-nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.01, "initial_accumulator_value": 0.1}),
}
each_rule = pytest.mark.parametrize(("optimizer", "options"), OPTIONS.values(), ids=OPTIONS)
each_bits = pytest.mark.parametrize("bits", [8, 4])


def parameter(dtype=torch.float32, shape=SHAPE):
    return nn.Parameter(random(*shape, dtype=torch.float64).to(dtype))


def step_with(optimizer, one, steps, dtype=None):
    """Steps with the gradients of their numbers."""
    for step in steps:
        one.grad = random(*one.shape, seed=step + 1).to(dtype or one.dtype)
        optimizer.step()


# ------------------------------------------------------------------------------------------------- 32 bits


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_32_bits_are_torchs_own(optimizer, options, dtype, kind):
    """To the last bit, the state too, which torch's optimizer takes back."""
    if optimizer is Adagrad and dtype == torch.float64 and "fused" in kind:
        options = {**options, "maximize": True}
    ours, theirs = parameter(dtype), parameter(dtype)
    mine, reference = optimizer([ours], bits=32, **options, **kind), TORCH[optimizer]([theirs], **options, **kind)
    step_with(mine, ours, range(6))
    step_with(reference, theirs, range(6))
    assert same(ours.detach(), theirs.detach())
    assert same(mine.state_dict()["state"], reference.state_dict()["state"])
    reference.load_state_dict(mine.state_dict())


def test_amsgrad_at_32_bits():
    ours, theirs = parameter(), parameter()
    mine, reference = AdamW([ours], bits=32, amsgrad=True), torch.optim.AdamW([theirs], amsgrad=True)
    step_with(mine, ours, range(6))
    step_with(reference, theirs, range(6))
    assert same(ours.detach(), theirs.detach())


# -------------------------------------------------------------------------------------------- the equations


def oracle(optimizer, start, gradients, options):
    """torch's optimizer in float64, which is tested against the papers there."""
    return follow(lambda p: TORCH[optimizer](p, **options), start, gradients)


@each_rule
@each_bits
def test_a_long_run_stays_near_that_of_32_bits(optimizer, options, bits):
    """What rounding takes away comes back: errors do not add up over 100 steps, of which each is off by more."""
    start = random(4, 1100, dtype=torch.float64).numpy()
    drift = 0.3 * random(4, 1100, seed=1000, dtype=torch.float64).numpy()
    gradients = [drift + random(4, 1100, seed=step + 1, dtype=torch.float64).numpy() for step in range(100)]
    exact = oracle(optimizer, start, gradients, options)[-1]
    run = follow(lambda p: optimizer(p, bits=bits, **options), start, gradients, torch.float32)[-1]
    error = abs(run - exact).mean() / abs(exact - start).mean()
    assert 0 < error < {8: 0.06, 4: 0.35}[bits]


@each_rule
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_bfloat16_parameters_follow_on_average(optimizer, options, bits):
    """Steps that are far below a bfloat16's spacing, which rounding to the nearest would lose all."""
    gradients = [torch.ones(32, 256).numpy()] * 40
    start = torch.ones(32, 256).numpy()
    options = {**options, "lr": options["lr"] / 100}
    options.pop("weight_decay", None)
    exact = oracle(optimizer, start, gradients, options)[-1].mean() - 1

    def moved(**more):
        run = follow(lambda p: optimizer(p, bits=bits, **options, **more), start, gradients, torch.bfloat16)
        return run[-1].mean() - 1

    assert moved() == pytest.approx(exact, rel=0.15)
    if optimizer is AdamW:
        assert abs(moved(stochastic_rounding=False)) < abs(exact) / 2


@each_bits
def test_zero_stays_zero(bits):
    """Numbers without a gradient do not move, in blocks with others or without, whatever is rounded."""
    one = parameter()
    start = one.detach().clone()
    optimizer = AdamW([one], bits=bits, lr=0.1, weight_decay=0.0)
    for step in range(20):
        one.grad = random(*SHAPE, seed=step)
        one.grad[:10] = 0
        one.grad[:, ::3] = 0
        optimizer.step()
    moved = one.detach() != start
    assert not moved[:10].any()
    assert not moved[:, ::3].any()
    assert moved[10:, 1::3].all()


@each_bits
def test_a_small_change_is_not_lost(bits):
    """A second moment that grows by a thousandth in each step; rounded to the nearest it would stay where it is."""
    one = parameter()
    optimizer = AdamW([one], bits=bits, lr=0.0, weight_decay=0.0)
    sizes = 1 + random(*SHAPE, seed=5).abs()
    mean = square = 0.0  # of gradients of size 1, exactly
    for step in range(1, 2001):
        scale = 1 if step <= 1000 else 2
        mean, square = 0.9 * mean + 0.1 * scale, 0.999 * square + 0.001 * scale**2
        optimizer.param_groups[0]["lr"] = float(step % 1000 == 0)
        before = one.detach().clone()
        one.grad = scale * sizes
        optimizer.step()
        if step % 1000 == 0:
            update = mean / (1 - 0.9**step) / (square / (1 - 0.999**step)) ** 0.5
            assert (before - one.detach()).mean().item() == pytest.approx(update, rel={8: 0.02, 4: 0.06}[bits])


# ----------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize(("bits", "expected"), [(8, 2 + 8 / 128), (4, 1 + 8 / 128)])
def test_bytes_per_parameter(bits, expected):
    one = parameter(shape=(256, 512))
    optimizer = AdamW([one], bits=bits)
    step_with(optimizer, one, range(1))
    state = optimizer.state[one]
    assert sum(v.nbytes for v in state.values()) == one.numel() * expected + 4 + 8


def test_small_short_and_wide_parameters_keep_32_bits():
    shapes = {"codes": (64, 64), "small": (63, 65), "short": (500, 31), "vector": (10_000,), "wide": (64, 64)}
    parameters = {name: parameter(shape=shape) for name, shape in shapes.items()}
    parameters["wide"] = parameter(torch.float64, (64, 64))
    optimizer = AdamW(parameters.values(), bits=4)
    for one in parameters.values():
        one.grad = torch.ones_like(one)
    optimizer.step()
    coded = {name for name, one in parameters.items() if "exp_avg.codes" in optimizer.state[one]}
    assert coded == {"codes"}
    optimizer = AdamW([parameter(shape=(3, 40))], bits=4, min_quant_size=100)
    step_with(optimizer, optimizer.param_groups[0]["params"][0], range(1))
    assert "exp_avg.codes" in optimizer.state_dict()["state"][0]


@each_rule
@each_bits
def test_gradients_that_are_not_finite_count_as_zero(optimizer, options, bits, caplog):
    """Number by number, as if they were zeros; counted, and said once."""
    spoilt, zeroed = parameter(), parameter()
    pair = [optimizer([one], bits=bits, **options) for one in (spoilt, zeroed)]
    for step in range(5):
        gradient = random(*SHAPE, seed=step)
        zeroed.grad = gradient.clone()
        spoilt.grad = gradient.clone()
        if step in (1, 3):
            zeroed.grad[3, 100:103] = 0
            spoilt.grad[3, 100:103] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for one in pair:
            one.step()
    assert same(spoilt.detach(), zeroed.detach())
    assert int(pair[0].state[spoilt]["nonfinite"]) == 6
    assert len(caplog.messages) == 1
    assert "6 numbers" in caplog.text or "3 numbers" in caplog.text


@each_bits
@pytest.mark.parametrize("layout", ["channels-last", "transposed", "expanded gradient"])
def test_any_memory_layout(bits, layout):
    start = random(40, 16, 3, 3)
    plain = nn.Parameter(start.clone())
    strided = nn.Parameter(start.clone())
    if layout == "channels-last":
        strided.data = strided.data.to(memory_format=torch.channels_last)
    if layout == "transposed":
        strided.data = strided.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    pair = [(plain, AdamW([plain], bits=bits)), (strided, AdamW([strided], bits=bits))]
    for step in range(4):
        for one, optimizer in pair:
            gradient = random(40, 1, 3, 3, seed=step).expand(40, 16, 3, 3)
            one.grad = gradient if layout == "expanded gradient" and one is strided else gradient.clone()
            optimizer.step()
    assert same(plain.detach(), strided.detach().contiguous())
    assert strided.is_contiguous() == (layout == "expanded gradient")


def test_bits_of_each_group():
    groups = [{"params": [parameter()], "bits": bits} for bits in (32, 8, 4)]
    optimizer = AdamW(groups)
    for step in range(3):
        for group in optimizer.param_groups:
            group["params"][0].grad = random(*SHAPE, seed=step)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    codes = [state[index].get("exp_avg.codes") for index in range(3)]
    assert [None if c is None else c.shape for c in codes] == [None, (48, 200), (48, 100)]
    described = optimizer.state_codecs()
    assert described.keys() == {1, 2}
    assert described[2]["exp_avg_sq"] == {"codebook": "e3m1", "bits": 4, "block_size": 128}


@each_rule
@each_bits
def test_torchs_state_becomes_codes(optimizer, options, bits):
    """A run that torch's optimizer began goes on, and is close to that which torch would have gone on with."""
    theirs = parameter()
    reference = TORCH[optimizer]([theirs], **options)
    step_with(reference, theirs, range(6))
    ours = nn.Parameter(theirs.detach().clone())
    mine = optimizer([ours], bits=bits, **options)
    mine.load_state_dict(reference.state_dict())
    assert mine.param_groups[0]["bits"] == bits
    before = theirs.detach().clone()
    step_with(reference, theirs, range(6, 46))
    step_with(mine, ours, range(6, 46))
    moved = (theirs.detach() - before).norm()
    assert 0 < (ours.detach() - theirs.detach()).norm() < {8: 0.1, 4: 0.5}[bits] * moved


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "bits is 5; moments have one of 32, 8, 4 bits"),
        ({"bits": True}, "bits is True"),
        ({"bits": 4, "amsgrad": True}, "amsgrad=True .* needs bits=32"),
        ({"bits": 8, "capturable": True}, "capturable=True .* needs bits=32"),
        ({"bits": 8, "differentiable": True}, "differentiable=True .* needs bits=32"),
        ({"seed": -1}, "seed is -1"),
        ({"min_quant_size": 0.5}, "min_quant_size is 0.5"),
        ({"lr": -1.0}, "learning rate"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        AdamW([parameter()], **settings)
    optimizer = AdamW([parameter()])
    before = copies(optimizer)
    if "lr" not in settings:
        with pytest.raises(ValueError, match=said):
            optimizer.add_param_group({"params": [parameter()], **settings})
        assert same(copies(optimizer), before)


def test_unknown_options_are_torchs_errors():
    with pytest.raises(TypeError, match="momentum"):
        AdamW([parameter()], momentum=0.9)


def test_a_sparse_gradient_changes_nothing():
    one, other = parameter(), parameter()
    optimizer = AdamW([one, other], bits=4)
    one.grad = torch.ones_like(one)
    other.grad = torch.ones_like(other).to_sparse()
    before = copies(optimizer)
    with pytest.raises(TypeError, match=r"parameter 1 .* sparse=False"):
        optimizer.step()
    assert same(copies(optimizer), before)


@pytest.mark.parametrize(("key", "value"), [("bits", 8), ("bits", 32), ("min_quant_size", 10**6)])
def test_settings_changed_under_the_state(key, value):
    """The step is refused, nothing has changed, and it goes on when they are set back."""
    one = parameter()
    optimizer = AdamW([one], bits=4)
    step_with(optimizer, one, range(2))
    before = copies(optimizer)
    kept = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match="parameter 0"):
        step_with(optimizer, one, range(2, 3))
    optimizer.param_groups[0][key] = kept
    assert same(copies(optimizer), before)
    step_with(optimizer, one, range(2, 3))


def foreign():
    def of(make, *shapes):
        parameters = [parameter(shape=shape) for shape in shapes or [SHAPE]]
        optimizer = make(parameters)
        for one in parameters:
            one.grad = torch.ones_like(one)
        optimizer.step()
        return optimizer.state_dict()

    four = {"bits": 4}
    broken = of(lambda p: AdamW(p, **four))
    broken["state"][0]["exp_avg.codes"] = broken["state"][0]["exp_avg.codes"].float()
    yield "other bits", of(lambda p: AdamW(p, bits=8)), "bits=8"
    yield "32 bits", of(lambda p: AdamW(p, bits=32)), "bits=32"
    yield "other shape", of(lambda p: AdamW(p, **four), (96, 100)), r"exp_avg\.(codes|scales)"
    yield "other class", of(lambda p: Adagrad(p, **four)), "sum"
    yield "torch's other class", of(lambda p: torch.optim.SGD(p, momentum=0.9)), "exp_avg"
    yield "torch's of another shape", of(torch.optim.AdamW, (96, 100)), "exp_avg"
    yield "torch's amsgrad", of(lambda p: torch.optim.AdamW(p, amsgrad=True)), "amsgrad"
    yield "more parameters", of(lambda p: AdamW(p, **four), SHAPE, (3, 3)), "sizes"
    yield "codes of float32", broken, "exp_avg.codes is torch.float32"
    yield "no state dict", {"state": {}}, "param_groups"


@pytest.mark.parametrize(("state_dict", "said"), [pytest.param(d, s, id=name) for name, d, s in foreign()])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_dict_that_does_not_fit(state_dict, said, steps):
    one = parameter()
    optimizer = AdamW([one], bits=4)
    step_with(optimizer, one, range(steps))
    before = copies(optimizer)
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(state_dict)
    assert same(copies(optimizer), before)
    step_with(optimizer, one, range(steps, steps + 1))


# ----------------------------------------------------------------------------------------------- as a base


@each_bits
@pytest.mark.parametrize("base", ["adamw", "sgd", "adagrad"])
def test_as_the_base_it_takes_its_own_steps(base, bits):
    """With preconditioning off, Shampoo over it is it, to the last bit."""
    alone, under = net(), net()
    own = {"adamw": AdamW, "sgd": SGD, "adagrad": Adagrad}[base]
    options = {"lr": 0.01, "min_quant_size": 256} | ({"momentum": 0.9} if base == "sgd" else {})
    first = own(alone.parameters(), bits=bits, **options)
    second = Shampoo(under.parameters(), base=base, base_bits=bits, precondition=False, **options)
    train(alone, first, range(5))
    train(under, second, range(5))
    assert same_models(alone, under)
    state = second.base_state_dict()
    for index, moments in first.state_dict()["state"].items():
        assert same(state["state"][index], moments)
    go_on = own(under.parameters(), bits=bits, **options)
    go_on.load_state_dict(state)
    train(alone, first, range(5, 8))
    train(under, go_on, range(5, 8))
    assert same_models(alone, under)


@each_bits
def test_moments_of_torchs_adamw_go_on_as_codes(bits):
    model = net()
    reference = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, reference, range(4))
    optimizer = Shampoo(model.parameters(), base_bits=bits, min_quant_size=256)
    optimizer.load_base_state_dict(reference.state_dict())
    assert optimizer.state[model.hidden.weight]["base.exp_avg.codes"].dtype == torch.uint8
    assert float(optimizer.state[model.hidden.weight]["base.step"]) == 4
    assert optimizer.param_groups[0]["lr"] == 0.01
    train(model, optimizer, range(4, 6))


def test_base_bits_of_each_group():
    model = net()
    groups = [{"params": model.conv.parameters(), "base_bits": 32}, {"params": model.hidden.parameters()}]
    optimizer = Shampoo(groups, lr=0.01, base_bits=4, min_quant_size=256, statistics_frequency=2)
    backward(model, 0)
    optimizer.step()
    assert "base.exp_avg" in optimizer.state[model.conv.weight]
    assert "base.exp_avg.codes" in optimizer.state[model.hidden.weight]
    assert optimizer.state_codecs()[2]["base.exp_avg"]["bits"] == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_bits": 3}, "base_bits is 3; it must be one of 32, 8, 4"),
        ({"base_bits": 4, "base": torch.optim.AdamW}, "only 'adamw', 'sgd', 'adagrad'"),
        ({"base_bits": 4, "amsgrad": True}, "amsgrad=True .* needs base_bits=32"),
        ({"base_bits": 4, "momentum": 0.9}, "unknown keyword 'momentum'.*betas"),
    ],
)
@pytest.mark.parametrize("optimizer", [Shampoo, KFAC, SOAP])
def test_base_bits_that_cannot_be(optimizer, settings, said):
    if optimizer is SOAP and "base" in settings:
        pytest.skip("SOAP has one base")
    model = nn.Linear(64, 64)
    more = {"model": model} if optimizer is KFAC else {}
    with pytest.raises((ValueError, TypeError), match=said):
        optimizer(model.parameters(), **settings, **more)


def test_base_bits_in_a_group_over_torchs_base():
    with pytest.raises(ValueError, match=r"base_bits=4, but the base is torch\.AdamW"):
        Shampoo([{"params": [parameter()], "base_bits": 4}])


def test_a_low_bit_class_as_base():
    one = parameter()
    optimizer = Shampoo([one], base=AdamW, base_bits=8, seed=3)
    step_with(optimizer, one, range(2))
    assert optimizer.param_groups[0]["base"] == "lowbit_optim.AdamW"
    assert optimizer.param_groups[0]["seed"] == 3
    assert "base.exp_avg.codes" in optimizer.state[one]
    other = copy.deepcopy(optimizer)
    assert same(other.state_dict(), optimizer.state_dict())


@each_bits
@pytest.mark.parametrize("make", [lambda p, b: AdamW(p, bits=b), lambda p, b: Shampoo(p, base_bits=b)])
def test_a_checkpoint_says_how_its_codes_are_read(tmp_path, make, bits):
    """A reader who has only the file finds the moments: table[code] * scale; and loading it goes on exactly."""
    model = nn.Linear(200, 48)
    optimizer = make(model.parameters(), bits)
    for step in range(3):
        model(random(8, 200, seed=step)).square().mean().backward()
        optimizer.step()
    save_checkpoint(tmp_path, model=model, optimizer=optimizer)
    (file,) = tmp_path.glob("optimizer-*.safetensors")
    prefix = "weight/" if isinstance(optimizer, AdamW) else "weight/base."
    with safe_open(file, "pt") as saved:
        codecs, tables = (json.loads(saved.metadata()[name]) for name in ("codecs", "codebooks"))
        found = {}
        for name in ("exp_avg", "exp_avg_sq"):
            codec = codecs[f"{prefix}{name}"]
            table = torch.tensor(tables[codec["codebook"]][str(bits)])
            codes, scales = (saved.get_tensor(f"{prefix}{name}.{part}") for part in ("codes", "scales"))
            if bits == 4:
                codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
            found[name] = table[codes.int()] * scales.repeat_interleave(codec["block_size"], 1)[:, :200]
    own = optimizer.state[model.weight]
    for name, kind in AdamW.moments.items():
        form = moment_form(model.weight, optimizer.param_groups[0], kind)
        read = form.read(name if isinstance(optimizer, AdamW) else f"base.{name}", own, model.weight.shape)
        assert torch.equal(found[name], read)
    other = copy.deepcopy(model)
    resumed = make(other.parameters(), bits)
    load_checkpoint(tmp_path, model=other, optimizer=resumed)
    assert same(resumed.state_dict(), optimizer.state_dict())


# --------------------------------------------------------------------------------------- what a review found


@each_bits
@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999])
def test_first_steps_are_no_longer_than_adams(bits, beta):
    """What is fed back is weighed as later steps are, which have less correction for the bias."""
    one = parameter()
    start = one.detach().clone()
    optimizer = AdamW([one], bits=bits, lr=1.0, betas=(beta, 0.999), weight_decay=0.0)
    step_with(optimizer, one, range(1))
    assert (one.detach() - start).square().mean().sqrt() < 1.25


def test_torchs_state_of_another_dtype_is_cast_where_torch_steps():
    bias = [nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    reference = torch.optim.AdamW(bias[:1])
    step_with(reference, bias[0], range(2))
    optimizer = AdamW(bias[1:], bits=4)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.state[bias[1]]["exp_avg"].dtype == torch.float32
    step_with(optimizer, bias[1], range(2, 3))


@pytest.mark.parametrize(("change", "said"), [({"exp_avg": torch.zeros(5)}, r"\[5\]"), ({"exp_avg_sq": None}, "lacks")])
def test_moments_that_torch_would_step_with_are_checked(change, said):
    one = nn.Parameter(torch.ones(6))
    optimizer = AdamW([one], bits=4)
    step_with(optimizer, one, range(1))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0] = {k: v for k, v in {**state_dict["state"][0], **change}.items() if v is not None}
    before = copies(optimizer)
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(state_dict)
    assert same(copies(optimizer), before)


@pytest.mark.parametrize("momenta", [(0.0, 0.9, 0.5), (0.9, 0.0, 0.9)])
def test_a_momentum_that_comes_and_goes(momenta):
    for make in (lambda p: SGD([p], bits=8), lambda p: Shampoo([p], base="sgd", base_bits=8, statistics_frequency=1)):
        one = parameter()
        optimizer = make(one)
        for step, momentum in enumerate(momenta):
            optimizer.param_groups[0]["momentum"] = momentum
            step_with(optimizer, one, range(step, step + 1))
        assert torch.isfinite(one).all()


def test_rates_and_betas_that_are_tensors():
    runs = []
    for wrap in (float, torch.tensor):
        one = parameter()
        optimizer = AdamW([one], bits=4, lr=wrap(0.5), betas=(wrap(0.5), wrap(0.75)))
        step_with(optimizer, one, range(3))
        runs.append(one.detach())
    assert same(*runs)


def test_writes_are_seen_by_autograd():
    one = parameter()
    optimizer = AdamW([one], bits=4)
    loss = one.square().sum()
    one.grad = torch.ones_like(one)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_number_in_bfloat16_is_reported_with_its_bits():
    optimizer = AdamW([parameter(torch.bfloat16, ())])
    assert "0          scalar  32 bits" in optimizer.report()


def test_vectors_in_bfloat16_are_long_rows():
    vector, matrix = (nn.Parameter(random(4096).bfloat16().view(shape)) for shape in ((4096,), (16, 256)))
    for one in (vector, matrix):
        step_with(AdamW([one], bits=32, min_quant_size=10**6), one, range(0))
        optimizer = AdamW([one], bits=32)
        for step in range(3):
            one.grad = random(4096, seed=step).bfloat16().view_as(one)
            optimizer.step()
    assert same(vector.detach(), matrix.detach().flatten())


def test_a_state_dict_from_before_base_bits():
    one = parameter()
    optimizer = Shampoo([one], statistics_frequency=1)
    step_with(optimizer, one, range(2))
    state_dict = optimizer.state_dict()
    state_dict["param_groups"] = [{k: v for k, v in state_dict["param_groups"][0].items() if k != "base_bits"}]
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["base_bits"] == 32


class Child(AdamW):
    pass


def test_a_child_of_a_low_bit_class_as_base():
    one = parameter()
    optimizer = Shampoo([one], base=Child, base_bits=4)
    step_with(optimizer, one, range(1))
    assert "base.exp_avg.codes" in optimizer.state[one]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soap_turns_moments_of_any_layout_and_dtype(dtype):
    model = nn.Conv2d(16, 32, 3).to(dtype=dtype, memory_format=torch.channels_last)
    optimizer = SOAP(model.parameters(), precondition_frequency=1)
    for step in range(3):
        model.zero_grad()
        model(random(2, 16, 8, 8, seed=step, dtype=dtype)).square().mean().backward()
        optimizer.step()
    moment = optimizer.state[model.weight]["base.exp_avg"]
    assert moment.dtype == dtype
    assert dtype == torch.float32 or not torch.equal(moment.float().double(), moment)
