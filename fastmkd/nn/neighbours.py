"""Where the neighbours of visible pixels lie: the tables that a `fastmkd.nn.plan.MaskPlan` hands to masked layers.

A neighbour is found in two steps. Which cell holds it follows from a small table over the visible cells; which pixel of
that cell, and at which cell offset, is the same for every cell and does not depend on the mask.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Pair", "Window", "tap_table"]

Pair = tuple[int, int]


class Window(NamedTuple):
    """A sliding window as `torch.nn.Conv2d` describes it; each entry is ``(vertical, horizontal)``.

    Attributes:
        kernel: taps.
        stride: steps.
        padding: what lies around the map, before it (above and left), and after it too unless `padding_end` says so.
        dilation: distance between taps.
        padding_end: what lies after the map (below and right) where that differs, as with an even kernel and "same".
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    padding_end: Pair | None = None

    def output_size(self, size: Pair) -> Pair:
        """Returns the size of the output map.

        Args:
            size: ``(H, W)`` of the input map.

        Example:
            >>> Window((3, 3), (2, 2), (1, 1), (1, 1)).output_size((32, 64))
            (16, 32)
        """
        after = self.padding if self.padding_end is None else self.padding_end
        height, width = (
            (size[a] + self.padding[a] + after[a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a] + 1
            for a in (0, 1)
        )
        return height, width


def tap_table(
    cells: Tensor, rank: Tensor, cell: Pair, out_cell: Pair, window: Window, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Builds the table of a window operation, on the device of the mask and without reading it back.

    One operator of PyTorch, so that a compiled network builds its tables inside the graph.

    Args:
        cells: ``(V,)`` int64, the visible cells of the batch in reading order.
        rank: ``(B, gh, gw)`` int64, position of a cell in `cells`, -1 if it is hidden.
        cell: ``(ch, cw)`` pixels per cell of the input map.
        out_cell: the same for the output map.
        window: kernel, stride, padding and dilation.
        transposed: for each input row, which output row reads it through each tap, instead of the other way round.

    Returns:
        ``(N, T)`` int32 row numbers, -1 for none, and ``(N,)`` int32 the rows sorted by which taps are present.

    Example:
        >>> window = Window((1, 3), (1, 1), (0, 1), (1, 1))
        >>> tap_table(torch.tensor([0, 1]), torch.tensor([[[0, 1, -1]]]), (1, 1), (1, 1), window)[0]
        tensor([[-1,  0,  1],
                [ 0,  1, -1]], dtype=torch.int32)
    """
    numbers = [n for pair in (cell, out_cell, *window[:4]) for n in pair]
    return _tap_table(cells, rank, numbers, transposed)


@torch.library.custom_op("fastmkd::tap_table", mutates_args=())
def _tap_table(cells: Tensor, rank: Tensor, numbers: list[int], transposed: bool) -> tuple[Tensor, Tensor]:
    cell, out_cell, kernel, stride, padding, dilation = zip(numbers[::2], numbers[1::2], strict=True)
    window = Window(kernel, stride, padding, dilation)
    source = out_cell if transposed else cell
    offsets, which, pixel = (_local_taps_transposed if transposed else _local_taps)(cell, out_cell, window)  # (P, T)
    neighbours = _neighbour_cells(cells, rank, offsets)  # (V, O)
    which, pixel = which.to(cells.device), pixel.to(cells.device)
    owner = neighbours[:, which.clamp_min(0).flatten()].view(-1, *which.shape)  # (V, O) -> (V, P, T)
    rows = owner * (source[0] * source[1]) + pixel
    absent = (owner < 0) | (which < 0)
    table = torch.where(absent, -1, rows).flatten(0, 1).to(torch.int32).contiguous()
    return table, _order(table)


@_tap_table.register_fake
def _(cells: Tensor, rank: Tensor, numbers: list[int], transposed: bool) -> tuple[Tensor, Tensor]:
    at = 0 if transposed else 2
    rows = cells.shape[0] * numbers[at] * numbers[at + 1]
    return cells.new_empty((rows, numbers[4] * numbers[5]), dtype=torch.int32), cells.new_empty(rows, dtype=torch.int32)


def _neighbour_cells(cells: Tensor, rank: Tensor, offsets: tuple[Pair, ...]) -> Tensor:
    """``(V, O)`` int64: among the visible cells, the one at each offset; -1 where it is hidden or off the grid."""
    _, gh, gw = rank.shape
    image, y, x = cells // (gh * gw), cells // gw % gh, cells % gw
    dy, dx = torch.tensor(offsets, device=cells.device).view(-1, 2).unbind(1)  # (O,)
    ny, nx = y[:, None] + dy, x[:, None] + dx  # (V, O)
    inside = (ny >= 0) & (ny < gh) & (nx >= 0) & (nx < gw)
    found = rank[image[:, None], ny.clamp(0, gh - 1), nx.clamp(0, gw - 1)]
    return torch.where(inside, found, -1)


@lru_cache(maxsize=256)
def _local_taps(cell: Pair, out_cell: Pair, window: Window) -> tuple[tuple[Pair, ...], Tensor, Tensor]:
    """For each pixel of an output cell and each tap: the cell offset at which the input lies, and the pixel there."""
    per_axis = [
        torch.arange(out_cell[a])[:, None] * window.stride[a]
        + torch.arange(window.kernel[a]) * window.dilation[a]
        - window.padding[a]
        for a in (0, 1)
    ]  # (P_a, T_a): input coordinate relative to the cell's corner
    return _locate(per_axis, [torch.ones_like(p, dtype=torch.bool) for p in per_axis], cell)


@lru_cache(maxsize=256)
def _local_taps_transposed(cell: Pair, out_cell: Pair, window: Window) -> tuple[tuple[Pair, ...], Tensor, Tensor]:
    """For each pixel of an input cell and each tap: the output pixel that reads it through this tap, if any."""
    per_axis, exists = [], []
    for a in (0, 1):
        shifted = (
            torch.arange(cell[a])[:, None] + window.padding[a] - torch.arange(window.kernel[a]) * window.dilation[a]
        )  # output coordinate times the stride
        per_axis.append(shifted.div(window.stride[a], rounding_mode="floor"))
        exists.append(shifted % window.stride[a] == 0)
    return _locate(per_axis, exists, out_cell)


def _locate(per_axis: list[Tensor], exists: list[Tensor], cell: Pair) -> tuple[tuple[Pair, ...], Tensor, Tensor]:
    """Splits coordinates relative to a cell's corner into cell offset and pixel; offset index -1 where none exists."""
    offset = [c.div(size, rounding_mode="floor") for c, size in zip(per_axis, cell, strict=True)]
    local = [c % size for c, size in zip(per_axis, cell, strict=True)]
    # (Ph, Th) and (Pw, Tw) -> (Ph, Pw, Th, Tw) -> (P, T)
    spread = lambda v, h: (v[:, None, :, None] + h[None, :, None, :]).flatten(2).flatten(0, 1)  # noqa: E731
    span = int(offset[1].max() - offset[1].min()) + 1
    code = spread((offset[0] - offset[0].min()) * span, offset[1] - offset[1].min())
    distinct, which = code.unique(return_inverse=True)
    low_y, low_x = int(offset[0].min()), int(offset[1].min())
    offsets = tuple((int(c) // span + low_y, int(c) % span + low_x) for c in distinct)
    present = spread(exists[0].int(), exists[1].int()) == 2
    return offsets, torch.where(present, which, -1), spread(local[0] * cell[1], local[1])


def _order(table: Tensor) -> Tensor:
    """Rows sorted by which taps are present, most first; rows with the same taps keep their order."""
    taps = table.shape[1]
    bits = torch.arange(min(taps, 62), device=table.device)
    pattern = ((table[:, : len(bits)] >= 0).long() << bits).sum(1)
    return pattern.argsort(descending=True, stable=True).to(torch.int32)
