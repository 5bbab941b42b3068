"""Random crops of a batch on its own device, for methods that look at an image several times (multi-crop)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_crops"]


def random_crops(
    images: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Tensor:
    """Cuts a random part out of each image, resizes it bilinearly, and flips some: random resized crop and flip.

    The part's share of the area is uniform in `scale`, its aspect ratio log-uniform in `ratio`; its sides are cut to
    the image's. Everything is drawn from the global generator of the images' device, and nothing waits for the device.
    Half precision is sampled in float32, for bfloat16 tells no pixel of 224 from the next.

    Args:
        images: ``(B, C, H, W)`` floating point.
        size: ``(h, w)`` pixels of the crops.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height, in shares of the image's sides.
        flip: probability of a left-right flip.

    Returns:
        ``(B, C, h, w)``.

    Raises:
        ValueError: a range that is not one.

    Example:
        >>> random_crops(torch.zeros(2, 3, 32, 32), (8, 8), (0.05, 0.4)).shape
        torch.Size([2, 3, 8, 8])
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {tuple(scale)}; expected two shares of the area, 0 < smallest <= largest <= 1.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio is {tuple(ratio)}; expected two positive numbers, the smaller first.")
    batch = images.shape[0]
    area, aspect, x, y, flipped = torch.rand(5, batch, device=images.device, dtype=torch.float32)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # In coordinates from -1 to 1 a part of width w has its centre within 1 - w of the middle.
    centre_x, centre_y = (1 - width) * (2 * x - 1), (1 - height) * (2 * y - 1)
    zero = torch.zeros_like(width)
    sign = torch.where(flipped < flip, -1.0, 1.0)
    rows = torch.stack((sign * width, zero, centre_x, zero, height, centre_y), dim=1).view(batch, 2, 3)
    wide = torch.promote_types(images.dtype, torch.float32)
    grid = F.affine_grid(rows.to(wide), [batch, images.shape[1], *size], align_corners=False)
    crops = F.grid_sample(images.to(wide), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.to(images.dtype)
