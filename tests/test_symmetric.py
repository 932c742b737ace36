"""What is kept of symmetric matrices, what comes back, and how many bytes ``bits`` are for every form of a factor."""

import pytest
import torch

from lowbit_optim.storage import Quantization, Symmetric
from lowbit_optim.storage.blockwise import decode, encode
from lowbit_optim.storage.budget import STORAGES
from lowbit_optim.storage.factors import Dense
from tests.factors import make

EIGHT = Quantization(8, "linear", 64, double=True, scale="fitted")
FOUR = Quantization(4, "linear-2", 64)
THREE = Quantization(3, "lloyd-max", 16, scale="fitted")
CODECS = [EIGHT, FOUR, THREE, torch.bfloat16, torch.float32, None]
ORDERS = [1, 2, 65]


def name(codec):
    return f"{codec.bits}-bit" if isinstance(codec, Quantization) else str(codec).removeprefix("torch.")


def symmetric(order, dtype=torch.float32, count=3):
    x = torch.randn(count, order, order, dtype=dtype, generator=torch.Generator().manual_seed(order))
    return (x + x.mT) / 2


@pytest.mark.parametrize("layout", ["triangle", "square"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_codec_every_bit_comes_back(dtype, order, layout):
    kept = Symmetric(None, layout)
    x = symmetric(order, dtype)
    parts = kept.encode(x)
    assert all(part.dtype == dtype for part in parts.values())
    assert torch.equal(kept.decode(parts, dtype), x)


def check(kept, x, rest):
    """The diagonal comes back as float32; ``rest``, rows of numbers, is coded as it would be anywhere."""
    parts = kept.encode(x)
    expected = encode(rest, kept.codec)
    assert parts.keys() == {"diagonal", *expected}
    assert parts["diagonal"].dtype == torch.float32
    for key, part in expected.items():
        assert torch.equal(parts[key], part)
    y = kept.decode(parts, torch.float64)
    assert torch.equal(y.diagonal(dim1=1, dim2=2), x.diagonal(dim1=1, dim2=2).float().double())
    return y, decode(expected, kept.codec, rest.shape[-1], torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("codec", CODECS[:-1], ids=name)
def test_triangle_is_one_row_of_the_rows_below_the_diagonal(codec, order):
    x = symmetric(order, torch.float64)
    row = torch.stack([torch.cat([m[i, :i] for i in range(order)]) for m in x])
    y, decoded = check(Symmetric(codec, "triangle"), x, row)
    assert torch.equal(y, y.mT)
    for i in range(order):
        for j in range(i):
            assert torch.equal(y[:, i, j], decoded[:, i * (i - 1) // 2 + j])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("codec", CODECS[:-1], ids=name)
def test_square_codes_every_row_with_a_zero_in_the_place_of_the_diagonal(codec, order):
    x = symmetric(order, torch.float64)
    elsewhere = 1 - torch.eye(order, dtype=torch.float64)
    y, decoded = check(Symmetric(codec, "square"), x, x * elsewhere)
    assert torch.equal(y * elsewhere, decoded * elsewhere)


@pytest.mark.parametrize("layout", ["triangle", "square"])
@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_identity_has_the_parts_of_an_encoded_matrix_and_is_exact(codec, layout):
    for order in ORDERS:
        for dtype in (torch.float32, torch.float64):
            kept = Symmetric(codec, layout)
            parts, others = kept.identity(2, order, dtype), kept.encode(symmetric(order, dtype, 2))
            assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {
                k: (v.shape, v.dtype) for k, v in others.items()
            }
            assert torch.equal(kept.decode(parts, dtype), torch.eye(order, dtype=dtype).expand(2, -1, -1))


@pytest.mark.parametrize("layout", ["triangle", "square"])
def test_correlations_spare_the_small_rows(layout):
    """Rows whose scales span 1e4: coded as they are, small rows drown in blocks that they share with large ones."""
    scale = torch.logspace(-4, 0, 65, dtype=torch.float64)[
        torch.randperm(65, generator=torch.Generator().manual_seed(0))
    ]
    x = symmetric(65) / 130 + torch.eye(65, dtype=torch.float64)
    x = x * scale[:, None] * scale
    exact = Symmetric(None, layout, correlations=True)
    torch.testing.assert_close(exact.decode(exact.encode(x), x.dtype), x, rtol=1e-12, atol=0)
    worst = []
    for correlations in (False, True):
        how = Symmetric(FOUR, layout, correlations)
        error = (how.decode(how.encode(x), x.dtype) - x) / scale[:, None] / scale
        worst.append(error.abs().max().item())
    assert worst[1] < 0.02
    assert worst[1] < 0.2 * worst[0]


@pytest.mark.parametrize(
    ("codec", "layout", "expected"),
    [
        # order 65: 4 * 65 bytes of diagonal; 2080 numbers of the triangle in 33 blocks of 64, or 130 of 16
        (EIGHT, "triangle", 260 + 2080 + 33 + 4),
        (FOUR, "triangle", 260 + 1040 + 33 * 4),
        (THREE, "triangle", 260 + 780 + 130 * 4),
        (torch.bfloat16, "triangle", 260 + 2080 * 2),
        (None, "triangle", 260 + 2080 * 4),
        # 65 rows of 65 numbers: 2 blocks of 64, or 5 of 16, and rows of whole bytes
        (EIGHT, "square", 260 + 65 * (65 + 2 + 4)),
        (FOUR, "square", 260 + 65 * (33 + 2 * 4)),
        (THREE, "square", 260 + 65 * (25 + 5 * 4)),
    ],
)
def test_bytes(codec, layout, expected):
    parts = Symmetric(codec, layout).encode(symmetric(65))
    assert sum(part[0].numel() * part.itemsize for part in parts.values()) == expected


def test_an_unknown_layout_is_refused_with_a_list():
    with pytest.raises(ValueError, match=r"'lower'.*triangle, square"):
        Symmetric(None, "lower")


# ------------------------------------------------------------------------------------------------------ budgets


def state_bytes(state):
    return sum(part.numel() * part.itemsize for name, part in state.items() if name != "failures")


BUDGETS = {  # storage: stored matrices, and the bits that it can have
    "root": (1, [16, 8, 4, 3, 2, 1.5, 1]),
    "logarithm": (1, [16, 8, 4, 3, 2, 1.5, 1]),
    "direct": (2, [16, 8, 4, 3, 2, 1.5, 1]),
    "eigen": (2, [16, 8, 4, 3]),
    "reflector": (2, [16, 8, 4, 3, 2, 1.5, 1]),
    "cholesky": (2, [16, 8, 4, 3, 2, 1.5, 1]),
    "cholesky-feedback": (3, [16, 8, 4, 3, 2, 1.5, 1]),
}


@pytest.mark.parametrize(("storage", "bits"), [(name, bits) for name, (_, all_) in BUDGETS.items() for bits in all_])
def test_bits_are_those_of_each_stored_matrix(storage, bits):
    """Per element of the square: the codes, 8 bits of scale per 64 codes, and 32 bits of diagonal per row."""
    matrices, _ = BUDGETS[storage]
    measured = 8 * state_bytes(make(storage, bits).init(1, 512, torch.float32, "cpu")) / 512**2 / matrices
    assert 0.99 * bits < measured < bits + 8 / 64 + 32 / 512 + 0.01


def test_bytes_of_a_large_parameter():
    paper = make("eigen", 4, FOUR, "square")
    for factor, limit in [(paper, 2.27), (make(bits=4), 1.05), (make(bits=2), 0.55), (make(bits=1), 0.3)]:
        assert 2 * state_bytes(factor.init(1, 1024, torch.float32, "meta")) / 1024**2 < limit


CODED = [
    (8, "linear", "absmax"),
    (6, "linear", "absmax"),
    (4, "nf", "fitted"),
    (3, "nf", "fitted"),
    (2, "nf", "fitted"),
]


@pytest.mark.parametrize("correlations", [False, True])
@pytest.mark.parametrize("layout", ["triangle", "square"])
@pytest.mark.parametrize(
    "codec", [*(Quantization(b, c, 64, True, s) for b, c, s in CODED), FOUR, torch.bfloat16, torch.float16], ids=str
)
def test_the_estimated_rounding_error_is_near_the_true_one(codec, layout, correlations):
    """Within a fifth, for the codecs of ``bits`` and the paper's."""
    x = symmetric(96) + torch.diag_embed(torch.linspace(12, 30, 96))
    kept = Symmetric(codec, layout, correlations)
    parts = kept.encode(x)
    true = (kept.decode(parts) - x).norm(dim=(1, 2)) / x.norm(dim=(1, 2))
    torch.testing.assert_close(kept.rounding_error(parts), true, rtol=0.2, atol=0.0)


def test_what_is_not_coded_has_no_rounding_error():
    kept = Symmetric(None)
    assert not kept.rounding_error(kept.encode(symmetric(65))).any()
    coded = Symmetric(FOUR)
    assert not coded.rounding_error(coded.encode(torch.zeros(2, 65, 65))).any()


def test_thirty_two_bits_are_dense_and_small_factors_have_no_codes():
    for storage in STORAGES:
        assert type(make(storage, 32)) is Dense
    for storage in BUDGETS:
        state = make(storage, 4, FOUR, quantized=False).init(1, 8, torch.float32, "cpu")
        counted = {name: state.pop(name).dtype for name in ("updates", "failures")}
        assert counted == {"updates": torch.int32, "failures": torch.int32}
        assert {part.dtype for part in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "lu"}, r"'lu'.*dense, direct, eigen, reflector, cholesky, cholesky-feedback, root"),
        ({"bits": 5}, r"5.*32, 16, 8, 4, 3, 2, 1.5, 1"),
        ({"storage": "eigen", "bits": 2}, r"eigen.*2 bits.*bits=3 or more.*'root'"),
        ({"storage": "dense", "bits": 4}, r"dense.*32.*'root'"),
        ({"storage": "cholesky", "layout": "square"}, r"'cholesky' keeps no squares.*'eigen'"),
        ({"layout": "lower"}, r"'lower'.*triangle, square"),
    ],
)
def test_a_form_that_does_not_exist_is_refused_with_what_is_possible(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
