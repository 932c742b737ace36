"""The codec compiled by numba against the reference: the same bits, of rows and of symmetric matrices."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowbit_optim
from lowbit_optim import kernels
from lowbit_optim.kernels import cpu_codec, cpu_decode, cpu_encode, reference
from lowbit_optim.storage import CODEBOOKS, Quantization, Symmetric
from lowbit_optim.storage.codebooks import BITS, table

CPU = torch.device("cpu")
LAYOUTS = ["triangle", "square"]
MANY = Quantization(4, "nf", 64, double=True)


def ordinary(shape, generator):
    return torch.randn(shape, generator=generator)


def of_any_magnitude(shape, generator):
    """From the smallest subnormal to the largest finite numbers."""
    exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 83 - 44.8
    x = 10.0**exponents * torch.randn(shape, generator=generator).sign()
    return x.clamp(-3.4e38, 3.4e38).float()


def subnormal(shape, generator):
    return torch.randn(shape, generator=generator) * 1e-43


def mostly_zero(shape, generator):
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.9] = 0.0
    return x * torch.randn(shape, generator=generator).sign()  # zeros of both signs


def on_a_grid(shape, generator):
    """Many quotients lie on boundaries."""
    return torch.randint(-254, 255, shape, generator=generator).float() / 254


NUMBERS = [ordinary, of_any_magnitude, subnormal, mostly_zero, on_a_grid]
hows = st.builds(
    Quantization,
    bits=st.sampled_from(BITS),
    codebook=st.sampled_from(CODEBOOKS),
    block_size=st.sampled_from([16, 32, 64, 128, 4096]),
    double=st.booleans(),
    scale=st.sampled_from(["absmax", "fitted"]),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def arguments(q):
    return (*table(q.codebook, q.bits, torch.float32, CPU), q.bits, q.block_size, q.scale == "fitted", q.double)


def assert_same_bits(one, other, said):
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    assert (one.shape, one.dtype) == (other.shape, other.dtype), said
    different = one.view(as_bits[one.itemsize]) != other.view(as_bits[one.itemsize])
    assert not different.any(), f"{said}: {int(different.sum())} of {different.numel()} differ"


def assert_same_parts(ours, expected):
    for name, one, other in zip(["codes", "scales", "maxima"], ours, expected, strict=True):
        assert_same_bits(one, other, name)


def assert_rows_agree(q, x, dtype):
    values, how = table(q.codebook, q.bits, torch.float32, CPU).values, (q.bits, q.block_size, x.shape[1], dtype)
    parts = cpu_codec.quantize_blockwise(x, *arguments(q))
    assert_same_parts(parts, reference.quantize_blockwise(x, *arguments(q)))
    expected = reference.dequantize_blockwise(*parts, values, *how)
    assert_same_bits(cpu_codec.dequantize_blockwise(*parts, values, *how), expected, "decoded")


def assert_matrices_agree(q, x, layout, dtype):
    values, how = table(q.codebook, q.bits, torch.float32, CPU).values, (q.bits, q.block_size, layout, dtype)
    parts, diagonal = cpu_codec.quantize_symmetric(x, *arguments(q), layout), x.diagonal(dim1=1, dim2=2).contiguous()
    assert_same_parts(parts, reference.quantize_symmetric(x, *arguments(q), layout))
    expected = reference.dequantize_symmetric(*parts, diagonal, values, *how)
    assert_same_bits(cpu_codec.dequantize_symmetric(*parts, diagonal, values, *how), expected, "decoded")


# ------------------------------------------------------------------------------------------------- the same bits


@given(hows, st.integers(0, 4), st.integers(0, 300), st.sampled_from(NUMBERS), dtypes, dtypes, st.integers(0, 99))
def test_rows(q, rows, n, numbers, dtype, decoded_dtype, seed):
    x = numbers((rows, n), torch.Generator().manual_seed(seed)).to(dtype)
    assert_rows_agree(q, x.nan_to_num(), decoded_dtype)


@given(
    hows,
    st.integers(0, 3),
    st.integers(0, 70),
    st.sampled_from(LAYOUTS),
    st.sampled_from(NUMBERS),
    dtypes,
    dtypes,
    st.integers(0, 99),
)
def test_matrices(q, k, n, layout, numbers, dtype, decoded_dtype, seed):
    x = numbers((k, n, n), torch.Generator().manual_seed(seed)).to(dtype)
    assert_matrices_agree(q, x.nan_to_num(), layout, decoded_dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quotients_around_every_boundary(codebook, bits):
    """At each scale that is tried, the boundary and the numbers beside it; and the ends of the cells."""
    boundaries = table(codebook, bits, torch.float32, CPU).boundaries
    edges = boundaries[boundaries.isfinite()]
    if bits > 4:
        cells = cpu_encode.cells_of(boundaries.numpy().tobytes())
        assert cells is not None
        assert len(cells.codes) <= 4096  # with their limits they stay in the first-level cache
        leading = torch.arange(cells.lowest, cells.lowest + cells.last + 1, dtype=torch.int32)
        starts = (leading << cells.shift).view(torch.float32)
        edges = torch.cat([edges, starts, -starts])
    edges = torch.cat([edges * fraction for fraction in (*reference.FIT_CANDIDATES, 1 / 3)]).clamp(-1, 1)
    x = torch.cat([edges, *(torch.nextafter(edges, torch.tensor(to)) for to in (2.0, -2.0)), torch.zeros(1)])
    x = torch.nn.functional.pad(x, (0, -len(x) % 63)).view(-1, 63).clamp(-1, 1)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)  # every block has the scale 1
    for scale in ("absmax", "fitted"):
        assert_rows_agree(Quantization(bits, codebook, 64, scale=scale), x, torch.float32)


def test_a_table_is_data():
    """Values that no codebook has: not symmetric, far from 1, repeated at the end."""
    x = ordinary((3, 200), torch.Generator().manual_seed(0))
    for bits in BITS:
        values = torch.linspace(-0.3, 7.0, 2**bits).square().sort().values
        values[-2:] = values[-2]
        boundaries = ((values[1:] + values[:-1]) / 2).where(values[:-1] < values[1:], torch.inf)
        for fitted in (False, True):
            how = values, boundaries, bits, 64, fitted, False
            parts = cpu_codec.quantize_blockwise(x, *how)
            assert_same_parts(parts, reference.quantize_blockwise(x, *how))


def test_a_table_too_dense_for_cells_is_coded_by_the_reference():
    x = ordinary((3, 200), torch.Generator().manual_seed(0))
    values = torch.cat([torch.arange(128) / 1e9 + 0.5, torch.arange(128) * 6e-8 + 1]).float().sort().values
    boundaries = ((values[1:].double() + values[:-1].double()) / 2).float()
    boundaries = boundaries.where(values[:-1] < values[1:], torch.inf).sort().values
    how = values, boundaries, 8, 64, False, True
    assert cpu_encode.cells_of(boundaries.numpy().tobytes()) is None
    assert_same_parts(cpu_codec.quantize_blockwise(x, *how), reference.quantize_blockwise(x, *how))


def test_many_blocks_share_a_maximum_by_groups():
    for q in (Quantization(4, "nf", 16, double=True), Quantization(3, "nf", 16, double=True, scale="fitted")):
        x = ordinary((2, 16 * 600 + 5), torch.Generator().manual_seed(0))
        assert_rows_agree(q, x * torch.logspace(-3, 3, x.shape[1]), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_matrices_of_several_strips_and_runs(layout):
    x = ordinary((2, 170, 170), torch.Generator().manual_seed(0))
    for bits in BITS:
        assert_matrices_agree(Quantization(bits, "linear-2", 64), x, layout, torch.float32)


# ------------------------------------------------------------------------------------------------- what may be given


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decoding_into_what_is_kept(layout, dtype):
    kept = Symmetric(Quantization(4, "nf", 64), layout)
    x = ordinary((3, 70, 70), torch.Generator().manual_seed(0))
    parts = kept.encode(x)
    expected = kept.decode(parts, dtype)
    larger, turned = torch.empty(3, 90, 90, dtype=dtype), torch.empty(70, 70, 3, dtype=dtype)
    for out in (torch.empty(3, 70, 70, dtype=dtype), larger[:, :70, 10:80], turned.permute(2, 1, 0)):
        assert kept.decode(parts, dtype, out=out) is out
        assert torch.equal(out, expected)
    assert torch.equal(kept.decode(parts, torch.float32).to(dtype), expected) or dtype == torch.float64


def test_an_out_that_does_not_fit_is_refused():
    kept = Symmetric(Quantization(4, "nf", 64))
    parts = kept.encode(torch.zeros(2, 40, 40))
    with pytest.raises(ValueError, match=r"float32 \[2, 40, 41\].*float32 \[2, 40, 40\]"):
        kept.decode(parts, out=torch.empty(2, 40, 41))
    with pytest.raises(ValueError, match=r"float64.*float32"):
        kept.decode(parts, out=torch.empty(2, 40, 40, dtype=torch.float64))


def test_strided_numbers_codes_and_tensors_that_require_gradients():
    x = ordinary((70, 40, 3), torch.Generator().manual_seed(0)).permute(2, 0, 1).requires_grad_()
    q = Quantization(4, "nf", 64, double=True)
    parts = q.encode(x)
    expected = q.encode(x.detach().contiguous())
    assert all(torch.equal(parts[name], expected[name]) for name in parts)
    assert torch.equal(q.decode({k: v[1:, ::2] for k, v in parts.items()}, 40), q.decode(parts, 40)[1:, ::2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_is_float32_rounded(layout):
    kept = Symmetric(Quantization(8, "linear", 64), layout)
    parts = kept.encode(ordinary((2, 70, 70), torch.Generator().manual_seed(0)))
    assert torch.equal(kept.decode(parts, torch.float16), kept.decode(parts).half())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_dtypes(layout):
    x = ordinary((2, 40, 40), torch.Generator().manual_seed(0))
    kept = Symmetric(Quantization(4, "nf", 64, scale="fitted"), layout)
    for dtype in (torch.float16, torch.bfloat16):
        ours, expected = kept.encode(x.to(dtype)), kept.encode(x.to(dtype).float())
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    wide = kept.decode(kept.encode(x.double()), torch.float64)
    torch.testing.assert_close(wide.float(), kept.decode(kept.encode(x)))


# ------------------------------------------------------------------------------------------------- torch.library


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_the_operators_keep_their_promises(layout):
    """Schema, fake tensors and tracing, as torch checks them."""
    q = Quantization(3, "nf", 16, double=True)
    x = ordinary((2, 37, 37), torch.Generator().manual_seed(0))
    values = arguments(q)[0]
    rows, matrices = (
        kernels.quantize_blockwise(x[0], *arguments(q)),
        kernels.quantize_symmetric(x, *arguments(q), layout),
    )
    tests = ("test_schema", "test_faketensor")
    check = torch.library.opcheck
    check(kernels._quantize_blockwise, (x[0], *arguments(q)), test_utils=tests)
    check(kernels._quantize_symmetric, (x, *arguments(q), layout), test_utils=tests)
    check(kernels._dequantize_blockwise, (*rows, values, 3, 16, torch.empty(37, 37)), test_utils=tests)
    matrix = (*matrices, torch.ones(2, 37), values, 3, 16, layout, torch.empty(2, 37, 37))
    check(kernels._dequantize_symmetric, matrix, test_utils=tests)


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_runs_through_the_operators():
    x = ordinary((2, 40, 40), torch.Generator().manual_seed(0))
    values, *how = arguments(MANY)

    def recode(x):
        parts = kernels.quantize_symmetric(x * 2, values, *how, "triangle")
        diagonal = torch.ones(x.shape[:2])
        whole = kernels.dequantize_symmetric(*parts, diagonal, values, 4, 64, "triangle", torch.float32)
        rows = kernels.quantize_blockwise(whole[0], values, *how)
        return kernels.dequantize_blockwise(
            *rows, values, 4, 64, 40, torch.bfloat16, out=torch.empty_like(x[0]).bfloat16()
        )

    compiled = torch.compile(recode, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), recode(x))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_optimizer_step_breaks_the_graph_at_first_order_steps():
    def stepped(compiled):
        parameter = torch.nn.Parameter(ordinary((8, 40), torch.Generator().manual_seed(0)))
        optimizer = lowbit_optim.AdamW([parameter], lr=0.1, bits=8)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(2):
            parameter.grad = ordinary((8, 40), torch.Generator().manual_seed(seed))
            step()
        return parameter.detach()

    torch.testing.assert_close(stepped(True), stepped(False))  # scalars are traced, and round otherwise


# ------------------------------------------------------------------------------------------------- threads, on the CPU


def results(q, x):
    parts = cpu_codec.quantize_symmetric(x, *arguments(q), "triangle")
    values, diagonal = arguments(q)[0], torch.zeros(x.shape[:2])
    return (*parts, cpu_codec.dequantize_symmetric(*parts, diagonal, values, q.bits, 64, "triangle", torch.float32))


@pytest.fixture(name="threads")
def _threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(threads, monkeypatch):
    monkeypatch.setattr(cpu_codec, "JOB", 1 << 12)
    x = ordinary((5, 150, 150), torch.Generator().manual_seed(0))
    threads(1)
    expected = results(MANY, x)
    for count in (2, 3):
        threads(count)
        for one, other in zip(results(MANY, x), expected, strict=True):
            assert torch.equal(one, other)


def test_two_threads_at_once(threads, monkeypatch):
    monkeypatch.setattr(cpu_codec, "JOB", 1 << 12)
    threads(2)
    xs = [ordinary((5, 150, 150), torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [results(MANY, x) for x in xs]
    barrier = threading.Barrier(4)

    def work(x):
        barrier.wait()
        return results(MANY, x)

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(work, xs), expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(threads, monkeypatch):
    monkeypatch.setattr(cpu_codec, "JOB", 1 << 12)
    threads(2)
    x = ordinary((5, 150, 150), torch.Generator().manual_seed(0))
    expected = results(MANY, x)  # the parent's threads are there
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(60)
            # Not torch.equal: OpenMP's threads, which torch may have started, are not there in a child.
            status = int(
                not all(
                    (one.numpy() == other.numpy()).all() for one, other in zip(results(MANY, x), expected, strict=True)
                )
            )
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------------------------------------- starting up


START = """
import sys, torch
from lowbit_optim.storage import Quantization, Symmetric
assert not {"numba", "triton"} & set(sys.modules)
kept = Symmetric(Quantization(2, "nf", 64, double=True))
kept.decode(kept.identity(1, 40, torch.float32))
from lowbit_optim.kernels.cpu_decode import dequantize_triangles
print(sum(dequantize_triangles.stats.cache_misses.values()))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    """And importing the package imports no compiler."""
    said = [
        subprocess.run(
            [sys.executable, "-c", START],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [["1"], ["0"]]


# ------------------------------------------------------------------------------------------------- the dispatch


@pytest.fixture(name="forget")
def _forget():
    """What was decided about backends is decided anew, now and after the test."""

    def forget():
        for decided in (kernels.forced, kernels.backend, kernels._warn):
            decided.cache_clear()

    forget()
    yield forget
    forget()


def module(device="cpu", dtype=torch.float32, work="codec"):
    return kernels.backend(work, torch.device(device), dtype).__name__.rpartition(".")[2]


@pytest.mark.usefixtures("forget")
def test_each_device_and_dtype_has_its_backend(monkeypatch):
    monkeypatch.delenv("LOWBIT_BACKEND", raising=False)
    assert module() == module(dtype=torch.bfloat16) == "cpu_codec"
    assert module(work="steps") == "cpu_steps"
    assert module(dtype=torch.float64) == module("meta") == "reference"
    assert module("meta", work="steps") == "first_order"


@pytest.mark.usefixtures("forget")
def test_a_device_without_kernels_has_the_reference_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.delenv("LOWBIT_BACKEND", raising=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for work, name in (("codec", "reference"), ("steps", "first_order")):
            assert module("mps", dtype, work) == name
    (line,) = caplog.messages
    assert "reference runs on mps, slowly: there are no kernels" in line


@pytest.mark.usefixtures("forget")
def test_an_old_gpu_has_the_reference(monkeypatch, caplog):
    monkeypatch.delenv("LOWBIT_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert module("cuda") == "reference"
    assert "8.0 or more, and this one has 6.1" in caplog.text


@pytest.mark.usefixtures("forget")
def test_without_numba_the_reference_codes(monkeypatch, caplog):
    monkeypatch.delenv("LOWBIT_BACKEND", raising=False)
    monkeypatch.setitem(sys.modules, "lowbit_optim.kernels.cpu_codec", None)
    x = ordinary((2, 40), torch.Generator().manual_seed(0))
    assert_same_parts(
        kernels.quantize_blockwise(x, *arguments(MANY)), reference.quantize_blockwise(x, *arguments(MANY))
    )
    assert "the plain torch reference runs on cpu" in caplog.text


def test_the_environment_forces_a_backend(monkeypatch, forget):
    def force(name):
        monkeypatch.setenv("LOWBIT_BACKEND", name)
        forget()

    force("reference")
    assert (module(), module(work="steps")) == ("reference", "first_order")
    force("numba")
    assert (module(), module("meta")) == ("cpu_codec", "reference")
    with pytest.raises(RuntimeError, match=r"LOWBIT_BACKEND=numba cannot serve cpu in torch.float64.*'reference'"):
        module(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"numba cannot serve cuda.*serves the CPU"):
        module("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    force("triton")
    with pytest.raises(RuntimeError, match=r"triton cannot serve cpu.*TRITON_INTERPRET=1"):
        module()
    with pytest.raises(RuntimeError, match=r"triton cannot serve mps.*CUDA and ROCm"):
        module("mps")
    monkeypatch.setenv("LOWBIT_BACKEND", "cuda")
    forget()
    with pytest.raises(ValueError, match=r"'cuda'.*reference, numba, triton"):
        module()


def test_offsets_past_2_to_the_31():
    """Of 2^31 numbers and a row more that row only; what nobody touches is no memory yet."""
    rows, n, last = 2**19 + 1, 4096, 2**19
    values, boundaries, *_ = arguments(Quantization(8, "linear", 64))
    x = ordinary((1, n), torch.Generator().manual_seed(0)).bfloat16()
    source, packed, scales = (
        np.zeros(rows * n, np.uint16),
        np.zeros(rows * n, np.uint8),
        np.zeros(rows * 64, np.float32),
    )
    source[last * n :] = x.view(torch.uint16).numpy()
    tables = (
        boundaries.numpy(),
        tuple(cpu_codec._cells_for(boundaries, 8)),
        cpu_encode.FRACTIONS,
        *cpu_encode.NO_LIMITS,
    )
    outputs = packed, scales, np.zeros(0, np.uint8), np.zeros(0, np.float32)
    how = (8, 64, False, False)
    cpu_encode.quantize((16, source), 0, n, n, how, tables, *outputs, last, rows, cpu_encode.scratch())
    codes, expected_scales, maxima = reference.quantize_blockwise(x, values, boundaries, 8, 64, False, False)
    assert np.array_equal(packed[last * n :], codes[0])
    assert np.array_equal(scales[last * 64 :], expected_scales[0])
    source[last * n :] = 0
    parts, runs, scratch = (*outputs, values.numpy(), cpu_codec.NO_PAIRS), n // cpu_decode.RUN, cpu_decode.row_scratch()
    target = False, outputs[3], source
    cpu_decode.dequantize_rows(parts, outputs[3], 0, (8, 64, False, n), target, last * runs, rows * runs, scratch)
    decoded = reference.dequantize_blockwise(codes, expected_scales, maxima, values, 8, 64, n, torch.bfloat16)
    assert np.array_equal(source[last * n :], decoded.view(torch.uint16)[0])


def test_under_another_name_the_package_registers_nothing():
    """A library that looks for another package `kernels` finds this one from the repository's root."""
    name, path = "kernels", Path(kernels.__file__)
    spec = importlib.util.spec_from_file_location(name, path)
    with pytest.raises(ImportError, match=r"this package is lowbit_optim\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
