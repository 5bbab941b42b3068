"""What masked autoencoders do besides running a ViT: draw masks, put tokens back, compare pixels (MAE; DMAE, Eq. 1).

Pixels of a patch are in the order of the public MAE: row, column, channel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.masks import random_mask
from ..ops.patch_embed import patch_rows

__all__ = [
    "count_hidden",
    "draw_patches",
    "normalised",
    "paste_patches",
    "patch_pixels",
    "sincos_positions",
]

EPSILON = 1e-6  # of the variance of a patch's pixels, as in the public MAE


def count_hidden(mask_ratio: float, grid: tuple[int, int]) -> int:
    """Returns how many patches of a grid are hidden, ``round(mask_ratio * gh * gw)``.

    Args:
        mask_ratio: share of the patches.
        grid: ``(gh, gw)``.

    Raises:
        ValueError: none would be hidden, or none visible.

    Example:
        >>> count_hidden(0.95, (14, 14))
        186
    """
    patches = math.prod(grid)
    hidden = round(mask_ratio * patches)
    if not 0 < hidden < patches:
        left = "hidden" if hidden <= 0 else "visible"
        raise ValueError(
            f"mask_ratio is {mask_ratio}, which leaves no {left} patch of the {patches} in a {grid[0]} x {grid[1]} "
            "grid; at least one of each is needed. Change mask_ratio, or take larger images or smaller patches."
        )
    return hidden


def draw_patches(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws for each image which patches are visible and which hidden, as `fastmkd.random_mask` does.

    Args:
        batch: number of images B.
        grid: ``(gh, gw)`` patches, N of them.
        mask_ratio: share of hidden patches.
        device: where the indices are returned.
        generator: source of randomness; None is the global one of the device.

    Returns:
        ``(B, k)`` visible and ``(B, N - k)`` hidden patches, int64, ascending.

    Raises:
        ValueError: see `count_hidden`.

    Example:
        >>> keep, hidden = draw_patches(1, (2, 2), 0.75)
        >>> keep.shape, sorted([*keep[0].tolist(), *hidden[0].tolist()])
        (torch.Size([1, 1]), [0, 1, 2, 3])
    """
    hidden = count_hidden(mask_ratio, grid)
    visible = random_mask(batch, grid, mask_ratio, device, generator).flatten(1)  # (B, N)
    # The visible ones first, each group in its order, without asking the device how many there are.
    order = (~visible).to(torch.uint8).argsort(dim=1, stable=True)
    keep, rest = order.split((order.shape[1] - hidden, hidden), dim=1)
    return keep.contiguous(), rest.contiguous()


def patch_pixels(images: Tensor, patches: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Reads the pixels of some patches.

    Args:
        images: ``(B, C, H, W)``.
        patches: ``(B, m)`` int64 patch indices.
        patch_size: of both sides, or ``(ph, pw)``.

    Returns:
        ``(B, m, ph * pw * C)``.

    Example:
        >>> patch_pixels(torch.arange(8.0).view(1, 2, 1, 4), torch.tensor([[1]]), (1, 2))
        tensor([[[2., 6., 3., 7.]]])
    """
    size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows = patch_rows(images, patches, size, size)  # (B, m, C * ph * pw)
    return rows.unflatten(2, (images.shape[1], -1)).mT.flatten(2)


def normalised(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation ``(B, m, 1)`` that the pixels of each patch are normalised with.

    Args:
        pixels: ``(B, m, ph * pw * C)``.

    Example:
        >>> mean, std = normalised(torch.tensor([[[1.0, 3.0]]]))
        >>> mean.item(), round(std.item(), 4)
        (2.0, 1.4142)
    """
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return mean, (variance + EPSILON).sqrt()


def paste_patches(images: Tensor, patches: Tensor, pixels: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Returns the images with other pixels in some patches.

    Args:
        images: ``(B, C, H, W)``.
        patches: ``(B, m)`` int64 patch indices.
        pixels: ``(B, m, ph * pw * C)``.
        patch_size: of both sides, or ``(ph, pw)``.

    Example:
        >>> paste_patches(torch.zeros(1, 1, 1, 4), torch.tensor([[1]]), torch.tensor([[[7.0, 8.0]]]), (1, 2))
        tensor([[[[0., 0., 7., 8.]]]])
    """
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    B, C, H, W = images.shape
    every = torch.arange((H // ph) * (W // pw), device=images.device).expand(B, -1)
    own = patch_pixels(images, every, (ph, pw))  # (B, N, ph * pw * C)
    whole = own.scatter(1, patches[:, :, None].expand_as(pixels), pixels.to(own.dtype))
    return whole.view(B, H // ph, W // pw, ph, pw, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


def sincos_positions(grid: tuple[int, int], width: int, num_prefix_tokens: int = 0) -> Tensor:
    """Makes MAE's fixed positions: sines and cosines of a patch's column in the first half, of its row in the second.

    Args:
        grid: ``(gh, gw)``.
        width: D, a multiple of 4.
        num_prefix_tokens: P, whose positions are zeros.

    Returns:
        ``(P + gh * gw, D)`` float32.

    Example:
        >>> sincos_positions((1, 2), 4, num_prefix_tokens=1)
        tensor([[0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0000, 1.0000]])
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = []
    for place in (columns, rows):
        angles = place.flatten()[:, None] * frequencies  # (N, D / 4)
        parts += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, 0, num_prefix_tokens, 0)).float()
