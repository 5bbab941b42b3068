"""Tap tables built the slow and obvious way, from a pixel mask and a dictionary: samples of the masked convolution ops.

`fastmkd.nn.plan.MaskPlan` builds the same tables by arithmetic; its test compares the two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TapSample", "gather_taps", "slow_tables", "tap_samples", "tile_tap_sample"]

Pair = tuple[int, int]


class TapSample(NamedTuple):
    """A masked convolution's tables with the sizes that fit them.

    Attributes:
        tables: ``taps (N_out, T)``, ``taps_back (N_in, T)``, ``order (N_out,)``, ``order_back (N_in,)``, all int32.
        channels: ``(Cin, Cout)``.
        kernel: ``(kh, kw)``.
        groups: number of groups.
    """

    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    channels: Pair
    kernel: Pair
    groups: int


def gather_taps(values: Tensor, taps: Tensor) -> Tensor:
    """Gathers the rows under each tap, zeros where there is none.

    Args:
        values: ``(N, C)``.
        taps: ``(M, T)`` row numbers, -1 for none.

    Returns:
        ``(M, T, C)``.

    Example:
        >>> gather_taps(torch.tensor([[5.0]]), torch.tensor([[0, -1]]))
        tensor([[[5.],
                 [0.]]])
    """
    padded = torch.cat((values, values.new_zeros(1, values.shape[1])))  # row -1 is the row of zeros
    return padded[taps.long()]


def slow_tables(
    visible_in: Tensor, visible_out: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Builds the tables of a convolution between two pixel masks by looking every tap up; rows in reading order.

    Args:
        visible_in: ``(B, H, W)`` bool, pixels of the input that have a row.
        visible_out: ``(B, H', W')`` bool, the same for the output.
        kernel: ``(kh, kw)``.
        stride: ``(vertical, horizontal)``, as are the next two.
        padding: zeros around the input.
        dilation: distance between taps.

    Returns:
        ``taps (N_out, kh * kw)`` and ``taps_back (N_in, kh * kw)``, int32, -1 for none.

    Example:
        >>> slow_tables(torch.ones(1, 1, 2).bool(), torch.ones(1, 1, 2).bool(), (1, 2), (1, 1), (0, 0), (1, 1))[0]
        tensor([[ 0,  1],
                [ 1, -1]], dtype=torch.int32)
    """
    row_in = {tuple(pixel): row for row, pixel in enumerate(visible_in.nonzero().tolist())}
    outputs = visible_out.nonzero().tolist()
    count = kernel[0] * kernel[1]
    taps = torch.full((len(outputs), count), -1, dtype=torch.int32)
    taps_back = torch.full((len(row_in), count), -1, dtype=torch.int32)
    for row, (image, y, x) in enumerate(outputs):
        for tap in range(count):
            source = (
                image,
                y * stride[0] + tap // kernel[1] * dilation[0] - padding[0],
                x * stride[1] + tap % kernel[1] * dilation[1] - padding[1],
            )
            if source in row_in:
                taps[row, tap] = row_in[source]
                taps_back[row_in[source], tap] = row
    return taps, taps_back


@lru_cache(maxsize=1)
def tap_samples() -> dict[str, TapSample]:
    """Tables for the samples of the masked convolution ops, on the CPU.

    Example:
        >>> tap_samples()["one_cell"].tables[0].shape
        torch.Size([4, 9])
    """
    make = _sample
    return dict(
        (
            make("small", (2, 2), 2, 2, (4, 5)),
            make("one_cell", (3, 3), 2, 1, (3, 7), batch=1),
            make("all_visible", (2, 3), 2, 6, (5, 4)),
            make("stride_two", (2, 2), 4, 2, (4, 6), stride=2),
            make("stride_two_pointwise", (2, 2), 2, 2, (4, 6), kernel=1, stride=2),
            make("dilated", (2, 2), 4, 3, (3, 4), dilation=2),
            make("wide_kernel", (3, 3), 2, 4, (2, 3), kernel=7),
            make("single_pixel_cells", (5, 4), 1, 7, (6, 5)),
            make("grouped", (2, 2), 2, 3, (8, 6), groups=2),
            make("depthwise", (2, 2), 4, 2, (8, 8), kernel=5, groups=8),
            make("odd_channels", (3, 3), 4, 4, (24, 37)),
            make("resnet_like", (7, 7), 2, 12, (64, 64)),
            make("depthwise_wide", (4, 4), 4, 5, (96, 96), kernel=7, groups=96),
        )
    )


@lru_cache(maxsize=1)
def tile_tap_sample() -> TapSample:
    """Tables for the sample on which every tile of a masked convolution is tried, on the CPU.

    Example:
        >>> tile_tap_sample().tables[0].shape
        torch.Size([2205, 9])
    """
    return _sample("tiles", (4, 4), 7, 9, (128, 200), batch=5)[1]


def _sample(
    name: str,
    grid: Pair,
    cell: int,
    visible: int,
    channels: Pair,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    batch: int = 2,
) -> tuple[str, TapSample]:
    g = torch.Generator().manual_seed(cell * 17 + channels[0])
    coarse = torch.zeros(batch, grid[0] * grid[1], dtype=torch.bool)
    coarse.scatter_(1, torch.rand(coarse.shape, generator=g).argsort(1)[:, :visible], True)
    pixels = lambda side: coarse.view(batch, *grid).repeat_interleave(side, 1).repeat_interleave(side, 2)  # noqa: E731
    pair = lambda n: (n, n)  # noqa: E731
    taps, taps_back = slow_tables(
        pixels(cell),
        pixels(cell // stride),
        pair(kernel),
        pair(stride),
        pair(dilation * (kernel // 2)),
        pair(dilation),
    )
    tables = (taps, taps_back, _shuffled(taps), _shuffled(taps_back))
    return name, TapSample(tables, channels, pair(kernel), groups)


def _shuffled(table: Tensor) -> Tensor:
    """A processing order; any permutation is valid, so the samples use one that nobody would guess."""
    return torch.randperm(len(table), generator=torch.Generator().manual_seed(len(table))).to(torch.int32)


def on_device(sample: TapSample, device: str) -> tuple[Any, ...]:
    """The sample's tables on a device.

    Args:
        sample: one of `tap_samples`.
        device: such as ``"cuda"``.

    Example:
        >>> len(on_device(tap_samples()["small"], "cpu"))
        4
    """
    return tuple(table.to(device) for table in sample.tables)
