"""Cells of a pyramid's level as rows, and what the op that aligns them shares with its gradient: checks and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

__all__ = ["CellInputs", "cells", "check_cells", "check_like", "level_of", "level_samples", "tile_level"]

CellInputs = Callable[[], tuple[Tensor, Tensor, Tensor | None]]


def cells(level: Tensor, patch: int) -> Tensor:
    """``(B, C, h, w) -> (B, gh * gw, p * p * C)``, for each cell its positions row by row.

    As a matrix product of such rows, a convolution whose stride is its kernel's side runs 1.2 to 1.7 times as fast on a
    CPU, forward and backward.

    Args:
        level: sides that `patch` divides.
        patch: p.

    Example:
        >>> cells(torch.arange(8.0).view(1, 1, 2, 4), 2)
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    batch, channels, height, width = level.shape
    x = level.permute(0, 2, 3, 1)  # (B, h, w, C)
    x = x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3)  # (B, gh, gw, p, p, C)
    return x.reshape(batch, height * width // patch**2, patch**2 * channels)


def level_of(rows: Tensor, like: Tensor, patch: int) -> Tensor:
    """The way back, ``(B, gh * gw, p * p * C) -> (B, C, h, w)``.

    Args:
        rows: of every cell.
        like: whose shape and order in memory the level takes.
        patch: p.

    Example:
        >>> level = torch.arange(8.0).view(1, 1, 2, 4)
        >>> torch.equal(level_of(cells(level, 2), level, 2), level)
        True
    """
    (batch, channels, height, width), p = like.shape, patch
    blocks = rows.view(batch, height // p, width // p, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    out = torch.empty_like(like, dtype=rows.dtype)
    out.view(batch, channels, height // p, p, width // p, p).copy_(blocks)  # (B, C, gh, p, gw, p)
    return out


def check_cells(level: Tensor, weight: Tensor, visible: Tensor | None, patch: int) -> None:
    """Checks what the op and its gradient share; raises a sentence."""
    if level.dim() != 4 or min(level.shape[1:]) < 1:
        raise ValueError(f"level has shape {tuple(level.shape)}; expected (B, C, gh * p, gw * p).")
    if not level.is_floating_point():
        raise TypeError(f"level has dtype {level.dtype}; expected a floating-point dtype.")
    batch, channels, height, width = level.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch is {patch}; expected a divisor of the level's {height} x {width} positions.")
    count, values = height * width // patch**2, patch**2 * channels
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != values:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (D, {values}), for each of the {patch} x {patch} "
            f"positions of a cell its {channels} channels."
        )
    if not (level.is_contiguous() or level.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"level has strides {level.stride()}; expected contiguous or channels-last.")
    check_like("weight", weight, level, tuple(weight.shape))
    if visible is not None:
        check_like("visible", visible, level, (batch, count), torch.bool)


def check_like(
    name: str, tensor: Tensor, level: Tensor, shape: Iterable[int], dtype: torch.dtype | None = None
) -> None:
    """Checks shape, dtype (None: that of the level), device and order in memory of one argument.

    Args:
        name: of the argument.
        tensor: the argument.
        level: the map that it goes with.
        shape: what is expected.
        dtype: what is expected.
    """
    expected = level.dtype if dtype is None else dtype
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")
    if tensor.dtype != expected:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}.")
    if tensor.device != level.device:
        raise ValueError(f"{name} is on {tensor.device} but level is on {level.device}; move one of them.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def level_samples(device: str, dtype: torch.dtype) -> list[tuple[str, CellInputs, int, bool]]:
    """Samples as (name, maker of level, weight and visible, patch, small enough for a gradient check)."""
    make = partial(_draw, device, dtype)

    def huge() -> tuple[Tensor, Tensor, Tensor | None]:
        level = torch.randn(130, 256, 256, 256, device=device, dtype=dtype)  # 2.2e9 elements: offsets need 64 bits
        weight = torch.randn(16, 4096, device=device, dtype=dtype) / 64
        return level, weight, torch.rand(130, 4096, device=device) >= 0.1

    return [
        ("small", lambda: make(2, 3, (2, 3), 2, 5), 2, True),
        ("nothing_hidden", lambda: make(2, 3, (2, 2), 3, 4, hidden=0.0), 3, True),
        ("everything_hidden", lambda: make(1, 2, (2, 2), 2, 3, hidden=1.0), 2, True),
        ("channels_last", lambda: make(2, 4, (3, 2), 2, 6, channels_last=True), 2, True),
        ("one_of_everything", lambda: make(1, 1, (1, 1), 1, 1, hidden=1e-9), 1, True),
        ("single_positions", lambda: make(3, 33, (5, 7), 1, 24), 1, False),
        ("odd_sides", lambda: make(2, 19, (3, 5), 5, 37), 5, False),
        ("fpn_p4", lambda: make(2, 64, (16, 16), 2, 96, hidden=0.1), 2, False),
        ("fpn_p3", lambda: make(1, 64, (8, 16), 4, 64, hidden=0.6), 4, False),
        ("fpn_p5", lambda: make(4, 256, (16, 16), 1, 256, hidden=0.1), 1, False),
        ("huge", huge, 4, False),
    ]


def tile_level(device: str, dtype: torch.dtype) -> tuple[CellInputs, int]:
    """Maker of level, weight and visible, and patch, of the sample on which every tile is tried."""
    return partial(_draw, device, dtype, 6, 72, (9, 11), 2, 200), 2


def _draw(
    device: str, dtype: torch.dtype, batch: int, channels: int, grid: tuple[int, int], patch: int, width: int,
    hidden: float = 0.3, channels_last: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    g = torch.Generator().manual_seed(channels * 101 + width)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)  # noqa: E731
    level, values = draw(batch, channels, grid[0] * patch, grid[1] * patch), patch**2 * channels
    if channels_last:
        level = level.contiguous(memory_format=torch.channels_last)
    visible = (torch.rand(batch, grid[0] * grid[1], generator=g) >= hidden).to(device)
    return level, draw(width, values) * values**-0.5, visible if hidden else None
