"""Where the taps of the pixels of a cell lie, as tensors: the reference of `fastmkd.ops.tap_table` works with them.

A neighbour is found in two steps. Which cell holds it follows from a small table over the visible cells; which pixel of
that cell, and at which cell offset, is the same for every cell and does not depend on the mask.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PATTERN_TAPS", "Local", "locate", "neighbour_cells"]

Pair = tuple[int, int]
PATTERN_TAPS = 52  # a float64 adds the bits of so many taps exactly; kPatternTaps in csrc/core/tap_axis.h


class Local(NamedTuple):
    """Where the T taps of the P pixels of a cell lie, the same for every cell.

    Attributes:
        offsets: ``(O, 2)`` int64, distinct cell offsets ``(dy, dx)``.
        column: ``(P * T,)`` int64, which offset a tap needs; O if it never exists.
        pixel: ``(P * T,)`` int32, the pixel within that cell.
        bits: ``(O, P)`` float64, bit t is set where tap t of pixel p needs offset o; the first `PATTERN_TAPS` taps.
    """

    offsets: Tensor
    column: Tensor
    pixel: Tensor
    bits: Tensor


@lru_cache(maxsize=512)
def locate(
    cell: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, transposed: bool, device: torch.device
) -> Local:
    """Locates the taps of the pixels of an output cell or, `transposed`, of an input cell; kept between batches.

    Args:
        cell: ``(ch, cw)`` pixels per cell of the input map; all pairs are ``(vertical, horizontal)``.
        kernel: taps.
        stride: steps, which divide `cell`.
        padding: what lies before the map.
        dilation: distance between taps.
        transposed: for each input pixel and tap, the output pixel that reads it, instead of the other way round.
        device: where the tensors are to be.

    Example:
        >>> local = locate((1, 2), (1, 3), (1, 1), (0, 1), (1, 1), False, torch.device("cpu"))
        >>> local.offsets.tolist(), local.column.tolist(), local.pixel.tolist()
        ([[0, -1], [0, 0], [0, 1]], [0, 1, 1, 1, 1, 2], [1, 0, 1, 0, 1, 0])
    """
    offset, inside, exists = [], [], []  # an axis each: (P_a, T_a)
    for a in (0, 1):
        taps = torch.arange(kernel[a], device="cpu") * dilation[a] - padding[a]
        if transposed:  # the output pixel o with o * stride + tap = input pixel
            shifted = torch.arange(cell[a], device="cpu")[:, None] - taps
            exists.append(shifted % stride[a] == 0)
            at, side = shifted.div(stride[a], rounding_mode="floor"), cell[a] // stride[a]
        else:
            at, side = torch.arange(cell[a] // stride[a], device="cpu")[:, None] * stride[a] + taps, cell[a]
            exists.append(torch.ones_like(at, dtype=torch.bool))
        offset.append(at.div(side, rounding_mode="floor"))
        inside.append(at % side)
    # (Ph, Th) and (Pw, Tw) -> (Ph, Pw, Th, Tw) -> (P, T)
    spread = lambda v, h: (v[:, None, :, None] + h[None, :, None, :]).flatten(2).flatten(0, 1)  # noqa: E731
    low_y, low_x = int(offset[0].min()), int(offset[1].min())
    span = int(offset[1].max()) - low_x + 1
    distinct, which = spread((offset[0] - low_y) * span, offset[1] - low_x).unique(return_inverse=True)
    offsets = torch.stack((distinct // span + low_y, distinct % span + low_x), dim=1)
    column = torch.where(spread(exists[0].int(), exists[1].int()) == 2, which, len(offsets))  # (P, T)
    width = cell[1] // stride[1] if transposed else cell[1]
    pixel = spread(inside[0] * width, inside[1]).to(torch.int32)
    chosen = column[:, :PATTERN_TAPS] == torch.arange(len(offsets), device="cpu")[:, None, None]  # (O, P, taps)
    bits = chosen.double() @ torch.tensor([2.0**t for t in range(chosen.shape[2])], dtype=torch.float64, device="cpu")
    return Local(offsets.to(device), column.flatten().to(device), pixel.flatten().to(device), bits.to(device))


def neighbour_cells(cells: Tensor, rank: Tensor, offsets: Tensor) -> Tensor:
    """Looks up the cells around each visible cell.

    Args:
        cells: ``(V,)`` int64, the visible cells of the batch in reading order.
        rank: ``(B, gh, gw)`` int64, position of a cell in `cells`, -1 if it is hidden.
        offsets: ``(O, 2)`` int64.

    Returns:
        ``(V, O)`` int64: among the visible cells, the one at each offset; -1 where it is hidden or off the grid.

    Example:
        >>> neighbour_cells(torch.tensor([0, 1]), torch.tensor([[[0, 1, -1]]]), torch.tensor([[0, 1]]))
        tensor([[ 1],
                [-1]])
    """
    _, gh, gw = rank.shape
    image, y, x = cells // (gh * gw), cells // gw % gh, cells % gw
    dy, dx = offsets.unbind(1)  # (O,)
    ny, nx = y[:, None] + dy, x[:, None] + dx  # (V, O)
    inside = (ny >= 0) & (ny < gh) & (nx >= 0) & (nx < gw)
    found = rank[image[:, None], ny.clamp(0, gh - 1), nx.clamp(0, gw - 1)]
    return torch.where(inside, found, -1)
