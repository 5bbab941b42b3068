"""The mask plan: one per batch, it tells every masked layer which rows exist and where their neighbours are.

A mask is a union of cells, so a packed map of any resolution is ordered cell by cell: the rows of a visible cell are
neighbours in memory, pixel by pixel, and the cells follow each other in reading order. Where a neighbour pixel lies is
then arithmetic: which cell (a small table over the visible cells) and which pixel of it (a table that does not depend
on the mask at all). No hash, no search, and nothing to build anew per layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.registry import require
from ..ops.tap_table import group_rows, tap_table
from .where import where
from .window import Pair, Window

__all__ = ["MaskPlan", "Pair", "Runs", "Taps", "Window", "output_cell"]


@dataclass(frozen=True)
class Taps:
    """Where the inputs of a window operation are, for one plan, input cell and window.

    Attributes:
        forward: ``(N_out, T)`` int32, the input row under each tap of each output row, -1 where there is none.
        backward: ``(N_in, T)`` int32, the output row that reads this input row through that tap, or -1.
        forward_order: ``(N_out,)`` int32, the output rows in the order in which to compute them: on a GPU those with
            the same taps together, so that a tile of neighbours skips taps that all of them lack; on a CPU as they are.
        backward_order: ``(N_in,)`` int32, the same for `backward`.
    """

    forward: Tensor
    backward: Tensor
    forward_order: Tensor
    backward_order: Tensor


@dataclass(frozen=True)
class Runs:
    """Where the pixel runs of cells lie in a channels-last map, whose runs count ``(B, H, gw)`` in reading order.

    A run is a cell's width of pixels: neighbours among the rows and in the map.

    Attributes:
        of_rows: ``(V * ch,)`` int64, the run of the map that each run of the rows is.
        of_map: ``(B * H * gw,)`` int64, the other way round; 0 where hidden.
        holes: int64, the runs of the map that are hidden.
    """

    of_rows: Tensor
    of_map: Tensor
    holes: Tensor


class MaskPlan:
    """Which cells of a batch are visible, and the tables that masked layers derive from it.

    Tables are built at their first use, on the mask's device without reading it back, and shared by all layers. The
    only number that the host needs is the count of visible cells: given, or read once (free if the mask is on the CPU).

    Args:
        visible: ``(B, gh, gw)`` bool, True = visible.
        count: how many cells are visible in the whole batch; None reads it from the mask.

    Raises:
        TypeError: `visible` is not a bool tensor, or `count` no int.
        ValueError: a wrong shape, an image with nothing visible, or a wrong `count` (on a GPU asynchronous asserts).

    Example:
        >>> plan = MaskPlan(torch.tensor([[[True, False], [True, True]]]))
        >>> plan.num_rows((4, 4))
        48
    """

    def __init__(self, visible: Tensor, count: int | None = None) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int | torch.SymInt)):
            raise TypeError(f"count is {count!r}; expected the number of visible cells, an int, or None to count them.")
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            what = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise TypeError(f"visible is {what}; expected a bool tensor, True where the image may be seen.")
        if visible.dim() != 3 or visible.numel() == 0:
            raise ValueError(f"visible has shape {tuple(visible.shape)}; expected (B, gh, gw), a cell grid per image.")
        if visible.is_meta and count is None:
            raise ValueError("visible is on meta, which holds no values to count; give count, how many cells it shows.")
        require(visible.flatten(1).any(1).all(), "visible hides an image entirely; every image needs a visible cell.")
        with _lasting():
            flat = visible.flatten()
            if count is None:
                self.cells = flat.nonzero()[:, 0]  # (V,), the one host read when the mask is on a GPU
            else:
                require(flat.sum() == count, f"count is {count}, which is not the number of visible cells.")
                self.cells = torch.nonzero_static(flat, size=count)[:, 0]
            # (B, gh, gw): position of a cell among the visible ones
            self.rank = torch.where(flat, flat.cumsum(0) - 1, -1).view_as(visible)
            self.visible = visible.clone()  # what is derived later holds even if the caller's mask changes meanwhile
        self._made_of = visible, _version(visible)
        self.batch, self.grid = visible.shape[0], (visible.shape[1], visible.shape[2])
        self._taps: dict[tuple[Pair, Window, bool], Taps] = {}
        self._tables: dict[tuple[Pair, Window, bool], tuple[Tensor, Tensor]] = {}
        self._orders: dict[tuple[Pair, Window, bool], Tensor] = {}
        self._inside: dict[tuple[Pair, Window], Tensor] = {}
        self._runs: dict[int, Runs] = {}

    @property
    def device(self) -> torch.device:
        """Device of the mask and of all tables."""
        return self.visible.device

    @property
    def num_cells(self) -> int:
        """V, the number of visible cells in the batch."""
        return self.cells.shape[0]

    def cell(self, size: Pair) -> Pair:
        """Returns the pixels per cell of a map.

        Args:
            size: ``(H, W)`` of the map.

        Returns:
            ``(ch, cw)``.

        Raises:
            ValueError: the grid does not divide the map.
        """
        (gh, gw), (height, width) = self.grid, size
        if height % gh or width % gw or min(size) < 1:
            raise ValueError(
                f"the grid {gh} x {gw} of visible does not divide a {height} x {width} map; choose a grid that divides "
                "every masked map (image side / total stride), or make the image side a multiple of the total stride."
            )
        return height // gh, width // gw

    def num_rows(self, cell: Pair) -> int:
        """Returns how many rows a packed map has.

        Args:
            cell: ``(ch, cw)`` pixels per cell.
        """
        return self.num_cells * cell[0] * cell[1]

    def agrees_with(self, other: MaskPlan) -> bool:
        """Returns whether rows of the two plans belong to the same positions: one plan, or two of one unchanged mask.

        Nothing waits for a GPU but where two plans are of one inference tensor, which does not tell whether it changed.

        Args:
            other: the other plan.

        Example:
            >>> visible = torch.tensor([[[True, False]]])
            >>> plan, same = MaskPlan(visible), MaskPlan(visible)
            >>> visible[:] = True
            >>> plan.agrees_with(same), plan.agrees_with(MaskPlan(visible))
            (True, False)
        """
        if self is other:
            return True
        (mine, version), (theirs, other_version) = self._made_of, other._made_of
        if mine is not theirs or version != other_version:
            return False
        return version is not None or torch.equal(self.visible, other.visible)

    @property
    def visible_share(self) -> float:
        """Visible cells among all, in (0, 1]; the host knows it."""
        return self.num_cells / self.visible.numel()

    @property
    def image_of_cells(self) -> Tensor:
        """``(V,)`` int64, the image that each visible cell belongs to; the cells of an image follow each other."""
        return self.cells // (self.grid[0] * self.grid[1])

    @property
    def cells_per_image(self) -> Tensor:
        """``(B,)`` int64, how many visible cells each image has."""
        return self.visible.flatten(1).sum(1)

    def positions(self, cell: Pair) -> tuple[Tensor, Tensor]:
        """Returns where in its image each row lies, ``(N,)`` int64 each: y and x.

        Args:
            cell: ``(ch, cw)`` pixels per cell.

        Example:
            >>> MaskPlan(torch.tensor([[[False, True]]])).positions((1, 2))
            (tensor([0, 0]), tensor([2, 3]))
        """
        (gh, gw), (ch, cw) = self.grid, cell
        corner_y, corner_x = self.cells // gw % gh * ch, self.cells % gw * cw  # (V,)
        y, x = torch.arange(ch, device=self.device), torch.arange(cw, device=self.device)
        grid_y = corner_y[:, None, None] + y[:, None]  # (V, ch, 1)
        grid_x = corner_x[:, None, None] + x  # (V, 1, cw)
        return grid_y.expand(-1, ch, cw).flatten(), grid_x.expand(-1, ch, cw).flatten()

    def taps(self, cell: Pair, window: Window, backward: bool = True) -> Taps:
        """Returns the tables of a window operation on maps with `cell` pixels per cell; cached.

        Args:
            cell: ``(ch, cw)`` of the input map.
            window: kernel, stride, padding and dilation.
            backward: False leaves the tables of the input's gradient empty: those of a stem are the largest of all, and
                images need no gradient.

        Raises:
            ValueError: the output map is not the input map divided by the stride, so cells would not stay whole.
        """
        key = (cell, window, backward)
        if key not in self._taps:
            table, order = self._table(cell, window)[0], self._order(cell, window)
            if backward:
                back = self._table(cell, window, transposed=True)[0]
                order_back = self._order(cell, window, transposed=True)
            else:
                with _lasting():
                    back, order_back = table.new_empty(0, table.shape[1]), order.new_empty(0)
            self._taps[key] = Taps(table, back, order, order_back)
        return self._taps[key]

    def forward_taps(self, cell: Pair, window: Window) -> Tensor:
        """Returns ``taps(cell, window).forward`` alone, for what needs no other table; cached.

        Args:
            cell: ``(ch, cw)`` of the input map.
            window: kernel, stride, padding and dilation.

        Raises:
            ValueError: as `taps`.
        """
        return self._table(cell, window)[0]

    def inside(self, cell: Pair, window: Window) -> Tensor:
        """Returns which taps of each output row lie in the image, seen or hidden: ``(N_out, T)`` bool; cached.

        Args:
            cell: ``(ch, cw)`` of the input map.
            window: kernel, stride, padding and dilation.

        Raises:
            ValueError: as `taps`.
        """
        key = (cell, window)
        if key not in self._inside:
            per_axis = []
            for a, start in enumerate(self.positions(output_cell(self.grid, cell, window))):
                reach = torch.arange(window.kernel[a], device=self.device) * window.dilation[a] - window.padding[a]
                source = start[:, None] * window.stride[a] + reach  # (N_out, T_a)
                per_axis.append((source >= 0) & (source < self.grid[a] * cell[a]))
            self._inside[key] = (per_axis[0][:, :, None] & per_axis[1][:, None, :]).flatten(1)
        return self._inside[key]

    def runs(self, height: int) -> Runs:
        """Returns where the pixel runs of cells lie in a dense map; cached.

        Args:
            height: ``ch``, pixel rows per cell of the map.

        Example:
            >>> MaskPlan(torch.tensor([[[False, True]]])).runs(2).of_rows
            tensor([1, 3])
        """
        if height not in self._runs:
            gw, flat = self.grid[1], self.visible.flatten()
            with _lasting():
                y = torch.arange(height, device=self.device)
                hidden = torch.nonzero_static(~flat, size=flat.shape[0] - self.num_cells)[:, 0]
                of_rows, holes = (
                    (c // gw * (height * gw) + c % gw)[:, None].add(y * gw).flatten() for c in (self.cells, hidden)
                )  # (V * ch,) and the same of hidden cells
                first = self.rank.clamp(min=0).flatten(0, 1)[:, None] * height  # (B * gh, 1, gw)
                self._runs[height] = Runs(of_rows, (first + y[:, None]).flatten(), holes)
        return self._runs[height]

    def _table(self, cell: Pair, window: Window, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """A table and the patterns of its rows, from the cache or built."""
        key = (cell, window, transposed)
        if key not in self._tables:
            output_cell(self.grid, cell, window)  # raises if cells would not stay whole
            with _lasting():
                self._tables[key] = tap_table(self.cells, self.rank, cell, *window[:4], transposed)
        return self._tables[key]

    def _order(self, cell: Pair, window: Window, transposed: bool = False) -> Tensor:
        """The order of a table's rows, from the cache or made; pooling and 1x1 layers never ask for one."""
        key = (cell, window, transposed)
        if key not in self._orders:
            pattern = self._table(cell, window, transposed)[1]
            with _lasting():
                # The C++ kernels go through rows in memory order and never look at this: nothing is sorted on a CPU.
                if pattern.device.type == "cpu":
                    self._orders[key] = torch.arange(pattern.shape[0], dtype=torch.int32, device=pattern.device)
                else:
                    self._orders[key] = group_rows(pattern)
        return self._orders[key]


def output_cell(grid: Pair, cell: Pair, window: Window) -> Pair:
    """Returns the pixels per cell of a window operation's output.

    Args:
        grid: ``(gh, gw)`` cells of an image.
        cell: ``(ch, cw)`` of the input map.
        window: kernel, stride, padding and dilation.

    Raises:
        ValueError: the output map is not the input map divided by the stride, so cells would not stay whole.

    Example:
        >>> output_cell((7, 7), (8, 8), Window((3, 3), (2, 2), (1, 1), (1, 1)))
        (4, 4)
    """
    size = (grid[0] * cell[0], grid[1] * cell[1])
    out = window.output_size(size)
    for axis in (0, 1):
        if out[axis] * window.stride[axis] != size[axis] or cell[axis] % window.stride[axis]:
            raise ValueError(
                f"a window with kernel {window.kernel}, stride {window.stride}, padding {window.padding} and dilation "
                f"{window.dilation} turns {size[0]} x {size[1]} pixels ({cell[0]} x {cell[1]} a cell) into {out[0]} x "
                f"{out[1]}, so the masked cells do not stay whole{where()}; a masked layer needs 'same' padding and a "
                "stride that divides the cell. Choose a coarser grid, or call .to_dense() before this layer."
            )
    return cell[0] // window.stride[0], cell[1] // window.stride[1]


def _version(mask: Tensor) -> int | None:
    """How often a tensor has been written to; None if it does not count."""
    return None if mask.is_inference() else mask._version


def _lasting() -> AbstractContextManager[Any]:
    """Lets a teacher's pass under inference_mode leave tables that a student's training can save for its backward."""
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inference else nullcontext()
