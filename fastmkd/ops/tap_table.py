r"""Tap tables: which row lies under each tap of a sliding window, for the visible pixels of a batch.

A mask hides whole cells of an image, and a packed map lists its visible pixels cell by cell: row ``v * P + p`` is pixel
p of visible cell v, of which each has P pixels. Along one axis, with x a pixel of the input, o one of the output:

.. math:: x = o \cdot \mathrm{stride} + t \cdot \mathrm{dilation} - \mathrm{padding}

``cells (V,)`` are the numbers of the visible cells in ``rank (B, gh, gw)``, which holds each one's position v, and -1
for hidden cells. The table, ``(N_out, T)`` int32, holds the input row x under tap t of output row o; the transposed
one, ``(N_in, T)``, the output row o that reads input row x through tap t; -1 where that is hidden, outside the image,
or no pixel. The pattern of a row, int64, has bit t set where tap t of the first 52 is present.

Where a neighbour lies is arithmetic: which cell (a look-up in `rank`), and which pixel of it, which is the same for all
cells. Integers only, so every backend gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .registry import Backend, BadInput, Cost, Sample, declare
from .row_numbers import check_row_numbers
from .tap_locate import locate, neighbour_cells

__all__ = ["group_rows", "tap_table"]

SCHEMA = (
    "tap_table(Tensor cells, Tensor rank, int[] cell, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "bool transposed) -> (Tensor, Tensor)"
)
INTEGERS = (torch.int64,)
MOST_SIDE = 1 << 14  # of a cell, a grid, a window: then no product or sum of two overflows 32 bits
MOST_ROWS = (1 << 31) - 1
NONE = -(2**30)  # plus any pixel of a cell it stays negative

Pair = tuple[int, int]


def tap_table(
    cells: Tensor,
    rank: Tensor,
    cell: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Builds the table of a window operation on packed maps, on the device of the mask and without reading it back.

    Args:
        cells: ``(V,)`` int64, the visible cells of the batch in reading order.
        rank: ``(B, gh, gw)`` int64, position of a cell in `cells`, -1 if it is hidden.
        cell: ``(ch, cw)`` pixels per cell of the input map; the output map has ``(ch / stride, cw / stride)``.
        kernel: taps, ``(vertical, horizontal)`` as are the next three.
        stride: steps; they divide `cell`.
        padding: zeros before the map, above and left.
        dilation: distance between taps.
        transposed: for each input row, which output row reads it through each tap, instead of the other way round.

    Returns:
        ``(N, T)`` int32 row numbers, -1 for none, and ``(N,)`` int64 patterns.

    Raises:
        ValueError: numbers or shapes that do not fit, or a cell out of range (on a GPU an asynchronous assert).
        TypeError: dtypes other than int64.

    Example:
        >>> cells, rank = torch.tensor([0, 1]), torch.tensor([[[0, 1, -1]]])
        >>> tap_table(cells, rank, (1, 1), kernel=(1, 3), stride=(1, 1), padding=(0, 1), dilation=(1, 1))
        (tensor([[-1,  0,  1],
                [ 0,  1, -1]], dtype=torch.int32), tensor([6, 3]))
    """
    return _entry(cells, rank, cell, kernel, stride, padding, dilation, transposed)


def group_rows(pattern: Tensor) -> Tensor:
    """Returns an order of the rows in which those with the same taps follow each other, as GPU kernels want them.

    Apart from the op, whose results are the same bits on every backend: a processor's kernels need no order at all.

    Args:
        pattern: ``(N,)`` int64, the bits of the taps that each row has.

    Returns:
        ``(N,)`` int32: a permutation, rows with more of the late taps first, equal ones as they were.

    Example:
        >>> group_rows(torch.tensor([3, 6, 3, 6]))
        tensor([1, 3, 0, 2], dtype=torch.int32)
    """
    return pattern.argsort(descending=True, stable=True).to(torch.int32)


def reference(
    cells: Tensor,
    rank: Tensor,
    cell: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    local = locate(*((n[0], n[1]) for n in (cell, kernel, stride, padding, dilation)), transposed, cells.device)
    source_pixels = cell[0] * cell[1] // (stride[0] * stride[1] if transposed else 1)
    owner = neighbour_cells(cells, rank, local.offsets)  # (V, O)
    first_row = torch.where(owner < 0, NONE, owner * source_pixels).to(torch.int32)
    first_row = F.pad(first_row, (0, 1), value=NONE)  # (V, O + 1): the last column is for taps that never exist
    table = first_row.gather(1, local.column.expand(len(cells), -1)).add_(local.pixel).clamp_(min=-1)  # (V, P * T)
    # Each tap lies in one cell, so the bits of the cells that are seen add up to the pattern of the row.
    pattern = (owner >= 0).double() @ local.bits  # (V, P)
    return table.view(-1, kernel[0] * kernel[1]), pattern.flatten().to(torch.int64)


def _rows(cells: Tensor, cell: list[int], stride: list[int], transposed: bool) -> int:
    return cells.shape[0] * (cell[0] * cell[1] // (1 if transposed else stride[0] * stride[1]))


def check(
    cells: Tensor,
    rank: Tensor,
    cell: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
) -> None:
    if cells.dim() != 1:
        raise ValueError(f"cells has shape {tuple(cells.shape)}; expected (V,), the visible cells of the batch.")
    if rank.dim() != 3 or not all(1 <= side <= MOST_SIDE for side in rank.shape[1:]) or rank.shape[0] < 1:
        raise ValueError(f"rank has shape {tuple(rank.shape)}; expected (B, gh, gw), grid sides from 1 to {MOST_SIDE}.")
    for name, tensor in (("cells", cells), ("rank", rank)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected int64.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")
    if rank.device != cells.device:
        raise ValueError(f"rank is on {rank.device} but cells is on {cells.device}; move one of them.")
    pairs = (("cell", cell, 1), ("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0))
    for name, pair, least in (*pairs, ("dilation", dilation, 1)):
        if len(pair) != 2 or not all(least <= n <= MOST_SIDE for n in pair):
            raise ValueError(f"{name} is {tuple(pair)}; expected two numbers from {least} to {MOST_SIDE}.")
    if cell[0] % stride[0] or cell[1] % stride[1]:
        raise ValueError(f"stride is {tuple(stride)}; expected divisors of cell, {tuple(cell)}: cells stay whole.")
    # A size that a traced graph does not know is no int.
    if isinstance(cells.shape[0], int) and cells.shape[0] * cell[0] * cell[1] > MOST_ROWS:
        raise ValueError(
            f"cells has {cells.shape[0]} cells of {cell[0]} x {cell[1]} pixels; expected at most {MOST_ROWS} pixels."
        )


def check_values(cells: Tensor, rank: Tensor, *_: Any) -> Iterator[tuple[Tensor, str]]:
    yield from check_row_numbers("cells", cells, 0, rank.numel(), what="a cell")
    yield from check_row_numbers("rank", rank, -1, len(cells), what="a position")


def fake(
    cells: Tensor,
    rank: Tensor,
    cell: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    rows = _rows(cells, cell, stride, transposed)
    return cells.new_empty((rows, kernel[0] * kernel[1]), dtype=torch.int32), cells.new_empty(rows)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return (None,) * 8  # row numbers carry no gradient


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(
        batch: int,
        grid: Pair,
        cell: Pair,
        kernel: Pair,
        stride: Pair = (1, 1),
        padding: Pair | None = None,
        dilation: Pair = (1, 1),
        hidden: float = 0.5,
        transposed: bool = False,
    ) -> tuple[Any, ...]:
        scores = torch.rand(batch, *grid, generator=torch.Generator().manual_seed(batch * 31 + grid[1]))
        visible = ((scores >= hidden) | (scores == scores.amax((1, 2), keepdim=True))).flatten().to(device)
        rank = torch.where(visible, visible.cumsum(0) - 1, -1).view(batch, *grid)
        padding = (kernel[0] // 2, kernel[1] // 2) if padding is None else padding
        windows = [list(n) for n in (cell, kernel, stride, padding, dilation)]
        return visible.nonzero()[:, 0], rank, *windows, transposed

    def huge() -> tuple[Any, ...]:  # 2.5e9 entries: offsets need 64 bits
        return make(1 << 13, (14, 14), (16, 16), (7, 7), stride=(2, 2))

    cases: dict[str, dict[str, Any]] = {
        "layer": {"batch": 3, "grid": (4, 4), "cell": (2, 2), "kernel": (3, 3)},
        "one_cell": {"batch": 1, "grid": (3, 3), "cell": (2, 2), "kernel": (3, 3), "hidden": 1.0},
        "all_visible": {"batch": 2, "grid": (2, 3), "cell": (3, 2), "kernel": (3, 5), "hidden": 0.0},
        "stride_two": {"batch": 2, "grid": (3, 2), "cell": (4, 4), "kernel": (3, 3), "stride": (2, 2)},
        "stride_two_pointwise": {"batch": 2, "grid": (2, 2), "cell": (2, 4), "kernel": (1, 1), "stride": (2, 2)},
        "uneven_strides": {
            "batch": 2, "grid": (2, 3), "cell": (4, 3), "kernel": (4, 2), "stride": (4, 1), "padding": (0, 0),
        },
        "dilated": {
            "batch": 2, "grid": (5, 4), "cell": (1, 2), "kernel": (3, 3), "padding": (6, 2), "dilation": (6, 2),
        },
        "even_kernel": {"batch": 2, "grid": (3, 3), "cell": (2, 2), "kernel": (4, 2), "padding": (1, 0)},
        "wide_kernel": {"batch": 2, "grid": (7, 7), "cell": (2, 2), "kernel": (7, 7), "hidden": 0.75},
        "more_taps_than_bits": {"batch": 2, "grid": (5, 5), "cell": (1, 1), "kernel": (9, 9)},
        "stage_1": {"batch": 16, "grid": (7, 7), "cell": (8, 8), "kernel": (3, 3), "hidden": 0.75},
        "stem": {
            "batch": 8, "grid": (7, 7), "cell": (32, 32), "kernel": (7, 7), "stride": (2, 2), "hidden": 0.75,
        },
    }  # fmt: skip
    return [
        Sample(f"{name}{suffix}", partial(make, **case, transposed=transposed))
        for name, case in cases.items()
        for suffix, transposed in (("", False), ("_transposed", True))
    ] + [Sample("huge", huge, huge=True)]


def bad_inputs() -> list[BadInput]:
    cells, rank = torch.tensor([0, 3]), torch.tensor([[[0, -1], [-1, 1]]])
    numbers = ([4, 4], [3, 3], [2, 2], [1, 1], [1, 1])
    cell, kernel, stride, padding, dilation = numbers
    two_dims, low, high, many = cells[None], cells - 1, cells + 1, torch.arange(9)
    return [
        BadInput("cells_shape", (two_dims, rank, *numbers, False), ValueError, "cells has shape"),
        BadInput("rank_shape", (cells, rank[0], *numbers, False), ValueError, "rank has shape"),
        BadInput("no_grid", (cells, rank[:, :0], *numbers, False), ValueError, "rank has shape"),
        BadInput("cells_dtype", (cells.int(), rank, *numbers, False), TypeError, "cells has dtype"),
        BadInput("rank_dtype", (cells, rank.int(), *numbers, False), TypeError, "rank has dtype"),
        BadInput("strided", (cells, rank.mT, *numbers, False), ValueError, "rank has strides"),
        BadInput("meta_device", (cells, rank.to("meta"), *numbers, False), ValueError, "rank is on meta"),
        BadInput("cell_below", (low, rank, *numbers, False), ValueError, "cells holds a cell outside 0 to 3"),
        BadInput("cell_above", (high, rank, *numbers, False), ValueError, "cells holds a cell outside 0 to 3"),
        BadInput("rank_above", (cells[:1], rank, *numbers, True), ValueError, "rank holds a position outside -1 to 0"),
        BadInput("one_number", (cells, rank, [4], *numbers[1:], False), ValueError, "cell is"),
        BadInput("no_taps", (cells, rank, cell, [0, 3], *numbers[2:], False), ValueError, "kernel is"),
        BadInput("padding", (cells, rank, cell, kernel, stride, [-1, 0], dilation, False), ValueError, "padding is"),
        BadInput("dilation", (cells, rank, *numbers[:4], [1, 1 << 20], False), ValueError, "dilation is"),
        BadInput("stride", (cells, rank, cell, kernel, [3, 2], padding, dilation, True), ValueError, "stride is"),
        BadInput("rows", (many, many.view(1, 3, 3), [1 << 14] * 2, *numbers[1:], False), ValueError, "cells has 9"),
    ]


def cost(
    cells: Tensor,
    rank: Tensor,
    cell: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
) -> Cost:
    rows = _rows(cells, cell, stride, transposed)
    return Cost(flops=0.0, bytes=float((len(cells) + rank.numel() + rows) * 8 + rows * kernel[0] * kernel[1] * 4))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    check_values=check_values,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    bad_inputs=bad_inputs,
    cost=cost,
    dtypes=INTEGERS,
    backends=[
        Backend("cpp", native.entry("tap_table"), "cpu", INTEGERS, native.missing_cpu),
        # Built and tested; stays out of `auto` until a GPU shows it faster than the reference.
        Backend("cuda", native.entry("tap_table"), "cuda", INTEGERS, native.missing_cuda, default=False),
    ],
)
