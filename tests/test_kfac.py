"""K-FAC and AdaBK against their equations in float64, and what hooks see."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowbit_optim import KFAC, AdaBK
from lowbit_optim.preconditioners.layers import rows_of
from tests.contract import random, same


def value(layer, side, loss_scale=1.0):
    """The statistic of a side as such."""
    m, magnitude = layer.statistic(side, loss_scale)
    return m * magnitude[:, None, None] ** 2


# ------------------------------------------------------------------------------------------------ trajectories


def perceptron(weights, x, y):
    """Loss mean of |f(x) - y|^2 / 2 of a tanh perceptron with biases, in numpy: per layer (inputs with a 1, gradients).

    Gradients are those of the mean loss, one row an example.
    """
    inputs, h = [], x
    for i, w in enumerate(weights):
        inputs.append(np.hstack([h, np.ones((len(h), 1))]))
        h = inputs[-1] @ w.T
        if i < len(weights) - 1:
            h = np.tanh(h)
    g, gradients = (h - y) / len(x), []
    for i in reversed(range(len(weights))):
        gradients.insert(0, g)
        if i:
            g = (g @ weights[i][:, :-1]) * (1 - inputs[i][:, :-1] ** 2)
    return list(zip(inputs, gradients, strict=True))


def damped_root(a, p, ridge):
    values, vectors = np.linalg.eigh(a)
    return (vectors * (np.maximum(values, 0) + ridge) ** (-1 / p)) @ vectors.T


def oracle(weights, batches, *, p, damping, absolute, beta, T1, T2, lr, graft):
    """W <- W - lr G~, statistics a mean with weights beta^age of x x^T over rows and N g g^T."""
    weights = [w.copy() for w in weights]
    roots = [[np.eye(n) for n in w.shape] for w in weights]
    means, count, history = [None for _ in weights], 0, []
    for t, (x, y) in enumerate(batches, 1):
        rows = perceptron(weights, x, y)
        share = None
        if t % T1 == 0:
            count += 1
            share = (1 - beta) / (1 - beta**count)
        for i, (a, g) in enumerate(rows):
            gradient = g.T @ a
            if share is not None:
                new = (len(a) * g.T @ g, a.T @ a / len(a))
                means[i] = (
                    new
                    if means[i] is None
                    else [(1 - share) * m + share * n for m, n in zip(means[i], new, strict=True)]
                )
            if t % T2 == 0:
                left, right = means[i]
                ridges = [damping * np.linalg.eigvalsh(m)[-1] for m in means[i]]
                if absolute:
                    pi = np.sqrt((np.trace(right) / len(right)) / (np.trace(left) / len(left)))
                    ridges = [np.sqrt(damping) / pi, np.sqrt(damping) * pi]
                roots[i] = [damped_root(m, p, r) for m, r in zip(means[i], ridges, strict=True)]
            left, right = roots[i]
            step = left @ gradient @ right
            if graft:
                step *= np.linalg.norm(gradient) / np.linalg.norm(step)
            weights[i] = weights[i] - lr * step
        history.append([w.copy() for w in weights])
    return history


SIZES = (9, 12, 5)


def mlp(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 5)).to(dtype)


def matrices(model):
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach().double().numpy() for m in model if hasattr(m, "weight")]


def batches(steps):
    return [
        (random(16, 9, seed=s, dtype=torch.float64), random(16, 5, seed=99 + s, dtype=torch.float64))
        for s in range(steps)
    ]


@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("made", "p"), [(KFAC, 1), (AdaBK, 2)])
@pytest.mark.parametrize(
    ("bits", "storage", "dtype", "limit"),
    [
        (32, "eigen", torch.float64, 1e-5),
        (32, "root", torch.float32, 1e-4),
        (8, "root", torch.float64, 0.02),
        (8, "logarithm", torch.float64, 0.02),
        (8, "cholesky", torch.float64, 0.05),
    ],
)
def test_twenty_steps_follow_the_equations(made, p, absolute, graft, bits, storage, dtype, limit):
    damping = 0.1 if p == 1 else 0.01
    model, steps = mlp(dtype), batches(20)
    shared = {"damping": damping, "lr": 0.02, "graft": graft}
    kept = {"bits": bits, "storage": storage, "min_quant_size": 0, "statistics_frequency": 2}
    if storage not in ("root", "logarithm"):
        kept["precondition_frequency"] = 2
    rule = "absolute" if absolute else "relative"
    optimizer = made(model.parameters(), model=model, base="sgd", damping_rule=rule, **kept, **shared)
    start = matrices(model)
    arrays = [(x.numpy(), y.numpy()) for x, y in steps]
    expected = oracle(start, arrays, p=p, absolute=absolute, beta=0.9, T1=2, T2=2, **shared)
    for (x, y), reference in zip(steps, expected, strict=True):
        optimizer.zero_grad()
        ((model(x.to(dtype)) - y.to(dtype)).square().sum() / 2 / len(x)).backward()
        optimizer.step()
        for got, exact, first in zip(matrices(model), reference, start, strict=True):
            assert np.linalg.norm(got - exact) / np.linalg.norm(exact - first) < limit


# ----------------------------------------------------------------------------------------------------- factors


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "2d": (nn.Conv2d(4, 6, 3), (4, 6, 5)),
    "3d": (nn.Conv3d(2, 4, 2), (2, 3, 4, 3)),
    "stride": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 6)),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (4, 6, 6)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 2)), (4, 6, 6)),
    "valid": (nn.Conv2d(4, 6, 2, padding="valid"), (4, 5, 5)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5, 5)),
    "reflect": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 8)),
    "without a bias": (nn.Conv2d(4, 6, 3, bias=False), (4, 5, 5)),
    "uneven kernel and stride": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1)), (4, 6, 5)),
}
each_convolution = pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def observe(model, x, backward=None):
    """An optimizer after the backward pass of sum y^2 / 2 / batch, and the gradients of y."""
    optimizer = KFAC(model.parameters(), model=model, statistics_frequency=1)
    y = model(x)
    y.retain_grad()
    (y.square().sum() / 2 / len(x)).backward()
    return optimizer, y.grad


def per_example(conv, x, g):
    """For each example and position the gradient of the weight and bias as an outer product, from autograd alone."""
    for i in range(len(x)):
        for position in np.ndindex(*g.shape[2:]):
            y = conv(x[i : i + 1])[0]
            output = y[(slice(None), *position)]
            jacobian = [torch.autograd.grad(output[o], conv.weight, retain_graph=True)[0] for o in range(len(output))]
            yield jacobian, g[(i, slice(None), *position)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@each_convolution
def test_convolution_factors_are_sums_over_examples_and_positions(conv, shape):
    """Inputs from the Jacobian of each output: dy_o / dw_o is the patch that position sees."""
    conv, plain = copy.deepcopy(conv).double(), copy.deepcopy(conv).double()
    x = random(3, *shape, dtype=torch.float64)
    optimizer, g = observe(conv, x)
    (layer,) = optimizer.preconditioner.layers
    groups, out = conv.groups, conv.out_channels // conv.groups
    inputs = [0.0 for _ in range(groups)]
    gradients = [0.0 for _ in range(groups)]
    positions = 0
    for jacobian, gradient in per_example(plain, x, g):
        positions += 1
        for k in range(groups):
            patch = jacobian[k * out][k * out].flatten()
            if conv.bias is not None:
                patch = torch.cat([patch, patch.new_ones(1)])
            own = gradient[k * out : (k + 1) * out]
            inputs[k] = inputs[k] + torch.outer(patch, patch)
            gradients[k] = gradients[k] + torch.outer(own, own)
    for side, expected, weight in (("right", inputs, 1 / 3), ("left", gradients, 9 / positions)):
        torch.testing.assert_close(value(layer, side), torch.stack(expected) * weight, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@each_convolution
def test_the_gradient_is_the_sum_of_what_the_rows_say(conv, shape):
    """sum_rows g x^T over the groups is the gradient of the joint weight, so rows and blocks have one order."""
    conv = copy.deepcopy(conv).double()
    x = random(3, *shape, dtype=torch.float64)
    optimizer, g = observe(conv, x)
    (layer,) = optimizer.preconditioner.layers
    inputs, gradients, examples = rows_of(conv, x, g, reduce=False)
    assert examples == 3
    if layer.joint:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    joint = conv.weight.grad.flatten(1)
    if layer.joint:
        joint = torch.cat([joint, conv.bias.grad[:, None]], 1)
    torch.testing.assert_close(gradients.mT @ inputs, layer.blocking.split(joint), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduce", [False, True])
def test_sequences(reduce):
    linear = nn.Linear(5, 4).double()
    x = random(3, 7, 5, dtype=torch.float64)
    optimizer = KFAC(
        linear.parameters(), model=linear, statistics_frequency=1, sharing="reduce" if reduce else "expand"
    )
    y = linear(x)
    y.retain_grad()
    y.square().sum().backward()
    (layer,) = optimizer.preconditioner.layers
    x = torch.cat([x, torch.ones(3, 7, 1, dtype=x.dtype)], -1)
    rows = (x.mean(1), y.grad.sum(1)) if reduce else (x.flatten(0, 1), y.grad.flatten(0, 1))
    n = 3 if reduce else 21
    for side, expected in (("right", rows[0].T @ rows[0] / n), ("left", n * rows[1].T @ rows[1])):
        torch.testing.assert_close(value(layer, side)[0], expected, rtol=1e-10, atol=1e-12)


def test_an_embedding_is_a_linear_layer_of_one_hot_inputs():
    embedding = nn.Embedding(6, 4).double()
    optimizer = KFAC(embedding.parameters(), model=embedding, statistics_frequency=1)
    x = torch.tensor([[0, 1, 1], [5, 2, 0]])
    y = embedding(x)
    y.retain_grad()
    y.square().sum().backward()
    (layer,) = optimizer.preconditioner.layers
    hot, g = F.one_hot(x.flatten(), 6).double(), y.grad.flatten(0, 1)
    for side, expected in (("left", hot.T @ hot / 6), ("right", 6 * g.T @ g)):
        torch.testing.assert_close(value(layer, side)[0], expected, rtol=1e-10, atol=1e-12)
    optimizer.step()
    assert torch.isfinite(embedding.weight).all()


# ------------------------------------------------------------------------------------------------------- hooks


def statistics(optimizer, loss_scale=1.0):
    layers = optimizer.preconditioner.layers
    return [value(layer, side, loss_scale) for layer in layers for side in ("left", "right")]


def loss(model, x):
    return model(x).square().sum() / 2 / len(x)


def fresh(**settings):
    model = mlp()
    return model, KFAC(model.parameters(), model=model, statistics_frequency=1, **settings)


X = random(8, 9, dtype=torch.float64)


def expected():
    model, optimizer = fresh()
    loss(model, X).backward()
    return statistics(optimizer)


def check(optimizer, reference=None):
    reference = expected() if reference is None else reference
    for got, exact in zip(statistics(optimizer), reference, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)


def test_accumulation_is_one_large_batch():
    model, optimizer = fresh()
    for part in X.split(4):
        (loss(model, part) / 2).backward()
    check(optimizer)


def test_passes_without_gradients_do_not_count():
    model, optimizer = fresh()
    with torch.no_grad():
        model(X)
    model(X)  # its backward pass never comes
    loss(model, X).backward()
    check(optimizer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    model, optimizer = fresh()
    x = X.clone().requires_grad_(reentrant)  # which reentrant checkpointing wants
    checkpoint(lambda x: loss(model, x), x, use_reentrant=reentrant).backward()
    check(optimizer)


def test_a_module_used_twice_in_one_graph_adds_its_uses_up():
    shared = nn.Linear(6, 6).double()
    optimizer = KFAC(shared.parameters(), model=shared, statistics_frequency=1)
    x = random(8, 6, dtype=torch.float64)
    first = shared(x)
    hidden = torch.tanh(first)
    second = shared(hidden)
    outputs = first, second
    for y in outputs:
        y.retain_grad()
    second.square().sum().backward()
    (layer,) = optimizer.preconditioner.layers
    inputs = F.pad(torch.cat([x, hidden]), (0, 1), value=1.0)
    gradients = torch.cat([y.grad for y in outputs])
    torch.testing.assert_close(value(layer, "right")[0], inputs.T @ inputs / 16)
    torch.testing.assert_close(value(layer, "left")[0], 16 * gradients.T @ gradients)


def test_in_place_activations_after_a_layer():
    model = nn.Sequential(nn.Linear(9, 12), nn.ReLU(inplace=True), nn.Linear(12, 5)).double()
    other = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    other.load_state_dict(model.state_dict())
    both = [KFAC(m.parameters(), model=m, statistics_frequency=1) for m in (model, other)]
    for m in (model, other):
        loss(m, X).backward()
    check(both[0], statistics(both[1]))


def test_a_scaled_loss():
    """Only absolute damping without grafting sees the scale, so it is tested there."""
    absolute = {"graft": False, "damping_rule": "absolute"}
    (model, optimizer), (other, scaled) = fresh(**absolute), fresh(**absolute, grad_scale=lambda: 1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaled.zero_grad()
        loss(model, X).backward()
        (1024 * loss(other, X)).backward()
        for parameter in other.parameters():
            parameter.grad /= 1024
        optimizer.step()
        scaled.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-9, atol=1e-12)
    copied = copy.deepcopy(scaled)
    with pytest.raises(ValueError, match="made with grad_scale"):
        copied.attach(other)


def test_autocast_and_bfloat16():
    model = mlp(torch.float32)
    optimizer = KFAC(model.parameters(), model=model, statistics_frequency=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, X.float()).backward()
    for got, exact in zip(statistics(optimizer), expected(), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0.1, atol=0.02 * float(exact.abs().max()))
    optimizer.step()
    half = mlp(torch.bfloat16)
    optimizer = KFAC(half.parameters(), model=half, statistics_frequency=1)
    loss(half, X.bfloat16()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in half.parameters())


def test_statistics_are_collected_only_where_they_are_due():
    model, optimizer = fresh()
    optimizer.param_groups[0]["statistics_frequency"] = 3
    collected = []
    for _ in range(6):
        optimizer.zero_grad()
        loss(model, X).backward()
        collected.append(optimizer.preconditioner.layers[0].rows)
        optimizer.step()
        assert optimizer.preconditioner.layers[0].rows == 0
    assert collected == [0, 0, 8, 0, 0, 8]


@pytest.mark.parametrize("by", ["optimizer", "model"])  # a trainer may call either
def test_zero_grad_forgets_a_step_that_was_left_out(by):
    model, optimizer = fresh()
    loss(model, 7 * X).backward()
    {"optimizer": optimizer, "model": model}[by].zero_grad()
    loss(model, X).backward()
    check(optimizer)


def test_close_removes_the_hooks_and_nothing_keeps_the_model():
    model, optimizer = fresh()
    assert all(len(m._forward_hooks) == 1 for m in model if isinstance(m, nn.Linear))
    optimizer.close()
    assert not any(m._forward_hooks for m in model)
    loss(model, X).backward()
    with pytest.raises(RuntimeError, match="attach"):
        optimizer.step()
    optimizer.attach(model)
    optimizer.step()
    hooked = list(optimizer.preconditioner.layers)
    del model
    gc.collect()
    assert all(layer.module() is None for layer in hooked)


def test_a_dropped_optimizer_leaves_deaf_hooks_that_the_next_removes():
    model, optimizer = fresh()
    layer = optimizer.preconditioner.layers[0]
    told = weakref.ref(layer)
    del optimizer, layer
    gc.collect()
    assert told() is None
    loss(model, X).backward()
    again = KFAC(model.parameters(), model=model)
    assert [len(m._forward_hooks) for m in model] == [1, 0, 1]
    again.close()


def test_a_model_that_was_compiled_before_is_noticed(caplog):
    """Its hooks never fire, and nothing would be preconditioned without a word."""
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    loss(compiled, X).backward()
    optimizer = KFAC(model.parameters(), model=model, statistics_frequency=1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(compiled, X).backward()
        optimizer.step()
    assert [r.message for r in caplog.records if "torch.compile" in r.message][1:] == []
    assert any("torch.compile" in r.message for r in caplog.records)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_a_model_that_is_compiled_after():
    torch._dynamo.reset()  # else the code that was compiled for another model of this kind, without hooks, is taken
    model, optimizer = fresh()
    compiled = torch.compile(model, backend="eager")
    loss(compiled, X).backward()
    check(optimizer)


def test_the_natural_gradient_of_least_squares():
    """With the true Fisher factors and no damping to speak of, one step of rate 1 is F^-1 times the gradient.

    y = W x + noise of covariance S has the Fisher matrix S^-1 (x) E[x x^T], exactly a Kronecker product.
    """
    model = nn.Linear(7, 4, bias=False).double()
    x = random(50, 7, dtype=torch.float64)
    target = random(50, 4, seed=1, dtype=torch.float64)
    root = random(4, 4, seed=2, dtype=torch.float64)
    precision = root @ root.T + torch.eye(4, dtype=torch.float64)
    settings = {"lr": 1.0, "base": "sgd", "graft": False, "damping": 1e-12, "bits": 32, "storage": "root"}
    optimizer = KFAC(model.parameters(), model=model, statistics_frequency=1, **settings)
    residual = model(x) - target
    ((residual @ precision) * residual).sum().div(2 * len(x)).backward()
    gradient, start = model.weight.grad.numpy().copy(), model.weight.detach().numpy().copy()
    (layer,) = optimizer.preconditioner.layers
    one = torch.ones((), dtype=torch.float64)
    layer.sums["gradients"] = (one, precision[None] / len(x))  # of which N^2 / P = N is taken
    optimizer.step()
    fisher = np.kron(precision.numpy(), (x.T @ x).numpy() / len(x))
    expected = start - np.linalg.solve(fisher, gradient.flatten()).reshape(4, 7)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6)
    least_squares = np.linalg.lstsq(x.numpy(), target.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(expected, least_squares, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_is_refused():
    model = mlp()
    with pytest.raises(TypeError, match="model is None; KFAC needs the module"):
        KFAC(model.parameters())
    norm = nn.LayerNorm(4)
    with pytest.raises(ValueError, match="no Linear, Conv"):
        KFAC(norm.parameters(), model=norm)
    with pytest.raises(ValueError, match=r"shape \(3, 2\) is not one of the model's"):
        KFAC([*model.parameters(), nn.Parameter(torch.zeros(3, 2))], model=model)
    with pytest.raises(ValueError, match="sharing is 'both'"):
        KFAC(model.parameters(), model=model, sharing="both")
    with pytest.raises(ValueError, match="damping is 0"):
        KFAC(model.parameters(), model=model, damping=0.0)
    with pytest.raises(ValueError, match="damping_rule is 'pi'"):
        AdaBK(model.parameters(), model=model, damping_rule="pi")
    assert not any(m._forward_hooks for m in model)


@pytest.mark.parametrize("spoil", ["unused", "empty batch", "nan activations", "nan gradients"])
def test_a_layer_without_statistics_is_skipped_and_counted(spoil):
    model, optimizer = fresh(min_quant_size=0)
    loss(model, X).backward()
    optimizer.step()
    weight = model[0].weight
    before = {k: v.clone() for k, v in optimizer.state[weight].items() if k.startswith(("left", "right"))}
    optimizer.zero_grad(set_to_none=False)
    if spoil == "unused":
        model[2](random(8, 12, dtype=torch.float64)).square().sum().backward()
    elif spoil == "empty batch":
        model(X[:0]).sum().backward()
    elif spoil == "nan activations":
        model(torch.where(torch.arange(9) == 3, torch.nan, X)).sum().backward()
    else:
        (model(X) * torch.nan).sum().backward()
    optimizer.step()
    state = optimizer.state[weight]
    assert state["left.failures"].item() + state["right.failures"].item() >= 1
    for key, value in before.items():
        if key.startswith("right" if spoil == "nan activations" else "left") and not key.endswith("failures"):
            assert same(state[key], value), key
    optimizer.zero_grad()
    loss(model, X).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.vocabulary = nn.Embedding(3000, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, groups=4)
        self.tied = nn.Linear(8, 20)
        self.tied.weight = self.embed.weight
        self.frozen = nn.Linear(8, 4)
        self.head = nn.Linear(8, 3)


def test_the_report():
    model = Mixed()
    left_out = {model.frozen.weight, model.frozen.bias}
    optimizer = KFAC([p for p in model.parameters() if p not in left_out], model=model)
    report = optimizer.treatments()
    assert report.keys() == {name for name, _ in model.named_parameters()} | {"tied.weight"}
    assert report["head.weight"] == "KFAC: 3 x 9, root, uncoded"
    assert report["conv.weight"] == "KFAC: 4 blocks of 2 x 7, root, uncoded"
    assert report["head.bias"] == "a column of the weight"
    assert "tied" in report["embed.weight"]
    assert "too large" in report["vocabulary.weight"]
    assert "code of its own" in report["attention.out_proj.weight"]
    assert report["frozen.weight"] == "no parameter of this optimizer"
    assert "no layer" in report["norm.weight"]


def test_a_weight_and_its_bias_keep_their_norm_together():
    model, optimizer = fresh()
    loss(model, X).backward()
    before = [torch.cat([m.weight.grad.flatten(), m.bias.grad]).norm() for m in (model[0], model[2])]
    optimizer.step()
    after = [torch.cat([m.weight.grad.flatten(), m.bias.grad]).norm() for m in (model[0], model[2])]
    torch.testing.assert_close(after, before)


def test_keyword_inputs_and_the_hooks_of_others():
    """Seen is what the module itself computes, whatever hooks make of it."""
    model, optimizer = fresh()
    model[0].register_forward_hook(lambda module, inputs, output: 10 * output)
    model[0].register_forward_hook(lambda module, inputs, output: (output, None))
    hidden, _ = model[0](input=X)
    (model[2](torch.tanh(hidden / 10)).square().sum() / 2 / len(X)).backward()
    check(optimizer)


def test_saved_inputs_are_freed_with_the_graph():
    model, _ = fresh()
    hidden = model[1](model[0](X))
    kept = weakref.ref(hidden)
    total = model[2](hidden).sum()
    del hidden
    total.backward()
    gc.collect()
    assert kept() is None


def test_two_backward_passes_through_one_graph():
    model, optimizer = fresh()
    total = loss(model, X) / 2
    total.backward(retain_graph=True)
    total.backward()
    # Twice the rows of half the loss: the gradients of one pass are those of the loss over two batches.
    check(optimizer)


def test_function_transforms_are_let_alone():
    model, optimizer = fresh()
    own = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda own: torch.func.functional_call(model, own, (X,)).sum())(own)
    assert not optimizer.preconditioner.layers[0].rows


def test_a_bias_joins_its_weight_only_where_it_is_trained_alike():
    model = mlp()
    groups = [{"params": [model[0].weight, model[2].weight, model[2].bias]}]
    groups += [{"params": [model[0].bias], "precondition": False}]
    optimizer = KFAC(groups, model=model, statistics_frequency=1, base="sgd")
    loss(model, X).backward()
    before = model[0].bias.grad.clone()
    optimizer.step()
    assert same(model[0].bias.grad, before)
    assert [layer.joint for layer in optimizer.preconditioner.layers] == [False, True]

    frozen = mlp()
    frozen[0].bias.requires_grad_(False)
    frozen[2].bias = nn.Parameter(frozen[2].bias.detach())
    tied = nn.Sequential(frozen[0], frozen[2], nn.Linear(5, 5).double())
    tied[2].bias = tied[1].bias
    optimizer = KFAC(tied.parameters(), model=tied)
    assert [layer.joint for layer in optimizer.preconditioner.layers] == [False, False, False]


def test_a_bias_that_comes_later_stays_with_the_base():
    model = mlp()
    optimizer = KFAC([model[0].weight, model[2].weight], model=model, statistics_frequency=1)
    loss(model, X).backward()
    optimizer.step()
    optimizer.add_param_group({"params": [model[0].bias, model[2].bias]})
    optimizer.zero_grad()
    loss(model, X).backward()
    optimizer.step()
    assert [layer.joint for layer in optimizer.preconditioner.layers] == [False, False]
    with pytest.raises(ValueError, match=r"shape \(3,\) is not one of the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize("storage", ["root", "logarithm", "spiked"])
@pytest.mark.parametrize("bits", [16, 4, 2])
def test_a_loss_that_was_tiny_does_not_stop_updates_for_good(storage, bits):
    """Beside absolute damping nothing of its factor is left, and none of it is needed."""
    model, optimizer = fresh(damping_rule="absolute", bits=bits, storage=storage, min_quant_size=0)
    for step in range(20):
        optimizer.zero_grad()
        ((1e-9 if step < 10 else 1.0) * loss(model, X + step)).backward()
        optimizer.step()
    assert not optimizer.state[model[0].weight]["left.failures"].item()
    statistic = optimizer.preconditioner.form(optimizer.param_groups[0], 12)
    state = {k.removeprefix("left."): v for k, v in optimizer.state[model[0].weight].items() if k.startswith("left.")}
    assert float(statistic.mean_eigenvalue(state, torch.float64)) > 1e-6


def test_a_factor_without_a_statistic_keeps_its_damping():
    model, optimizer = fresh(damping_rule="absolute", bits=32, storage="root", base="sgd", lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, X).backward()
        optimizer.step()
    before = optimizer.state[model[0].weight]["left.root"].clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["left.root"], before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_layer_is_left_alone():
    model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 3), nn.Linear(3, 2))
    optimizer = KFAC(model.parameters(), model=model, statistics_frequency=1)
    model(random(8, 6)).sum().backward()
    optimizer.step()
    assert optimizer.treatments()["0.weight"] == "its weight is empty"


@pytest.mark.parametrize("made", [KFAC, AdaBK])
@pytest.mark.parametrize("key", ["model", "sharing", "grad_scale"])
def test_settings_of_the_whole_optimizer_in_a_group(made, key):
    model = mlp()
    with pytest.raises(ValueError, match=rf"'{key}'.*whole optimizer.*{made.__name__}\("):
        made([{"params": model.parameters(), key: "reduce"}], model=model)
    optimizer = made(model[0].parameters(), model=model)
    with pytest.raises(ValueError, match=f"'{key}'"):
        optimizer.add_param_group({"params": model[2].parameters(), key: "reduce"})
    assert len(optimizer.param_groups) == 1


def test_a_closed_optimizer_can_still_be_saved():
    model, optimizer = fresh()
    loss(model, X).backward()
    optimizer.step()
    codecs, state = optimizer.state_codecs(), optimizer.state_dict()
    optimizer.close()
    assert optimizer.state_codecs() == codecs
    assert same(optimizer.state_dict()["state"], state["state"])
    copied = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"call attach\(model\) before loading"):
        copied.load_state_dict(state)
