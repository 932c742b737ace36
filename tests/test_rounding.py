"""Adaptive rounding: codes of a whole matrix chosen together, against the equations and against the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowbit_optim import Quantization, Shampoo, kernels
from lowbit_optim.kernels import rounding
from lowbit_optim.kernels.reference import lower
from lowbit_optim.storage.blockwise import SWEEPS
from lowbit_optim.storage.budget import form
from lowbit_optim.storage.codebooks import codebook, table
from lowbit_optim.storage.root import Logarithm
from lowbit_optim.storage.symmetric import Symmetric

HOWS = [
    Quantization(4, "nf", 64, double=True, scale="fitted", rounding="adaptive"),
    Quantization(3, "nf", 16, double=True, scale="fitted", rounding="adaptive"),
    Quantization(2, "nf", 32, scale="fitted", rounding="adaptive"),
    Quantization(4, "linear-2", 64, rounding="adaptive"),
]
each_way = pytest.mark.parametrize("how", HOWS, ids=lambda q: f"{q.codebook}-{q.bits}-{q.block_size}")


def spectrum(kind, n):
    if kind == "log-spaced":
        return np.logspace(0, -5, n)
    if kind == "power law":
        return np.arange(1, n + 1.0) ** -2
    return np.r_[np.full(n // 8, 1.0), np.full(n - n // 8, 1e-4)]


def statistic(kind, n, k=1, seed=0):
    """[k, n, n] of a known spectrum, float64."""
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(k)]
    return np.stack([(u * spectrum(kind, n)) @ u.T for u in bases])


def power(a, exponent):
    values, vectors = np.linalg.eigh(a)
    return (vectors * np.maximum(values, 0) ** exponent) @ vectors.T


def weighed(error, weight):
    return np.trace(error @ weight @ error)


def both(x, weight, how):
    """What nearest and adaptive rounding make of x, float64, and the parts of both."""
    x, weight = torch.from_numpy(x).float(), torch.from_numpy(weight).float()
    kept = Symmetric(how)
    parts = [kept.encode(x), kept.encode(x, weight)]
    return [kept.decode(p).double().numpy() for p in parts], parts


# ---- what it is for ------------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("kind", ["log-spaced", "power law", "spiked"])
def test_the_weighed_error_falls(how, kind):
    a = statistic(kind, 96)[0]
    x, weight = power(a, -0.25), power(a, 0.5)
    (nearest, adaptive), parts = both(x[None], weight[None], how)
    before, after = (weighed(q[0] - x, weight) for q in (nearest, adaptive))
    assert after < 0.7 * before
    assert torch.equal(parts[0]["diagonal"], parts[1]["diagonal"])
    assert torch.equal(parts[0]["scales"], parts[1]["scales"])  # only codes are others


@pytest.mark.parametrize("bits", [2, 1.5, 1])
@pytest.mark.parametrize("kind", ["log-spaced", "power law", "spiked"])
def test_gradients_come_out_nearer(bits, kind):
    """1 - cos of X G with the exact one, for gradients of covariance A, is at most 0.7 of what nearest codes leave."""
    a = statistic(kind, 96)[0]
    gradient = power(a, 0.5) @ np.random.default_rng(1).standard_normal((96, 400))
    exact = power(a, -0.25) @ gradient
    off = []
    for rounding_ in ("nearest", "adaptive"):
        how = Quantization({2: 4, 1.5: 3, 1: 2}[bits], "nf", 64, double=True, scale="fitted", rounding=rounding_)
        factor = form("root", bits, how, "triangle", True, eps=1e-6, power=4)
        root = factor.root(factor.holding(torch.from_numpy(a)[None].float()), torch.float64)[0].numpy()
        came = root @ gradient
        off.append(1 - np.sum(came * exact) / np.linalg.norm(came) / np.linalg.norm(exact))
    assert off[1] < 0.7 * off[0]


def test_every_code_is_the_best_while_the_others_stay():
    """After enough sweeps no single code can be changed for less tr(E W E), by the equation, in float64."""
    n, how = 24, HOWS[1]
    a = statistic("power law", n)[0]
    x, weight = power(a, -0.25), power(a, 0.5)
    kept, single = Symmetric(how), torch.float32
    start = kept.encode(torch.from_numpy(x)[None].float())
    tables = table(how.codebook, how.bits, single, torch.device("cpu"))
    numbers = (torch.from_numpy(m)[None].float() for m in (x, weight))
    codes = kernels.round_triangles(
        *numbers, start["codes"], start["scales"], start["scale_maxima"], *tables, how.bits, how.block_size, 50
    )
    q = kept.decode(start | {"codes": codes})[0].double().numpy()
    levels = np.asarray(codebook(how.codebook, how.bits).tolist())
    every = [kept.decode(start | {"codes": torch.full_like(codes, c)})[0] for c in (0, 255)]
    scales = (every[1] - every[0]).double().numpy() / (levels[-1] - levels[0])
    best = weighed(q - x, weight)
    for i in range(n):
        for j in range(i):
            for level in levels:
                other = q.copy()
                other[i, j] = other[j, i] = level * scales[i, j]
                assert weighed(other - x, weight) > best * (1 - 1e-5)


def test_statistics_that_do_not_change_keep_their_codes():
    factor = form("root", 2, None, "triangle", True, eps=1e-6, power=4)
    m = torch.from_numpy(statistic("power law", 80)).float()
    state = factor.holding(m)
    for _ in range(5):  # towards what was read itself
        state = factor.update(state, factor.statistic(state, torch.float32), torch.ones(1))
    again = factor.update(state, factor.statistic(state, torch.float32), torch.ones(1))
    assert (again["root.codes"] != state["root.codes"]).float().mean() < 0.02


# ---- the same bits everywhere --------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("n", [1, 2, 17, 45])
def test_numba_chooses_the_codes_of_the_reference(how, n, monkeypatch):
    a = statistic("log-spaced", n, k=3)
    x, weight = torch.from_numpy(np.stack([power(m, -0.25) for m in a])).float(), torch.from_numpy(a).float()
    x[1] = torch.eye(n)  # blocks of scale 0
    weight[2, : n // 2] = weight[2, :, : n // 2] = 0  # dead units
    found = [how.encode_symmetric(x, "triangle", weight)]
    monkeypatch.setattr(kernels, "forced", lambda: "reference")
    found.append(how.encode_symmetric(x, "triangle", weight))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_a_matrix_is_rounded_alike_in_any_stack():
    x, weight = (
        torch.from_numpy(np.stack([power(m, e) for m in statistic("power law", 48, k=5)])).float() for e in (-0.25, 0.5)
    )
    together = HOWS[0].encode_symmetric(x, "triangle", weight)["codes"]
    alone = [HOWS[0].encode_symmetric(x[i : i + 1], "triangle", weight[i : i + 1])["codes"] for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_the_reference_follows_the_rule():
    """One sweep, written out from the equation in numpy's float32."""
    n, how = 11, HOWS[3]
    a = statistic("power law", n)[0]
    x, w = (power(a, e).astype(np.float32) for e in (-0.25, 0.5))
    w = (w + w.T) / 2
    values, boundaries = table(how.codebook, how.bits, torch.float32, torch.device("cpu"))
    below = [(i, j) for i in range(n) for j in range(i)]
    rows = np.array([x[i, j] for i, j in below])
    scales = np.abs(rows).max(keepdims=True)
    levels = values.numpy()
    codes = np.abs(levels[None] - (rows / scales)[:, None]).argmin(1)
    kept = levels[codes] * scales
    start = [torch.from_numpy(np.asarray(part)[None]) for part in (codes.astype(np.uint8), kept, scales)]
    r = rounding.residual(torch.from_numpy(x)[None], start[1], torch.from_numpy(w)[None])
    expected, q = r[0].numpy().copy(), kept.copy()
    for place, (i, j) in enumerate(below):
        best = q[place] - (expected[i, j] + expected[j, i]) / (w[i, i] + w[j, j])
        new = levels[(best / scales[0] > boundaries.numpy()).sum()] * scales[0]
        expected[i] += (new - q[place]) * w[j]
        expected[j] += (new - q[place]) * w[i]
        q[place] = new
    rounding.descend(*start, r, torch.from_numpy(w)[None], values, boundaries, 64, 1)
    assert np.array_equal(start[1][0].numpy(), q)
    assert np.array_equal(levels[start[0][0].numpy()] * scales, q)
    error = np.zeros((n, n))
    error[tuple(zip(*below, strict=True))] = q - rows
    assert np.allclose((error + error.T) @ w, r[0].numpy(), atol=1e-5)  # R is still E W
    assert lower(n, torch.device("cpu")).tolist() == [i * n + j for i, j in below]


@pytest.mark.filterwarnings("ignore")
def test_the_operator_keeps_its_promises():
    how = HOWS[0]
    x = torch.from_numpy(statistic("power law", 20, k=2)).float()
    coded = kernels.quantize_symmetric(x, *how._how(x), "triangle")
    tables = table(how.codebook, how.bits, torch.float32, torch.device("cpu"))
    arguments = (x, x, *coded, *tables, how.bits, how.block_size, SWEEPS)
    torch.library.opcheck(kernels._round_triangles, arguments, test_utils=("test_schema", "test_faketensor"))


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, 70])
def test_what_is_not_finite_is_not_kept(n):
    factor = form("root", 2, None, "triangle", True, eps=1e-6, power=4)
    state = factor.holding(torch.from_numpy(statistic("power law", n)).float())
    after = factor.update(state, torch.full((1, n, n), torch.nan), torch.ones(1))
    assert torch.equal(after["root.codes"], state["root.codes"])
    assert after["failures"].item() == 1


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"storage": "logarithm"}, "storage 'logarithm' in layout 'triangle' cannot round adaptively"),
        ({"storage": "eigen"}, "take rounding='nearest', or storage='root' in triangles"),
        ({"layout": "square"}, "storage 'root' in layout 'square' cannot round adaptively"),
    ],
)
def test_other_forms_refuse(keywords, said):
    model = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match=said):
        Shampoo(model.parameters(), quantization=HOWS[0], **keywords)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="unknown rounding 'up'; the roundings are nearest, adaptive"):
        Quantization(rounding="up")


def test_what_is_the_default():
    for bits in (4, 3, 2, 1.5, 1):
        codec = form("root", bits, None, "triangle", True).codec.codec
        assert (codec.rounding == "adaptive") == (bits == 2)
        assert form("logarithm", bits, None, "triangle", True).codec.codec.rounding == "nearest"
    assert form("root", 4, None, "square", True).codec.codec.rounding == "nearest"


def test_a_state_of_before_loads():
    """Codes that are given had five fields, and were the nearest."""
    how = Quantization(4, "nf", 64, double=True, scale="fitted")
    optimizer = Shampoo(torch.nn.Linear(64, 64).parameters(), quantization=how)
    optimizer.init_state()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        assert group["quantization"] == (4, "nf", 64, True, "fitted", "nearest")
        group["quantization"] = group["quantization"][:5]
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(optimizer.state_dict())
    other = Shampoo(torch.nn.Linear(64, 64).parameters(), quantization=HOWS[1])
    with pytest.raises(ValueError, match="Load it into an optimizer with the quantization that it has"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finer_codes_and_wider_numbers(bits, dtype):
    how = Quantization(bits, "linear", 32, double=True, rounding="adaptive")
    a = statistic("power law", 50, k=2)
    x, weight = (torch.from_numpy(np.stack([power(m, e) for m in a])).to(dtype) for e in (-0.25, 0.5))
    nearest, adaptive = (Symmetric(how).encode(x, w) for w in (None, weight))
    errors = [
        weighed(Symmetric(how).decode(p)[0].double().numpy() - x[0].double().numpy(), weight[0].double().numpy())
        for p in (nearest, adaptive)
    ]
    assert errors[1] < 0.8 * errors[0]
    assert not len(how.encode_symmetric(x[:0], "triangle", weight[:0])["codes"])


def test_autocast_does_not_reach_the_codes():
    x, weight = (torch.from_numpy(power(statistic("power law", 40)[0], e))[None].float() for e in (-0.25, 0.5))
    expected = HOWS[0].encode_symmetric(x, "triangle", weight)["codes"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(HOWS[0].encode_symmetric(x, "triangle", weight)["codes"], expected)


def test_a_logarithm_is_rounded_number_by_number():
    a = torch.from_numpy(statistic("power law", 70)).float()
    nearest, adaptive = (
        Logarithm(codec=Symmetric(replace(HOWS[0], rounding=rounding_)), power=4, eps=1e-6).holding(a)
        for rounding_ in ("nearest", "adaptive")
    )
    assert torch.equal(nearest["logarithm.codes"], adaptive["logarithm.codes"])
