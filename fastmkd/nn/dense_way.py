"""The dense way through a masked convolution: rows to a map, one dense convolution, the visible rows of its output.

Where few positions are hidden there is little to skip, and the dense library's rate counts for more. The meaning stays
``y = conv(x * m_in) * m_out``: hidden positions enter as zeros and leave unread, so they get no gradient either.

Rows are moved in runs. The pixels of a cell that lie side by side do so among the rows as well as in a channels-last
map, and a run is long enough to be copied at memory speed. `fastmkd.nn.crossings` says when this way is taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import MaskPlan, Pair, Window, output_cell

__all__ = ["dense_convolve"]


def dense_convolve(
    values: Tensor, weight: Tensor, bias: Tensor | None, plan: MaskPlan, cell: Pair, window: Window, groups: int
) -> Tensor:
    """Convolves packed rows with the dense library.

    Args:
        values: ``(N_in, Cin)``.
        weight: ``(Cout, Cin / groups, kh, kw)``.
        bias: ``(Cout,)`` or None.
        plan: the batch's plan.
        cell: ``(ch, cw)`` of the input map.
        window: padded alike on both sides.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        ``(N_out, Cout)``.

    Raises:
        ValueError: a window with which the cells do not stay whole.

    Example:
        >>> plan, window = MaskPlan(torch.tensor([[[True, False]]])), Window((1, 3), (1, 1), (0, 1), (1, 1))
        >>> dense_convolve(torch.ones(2, 1), torch.ones(1, 1, 1, 3), None, plan, (1, 2), window, 1)
        tensor([[2.],
                [2.]])
    """
    out_cell = output_cell(plan.grid, cell, window)
    (gh, gw), channels = plan.grid, weight.shape[0]
    runs = plan.runs(cell[0])
    dense = _Move.apply(_as_runs(values, cell[1]), runs.of_map, runs.holes, runs.of_rows, None)  # (B * H * gw, cw * C)
    dense = dense.view(plan.batch, gh * cell[0], gw * cell[1], -1).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
    dense = F.conv2d(dense, weight, bias, window.stride, window.padding, window.dilation, groups)
    dense = _as_runs(dense.permute(0, 2, 3, 1).reshape(-1, channels), out_cell[1])
    runs = plan.runs(out_cell[0])
    return _Move.apply(dense, runs.of_rows, None, runs.of_map, runs.holes).view(-1, channels)


def _as_runs(rows: Tensor, width: int) -> Tensor:
    """``(N, C)`` -> ``(N / width, width * C)``."""
    return rows.reshape(-1, width * rows.shape[1])


class _Move(torch.autograd.Function):
    """Copies runs to where `index` takes them from and zeros `holes`; its gradient is the way back.

    PyTorch's own gradient of ``index_select`` adds row by row on one thread, since it cannot know that none repeats.
    """

    @staticmethod
    def forward(ctx: Any, runs: Tensor, index: Tensor, holes: Tensor | None, back: Tensor, back_holes: Any) -> Tensor:
        ctx.save_for_backward(back, back_holes)
        return _moved(runs, index, holes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _moved(grads[0], *ctx.saved_tensors), None, None, None, None


def _moved(runs: Tensor, index: Tensor, holes: Tensor | None) -> Tensor:
    out = runs.index_select(0, index)
    return out if holes is None else out.index_fill_(0, holes, 0.0)
