"""EKFAC against its equations in float64, and what it keeps."""

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_optim import EKFAC, load_checkpoint, save_checkpoint
from lowbit_optim.storage.moment import Moment
from tests.contract import net, random, same, same_models, train
from tests.test_kfac import batches, matrices, mlp, perceptron

# ------------------------------------------------------------------------------------------------ trajectories


def oracle(weights, data, *, damping, beta, T1, T2, lr, graft):
    """W <- W - lr G~, by matrices of the order of the whole weight: U = Q_L (x) Q_R, m = average of (U^T vec G)^2.

    When U turns, m becomes the diagonal of U_new^T (U diag(m) U^T) U_new.
    """
    weights = [w.copy() for w in weights]
    means, moments = [None for _ in weights], [np.zeros(w.size) for w in weights]
    bases, turned, history = [np.eye(w.size) for w in weights], False, []
    for t, (x, y) in enumerate(data, 1):
        for i, (a, g) in enumerate(perceptron(weights, x, y)):
            gradient = g.T @ a
            if t % T1 == 0:
                share = (1 - beta) / (1 - beta ** (t // T1))
                new = len(a) * g.T @ g, a.T @ a / len(a)
                means[i] = new if t == T1 else [(1 - share) * m + share * n for m, n in zip(means[i], new, strict=True)]
            if t % T2 == 0:
                turned = True
                old, bases[i] = bases[i], np.kron(*(np.linalg.eigh(m)[1] for m in means[i]))
                moments[i] = np.diag(bases[i].T @ (old * moments[i]) @ old.T @ bases[i])
            inside = bases[i].T @ gradient.flatten()
            share = (1 - beta) / (1 - beta**t)
            moments[i] = (1 - share) * moments[i] + share * inside**2
            step = gradient
            if turned:
                divided = inside / (moments[i] + damping * moments[i].max())
                step = (bases[i] @ divided).reshape(gradient.shape)
            if graft:
                step = step * np.linalg.norm(gradient) / np.linalg.norm(step)
            weights[i] = weights[i] - lr * step
        history.append([w.copy() for w in weights])
    return history


def deviations(dtype, graft, **settings):
    """At each step how far each weight is from the oracle's, relative to how far that has come."""
    model, data = mlp(dtype), batches(20)
    shared = {"damping": 0.01, "lr": 0.02 if graft else 1e-4, "graft": graft}
    periods = {"statistics_frequency": 2, "precondition_frequency": 4}
    optimizer = EKFAC(model.parameters(), model=model, base="sgd", **shared, **periods, **settings)
    start = matrices(model)
    arrays = [(x.numpy(), y.numpy()) for x, y in data]
    expected = oracle(start, arrays, beta=0.9, T1=2, T2=4, **shared)
    found = []
    for (x, y), reference in zip(data, expected, strict=True):
        optimizer.zero_grad()
        ((model(x.to(dtype)) - y.to(dtype)).square().sum() / 2 / len(x)).backward()
        optimizer.step()
        triples = zip(matrices(model), reference, start, strict=True)
        found.append([np.linalg.norm(w - exact) / np.linalg.norm(exact - first) for w, exact, first in triples])
    return np.array(found)


@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_32_bits_follow_the_equations(dtype, limit, graft):
    assert deviations(dtype, graft, bits=32).max() < limit


# Measured, and half more.
@pytest.mark.parametrize(
    ("bits", "basis", "limit"),
    [(8, "reflector", 0.017), (4, "reflector", 0.06), (4, "eigen", 0.3), (2, "reflector", 0.6)],
)
def test_low_bits_stay_near(bits, basis, limit):
    last = deviations(torch.float64, True, bits=bits, basis=basis, min_quant_size=0)[-1]
    assert last.max() < limit


def test_the_natural_gradient_of_exact_factors():
    """Of gradients whose covariance is the Kronecker product of the factors m is its eigenvalues, and G^ = F^-1 G."""
    model = nn.Linear(5, 3, bias=False).double()
    x = random(40, 5, dtype=torch.float64)
    root = random(3, 3, seed=2, dtype=torch.float64)
    precision = root @ root.T + torch.eye(3, dtype=torch.float64)
    fisher = np.kron(precision.numpy(), (x.T @ x).numpy() / len(x))
    values, vectors = np.linalg.eigh(fisher)
    settings = {"statistics_frequency": 1, "factor_decay": 1 - 1e-9, "damping": 1e-9, "graft": False, "bits": 32}
    optimizer = EKFAC(model.parameters(), model=model, base="sgd", lr=0.0, **settings)
    (layer,) = optimizer.preconditioner.layers
    for value, vector in zip(values, vectors.T, strict=True):
        model(x).sum().backward()
        layer.sums["gradients"] = (torch.ones((), dtype=torch.float64), precision[None] / len(x))
        gradient = np.sqrt(len(values) * value) * vector
        model.weight.grad = torch.tensor(gradient).reshape(3, 5)
        optimizer.step()
    moment = optimizer.state[model.weight]["moment.rms"].square()
    np.testing.assert_allclose(np.sort(moment.flatten().numpy()), values, rtol=1e-6)
    np.testing.assert_allclose(model.weight.grad.flatten().numpy(), np.linalg.solve(fisher, gradient), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- turns


def step(model, optimizer, seed, scale=1.0):
    """The gradients of one step before and after."""
    optimizer.zero_grad()
    (scale * model(random(16, 9, seed=seed, dtype=model[0].weight.dtype)).square().mean()).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return before, [p.grad for p in model.parameters()]


def test_the_base_runs_alone_until_there_are_bases():
    model = mlp(torch.float32)
    optimizer = EKFAC(model.parameters(), model=model, statistics_frequency=2, precondition_frequency=4)
    for seed in range(6):
        before, after = step(model, optimizer, seed)
        if seed < 3:
            torch.testing.assert_close(after, before, rtol=1e-5, atol=0.0)
        else:
            assert not any(torch.allclose(a, b) for a, b in zip(after, before, strict=True))


def test_a_layer_that_saw_nothing_is_left_to_the_base():
    model = mlp()
    optimizer = EKFAC(model.parameters(), model=model, statistics_frequency=1)
    for seed in range(3):
        optimizer.zero_grad()
        given = [random(*p.shape, seed=seed, dtype=p.dtype) for p in model.parameters()]
        for parameter, gradient in zip(model.parameters(), given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close([p.grad for p in model.parameters()], given)
    assert optimizer.state[model[0].weight]["left.failures"].item() == 3
    before, after = step(model, optimizer, 3)
    assert not any(torch.allclose(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("power", [50, -50, 100, -100])
@pytest.mark.parametrize("graft", [True, False])
def test_the_scale_of_gradients_means_nothing(power, graft):
    """With grafting the result is proportional to it, without to its inverse, while the statistics fit in float32."""
    after = []
    for scale in (1.0, 2.0**power):
        model = mlp(torch.float32)
        settings = {"statistics_frequency": 1, "graft": graft, "min_quant_size": 0}
        optimizer = EKFAC(model.parameters(), model=model, base="sgd", lr=0.0, **settings)
        for seed in range(4):
            _, grads = step(model, optimizer, seed, scale)
        after.append(torch.cat([grad.double().flatten() * (1 / scale if graft else scale) for grad in grads]))
    assert torch.isfinite(after[1]).all()
    if abs(power) < 60:
        assert (after[1] - after[0]).norm() < 1e-2 * after[0].norm()


def test_blocks_of_groups_and_layers_do_not_meet():
    """The same whether all blocks of a shape are worked on at once or one by one."""
    found = []
    for workspace in (1, 2**28):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Conv1d(6, 6, 3, padding=1, groups=groups) for groups in (3, 1, 3))).double()
        optimizer = EKFAC(model.parameters(), model=model, statistics_frequency=2, workspace=workspace, lr=0.01)
        for seed in range(5):
            optimizer.zero_grad()
            model(random(4, 6, 7, seed=seed, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        assert optimizer.state[model[0].weight]["moment.rms"].shape == (3, 2, 7)
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_moment_that_turns_keeps_its_sum():
    moment = Moment(decay=0.9, damping=0.1)
    state = moment.init(2, 6, 4, torch.float64, "cpu")
    magnitude = torch.tensor([1e-200, 1e200], dtype=torch.float64)
    state = moment.update(state, random(2, 6, 4, dtype=torch.float64), magnitude)
    left, right = (torch.linalg.qr(random(2, n, n, seed=n, dtype=torch.float64)).Q for n in (6, 4))
    turned = moment.turn(state, left, right)
    before, after = (s["rms"] / magnitude[:, None, None] for s in (state, turned))
    torch.testing.assert_close(after.square().sum((1, 2)), before.square().sum((1, 2)))
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_group_that_wakes_up_late_counts_as_much_as_the_others(scale):
    """It has no bases before the next turn, but gradients in the same units, for all share one norm."""
    conv = nn.Conv1d(4, 4, 3, groups=2).double()
    optimizer = EKFAC(conv.parameters(), model=conv, base="sgd", lr=0.0, statistics_frequency=2)
    for seed in range(3):
        x = random(8, 4, 9, seed=seed, dtype=torch.float64)
        x[:, 2:] *= seed == 2  # the second group is dead until the bases have turned
        optimizer.zero_grad()
        (scale * conv(x)[:, : 2 if seed < 2 else 4].square().mean()).backward()
        optimizer.step()
    first, second = (conv.weight.grad[i : i + 2].norm() for i in (0, 2))
    assert 0.02 < first / second < 50


def test_a_decomposition_that_fails_makes_no_bases(monkeypatch):
    def fails(a):
        raise torch.linalg.LinAlgError("injected")

    model = mlp(torch.float32)
    optimizer = EKFAC(model.parameters(), model=model, bits=32, statistics_frequency=2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        for seed in range(2):
            before, after = step(model, optimizer, seed)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0.0)
    state = optimizer.state[model[0].weight]
    assert (state["left.failures"].item(), state["left.turns"].item()) == (1, 0)
    for seed in range(2):
        before, after = step(model, optimizer, seed)
    assert state["left.turns"].item() == optimizer.state[model[0].weight]["left.turns"].item() == 1
    assert not any(torch.allclose(a, b) for a, b in zip(after, before, strict=True))


def test_no_damping_to_speak_of():
    """Dead units have a moment of zero, and so has what they are divided by."""
    model = mlp(torch.float32)
    with torch.no_grad():
        model[0].bias[:5] = -1e6
    optimizer = EKFAC(model.parameters(), model=model, statistics_frequency=1, damping=1e-50)
    for seed in range(4):
        step(model, optimizer, seed)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(("settings", "limit"), [({}, 2.1), ({"basis": "eigen"}, 2.1), ({"bits": 32}, 16.01)])
def test_bytes_of_the_state(settings, limit):
    """Per parameter of a 1024 x 1024 matrix, the moment's four apart."""
    model = nn.Linear(1024, 1024, bias=False)
    optimizer = EKFAC(model.parameters(), model=model, **settings)
    optimizer.init_state()
    size = {"left": 0.0, "right": 0.0, "moment": 0.0, "step": 0.0, "nonfinite": 0.0}
    for key, part in optimizer.state[model.weight].items():
        size[key.partition(".")[0]] += part.nbytes / model.weight.numel()
    assert size["moment"] == pytest.approx(4, rel=1e-4)
    assert 0.98 * limit - 0.1 < size["left"] + size["right"] < limit


def test_a_checkpoint_resumes_to_the_last_bit(tmp_path):
    def make(seed):
        model = net(seed=seed)
        settings = {"min_quant_size": 256, "statistics_frequency": 2, "precondition_frequency": 4}
        return model, EKFAC(model.parameters(), model=model, **settings)

    model, optimizer = make(0)
    train(model, optimizer, range(5))
    save_checkpoint(tmp_path, model=model, optimizer=optimizer)
    other, resumed = make(1)
    load_checkpoint(tmp_path, model=other, optimizer=resumed)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(5, 10))
    assert same_models(model, other)
    assert same(optimizer.state_dict(), resumed.state_dict())


def test_what_cannot_be_is_refused():
    model = mlp()
    with pytest.raises(TypeError, match="model is None; EKFAC needs the module"):
        EKFAC(model.parameters())
    with pytest.raises(ValueError, match="'svd'"):
        EKFAC(model.parameters(), model=model, basis="svd")
    with pytest.raises(ValueError, match=r"basis 'eigen' cannot have 2 bits.*'reflector'"):
        EKFAC(model.parameters(), model=model, basis="eigen", bits=2)
    with pytest.raises(ValueError, match="damping is 0"):
        EKFAC(model.parameters(), model=model, damping=0)
    with pytest.raises(ValueError, match="sharing is 'both'"):
        EKFAC(model.parameters(), model=model, sharing="both")
    with pytest.raises(TypeError, match="root_power"):
        EKFAC(model.parameters(), model=model, root_power=2)
    assert not any(m._forward_hooks for m in model)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-30, 1e30])
def test_parameters_stay_finite_at_any_scale_of_the_gradient(scale):
    model = nn.Linear(20, 12)
    optimizer = EKFAC(model.parameters(), lr=0.1, model=model, base="sgd", statistics_frequency=2)
    for seed in range(6):
        optimizer.zero_grad()
        model(random(16, 20, seed=seed)).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad *= scale
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
