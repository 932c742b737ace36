"""The code tables hold the values that the papers and the other libraries say."""

import math
import warnings

import numpy as np
import pytest
import torch

from lowbit_optim.storage import CODEBOOKS, codebook
from lowbit_optim.storage.codebooks import BITS, cell_errors

EVERY = [(name, bits) for name in CODEBOOKS for bits in BITS]

# Wang et al. 2024, App. C, as fractions.
LINEAR2 = {
    4: np.array([-225, -169, -121, -81, -49, -25, -9, 0, 1, 9, 25, 49, 81, 121, 169, 225]) / 225,
    3: np.array([-49, -25, -9, 0, 1, 9, 25, 49]) / 49,
}
DYNAMIC = {
    4: [
        *(-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0),
        *(0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1),
    ],
    3: [-0.7750, -0.3250, -0.0550, 0, 0.0550, 0.3250, 0.7750, 1],
}

# The table that QLoRA prints (float32).
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]

# Optimal output levels for a unit normal variable, upper half: Max, "Quantizing for minimum distortion", 1960, table I.
MAX_1960 = {
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_every_table_is_ascending_and_fills_the_unit_interval(name, bits):
    table = codebook(name, bits)
    assert table.dtype == torch.float64
    assert table.shape == (2**bits,)
    repeated = 1 if name == "linear" else 0  # an odd number of values leaves one bit pattern over
    values = table[: 2**bits - repeated]
    assert (values.diff() > 0).all()
    assert (table[2**bits - repeated :] == values[-1]).all()
    assert values[-1] == 1
    assert values[0] == -1 if name != "dynamic" else -1 < values[0] < 0
    assert (values == 0).sum() == (name != "lloyd-max")
    if name in ("linear", "lloyd-max"):
        assert torch.equal(values, -values.flip(0))


@pytest.mark.parametrize("bits", [3, 4])
def test_tables_of_the_paper(bits):
    np.testing.assert_allclose(codebook("linear-2", bits), LINEAR2[bits], rtol=1e-15, atol=0)
    np.testing.assert_allclose(codebook("dynamic", bits), DYNAMIC[bits], rtol=1e-14, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_linear_is_evenly_spaced(bits):
    values = codebook("linear", bits)[:-1]
    np.testing.assert_allclose(values, np.linspace(-1, 1, 2**bits - 1), rtol=0, atol=1e-15)


def test_normal_float_4_is_the_table_of_qlora():
    np.testing.assert_allclose(codebook("nf", 4), NF4, rtol=0, atol=2e-7)


def dynamic_map():
    """bitsandbytes' signed 8-bit dynamic map, in float32 as there: seven decades, the top one in 64 equal parts."""
    data = [0.0, 1.0]
    for decade in range(7):
        boundaries = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
        means = (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        data += [sign * float(10.0 ** (decade - 6) * mean) for mean in means for sign in (-1, 1)]
    return np.array(sorted(data), dtype=np.float32)


def test_dynamic_8_is_the_map_of_bitsandbytes():
    assert len(dynamic_map()) == 256
    np.testing.assert_allclose(codebook("dynamic", 8), dynamic_map(), rtol=0, atol=1e-7)


def test_dynamic_8_equals_the_installed_bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_allclose(codebook("dynamic", 8), functional.create_dynamic_map(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_has_the_published_levels(bits):
    upper = codebook("lloyd-max", bits)[2 ** (bits - 1) :].numpy()
    np.testing.assert_allclose(upper, np.array(MAX_1960[bits]) / MAX_1960[bits][-1], rtol=5e-4)


@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_lloyd_max_levels_are_the_centroids_of_their_cells(bits):
    """With the one scale that makes the outermost level a centroid, every other level is one too."""
    upper = codebook("lloyd-max", bits)[2 ** (bits - 1) :].numpy()
    edges = np.array([0.0, *((upper[1:] + upper[:-1]) / 2), math.inf])

    def centroids(scale):
        # Integrals of the normal density over each cell; beyond ten standard deviations there is nothing to add.
        ends = np.minimum(edges * scale, 10.0)
        x = np.linspace(ends[:-1], ends[1:], 4_001)
        density = np.exp(-(x**2) / 2)
        return np.trapezoid(x * density, x, axis=0) / np.trapezoid(density, x, axis=0)

    low, high = 1.0, 8.0
    for _ in range(40):
        scale = (low + high) / 2
        low, high = (scale, high) if centroids(scale)[-1] > scale else (low, scale)
    np.testing.assert_allclose(upper * scale, centroids(scale), rtol=2e-6)


@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_cell_errors_are_those_of_evenly_spread_numbers(name, bits):
    """Measured on a fine grid of [-1, 1]; a code that is never chosen, for it repeats another's value, has none."""
    values = codebook(name, bits).numpy()
    x = (np.arange(400_000) + 0.5) / 200_000 - 1
    distinct = np.unique(values)
    nearest = np.searchsorted((distinct[1:] + distinct[:-1]) / 2, x)
    codes = np.searchsorted(values, distinct)[nearest]
    squares = np.bincount(codes, (x - values[codes]) ** 2, 2**bits)
    expected = np.sqrt(squares / np.bincount(codes, minlength=2**bits).clip(min=1))
    got = cell_errors(name, bits, torch.float64, torch.device("cpu")).numpy()
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=1e-5)


def test_unknown_names_and_bits_are_refused_with_a_list():
    with pytest.raises(ValueError, match=r"'fp4'.*linear, linear-2, dynamic, nf, lloyd-max"):
        codebook("fp4", 4)
    with pytest.raises(ValueError, match=r"5 bits.*2, 3, 4, 6, 8"):
        codebook("linear", 5)
