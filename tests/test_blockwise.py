"""Packing and block-wise quantization against oracles in python integers and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit_optim.kernels.reference import FIT_CANDIDATES, pack, packed_bytes, unpack
from lowbit_optim.storage import CODEBOOKS, Quantization, codebook, decode_tensor, encode_tensor
from lowbit_optim.storage.codebooks import BITS

quantizations = st.builds(
    Quantization,
    bits=st.sampled_from(BITS),
    codebook=st.sampled_from(CODEBOOKS),
    block_size=st.sampled_from([16, 64]),
    double=st.booleans(),
    scale=st.sampled_from(["absmax", "fitted"]),
)
single = quantizations.filter(lambda q: not q.double and q.scale == "absmax")
ORDINARY = Quantization(4, "linear-2", 64)
SMALLEST = Quantization(3, "lloyd-max", 16, double=True, scale="fitted")


def matrices(rows=3, columns=70, limit=None):
    """float32 matrices of any finite numbers, or of numbers up to a limit."""
    bound = {} if limit is None else {"min_value": -limit, "max_value": limit}
    elements = st.floats(width=32, allow_nan=False, allow_infinity=False, **bound)
    shapes = st.tuples(st.integers(1, rows), st.integers(1, columns))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def codes_of(parts, bits, n):
    """The codes of every row, read with python integers."""
    rows = parts["codes"].reshape(-1, parts["codes"].shape[-1]).tolist()
    words = [int.from_bytes(bytes(row), "little") for row in rows]
    return np.array([[word >> (i * bits) & (2**bits - 1) for i in range(n)] for word in words]).reshape(-1, n)


def per_number(scales, block, n):
    """The scale of every number of the rows."""
    return np.repeat(np.asarray(scales), block, axis=-1)[..., :n]


def bits_equal(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


# ------------------------------------------------------------------------------------------------------- packing


@given(st.data(), st.sampled_from(BITS), st.integers(0, 3), st.integers(0, 40))
def test_codes_are_packed_as_a_little_endian_bit_string(data, bits, rows, n):
    codes = data.draw(hnp.arrays(np.uint8, (rows, n), elements=st.integers(0, 2**bits - 1)))
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-n * bits // 8)) == (rows, packed_bytes(n, bits))
    for row, string in zip(codes.tolist(), packed.tolist(), strict=True):
        word = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(string) == word.to_bytes(len(string), "little")
    assert np.array_equal(unpack(packed, bits, n), codes)


# -------------------------------------------------------------------------------------------------------- codes


@given(matrices(), single)
def test_each_number_gets_the_nearest_value_of_its_block(x, q):
    n, block, table = x.shape[1], q.block_size, codebook(q.codebook, q.bits).numpy()
    parts = q.encode(torch.from_numpy(x))
    scales = np.stack([np.abs(x[:, i : i + block]).max(1) for i in range(0, n, block)], axis=1)
    assert np.array_equal(parts["scales"], scales)
    scales = per_number(scales, block, n)
    quotients = np.divide(x, scales, out=np.zeros_like(x), where=scales > 0).astype(np.float64)
    codes = codes_of(parts, q.bits, n)
    distances = np.abs(quotients[..., None] - table)
    chosen = np.take_along_axis(distances, codes[..., None], axis=-1)[..., 0]
    assert (chosen <= distances.min(-1) + 1e-7).all()  # boundaries are rounded to float32
    assert np.array_equal(q.decode(parts, n), table.astype(np.float32)[codes] * scales)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_quotient_on_a_boundary_takes_the_lower_code(name, bits, dtype):
    """Boundaries are midpoints, rounded once to the dtype of the arithmetic; the number after one has the next code."""
    table = codebook(name, bits).numpy()
    table = table[: len(np.unique(table))]
    midpoints = ((table[1:] + table[:-1]) / 2).astype(dtype)
    row = np.concatenate([[1.0], midpoints, np.nextafter(midpoints, dtype(2))]).astype(dtype)
    lower = np.arange(len(midpoints))
    q = Quantization(bits, name, 512)
    codes = codes_of(q.encode(torch.from_numpy(row[None])), bits, len(row))
    assert np.array_equal(codes[0], [len(table) - 1, *lower, *(lower + 1)])


@given(matrices(), quantizations)
def test_a_repeated_table_value_is_never_chosen(x, q):
    """Not even where a scale is smaller than the block's largest number."""
    q = Quantization(q.bits, "linear", q.block_size, q.double, q.scale)
    assert codes_of(q.encode(torch.from_numpy(x).double() * 1.7), q.bits, x.shape[1]).max() <= 2**q.bits - 2


def test_float64_is_divided_and_compared_in_float64():
    x = torch.tensor([[1.0, 0.5 + 1e-12]], dtype=torch.float64)
    q = Quantization(2, "linear")  # -1, 0, 1: a half is a boundary
    assert codes_of(q.encode(x), 2, 2).tolist() == [[2, 2]]
    assert codes_of(q.encode(x.float()), 2, 2).tolist() == [[2, 1]]
    many = normal(50, 1000, dtype=torch.float64)
    q = Quantization(8, "nf")
    parts = q.encode(many)
    scales = per_number(parts["scales"].double(), 64, 1000)
    nearest = np.abs((many.numpy() / scales)[..., None] - codebook("nf", 8).numpy()).argmin(-1)
    assert np.array_equal(codes_of(parts, 8, 1000), nearest)
    exact = codebook("nf", 8).numpy()[nearest] * scales
    np.testing.assert_allclose(q.decode(parts, 1000, torch.float64), exact, rtol=1e-15)


@given(matrices(limit=2.0**99), quantizations.filter(lambda q: q.codebook != "lloyd-max"))
def test_zeros_stay_exact(x, q):
    x[:, ::3] = 0
    assert (q.decode(q.encode(torch.from_numpy(x)), x.shape[1])[:, ::3] == 0).all()


@given(matrices(limit=2.0**99), single.filter(lambda q: q.codebook != "dynamic"))
def test_encoding_what_was_decoded_changes_nothing(x, q):
    """All tables but the dynamic one hold -1, so a block keeps its largest magnitude."""
    x[np.abs(x) < 1e-30] = 0
    parts = q.encode(torch.from_numpy(x))
    assert bits_equal(q.encode(q.decode(parts, x.shape[1])), parts)


def test_error_of_eight_even_bits_is_half_a_step():
    x = normal(20, 1000)
    q = Quantization(8, "linear", 64)
    parts = q.encode(x)
    limit = per_number(parts["scales"], 64, 1000) / 254
    assert (np.abs(q.decode(parts, 1000).numpy() - x.numpy()) <= limit * (1 + 1e-4)).all()


# ------------------------------------------------------------------------------------------------------- scales


@given(st.integers(0, 999), st.sampled_from(CODEBOOKS), st.sampled_from([2, 3, 4]), st.integers(-110, 120))
def test_fitted_scale_has_the_least_error_of_the_candidates(seed, name, bits, exponent):
    """The largest magnitude is one of them, so it is never worse than absmax; at any magnitude."""
    assert FIT_CANDIDATES[0] == 1
    x = normal(20, 64 + 9, dtype=torch.float64, seed=seed)
    x = torch.ldexp(x**3, torch.tensor(exponent)).float()  # the cube has outliers
    q = Quantization(bits, name, 64, scale="fitted")
    parts = q.encode(x)
    decoded = q.decode(parts, 73).double().numpy()
    table = codebook(name, bits).numpy()
    fractions = np.array(FIT_CANDIDATES)[:, None, None]
    for block in (slice(0, 64), slice(64, 73)):
        numbers = x[:, block].double().numpy()
        top = np.abs(numbers).max(1, keepdims=True)
        nearest = table[np.abs((numbers / top / fractions)[..., None] - table).argmin(-1)] * fractions
        errors = ((nearest - numbers / top) ** 2).sum(-1)
        error = (((decoded[:, block] - numbers) / top) ** 2).sum(-1)
        np.testing.assert_allclose(error, errors.min(0), rtol=1e-4)


def test_double_scales_are_bytes_of_a_maximum_per_256_blocks():
    """600 blocks of a row are two groups and a part; the second group is all zeros."""
    x = normal(2, 16 * 600 - 5, dtype=torch.float64).numpy() * np.repeat(np.geomspace(1e-4, 1, 600), 16)[:-5]
    x[:, 16 * 256 : 16 * 512] = 0
    x[1, :16] = 0
    q = Quantization(4, "linear-2", 16, double=True)
    parts = q.encode(torch.from_numpy(x))
    absmax = np.abs(np.pad(x, ((0, 0), (0, 5))).reshape(2, 600, 16)).max(-1).astype(np.float32)
    groups = np.split(absmax, [256, 512], axis=1)
    maxima = np.stack([group.max(1) for group in groups], axis=1)
    scales = [np.rint(g / np.where(m > 0, m, 1)[:, None] * 255) for g, m in zip(groups, maxima.T, strict=True)]
    scales = np.concatenate(scales, axis=1).astype(np.uint8)
    assert np.array_equal(parts["scales"], scales)
    assert np.array_equal(parts["scale_maxima"], maxima)

    table = codebook("linear-2", 4).numpy()
    decoded = scales / np.float32(255) * np.repeat(maxima, 256, axis=1)[:, :600]
    decoded = per_number(decoded.astype(np.float64), 16, x.shape[1])
    quotients = np.divide(x, decoded, out=np.zeros_like(x), where=decoded > 0)
    codes = np.abs(quotients[..., None] - table).argmin(-1)
    assert np.array_equal(codes_of(parts, 4, x.shape[1]), codes)
    result = q.decode(parts, x.shape[1], torch.float64)
    np.testing.assert_allclose(result, np.where(decoded > 0, table[codes] * decoded, 0), rtol=1e-15)


@given(quantizations, st.integers(-80, 80))
def test_a_power_of_two_changes_no_code(q, exponent):
    x = normal(3, 100)
    one, other = q.encode(x), q.encode(torch.ldexp(x, torch.tensor(exponent)))
    assert torch.equal(one["codes"], other["codes"])
    scaled = q.decode(one, 100, torch.float64) * 2.0**exponent
    assert torch.equal(scaled, q.decode(other, 100, torch.float64))


# ---------------------------------------------------------------------------------------------- rows and shards


@given(quantizations, st.integers(0, 5), st.integers(0, 5))
def test_a_shard_of_rows_has_the_bytes_of_the_whole(q, start, stop):
    x = normal(5, 9, 11)
    x[2] = 1e6  # a row that would spoil its neighbours
    whole = encode_tensor(x, q)
    assert bits_equal(encode_tensor(x[start:stop], q), {name: part[start:stop] for name, part in whole.items()})


@pytest.mark.parametrize("q", [ORDINARY, SMALLEST], ids=["ordinary", "smallest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_encoded_as_the_float32_of_its_value(q, dtype):
    x = normal(4, 100).to(dtype)
    assert bits_equal(q.encode(x), q.encode(x.float()))


@pytest.mark.parametrize("q", [ORDINARY, SMALLEST], ids=["ordinary", "smallest"])
def test_strides_do_not_matter(q):
    x = normal(100, 6)
    for view in (x.T, x[::2].T, x.T[:, 10:90], x.T[:1].expand(4, -1)):
        assert bits_equal(q.encode(view), q.encode(view.clone(memory_format=torch.contiguous_format)))


SHAPES = {
    "matrix": ((5, 70), True),
    "convolution": ((6, 4, 3, 3), True),
    "shortest coded row": ((3, 32), True),
    "longest uncoded row": ((3, 31), False),
    "vector": ((1000,), False),
    "scalar": ((), False),
    "no rows": ((0, 64), True),
    "empty rows": ((3, 0), False),
    "empty vector": ((0,), False),
    "empty inside": ((2, 0, 4), False),
    "one row": ((1, 64), True),
}


@pytest.mark.parametrize(("shape", "coded"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("q", [Quantization(8, "linear"), torch.bfloat16, None], ids=["codes", "bf16", "none"])
def test_a_tensor_of_any_shape_comes_back(shape, coded, q):
    x = normal(*shape, dtype=torch.float64)
    parts = encode_tensor(x, q)
    y = decode_tensor(parts, q, x.shape, torch.float64)
    assert y.shape == x.shape
    assert y.dtype == torch.float64
    if coded and isinstance(q, Quantization):
        assert set(parts) == {"codes", "scales"}
        torch.testing.assert_close(y, x, rtol=0, atol=0.02)
    else:
        assert set(parts) == {"values"}
        assert torch.equal(y, x.to(q if coded else None).double())


def test_what_stays_uncoded_has_at_least_float32_and_is_a_copy():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = normal(7).to(dtype)
        parts = encode_tensor(x, ORDINARY)
        assert parts["values"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        before = parts["values"].clone()
        x.zero_()
        assert torch.equal(parts["values"], before)


@given(quantizations, st.lists(st.integers(0, 5), max_size=2), st.integers(0, 300))
def test_the_parts_of_zeros_are_those_of_an_encoded_tensor(q, lead, n):
    zeros, ones = q.zeros([*lead, n]), q.encode(torch.ones(*lead, n))
    assert {k: (v.shape, v.dtype) for k, v in zeros.items()} == {k: (v.shape, v.dtype) for k, v in ones.items()}
    for parts in (zeros, q.encode(torch.zeros(*lead, n))):
        assert torch.equal(q.decode(parts, n), torch.zeros(*lead, n))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook": "fp4"}, "'fp4'.*linear, linear-2, dynamic, nf, lloyd-max"),
        ({"bits": 5}, "5 bits.*2, 3, 4, 6, 8"),
        ({"block_size": 100}, "100.*power of two from 16 to 4096"),
        ({"block_size": 8192}, "8192.*power of two from 16 to 4096"),
        ({"scale": "max"}, "'max'.*absmax, fitted"),
        ({"double": 8}, "8.*True or False"),
    ],
)
def test_a_bad_quantization_is_refused_with_what_is_possible(settings, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**settings)
