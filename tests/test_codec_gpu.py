"""The codec's Triton kernels give the bits of the reference: on a GPU where there is one, else in the interpreter."""

import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it is made for Linux only)")
import triton
import triton.language as tl

from lowbit_optim.kernels import gpu_codec, reference
from lowbit_optim.storage import CODEBOOKS
from lowbit_optim.storage.codebooks import BITS, table

pytestmark = pytest.mark.usefixtures("silent_numpy")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on "cpu" tests/conftest.py asked for the interpreter
DTYPES = [torch.float32, torch.bfloat16]
NUMBER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Block size, fitted, double.
SETTINGS = [(16, True, True), (64, False, False), (32, True, False), (128, False, True), (64, True, True)]


def same(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape, actual.device.type) == (expected.dtype, expected.shape, DEVICE)
    actual = actual.cpu()
    if expected.dtype in NUMBER:
        actual, expected = actual.view(NUMBER[expected.dtype]), expected.view(NUMBER[expected.dtype])
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {expected.numel()} differ"


def check(x: Tensor, bits: int, codebook: str, *how: Any, layout: str | None = None) -> None:
    """Both directions, for rows or, of a layout, matrices, in x's dtype; into a tensor that was something else."""
    tables = table(codebook, bits, torch.float32, torch.device("cpu"))
    values, boundaries = (t.to(DEVICE) for t in tables)
    kind, end = ("blockwise", ()) if layout is None else ("symmetric", (layout,))
    parts = getattr(reference, f"quantize_{kind}")(x, *tables, bits, *how, *end)
    on_device = x.to(DEVICE) if DEVICE == "cuda" else x
    for part, expected in zip(
        getattr(gpu_codec, f"quantize_{kind}")(on_device, values, boundaries, bits, *how, *end), parts, strict=True
    ):
        same(part, expected)

    decode, its_decode = (getattr(module, f"dequantize_{kind}") for module in (reference, gpu_codec))
    diagonal = () if layout is None else (normal(*x.shape[:2], seed=5),)
    end = (x.shape[-1],) if layout is None else (layout,)
    tensors = [t.to(DEVICE) for t in (*parts, *diagonal, tables.values)]
    out = torch.full_like(on_device, torch.nan)
    result = its_decode(*tensors, bits, how[0], *end, x.dtype, out)
    assert result is out
    same(result, decode(*parts, *diagonal, tables.values, bits, how[0], *end, x.dtype))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(CODEBOOKS)), ids=CODEBOOKS)
@pytest.mark.parametrize("bits", BITS)
def test_rows(bits, number, dtype):
    """Of ordinary numbers, of huge and subnormal ones, and of zeros; every table with two settings."""
    x = normal(5, 150) ** 3 * torch.tensor([1.0, 1e36, 1e-43, 1e-37, 0.0]).unsqueeze(-1)
    settings = SETTINGS[(number + bits + DTYPES.index(dtype)) % len(SETTINGS)]
    check(x.to(dtype), bits, CODEBOOKS[number], *settings)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31])
def test_row_lengths(n, bits):
    check(normal(3, n), bits, "dynamic", 16, False, False)


@pytest.mark.parametrize(("bits", "fitted", "double"), [(3, True, False), (4, True, True), (8, False, False)])
def test_longest_blocks(bits, fitted, double):
    check(normal(1, 4096 + 700), bits, "linear-2", 4096, fitted, double)


def test_several_groups_of_scales():
    """Two and a part; one of them all zeros."""
    x = normal(2, 16 * 600 - 5) * torch.linspace(-10, 0, 16 * 600 - 5).exp()
    x[1, 16 * 256 : 16 * 512] = 0
    check(x, 4, "nf", 16, False, True)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", BITS)
def test_quotients_on_and_beside_boundaries(bits, codebook):
    boundaries = table(codebook, bits, torch.float32, torch.device("cpu")).boundaries
    boundaries = boundaries[boundaries.isfinite()]
    beside = [boundaries.nextafter(torch.tensor(end)) for end in (-2.0, 2.0)]
    check(torch.cat([torch.ones(1), boundaries, *beside]).unsqueeze(0), bits, codebook, 1024, False, False)


def test_candidates_of_equal_errors():
    """Halves of the largest number, which several scales hold exactly, and blocks of it alone."""
    x = torch.ones(4, 32)
    x[1, 1:] = 0.5
    x[2, ::2] = -0.75
    x[3, 1:] = 0
    for bits in (2, 3):
        check(x, bits, "linear", 16, True, False)


def test_scales_that_are_coded_as_zero():
    """Quotients are of zero, whatever the numbers are; and codes of half a unit are rounded to even."""
    x = torch.zeros(1, 16 * 300)
    x[0, ::16] = torch.cat([torch.tensor([255.0]), torch.arange(299) * 0.5])
    x[0, 16 * 256 :] *= 1e-3
    x[0, -1] = 1e30
    check(x, 4, "lloyd-max", 16, False, True)


@pytest.mark.parametrize("layout", ["triangle", "square"])
@pytest.mark.parametrize("bits", BITS)
def test_matrices(bits, layout):
    """In tiles and blocks that end anywhere; the smallest ones of no or one number."""
    settings = SETTINGS[bits % len(SETTINGS)]
    for number, (k, n) in enumerate([(2, 70), (1, 33), (3, 2), (2, 1)]):
        check(normal(k, n, n, dtype=DTYPES[(bits + number) % 2]), bits, "linear-2", *settings, layout=layout)


@pytest.mark.parametrize(("bits", "dtype"), [(3, torch.bfloat16), (4, torch.float32), (8, torch.float16)])
def test_matrices_of_several_tiles(bits, dtype):
    check(normal(2, 150, 150, dtype=dtype), bits, "linear-2", 16, False, bits != 4, layout="triangle")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_diagonal_is_rounded_to_the_dtype_of_the_result(dtype):
    tables = table("nf", 4, torch.float32, torch.device("cpu"))
    parts = reference.quantize_symmetric(normal(2, 20, 20), *tables, 4, 16, False, False, "triangle")
    arguments = (*parts, (normal(2, 20).double() * (1 + 2.0**-9)).to(dtype), tables.values)
    for result in (torch.float32, torch.bfloat16):
        expected = reference.dequantize_symmetric(*arguments, 4, 16, "triangle", result)
        same(gpu_codec.dequantize_symmetric(*(t.to(DEVICE) for t in arguments), 4, 16, "triangle", result), expected)


@pytest.mark.parametrize("double", [False, True])
def test_nothing(double):
    for shape in ((0, 64), (3, 0)):
        check(torch.zeros(shape), 4, "nf", 64, False, double)
    for shape in ((0, 5, 5), (2, 0, 0)):
        for layout in ("triangle", "square"):
            check(torch.zeros(shape), 4, "nf", 64, False, double, layout=layout)


def test_tensors_that_begin_anywhere():
    x = normal(3 * 64 + 1)
    check(x[1:].view(3, 64), 4, "nf", 64, False, False)
    check(x[:-1].bfloat16()[3:147].view(1, 12, 12), 8, "nf", 64, False, False, layout="triangle")


@triton.jit
def _corners(p, r, c, n: tl.constexpr):
    place = tl.arange(0, n)
    row, column = gpu_codec._corner(tl.load(p + place))
    tl.store(r + place, row)
    tl.store(c + place, column)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int32, 2**31), (torch.int64, 2**43)])
def test_places_in_large_triangles(dtype, limit):
    """At both ends of rows, at random and at the last number that the dtype or the root can serve."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.arange(1, 200), math.isqrt(2 * limit) - torch.arange(1, 200)])
    starts = rows * (rows - 1) // 2
    numbers = torch.cat([starts, starts + rows - 1, torch.tensor([limit - 1])])
    numbers = torch.cat([numbers, torch.randint(limit, (1024 - len(numbers),), generator=generator)])
    expected = torch.tensor([(1 + math.isqrt(1 + 8 * p)) // 2 for p in numbers.tolist()])
    p = numbers.to(dtype).to(DEVICE)
    r, c = torch.zeros_like(p), torch.zeros_like(p)
    _corners[(1,)](p, r, c, len(p))
    assert torch.equal(r.cpu().long(), expected)
    assert torch.equal(c.cpu().long(), numbers - expected * (expected - 1) // 2)


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")


@on_gpu
@pytest.mark.parametrize("bits", BITS)
def test_large_tensors(bits):
    check(normal(300, 4000), bits, "linear-2", 64, bits == 4, bits < 4)
    check(normal(1000, 1003, dtype=torch.bfloat16), bits, "linear-2", 128, False, False)
    for n in (1000, 1024):
        check(normal(3, n, n), bits, "linear-2", 64, bits == 3, bits == 3, layout="triangle")


@on_gpu
@pytest.mark.parametrize("shape", [(1, 2**31 + 5001), (3, 2**30 + 5001)])
def test_more_than_two_to_the_31_numbers(shape):
    """Blocks know nothing of each other, so the last ones are those of a short row."""
    values, boundaries = table("linear-2", 4, torch.float32, torch.device("cuda", 0))
    x, tail = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE), normal(1, 4096 + 5001 % 4096).bfloat16()
    n = tail.shape[1]
    x[-1, -n:] = tail[0].to(DEVICE)
    parts = gpu_codec.quantize_blockwise(x, values, boundaries, 4, 64, False, False)
    expected = reference.quantize_blockwise(tail, values.cpu(), boundaries.cpu(), 4, 64, False, False)
    for part, its_end in zip(parts[:2], expected, strict=False):
        same(part[-1:, -its_end.shape[1] :], its_end)
    decoded = gpu_codec.dequantize_blockwise(*parts, values, 4, 64, shape[1], torch.bfloat16, x.fill_(torch.nan))
    same(decoded[-1:, -n:], reference.dequantize_blockwise(*expected, values.cpu(), 4, 64, n, torch.bfloat16))
    decoded[-1, -n:] = 0
    assert not decoded.any()


@on_gpu
def test_triangle_of_more_than_two_to_the_31_numbers():
    """Its last row, of a matrix that is zero elsewhere."""
    n = 65600
    values, boundaries = table("linear-2", 4, torch.float32, torch.device("cuda", 0))
    x = torch.zeros(1, n, n, dtype=torch.bfloat16, device=DEVICE)
    x[0, -1, :-1] = normal(n - 1).to(DEVICE)
    parts = gpu_codec.quantize_symmetric(x, values, boundaries, 4, 64, False, False, "triangle")
    start = (n - 1) * (n - 2) // 2  # the number at which the last row begins
    row = torch.cat([torch.zeros(start % 64), x[0, -1, :-1].float().cpu()]).unsqueeze(0)
    expected = reference.quantize_blockwise(row, values.cpu(), boundaries.cpu(), 4, 64, False, False)
    for part, its_end in zip(parts[:2], expected, strict=False):
        same(part[-1:, -its_end.shape[1] :], its_end)
    diagonal = torch.ones(1, n, device=DEVICE)
    whole = gpu_codec.dequantize_symmetric(*parts, diagonal, values, 4, 64, "triangle", torch.bfloat16, x)
    decoded = reference.dequantize_blockwise(*expected, values.cpu(), 4, 64, row.shape[1], torch.bfloat16)
    decoded = torch.cat([decoded[0, start % 64 :], torch.ones(1, dtype=torch.bfloat16)])
    same(whole[0, -1], decoded)
    same(whole[0, :, -1].contiguous(), decoded)
    assert whole[0, :-1, :-1].count_nonzero() == n - 1


def test_assembly(tmp_path):
    """What the interpreter cannot show, of GPUs that need not be there: no kernel fuses, approximates, flushes
    subnormal numbers or spills registers, loads and stores along rows are of 16 bytes, and another number of rows or
    matrices is not compiled again."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_targets", "codec"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for target in json.loads(done.stdout):
        assert len(set(target["counts"])) == 1
        for name, text in target["assembly"]:
            (check_ptx if target["backend"] == "cuda" else check_gcn)(name, text)


def check_ptx(name: str, text: str) -> None:
    assert not re.findall(r"\b(?:fma|mad)\S*f32|\S+\.(?:ftz|approx|full)\b\S*|\b(?:ld|st)\.local\S*", text)
    if name.startswith("_dequantize"):
        assert re.search(r"\bst\.global\S*\.v4\.b32", text)
    elif name != "_quantize_scales" and "sqrt" not in text:  # a root finds places in a triangle, which align nothing
        assert re.search(r"\bld\.global\S*\.v4\.b32", text)


def check_gcn(name: str, text: str) -> None:
    assert ".amdhsa_float_denorm_mode_32 3" in text
    assert re.search(r"\.vgpr_spill_count:\s+0\b", text)
    if "v_sqrt" not in text:  # a division is five of them
        assert len(re.findall(r"\bv_fma(?:c|_f32|c_f32)", text)) == 5 * text.count("v_div_fixup_f32")
