"""Masks over a grid of cells: which part of each image a network may see. True means visible.

Every function hides the same number of cells in every image, ``round(mask_ratio * gh * gw)`` with Python's `round`
(halves go to the even number), but leaves at least one cell visible. They differ in which cells: a function scores the
cells, and the cells with the lowest scores are hidden.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["block_mask", "cell_scores", "grid_mask", "random_mask"]


def random_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hides cells drawn uniformly, anew for each image (MAE; DMAE, Section 3; MKD, Table 4g).

    Args:
        batch: number of images B.
        grid: ``(gh, gw)`` cells.
        mask_ratio: share of cells to hide, 0 to 1; ``round(mask_ratio * gh * gw)`` cells, at most all but one.
        device: where the mask is returned; None means PyTorch's default device.
        generator: source of randomness. It draws on its own device, so a CPU generator gives the same masks everywhere.

    Returns:
        ``(B, gh, gw)`` bool, True = visible.

    Raises:
        ValueError: `batch`, `grid` or `mask_ratio` out of range.
        TypeError: `batch` or `grid` is not made of ints, or `mask_ratio` is no number.

    Example:
        >>> random_mask(2, (4, 4), 0.75).flatten(1).sum(1)
        tensor([4, 4])
    """
    hidden = _count_hidden(batch, grid, mask_ratio)
    return _hide_lowest(cell_scores("random", batch, grid, device, generator), hidden, grid, device)


def block_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hides one block of neighbouring cells per image, with random place and aspect ratio (after BEiT; MKD, Table 4g).

    The block is a rectangle around a random centre, cut at the border of the grid, whose last row or column may be
    incomplete so that the number of hidden cells is exact. Its aspect ratio lies between 0.5 and 2.

    Args:
        batch: number of images B.
        grid: ``(gh, gw)`` cells.
        mask_ratio: share of cells to hide, 0 to 1; ``round(mask_ratio * gh * gw)`` cells, at most all but one.
        device: where the mask is returned; None means PyTorch's default device.
        generator: source of randomness. It draws on its own device, so a CPU generator gives the same masks everywhere.

    Returns:
        ``(B, gh, gw)`` bool, True = visible.

    Raises:
        ValueError: `batch`, `grid` or `mask_ratio` out of range.
        TypeError: `batch` or `grid` is not made of ints, or `mask_ratio` is no number.

    Example:
        >>> block_mask(2, (4, 4), 0.5).flatten(1).sum(1)
        tensor([8, 8])
    """
    hidden = _count_hidden(batch, grid, mask_ratio)
    return _hide_lowest(cell_scores("block", batch, grid, device, generator), hidden, grid, device)


def grid_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hides cells in a regular pattern, shifted at random per image (MAE's grid sampling; DPK, Table 6; MKD, Table 4g).

    At 0.75 one cell of every 2 x 2 stays, at 0.5 a checkerboard; other ratios take the cells in the order of a Bayer
    (ordered dithering) matrix, which spreads any number of cells evenly.

    Args:
        batch: number of images B.
        grid: ``(gh, gw)`` cells.
        mask_ratio: share of cells to hide, 0 to 1; ``round(mask_ratio * gh * gw)`` cells, at most all but one.
        device: where the mask is returned; None means PyTorch's default device.
        generator: source of randomness. It draws on its own device, so a CPU generator gives the same masks everywhere.

    Returns:
        ``(B, gh, gw)`` bool, True = visible.

    Raises:
        ValueError: `batch`, `grid` or `mask_ratio` out of range.
        TypeError: `batch` or `grid` is not made of ints, or `mask_ratio` is no number.

    Example:
        >>> grid_mask(1, (4, 4), 0.75).view(2, 2, 2, 2).sum((1, 3))
        tensor([[1, 1],
                [1, 1]])
    """
    hidden = _count_hidden(batch, grid, mask_ratio)
    return _hide_lowest(cell_scores("grid", batch, grid, device, generator), hidden, grid, device)


def cell_scores(
    kind: Literal["random", "block", "grid"],
    batch: int,
    grid: tuple[int, int],
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scores the cells of each image: hiding any number of those with the lowest scores gives a mask of the kind.

    Args:
        kind: "random", "block" or "grid", see `random_mask`, `block_mask` and `grid_mask`.
        batch: number of images B.
        grid: ``(gh, gw)`` cells.
        device: where the numbers are drawn unless there is a generator; None means PyTorch's default device.
        generator: source of randomness.

    Returns:
        ``(B, gh * gw)``, on the device where the numbers were drawn.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> cell_scores("random", 2, (4, 4)).shape
        torch.Size([2, 16])
    """
    if kind == "random":
        return _uniform((batch, grid[0] * grid[1]), device, generator)
    if kind == "block":
        return _distance_to_centre(grid, _uniform((batch, 3, 1), device, generator))
    if kind == "grid":
        return _shifted_bayer(grid, _uniform((batch, 2), device, generator))
    raise ValueError(f"mask is {kind!r}; expected 'random', 'block' or 'grid'.")


def _distance_to_centre(grid: tuple[int, int], noise: Tensor) -> Tensor:
    """``(B, 3, 1)`` uniform numbers -> ``(B, gh * gw)``: how far a cell is from the centre of a growing block."""
    gh, gw = grid
    centre_y, centre_x, log_aspect = noise.unbind(1)  # each (B, 1)
    aspect = torch.exp((2 * log_aspect - 1) * math.log(2) / 2)  # sqrt of height / width, so the ratio is 0.5 to 2
    y = torch.arange(gh, device=aspect.device) + 0.5
    x = torch.arange(gw, device=aspect.device) + 0.5
    dy = (y - centre_y * gh).abs() / aspect  # (B, gh)
    dx = (x - centre_x * gw).abs() * aspect  # (B, gw)
    # The cells within a given Chebyshev distance of the centre form a rectangle.
    return torch.maximum(dy[:, :, None], dx[:, None, :]).flatten(1)


def _shifted_bayer(grid: tuple[int, int], noise: Tensor) -> Tensor:
    """``(B, 2)`` uniform numbers -> ``(B, gh * gw)``: the Bayer matrix, shifted for each image."""
    thresholds = _bayer(max(grid), noise.device)  # (side, side)
    side = thresholds.shape[0]
    shift = (noise * side).long().clamp_max(side - 1)
    y = (torch.arange(grid[0], device=noise.device) + shift[:, :1]) % side  # (B, gh)
    x = (torch.arange(grid[1], device=noise.device) + shift[:, 1:]) % side  # (B, gw)
    return thresholds[y[:, :, None], x[:, None, :]].flatten(1)


def _count_hidden(batch: int, grid: tuple[int, int], mask_ratio: float) -> int:
    """Number of hidden cells per image, after checking the arguments that all masks share."""
    if isinstance(batch, bool) or not isinstance(batch, int):
        # Whoever passes the images themselves must not get all their pixels back.
        given = f"a {type(batch).__name__}" if hasattr(batch, "__len__") else repr(batch)
        raise TypeError(f"batch is {given}; expected an int, such as len(images).")
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1.")
    if not isinstance(grid, (tuple, list)) or not all(isinstance(n, int) and not isinstance(n, bool) for n in grid):
        raise TypeError(f"grid is {grid!r}; expected (gh, gw), two ints.")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid is {tuple(grid)}; expected (gh, gw), two positive numbers.")
    if not isinstance(mask_ratio, (int, float)):
        raise TypeError(f"mask_ratio is {mask_ratio!r}; expected a number, the share of the cells to hide.")
    if not 0 <= mask_ratio <= 1:  # NaN fails too
        raise ValueError(f"mask_ratio is {mask_ratio}; expected a share of the cells between 0 and 1.")
    cells = grid[0] * grid[1]
    return min(round(mask_ratio * cells), cells - 1)


def _uniform(shape: tuple[int, ...], device: torch.device | str | None, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1), on the generator's device if there is one."""
    return torch.rand(shape, device=device if generator is None else generator.device, generator=generator)


def _hide_lowest(scores: Tensor, hidden: int, grid: tuple[int, int], device: torch.device | str | None) -> Tensor:
    """``(B, gh * gw)`` scores -> ``(B, gh, gw)`` mask in which the `hidden` lowest are False; ties by index."""
    visible = torch.ones_like(scores, dtype=torch.bool)
    visible.scatter_(1, scores.argsort(dim=1, stable=True)[:, :hidden], False)
    return visible.view(-1, *grid).to(device if device is not None else torch.get_default_device())


def _bayer(least: int, device: torch.device) -> Tensor:
    """Bayer matrix of side 2^m >= max(least, 2): each value once; any top share of the values is evenly spread."""
    bit = torch.arange(2, device=device)
    pattern = 2 * (bit[:, None] ^ bit) + bit[:, None]  # [[0, 2], [3, 1]], made on the device: nothing is sent there
    matrix = pattern
    while matrix.shape[0] < least:
        matrix = 4 * matrix.repeat(2, 2) + pattern.repeat_interleave(len(matrix), 0).repeat_interleave(len(matrix), 1)
    return matrix
