"""csrc/cuda/centred_gram.cuh, the source that nvcc compiles, run on the CPU through cuda_shim.h."""

import ctypes
import shutil

import numpy as np
import pytest
import torch

from fastmkd.ops import get_op
from fastmkd.ops.accuracy import judge, upcast

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GUARD = 64  # numbers around every buffer that the kernels must leave alone


def guarded(count, dtype):
    """A buffer of NaN, so that whatever the kernels leave unwritten shows."""
    return np.full(count + 2 * GUARD, np.nan, dtype=dtype)


@pytest.fixture(scope="session")
def gram(tmp_path_factory, run, root):
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    library = tmp_path_factory.mktemp("shim") / "centred_gram.so"
    folder = root / "tests" / "native"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
    run(
        compiler, "-std=c++20", "-O2", *warnings, "-shared", "-fPIC", f"-I{folder}", f"-I{root / 'csrc'}",
        folder / "centred_gram_shim.cpp", "-o", library,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.gram_blocks.restype = ctypes.c_int64

    def call(features, order="forward"):
        n, count = len(features[0]), len(features)
        strides = (ctypes.c_int64 * count)(*(x.stride(0) for x in features))
        widths = (ctypes.c_int64 * count)(*(x.shape[1] for x in features))
        blocks = loaded.gram_blocks(count, n, widths)
        sums = guarded(blocks * loaded.gram_square(), np.float32)
        means, out = guarded(count * n, np.float64), guarded(count * n * n, np.float32)
        pointers = (ctypes.c_void_p * count)(*(x.data_ptr() for x in features))
        inside = [ctypes.c_void_p(buffer[GUARD:].ctypes.data) for buffer in (sums, means, out)]
        code = loaded.centred_gram_shim(
            count, n, pointers, strides, widths, DTYPES[features[0].dtype], *inside, ORDERS[order]
        )
        assert code == 0
        for buffer in (sums, means, out):
            assert np.isnan(buffer[:GUARD]).all()
            assert np.isnan(buffer[-GUARD:]).all()
            assert not np.isnan(buffer[GUARD:-GUARD]).any()
        return torch.from_numpy(out[GUARD:-GUARD].reshape(count, n, n).copy()), blocks

    return call


def layers(dtype, n, *widths, mean=0.0, padding=0):
    g = torch.Generator().manual_seed(n + sum(widths))
    return [(torch.randn(n, d + padding, generator=g) + mean).to(dtype)[:, :d] for d in widths]


CASES = {
    "least_batch": {"n": 4, "widths": (1, 31)},
    "one_layer": {"n": 64, "widths": (32,)},
    "several_parts": {"n": 9, "widths": (4097, 6200, 2048), "mean": 3.0},
    "three_tiles": {"n": 67, "widths": (48, 2500), "padding": 5},
    "ten_tiles": {"n": 193, "widths": (40, 7), "mean": 100.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(gram, case, dtype):
    options = dict(CASES[case])
    args = (layers(dtype, options.pop("n"), *options.pop("widths"), **options),)
    out, _ = gram(*args)
    reference = get_op("centred_gram").reference
    verdict = judge(out, reference(*upcast(args)), reference(*args))
    assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registry_samples(gram, dtype):
    op = get_op("centred_gram")
    for sample in op.samples("cpu", dtype):
        if not sample.huge and op.cost(*sample.args).flops < 1e7:
            args = sample.args
            verdict = judge(gram(*args)[0], op.reference(*upcast(args)), op.reference(*args))
            assert verdict.ok, (sample.name, verdict)


def test_half_precision_numbers_of_every_size_are_read_right(gram):
    for dtype in (torch.float16, torch.bfloat16):
        numbers = (
            torch.arange(-(2**15), 2**15, 733, dtype=torch.int32).to(torch.int16).view(dtype)
        )  # subnormal ones too
        numbers = numbers[numbers.abs() < 1e15]  # NaN and what overflows when it is squared left out
        # K[1, 2] of the images 0, x, 1, 0 is x; U-centring then leaves a fixed multiple of it.
        features = [torch.stack((x * 0, x, x * 0 + 1, x * 0))[:, None] for x in numbers]
        assert len(features) > 40
        torch.testing.assert_close(gram(features)[0], get_op("centred_gram").reference(features), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_no_order_of_threads_changes_the_result(gram, order):
    features = layers(torch.float32, 67, 4100, 30)
    out, blocks = gram(features)
    assert blocks == 12  # three tiles of three parts and of one
    assert torch.equal(gram(features, order)[0], out)


def test_symmetric_with_an_empty_diagonal_and_zero_for_a_dead_layer(gram):
    (alive,) = layers(torch.float32, 70, 33)
    dead, one_image = torch.full((70, 33), 3.3), torch.zeros(70, 33)
    one_image[0] = alive[0]
    out, _ = gram([alive, dead, one_image])
    assert torch.equal(out, out.mT)
    assert not out.diagonal(dim1=1, dim2=2).any()
    assert not out[1:].any()
    assert out[0].any()


@pytest.mark.gpu
def test_on_a_gpu():
    from fastmkd import _native_loader

    if not _native_loader.load().cuda:
        pytest.skip(str(_native_loader.load().cuda_reason))
    reference = get_op("centred_gram").reference
    for dtype in DTYPES:
        args = ([x.cuda() for x in layers(dtype, 130, *range(1, 101), 30000)],)  # more layers than one launch takes
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = torch.ops.fastmkd_native.centred_gram(*args)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        verdict = judge(out, reference(*upcast(args)), reference(*args))
        assert verdict.ok, (dtype, verdict)
        assert torch.equal(torch.ops.fastmkd_native.centred_gram(*args), out)
