"""The compiled CPU operator, and the CUDA kernel's source run on the CPU, against tables made with a dictionary."""

import ctypes

import numpy as np
import pytest
import torch

from fastmkd.ops.tap_tables import slow_tables

GUARD = 64  # words around every buffer that the kernel must leave alone
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}

# name: batch, grid, cell, kernel, stride, padding, dilation, share hidden
CASES = {
    "one_row": (1, (1, 1), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 0.0),
    "one_visible_cell": (1, (3, 3), (2, 2), (3, 3), (1, 1), (1, 1), (1, 1), 1.0),
    "all_visible": (2, (3, 3), (3, 3), (3, 3), (1, 1), (1, 1), (1, 1), 0.0),
    "not_square": (3, (2, 5), (3, 1), (1, 5), (1, 1), (0, 2), (1, 1), 0.4),
    "stride_two": (2, (3, 3), (4, 4), (3, 3), (2, 2), (1, 1), (1, 1), 0.5),
    "stride_two_pointwise": (2, (3, 2), (2, 2), (1, 1), (2, 2), (0, 0), (1, 1), 0.5),
    "dilated": (2, (4, 4), (2, 1), (3, 3), (1, 1), (6, 2), (6, 2), 0.4),
    "beyond_the_grid": (1, (2, 2), (2, 2), (3, 3), (1, 1), (9, 9), (9, 9), 0.0),
    "stem": (1, (2, 2), (8, 8), (7, 7), (2, 2), (3, 3), (1, 1), 0.5),
    "wide_kernel": (2, (6, 6), (1, 1), (7, 7), (1, 1), (3, 3), (1, 1), 0.5),
    "even_kernel": (2, (3, 4), (2, 2), (4, 2), (1, 1), (1, 0), (1, 1), 0.5),  # more zeros after the map than before
    "more_taps_than_bits": (2, (4, 4), (2, 2), (9, 9), (1, 1), (4, 4), (1, 1), 0.3),
    "few_rows_a_block": (2, (4, 4), (2, 2), (13, 9), (1, 1), (6, 4), (1, 1), 0.3),
}


def arguments(case):
    """The op's arguments but the last, and the mask that they come from."""
    batch, grid, cell, *window, hidden = CASES[case]
    scores = torch.rand(batch, *grid, generator=torch.Generator().manual_seed(batch))
    visible = (scores >= hidden) | (scores == scores.amax((1, 2), keepdim=True))
    rank = torch.where(visible.flatten(), visible.flatten().cumsum(0) - 1, -1).view_as(visible)
    return (visible.flatten().nonzero()[:, 0], rank, cell, *window), visible


def pixels(values, cell):
    """Each cell of ``(B, gh, gw)`` repeated."""
    return values.repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2)


def expected(case, transposed):
    """Table and pattern from the slow table, whose rows are in reading order."""
    (_, rank, cell, kernel, stride, padding, dilation), visible = arguments(case)
    sides = cell, (cell[0] // stride[0], cell[1] // stride[1])
    slow = slow_tables(*(pixels(visible, side) for side in sides), kernel, stride, padding, dilation)[int(transposed)]
    numbers = []  # of input and output rows: the packed number of each in reading order
    for h, w in sides:
        inside = torch.arange(h * w).view(h, w).repeat(rank.shape[1:])
        numbers.append((pixels(rank, (h, w)) * (h * w) + inside)[pixels(visible, (h, w))])
    rows, entries = numbers if transposed else numbers[::-1]
    table = torch.empty_like(slow)
    table[rows] = torch.where(slow >= 0, entries[slow.long()].int(), -1)
    pattern = ((table[:, :52] >= 0).long() << torch.arange(min(52, table.shape[1]))).sum(1)
    return table, pattern


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_operator(ops, case, transposed):
    args, _ = arguments(case)
    for got, want in zip(ops.tap_table(*args, transposed), expected(case, transposed), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_operator_without_cells(ops):
    hidden = torch.full((2, 3, 3), -1)
    table, pattern = ops.tap_table(hidden[:0].flatten(), hidden, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1), False)
    assert table.shape == (0, 9)
    assert pattern.shape == (0,)


def test_operator_does_not_depend_on_the_thread_count(ops):
    rank = torch.arange(4 * 49).view(4, 7, 7)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.tap_table(rank.flatten(), rank, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), False))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


CELLS, RANK, WINDOW = torch.tensor([0, 3]), torch.tensor([[[0, -1], [-1, 1]]]), ((3, 3), (2, 2), (1, 1), (1, 1))
BAD = [
    ((CELLS[None], RANK, (4, 4), *WINDOW), "cells has shape"),
    ((CELLS, RANK[0], (4, 4), *WINDOW), "rank has shape"),
    ((CELLS, RANK[:0], (4, 4), *WINDOW), "rank has shape"),
    ((CELLS.int(), RANK, (4, 4), *WINDOW), "cells has dtype Int"),
    ((CELLS, RANK.int(), (4, 4), *WINDOW), "rank has dtype Int"),
    ((CELLS, RANK.mT, (4, 4), *WINDOW), "rank is not contiguous"),
    ((CELLS + 1, RANK, (4, 4), *WINDOW), "cells holds 4; expected 0 to 3"),
    ((CELLS - 1, RANK, (4, 4), *WINDOW), "cells holds -1"),
    ((CELLS[:1], RANK, (4, 4), *WINDOW), "rank holds 1; expected -1 to 0"),
    ((CELLS, RANK - 1, (4, 4), *WINDOW), "rank holds -2"),
    ((CELLS, RANK, (4,), *WINDOW), "cell holds 1 numbers; expected 2"),
    ((CELLS, RANK, (4, 0), *WINDOW), r"cell is \(4, 0\)"),
    ((CELLS, RANK, (4, 3), *WINDOW), r"stride is \(2, 2\); expected divisors of cell, \(4, 3\)"),
    ((CELLS, RANK, (4, 4), (3, 0), *WINDOW[1:]), r"kernel is \(3, 0\)"),
    ((CELLS, RANK, (4, 4), (3, 3), (0, 2), *WINDOW[2:]), r"stride is \(0, 2\)"),
    ((CELLS, RANK, (4, 4), (3, 3), (2, 2), (-1, 1), (1, 1)), r"padding is \(-1, 1\)"),
    ((CELLS, RANK, (4, 4), *WINDOW[:3], (1, 1 << 15)), "dilation is"),
    ((torch.arange(9), torch.arange(9).view(1, 3, 3), (1 << 14, 1 << 14), *WINDOW), "cells has 9 cells"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[message[:16] for _, message in BAD])
def test_bad_arguments_are_named(ops, args, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.tap_table(*args, False)


@pytest.fixture(scope="session")
def kernel(shim):
    function = shim("tap_table")

    def call(case, transposed, order="forward"):
        (cells, rank, cell, *window), _ = arguments(case)
        kernel, stride = window[:2]
        side = [n if transposed else n // s for n, s in zip(cell, stride, strict=True)]
        rows, taps = len(cells) * side[0] * side[1], kernel[0] * kernel[1]
        table = np.full(rows * taps + 2 * GUARD, -7, dtype=np.int32)
        pattern = np.full(rows + 2 * GUARD, -7, dtype=np.int64)
        numbers = (ctypes.c_int * 8)(*(n for pair in window for n in pair))
        code = function(
            ctypes.c_void_p(cells.data_ptr()), ctypes.c_void_p(rank.data_ptr()), len(cells), *rank.shape[1:], *cell,
            numbers, int(transposed), ctypes.c_void_p(table[GUARD:].ctypes.data),
            ctypes.c_void_p(pattern[GUARD:].ctypes.data), ORDERS[order],
        )  # fmt: skip
        assert code == 0
        for buffer in (table, pattern):
            assert (buffer[:GUARD] == -7).all()
            assert (buffer[-GUARD:] == -7).all()
        return table[GUARD:-GUARD].reshape(rows, taps), pattern[GUARD:-GUARD]

    return call


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_cuda_source(kernel, case, transposed):
    for got, want in zip(kernel(case, transposed), expected(case, transposed), strict=True):
        np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_no_order_of_threads_changes_the_result(kernel, order):
    for case in ("stride_two", "few_rows_a_block"):
        for got, want in zip(kernel(case, True, order), kernel(case, True), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, transposed):
    from fastmkd import _native_loader

    if not _native_loader.load().cuda:
        pytest.skip(str(_native_loader.load().cuda_reason))
    (cells, rank, *numbers), _ = arguments(case)
    found = torch.ops.fastmkd_native.tap_table(cells.cuda(), rank.cuda(), *numbers, transposed)
    for got, want in zip(found, expected(case, transposed), strict=True):
        assert torch.equal(got.cpu(), want)
