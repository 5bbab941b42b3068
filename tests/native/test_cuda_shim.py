"""csrc/cuda/select_tokens.cuh, the source that nvcc compiles, run on the CPU through cuda_shim.h."""

import ctypes

import numpy as np
import pytest
import torch

from fastmkd.ops import get_op

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
GUARD = 64  # words around every buffer that the kernel must leave alone


@pytest.fixture(scope="session")
def kernel(shim):
    function = shim("select_tokens")

    def call(saliency, k, grid, target, order="forward"):
        rows, count = len(saliency), target[0] * target[1]
        data = np.ascontiguousarray(saliency, dtype=np.float32)
        out = np.full(rows * k + 2 * GUARD, -7, dtype=np.int64)
        workspace = np.full(rows * count + 2 * GUARD, 0xDEADBEEF, dtype=np.uint32)
        code = function(
            ctypes.c_void_p(data.ctypes.data), rows, k, *grid, *target, ctypes.c_void_p(out[GUARD:].ctypes.data),
            ctypes.c_void_p(workspace[GUARD:].ctypes.data), ORDERS[order],
        )  # fmt: skip
        assert code == 0
        assert (out[:GUARD] == -7).all()
        assert (out[-GUARD:] == -7).all()
        assert (workspace[:GUARD] == 0xDEADBEEF).all()
        assert (workspace[-GUARD:] == 0xDEADBEEF).all()
        return out[GUARD:-GUARD].reshape(rows, k)

    return call


def scores(kind, rows, count):
    generator = np.random.default_rng(count)
    if kind == "smooth":
        return generator.standard_normal((rows, count)).astype(np.float32)
    if kind == "ties":
        return generator.integers(-2, 3, (rows, count)).astype(np.float32) * np.float32(0.3)
    if kind == "zeros":  # both signs: all equal
        return np.where(generator.random((rows, count)) < 0.5, np.float32(0.0), np.float32(-0.0))
    return np.full((rows, count), -np.finfo(np.float32).max, dtype=np.float32)


def largest(values, k):
    order = np.argsort(-values, axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1)


@pytest.mark.parametrize("kind", ["smooth", "ties", "zeros", "lowest"])
@pytest.mark.parametrize("count", [1, 16, 196, 255, 256, 257, 577, 1024, 4096])
def test_selection(kernel, kind, count):
    values = scores(kind, 2, count)
    for k in {1, (count + 1) // 2, max(1, count - 1), count}:
        np.testing.assert_array_equal(kernel(values, k, (1, count), (1, count)), largest(values, k))


def test_selection_in_the_workspace(kernel):
    values = scores("ties", 2, 10500)  # longer than shared memory holds
    np.testing.assert_array_equal(kernel(values, 3000, (1, 10500), (1, 10500)), largest(values, 3000))


@pytest.mark.parametrize(
    ("grid", "target"),
    [((14, 14), (16, 16)), ((14, 14), (24, 24)), ((24, 24), (9, 11)), ((1, 12), (5, 12)), ((1, 1), (3, 2))],
)
@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_resized_selection_equals_the_reference(kernel, kind, grid, target):
    values = scores(kind, 3, grid[0] * grid[1])
    n = target[0] * target[1]
    for k in {1, n // 2, n}:
        want = get_op("select_tokens").reference(torch.from_numpy(values), k, *grid, *target)
        np.testing.assert_array_equal(kernel(values, k, grid, target), want.numpy())


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_no_order_of_threads_changes_the_result(kernel, order):
    for kind in ("smooth", "ties"):
        values = scores(kind, 2, 600)
        got = kernel(values, 200, (20, 30), (25, 31), order)
        np.testing.assert_array_equal(got, kernel(values, 200, (20, 30), (25, 31)))
        np.testing.assert_array_equal(kernel(values, 200, (20, 30), (20, 30), order), largest(values, 200))


@pytest.mark.gpu
def test_on_a_gpu(kernel):
    from fastmkd import _native_loader

    if not _native_loader.load().cuda:
        pytest.skip(str(_native_loader.load().cuda_reason))
    for kind in ("smooth", "ties", "zeros"):
        for grid, target, k in (((14, 14), (14, 14), 98), ((14, 14), (24, 24), 288), ((105, 100), (105, 100), 3000)):
            values = scores(kind, 3, grid[0] * grid[1])
            got = torch.ops.fastmkd_native.select_tokens(torch.from_numpy(values).cuda(), k, *grid, *target)
            np.testing.assert_array_equal(got.cpu().numpy(), kernel(values, k, grid, target))
