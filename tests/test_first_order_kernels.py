"""The first-order steps: their specification against its own words, and every backend against the specification."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit_optim import kernels
from lowbit_optim.kernels import cpu, cpu_steps, first_order
from lowbit_optim.kernels.first_order import (
    BLOCK,
    FRACTION,
    LINES,
    Moment,
    Step,
    code_values,
    decode,
    encode_signed,
    encode_unsigned,
    keys,
    largest,
    random_bits,
    shifted,
    write_parameter,
    zeros,
)
from lowbit_optim.kernels.reference import unpack

BACKENDS = {"cpu": cpu_steps}
SETTINGS = {
    "adamw": {
        "beta1": 0.9,
        "beta2": 0.999,
        "decay": 1 - 1e-4,
        "step_size": 1e-2,
        "root_correction": 1.3,
        "eps": 1e-8,
        "feedback": 9.0,
    },
    "sgd": {"weight_decay": 0.01, "momentum": 0.9, "share": 1.0, "nesterov": False, "lr": 0.1, "feedback": 9.0},
    "adagrad": {"weight_decay": 0.01, "step_size": 0.1, "eps": 1e-10},
}
KINDS = {"adamw": ("signed", "unsigned"), "sgd": ("signed",), "adagrad": ("unsigned",)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = [("signed", 4), ("signed", 8), ("unsigned", 4), ("unsigned", 8)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def of_any_magnitude(*shape, seed=0, low=-38.0, high=38.0):
    """Numbers of magnitudes from 10^low to 10^high, evenly spread on a logarithmic scale."""
    exponents = torch.rand(shape, generator=generator(seed), dtype=torch.float64) * (high - low) + low
    return (10.0**exponents * normal(*shape, seed=seed + 1).sign()).float()


def ordinary(rows, n, seed):
    return normal(rows, n, seed=seed)


def nasty(rows, n, seed):
    """Every magnitude, blocks of zeros, subnormals, both zeros, and numbers that are not finite."""
    x = of_any_magnitude(rows, n, seed=seed)
    x[seed % rows, : BLOCK + 7] = 0.0
    x[(seed + 1) % rows, :BLOCK] = of_any_magnitude(min(n, BLOCK), seed=seed, low=-45, high=-38)
    chosen = torch.rand(rows, n, generator=generator(seed))
    for i, value in enumerate([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38, -3.4e38]):
        x[(chosen > 0.01 * i) & (chosen < 0.01 * (i + 1))] = value
    return x


def tiny(rows, n, seed):
    """Around the smallest numbers that there are, where scales underflow."""
    return of_any_magnitude(rows, n, seed=seed, low=-45, high=-36)


def steps_of(rule, dtype, bits, rows, n, numbers, count=3, settings=None, gradient_dtype=None, seed=1):
    """Batches of one Step each, all of the same parameter and moments."""
    x = normal(rows, n, seed=seed) if numbers is ordinary else of_any_magnitude(rows, n, seed=seed, low=-30, high=4)
    parameter = x.to(dtype)
    moments = tuple(zeros(rows, n, bits, "cpu") for _ in KINDS[rule])
    settings = {"sign": 1.0, "stochastic": True} | SETTINGS[rule] | (settings or {})
    gradients = [numbers(rows, n, seed + 10 * t).to(gradient_dtype or dtype) for t in range(count)]
    return [
        Step(rule, parameter, gradient, moments, keys(3, seed, t), settings) for t, gradient in enumerate(gradients, 1)
    ]


def tensors(step):
    """What a step writes, by name."""
    named = {"parameter": step.parameter}
    for i, moment in enumerate(step.moments):
        named |= {f"{name} {i}": x for name, x in moment._asdict().items() if isinstance(x, torch.Tensor)}
    return named


def copied(step):
    """The step on tensors of its own."""
    moments = [Moment(m.bits, *(None if x is None else x.clone() for x in m[1:])) for m in step.moments]
    return step._replace(parameter=step.parameter.clone(), moments=tuple(moments))


def assert_same_bits(one, other, said=""):
    """The same bits, but for those of numbers that are none."""
    assert one.dtype == other.dtype, said
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
    same = one.view(as_bits) == other.view(as_bits)
    if one.is_floating_point():
        same |= one.isnan() & other.isnan()
    assert bool(same.all()), f"{said}: {int((~same).sum())} of {same.numel()} differ"


def assert_agree(backend, steps):
    """The backend and the specification give the same bits after each of these steps of one parameter."""
    ours = copied(steps[0])
    for t, step in enumerate(steps, 1):
        ours = ours._replace(gradient=step.gradient.clone(), keys=step.keys)
        (bad,), (expected,) = backend.take([ours]), first_order.take([step])
        assert (bad.dtype, bad.shape, bad.item()) == (torch.int64, (), expected.item())
        assert_same_bits(ours.gradient, step.gradient, "the gradient")
        for name, x in tensors(step).items():
            assert_same_bits(tensors(ours)[name], x, f"{name} after step {t}")


# ------------------------------------------------------------------------------------------------- the backends


@pytest.fixture(params=BACKENDS, name="backend")
def _backend(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("numbers", [ordinary, nasty, tiny])
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", SETTINGS)
def test_a_backend_gives_the_bits_of_the_specification(backend, rule, dtype, bits, numbers):
    for rows, n in [(3, 32), (2, 33), (2, 127), (3, 128), (2, 129), (3, 300), (2, 1000)]:
        assert_agree(backend, steps_of(rule, DTYPES[dtype], bits, rows, n, numbers))


@given(
    rule=st.sampled_from(list(SETTINGS)),
    bits=st.sampled_from([4, 8, 32]),
    dtype=st.sampled_from(list(DTYPES.values())),
    gradient_dtype=st.sampled_from(list(DTYPES.values())),
    rows=st.integers(1, 4),
    n=st.integers(1, 300),
    numbers=st.sampled_from([ordinary, nasty, tiny]),
    sign=st.sampled_from([1.0, -1.0]),
    stochastic=st.booleans(),
    nesterov=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_backend_agrees_whatever_the_settings(
    rule, bits, dtype, gradient_dtype, rows, n, numbers, sign, stochastic, nesterov, seed
):
    settings = {"sign": sign, "stochastic": stochastic} | ({"nesterov": nesterov} if rule == "sgd" else {})
    for backend in BACKENDS.values():
        steps = steps_of(rule, dtype, bits, rows, n, numbers, 2, settings, gradient_dtype, seed)
        assert_agree(backend, steps)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_long_run_agrees(backend, bits):
    assert_agree(backend, steps_of("adamw", torch.bfloat16, bits, 2, 200, ordinary, count=50))


def test_numbers_that_are_not_finite_are_counted_and_read_as_zero(backend):
    (step,) = steps_of("adamw", torch.float32, 8, 3, 130, ordinary, count=1)
    step.gradient[0, 0], step.gradient[1, 128], step.gradient[2, 129] = float("nan"), float("inf"), -float("inf")
    clean = copied(step)._replace(gradient=step.gradient.nan_to_num(0.0, 0.0, 0.0))
    (bad,), (none) = backend.take([step]), backend.take([clean])
    assert (bad.item(), none[0].item()) == (3, 0)
    for name, x in tensors(step).items():
        assert_same_bits(x, tensors(clean)[name], name)


def test_steps_of_a_batch_do_not_touch_each_other(backend):
    batch = [
        steps_of(rule, dtype, bits, 5, 200, nasty, count=1, seed=seed)[0]
        for seed, (rule, dtype, bits) in enumerate(
            (rule, dtype, bits) for rule in SETTINGS for dtype in DTYPES.values() for bits in (4, 8, 32)
        )
    ]
    empty = Step(
        "sgd", torch.zeros(0, 5), torch.zeros(0, 5), (zeros(0, 5, 8, "cpu"),), keys(0, 0, 1), batch[10].settings
    )
    batch.append(empty)
    ours = [copied(step) for step in batch]
    bad, expected = backend.take(ours), first_order.take(batch)
    assert [x.item() for x in bad] == [x.item() for x in expected]
    for one, other in zip(ours, batch, strict=True):
        for name, x in tensors(other).items():
            assert_same_bits(tensors(one)[name], x, name)
    assert backend.take([]) == []


@pytest.mark.parametrize("backend", [first_order, *BACKENDS.values()], ids=["specification", *BACKENDS])
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("rule", SETTINGS)
def test_rows_apart_take_the_step_of_all_of_them(backend, rule, bits):
    """With the keys of their place; parts without rows, too."""
    whole = steps_of(rule, torch.bfloat16, bits, 7, 300, nasty, count=3)
    apart = copied(whole[0])
    for step in whole:
        parts = [
            apart._replace(
                parameter=apart.parameter[first:last],
                gradient=step.gradient[first:last],
                moments=tuple(Moment(m.bits, *(None if x is None else x[first:last] for x in m[1:])) for m in apart[3]),
                keys=shifted(step.keys, first * 300),
            )
            for first, last in [(0, 3), (3, 6), (6, 7), (7, 7)]
        ]
        bad, counts = backend.take([step]), backend.take(parts)
        assert sum(count.item() for count in counts) == bad[0].item()
        for name, x in tensors(step).items():
            assert_same_bits(tensors(apart)[name], x, name)


def test_autograd_sees_that_a_parameter_was_written():
    (step,) = steps_of("sgd", torch.float32, 8, 2, 40, ordinary, count=1)
    parameter = torch.nn.Parameter(step.parameter)
    product = (parameter * parameter).sum()
    kernels.take_steps([step._replace(parameter=parameter.detach())])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ------------------------------------------------------------------------------------------------- threads, on the CPU


def big(bits=8, dtype=torch.float32):
    """One step of more than one chunk of work, beside small ones."""
    blocks = 2 * cpu_steps.CHUNK + 5
    return [steps_of("adamw", dtype, bits, rows, n, ordinary, 1)[0] for rows, n in [(blocks, 100), (3, 40), (1, 700)]]


@pytest.fixture(name="two_threads")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_number_of_threads_changes_nothing(bits):
    two = big(bits)
    three, one, oracle = ([copied(step) for step in two] for _ in range(3))
    cpu_steps.take(two)
    torch.set_num_threads(3)
    cpu_steps.take(three)
    torch.set_num_threads(1)
    cpu_steps.take(one)
    first_order.take(oracle)
    for batch in (two, three, one):
        for step, expected in zip(batch, oracle, strict=True):
            for name, x in tensors(expected).items():
                assert_same_bits(tensors(step)[name], x, name)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_step_at_once():
    mine = [big() for _ in range(4)]
    expected = [copied(step) for step in mine[0]]
    first_order.take(expected)
    barrier = threading.Barrier(4)

    def step(batch):
        barrier.wait()
        cpu_steps.take(batch)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(step, mine))
    for batch in mine:
        for one, other in zip(batch, expected, strict=True):
            for name, x in tensors(other).items():
                assert_same_bits(tensors(one)[name], x, name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_has_threads_of_its_own():
    batch = big()
    child_batch, expected = [copied(step) for step in batch], [copied(step) for step in batch]
    for step in child_batch:
        for x in tensors(step).values():
            x.share_memory_()
    cpu_steps.take(batch)  # the parent's threads are there
    child = os.fork()
    if not child:
        status = 1
        try:
            cpu_steps.take(child_batch)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    first_order.take(expected)
    for one, other in zip(child_batch, expected, strict=True):
        for name, x in tensors(other).items():
            assert_same_bits(tensors(one)[name], x, name)


def test_an_error_in_a_thread_is_raised(monkeypatch):
    def fail(*arguments):
        raise ValueError("from a kernel")

    monkeypatch.setitem(cpu_steps.KERNELS, "adamw", fail)
    with pytest.raises(ValueError, match="from a kernel"):
        cpu_steps.take(big())


# ------------------------------------------------------------------------------------------------- the dispatch


def test_take_steps_chooses_a_backend_for_each_step(monkeypatch):
    taken = []

    def recording(steps):
        taken.append([step.parameter.dtype for step in steps])
        return first_order.take(steps)

    monkeypatch.setattr(cpu_steps, "take", recording)
    kernels.backend.cache_clear()
    batch = [steps_of("sgd", dtype, 8, 2, 40, nasty, 1)[0] for dtype in DTYPES.values()]
    wide = batch[0]._replace(parameter=batch[0].parameter.double())
    expected = first_order.take([copied(step) for step in (batch[0], wide, *batch[1:])])
    bad = kernels.take_steps([batch[0], wide, *batch[1:]])
    kernels.backend.cache_clear()
    assert taken == [list(DTYPES.values())]
    assert [x.item() for x in bad] == [x.item() for x in expected]


def test_without_numba_the_specification_steps(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lowbit_optim.kernels.cpu_steps", None)
    kernels.backend.cache_clear()
    assert kernels.backend("steps", torch.device("cpu"), torch.float32) is first_order
    kernels.backend.cache_clear()
    assert "the plain torch reference runs on cpu" in caplog.text


def test_importing_the_package_imports_no_numba():
    code = "import sys, lowbit_optim.kernels; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_nothing_can_be_kept_on_disk_kernels_compile_all_the_same(monkeypatch):
    import numba

    real = numba.njit

    def njit(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available for file 'x.py'")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)

    def double(x: float) -> float:
        return x + x

    assert cpu.kernel(double)(2.0) == 4.0


# ------------------------------------------------------------------------------------------------- the specification


@pytest.mark.parametrize("first", [0, 1, 700, 2**32 - 3, 2**32 + 700, 2**40 + 5])
def test_random_bits_of_a_part(first):
    """Those of the numbers with the same indices in the whole: by the definition in Python's integers."""

    def murmur(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    whole = keys(3, 1, 4)
    for key, part in zip(whole, shifted(whole, first), strict=True):
        expected = [murmur(((first + i) * 0x9E3779B1 + key) % 2**32) for i in range(10)]
        assert random_bits(part, torch.Size((2, 5)), torch.device("cpu")).flatten().tolist() == expected


def encoded(kind, bits, x, key=1):
    """The codes of rows, uint8 [rows, n], and the moment that has them packed."""
    if kind == "signed":
        packed, scales = encode_signed(x, bits)
    else:
        packed, scales = encode_unsigned(x, bits, random_bits(key, x.shape, x.device))
    return unpack(packed, bits, x.shape[1]), Moment(bits, codes=packed, scales=scales)


def rows_of(kind, rows, n, seed=0):
    x = normal(rows, n, seed=seed) * 10.0 ** normal(rows, n, seed=seed + 1)
    return x if kind == "signed" else x.square()


@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_code_values_are_the_small_floats_of_the_docstring(kind, bits):
    values = code_values(kind, bits).tolist()
    if kind == "unsigned":
        f = FRACTION[bits]
        lowest = (127 << f) - (2**bits - 1)
        expected = [
            (1 + (k + lowest & (1 << f) - 1) / (1 << f)) * 2.0 ** ((k + lowest >> f) - 127) for k in range(2**bits)
        ]
    else:  # of 8 bits subnormal below 16, then exponent and fraction
        floats = [k if k < 16 else (16 + k % 16) * 2 ** ((k >> 4) - 1) for k in range(128)]
        small = floats if bits == 8 else [0, 1, 5, 13, 29, 61, 93, 125]
        assert small[-1] == largest(bits)
        expected = small + [-x for x in small]
    assert values == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_lines_are_exact_and_codes_lie_closer_towards_zero(bits):
    assert all(d == 2 ** (d.bit_length() - 1) for d, _ in LINES[bits])
    values = code_values("signed", bits)[: 2 ** (bits - 1)]
    assert bool((values.diff().diff() >= 0).all())


@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_a_number_that_a_code_stands_for_keeps_that_code(kind, bits):
    values = code_values(kind, bits)
    n = len(values)
    for key in range(5):
        x = torch.cat([values, -values[:1]])[:n].reshape(-1, min(n, BLOCK)) * 0.125
        x[:, 0] = x.abs().max()  # each block has the largest number
        codes, moment = encoded(kind, bits, x, key)
        assert torch.equal(decode(moment, kind, x.shape[1]), x)
        assert torch.equal(code_values(kind, bits)[codes.int()] * moment.scales, x)


@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_a_number_becomes_one_of_the_two_codes_around_it(kind, bits):
    x = rows_of(kind, 3, 300)
    _, moment = encoded(kind, bits, x)
    scales = moment.scales.repeat_interleave(BLOCK, 1)[:, :300].double()
    values = code_values(kind, bits).double().sort().values
    units = (x.double() / scales).clamp(values[0], values[-1])
    above = torch.searchsorted(values, units * (1 - 1e-6 * units.sign()))
    below = (torch.searchsorted(values, units * (1 + 1e-6 * units.sign()), right=True) - 1).clamp(min=0)
    got = decode(moment, kind, 300).double() / scales
    lower, upper = values[torch.minimum(below, above)], values[torch.maximum(below, above).clamp(max=len(values) - 1)]
    assert bool(((got >= lower * (1 - 1e-6 * lower.sign())) & (got <= upper * (1 + 1e-6 * upper.sign()))).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_at_random_has_no_bias(bits):
    draws = 4000
    x = torch.linspace(0.05, 1.0, BLOCK).unsqueeze(0)
    decoded = [decode(encoded("unsigned", bits, x, key)[1], "unsigned", BLOCK) for key in range(draws)]
    error = torch.stack(decoded).double().mean(0) - x
    # The deviation is at most half of the spacing of codes there.
    values = code_values("unsigned", bits)
    spacing = values.diff()[(torch.searchsorted(values, x) - 1).clamp(0, len(values) - 2)]
    assert bool((error.abs() <= 5 * spacing / 2 / draws**0.5 + 1e-6).all())
    assert error.mean().abs() < 5 * spacing.mean() / 2 / (draws * BLOCK) ** 0.5 + 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_a_signed_number_becomes_the_nearest_code(bits):
    x = rows_of("signed", 3, 300)
    _, moment = encoded("signed", bits, x)
    assert moment.scales is not None
    units = x.double() / moment.scales.repeat_interleave(BLOCK, 1)[:, :300].double()
    distances = (units.unsqueeze(-1) - code_values("signed", bits).double()).abs()
    got = decode(moment, "signed", 300).double() / moment.scales.repeat_interleave(BLOCK, 1)[:, :300].double()
    assert bool(((units - got).abs() <= distances.amin(-1) + 1e-5 * units.abs() + 1e-5).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("nesterov", [False, True])
def test_what_rounding_takes_from_a_momentum_is_not_lost(bits, nesterov):
    """Long after the last gradient the parameter is where SGD without rounding would be, to the last code's worth."""
    gradients = [normal(2, 300, seed=seed) for seed in range(5)] + [torch.zeros(2, 300)] * 200
    settings = {"weight_decay": 0.0, "momentum": 0.9, "share": 1.0, "nesterov": nesterov, "lr": 0.1, "sign": 1.0}
    ends = {}
    for own, feedback in ((32, 0.0), (bits, 9.0), ("lost", 0.0)):
        parameter, moment = torch.zeros(2, 300), zeros(2, 300, bits if own == "lost" else own, "cpu")
        more = {"feedback": feedback, "stochastic": False}
        first_order.take([Step("sgd", parameter, g, (moment,), keys(0, 0, 1), settings | more) for g in gradients])
        ends[own] = parameter
    error = (ends[bits] - ends[32]).norm() / ends[32].norm()
    assert error < 1e-4
    assert (ends["lost"] - ends[32]).norm() / ends[32].norm() > 20 * error


def test_bfloat16_parameters_are_rounded_without_bias():
    draws = 4000
    x = normal(1, BLOCK)
    p = torch.zeros(1, BLOCK, dtype=torch.bfloat16)
    total = torch.zeros(1, BLOCK, dtype=torch.float64)
    for key in range(draws):
        write_parameter(p, x, key)
        total += p.double()
        assert bool(((p.float() - x).abs() < x.abs() * 2.0**-7).all())
    assert bool(((total / draws - x).abs() <= 5 * x.abs() * 2.0**-8 / draws**0.5).all())
    write_parameter(p, x, None)
    assert torch.equal(p, x.bfloat16())


@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_blocks_of_zeros_stay_zero(kind, bits):
    x = torch.zeros(2, 300)
    x[0, 128:256] = 1.0
    for key in range(20):
        _, moment = encoded(kind, bits, x, key)
        assert torch.equal(decode(moment, kind, 300), x)
        assert torch.equal(moment.scales, torch.tensor([[0.0, 1.0 / scale_unit(kind, bits), 0.0], [0.0, 0.0, 0.0]]))


def scale_unit(kind, bits):
    return largest(bits) if kind == "signed" else 1.0


@pytest.mark.parametrize("bits", [4, 8])
def test_unsigned_codes_are_zero_in_blocks_of_zeros_only(bits):
    x = torch.zeros(1, BLOCK)
    x[0, 3] = 1e-20
    for key in range(20):
        _, moment = encoded("unsigned", bits, x, key)
        assert bool((decode(moment, "unsigned", BLOCK) > 0).all())


@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_the_largest_number_of_a_block_is_kept(kind, bits):
    x = rows_of(kind, 4, 128)
    for key in range(10):
        _, moment = encoded(kind, bits, x, key)
        decoded = decode(moment, kind, 128)
        assert torch.allclose(decoded.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)


def test_the_same_seed_parameter_and_step_give_the_same_keys_and_any_other_do_not():
    assert keys(1, 2, 3) == keys(1, 2, 3)
    made = [key for seed in range(5) for number in range(5) for step in range(1, 6) for key in keys(seed, number, step)]
    assert len(set(made)) == len(made)
    assert all(0 <= key < 2**32 for key in made)
    bits = random_bits(keys(1, 2, 3).moment, torch.Size((4, 50)), torch.device("cpu"))
    assert torch.equal(bits, random_bits(keys(1, 2, 3).moment, torch.Size((4, 50)), torch.device("cpu")))
    assert 0 <= int(bits.min()) <= int(bits.max()) < 2**32


def test_random_bits_are_even():
    """Each of the 32 bits is set half of the time, and neighbours do not follow each other."""
    for key in (0, 1, 2**32 - 1):
        bits = random_bits(key, torch.Size((1, 1 << 14)), torch.device("cpu")).view(-1)
        each = ((bits.unsqueeze(1) >> torch.arange(32)) & 1).double()
        assert bool(((each.mean(0) - 0.5).abs() < 5 * 0.5 / 128).all())
        both = (each[1:] == each[:-1]).double().mean(0)
        assert bool(((both - 0.5).abs() < 5 * 0.5 / 128).all())
