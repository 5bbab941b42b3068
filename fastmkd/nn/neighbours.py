"""Where the neighbours of visible pixels lie: the tables that a `fastmkd.nn.plan.MaskPlan` hands to masked layers.

A neighbour is found in two steps. Which cell holds it follows from a small table over the visible cells; which pixel of
that cell, and at which cell offset, is the same for every cell and does not depend on the mask.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Pair", "Window", "tap_table"]

Pair = tuple[int, int]
_NONE = -(2**30)  # plus any pixel of a cell it stays negative


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
    local = (_local_taps_transposed if transposed else _local_taps)(cell, out_cell, window, cells.device)
    source = out_cell if transposed else cell
    owner = _neighbour_cells(cells, rank, local.offsets)  # (V, O)
    first_row = torch.where(owner < 0, _NONE, owner * (source[0] * source[1])).to(torch.int32)
    first_row = F.pad(first_row, (0, 1), value=_NONE)  # (V, O + 1): the last column is for taps that never exist
    table = first_row.gather(1, local.column.expand(len(cells), -1)).add_(local.pixel).clamp_(min=-1)  # (V, P * T)
    # Each tap lies in one cell, so the bits of the cells that are seen add up to the pattern of the row.
    pattern = (owner >= 0).double() @ local.bits  # (V, P)
    order = pattern.flatten().argsort(descending=True, stable=True)
    return table.view(-1, kernel[0] * kernel[1]), order.to(torch.int32)


@_tap_table.register_fake
def _(cells: Tensor, rank: Tensor, numbers: list[int], transposed: bool) -> tuple[Tensor, Tensor]:
    at = 0 if transposed else 2
    rows = cells.shape[0] * numbers[at] * numbers[at + 1]
    return cells.new_empty((rows, numbers[4] * numbers[5]), dtype=torch.int32), cells.new_empty(rows, dtype=torch.int32)


def _neighbour_cells(cells: Tensor, rank: Tensor, offsets: Tensor) -> Tensor:
    """``(V, O)`` int64: among the visible cells, the one at each offset; -1 where it is hidden or off the grid."""
    _, gh, gw = rank.shape
    image, y, x = cells // (gh * gw), cells // gw % gh, cells % gw
    dy, dx = offsets.unbind(1)  # (O,)
    ny, nx = y[:, None] + dy, x[:, None] + dx  # (V, O)
    inside = (ny >= 0) & (ny < gh) & (nx >= 0) & (nx < gw)
    found = rank[image[:, None], ny.clamp(0, gh - 1), nx.clamp(0, gw - 1)]
    return torch.where(inside, found, -1)


class _Local(NamedTuple):
    """Where the taps of the P pixels of a cell lie, the same for every cell; kept on the device between batches.

    Attributes:
        offsets: ``(O, 2)`` int64, distinct cell offsets ``(dy, dx)``.
        column: ``(P * T,)`` int64, which offset a tap needs; O if it never exists.
        pixel: ``(P * T,)`` int32, the pixel within that cell.
        bits: ``(O, P)`` float64, bit t is set where tap t of pixel p needs offset o; exact, for at most 52 taps.
    """

    offsets: Tensor
    column: Tensor
    pixel: Tensor
    bits: Tensor


@lru_cache(maxsize=512)
def _local_taps(cell: Pair, out_cell: Pair, window: Window, device: torch.device) -> _Local:
    """For each pixel of an output cell and each tap: the cell offset at which the input lies, and the pixel there."""
    per_axis = [
        torch.arange(out_cell[a])[:, None] * window.stride[a]
        + torch.arange(window.kernel[a]) * window.dilation[a]
        - window.padding[a]
        for a in (0, 1)
    ]  # (P_a, T_a): input coordinate relative to the cell's corner
    return _locate(per_axis, [torch.ones_like(p, dtype=torch.bool) for p in per_axis], cell, device)


@lru_cache(maxsize=512)
def _local_taps_transposed(cell: Pair, out_cell: Pair, window: Window, device: torch.device) -> _Local:
    """For each pixel of an input cell and each tap: the output pixel that reads it through this tap, if any."""
    per_axis, exists = [], []
    for a in (0, 1):
        shifted = (
            torch.arange(cell[a])[:, None] + window.padding[a] - torch.arange(window.kernel[a]) * window.dilation[a]
        )  # output coordinate times the stride
        per_axis.append(shifted.div(window.stride[a], rounding_mode="floor"))
        exists.append(shifted % window.stride[a] == 0)
    return _locate(per_axis, exists, out_cell, device)


def _locate(per_axis: list[Tensor], exists: list[Tensor], cell: Pair, device: torch.device) -> _Local:
    """Splits coordinates relative to a cell's corner into cell offset and pixel."""
    offset = [c.div(size, rounding_mode="floor") for c, size in zip(per_axis, cell, strict=True)]
    local = [c % size for c, size in zip(per_axis, cell, strict=True)]
    # (Ph, Th) and (Pw, Tw) -> (Ph, Pw, Th, Tw) -> (P, T)
    spread = lambda v, h: (v[:, None, :, None] + h[None, :, None, :]).flatten(2).flatten(0, 1)  # noqa: E731
    low_y, low_x = int(offset[0].min()), int(offset[1].min())
    span = int(offset[1].max()) - low_x + 1
    distinct, which = spread((offset[0] - low_y) * span, offset[1] - low_x).unique(return_inverse=True)
    offsets = torch.stack((distinct // span + low_y, distinct % span + low_x), dim=1)
    column = torch.where(spread(exists[0].int(), exists[1].int()) == 2, which, len(offsets))  # (P, T)
    pixel = spread(local[0] * cell[1], local[1]).to(torch.int32)
    taps = min(column.shape[1], 52)
    chosen = column[:, :taps] == torch.arange(len(offsets))[:, None, None]  # (O, P, taps)
    bits = chosen.double() @ torch.tensor([2.0**t for t in range(taps)], dtype=torch.float64)
    return _Local(offsets.to(device), column.flatten().to(device), pixel.flatten().to(device), bits.to(device))
