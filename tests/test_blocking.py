"""Parameters as blocks, against index arithmetic on plain python integers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit_optim.blocking import Stack, blocking

shapes = st.lists(st.sampled_from([1, 1, 2, 3, 5, 8]), min_size=2, max_size=5).filter(
    lambda shape: sum(d != 1 for d in shape) >= 2
)


def numbered(shape):
    """1, 2, 3, ... in the shape."""
    return torch.arange(1.0, math.prod(shape) + 1).reshape(shape)


@given(shapes, st.integers(1, 12))
def test_every_element_goes_where_it_belongs_and_comes_back(shape, max_dim):
    cut = blocking(tuple(shape), max_dim)
    x = numbered(shape)
    blocks = cut.split(x)

    first = next(d for d in shape if d != 1)
    matrix = first, math.prod(shape) // first
    grid = [math.ceil(d / max_dim) for d in matrix]
    rows, columns = (math.ceil(d / g) for d, g in zip(matrix, grid, strict=True))
    assert max(rows, columns) <= max_dim
    assert blocks.shape == (math.prod(grid), rows, columns) == (cut.count, cut.rows, cut.columns)
    expected = torch.zeros_like(blocks)  # what no element goes to is zero
    for flat, index in enumerate(itertools.product(*(range(d) for d in shape))):
        i, j = divmod(flat, matrix[1])
        block = i // rows * grid[1] + j // columns
        expected[block, i % rows, j % columns] = x[index]
    assert torch.equal(blocks, expected)

    blocks[expected == 0] = math.nan  # padding is cut off again, whatever came of it
    assert torch.equal(cut.merge(blocks), x)


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (1, 1, 7, 1), (1, 1), (0,), (0, 5), (3, 0), (4, 0, 2)])
def test_what_is_no_matrix_has_no_blocking(shape):
    assert blocking(shape, 1200) is None


@pytest.mark.parametrize(
    ("shape", "max_dim", "blocks"),
    [
        ((1201, 3), 1200, (2, 601, 3)),  # equal blocks: not 1200 and 1
        ((1200, 3), 1200, (1, 1200, 3)),
        ((64, 32, 3, 3), 1200, (1, 64, 288)),
        ((1, 6, 4, 1), 1200, (1, 6, 4)),
        ((2500, 1300), 1000, (6, 834, 650)),
        ((2, 2), 1, (4, 1, 1)),
    ],
)
def test_blocks(shape, max_dim, blocks):
    assert blocking(shape, max_dim).split(numbered(shape)).shape == blocks


def test_a_strided_gradient_is_split_as_its_contiguous_copy():
    x = numbered((6, 4, 3, 3)).to(memory_format=torch.channels_last)
    cut = blocking((6, 4, 3, 3), 10)
    assert torch.equal(cut.split(x), cut.split(x.contiguous()))


def stack(counts):
    """Parameters with such counts of blocks; block i of the stack is filled with i."""
    numbers = iter(range(sum(counts)))
    states = [
        {
            "left.codes": torch.tensor([[next(numbers)] * 3 for _ in range(count)], dtype=torch.uint8),
            "left.scale": torch.ones(count, dtype=torch.float64),
            "right.codes": torch.full((count, 2), 99.0),
            "step": torch.tensor(5),
        }
        for count in counts
    ]
    return Stack(states, counts)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_stack_reads_and_writes_across_parameters(counts, data):
    whole = stack(counts)
    start = data.draw(st.integers(0, sum(counts) - 1))
    stop = data.draw(st.integers(start + 1, sum(counts)))
    got = whole.read("left", start, stop)
    assert got.keys() == {"codes", "scale"}
    assert got["codes"].dtype == torch.uint8
    assert got["codes"].tolist() == [[i] * 3 for i in range(start, stop)]

    owned = [state["left.codes"] for state in whole.states]
    assert whole.read("left", start, stop, ("sc", "x")).keys() == {"scale"}
    whole.write("left", start, stop, {"codes": got["codes"] + 100})
    assert torch.cat(owned).tolist() == [[i + 100 * (start <= i < stop)] * 3 for i in range(sum(counts))]
    assert all((state["right.codes"] == 99).all() and (state["left.scale"] == 1).all() for state in whole.states)
