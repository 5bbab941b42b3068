"""RepPoints: from points to boxes, and which place of the pyramid answers for which object (RepPoints, Section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BACKGROUND", "IGNORED", "assign_by_centre", "assign_by_overlap", "boxes_from_points", "centres"]

BACKGROUND, IGNORED = -1, -2
BASE = 4  # an object of BASE strides is of the size that a level is for


def boxes_from_points(points: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Returns the pseudo box of each set of points (Section 3.1).

    Args:
        points: ``(..., n, 2)``, x and y.
        log_scale: ``(2,)``; with it the box is ``mean -+ std * exp(log_scale)`` of the points ("moment-based");
            without, the smallest box around them ("min-max").

    Returns:
        ``(..., 4)``, corners x0 y0 x1 y1.

    Example:
        >>> boxes_from_points(torch.tensor([[1.0, 5.0], [3.0, 1.0]]))
        tensor([1., 1., 3., 5.])
        >>> boxes_from_points(torch.tensor([[1.0, 5.0], [3.0, 1.0]]), torch.zeros(2)).round(decimals=2)
        tensor([0.5900, 0.1700, 3.4100, 5.8300])
    """
    if log_scale is None:
        low, high = points.amin(-2), points.amax(-2)  # aminmax has no gradient in PyTorch 2.11
        return torch.cat([low, high], dim=-1)
    std, mean = torch.std_mean(points, dim=-2)
    half = std * log_scale.exp()
    return torch.cat([mean - half, mean + half], dim=-1)


def centres(sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the middle of each bin of a pyramid, level after level and row after row, and its stride.

    Args:
        sizes: ``(h, w)`` of each level.
        strides: of each level in pixels.
        device: for the result.

    Returns:
        ``(L, 2)`` x and y in pixels, and ``(L,)``.

    Example:
        >>> centres([(1, 2)], [8], torch.device("cpu"))[0]
        tensor([[ 4.,  4.],
                [12.,  4.]])
    """
    places, steps = [], []
    for (h, w), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        places.append((torch.stack([x, y], dim=-1).view(-1, 2) + 0.5) * stride)
        steps.append(torch.full((h * w,), float(stride), device=device))
    return torch.cat(places), torch.cat(steps)


def assign_by_centre(boxes: Tensor, sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """Gives each object to one bin: the one that its centre falls in, on the level for its size (Section 3.2).

    The level is ``floor(log2(sqrt(w h) / 4))``, where a bin of level l is ``2**l`` pixels wide. If two objects want one
    bin the smaller gets it, as the larger can be found elsewhere by its parts.

    Args:
        boxes: ``(G, 4)`` corners in pixels.
        sizes: ``(h, w)`` of each level.
        strides: of each level, ascending powers of two.

    Returns:
        ``(L,)`` int64: which object, or `BACKGROUND`.

    Example:
        >>> assign_by_centre(torch.tensor([[10.0, 0.0, 50.0, 34.0]]), [(2, 4), (1, 2)], [8, 16])
        tensor([-1, -1, -1, -1, -1, -1, -1,  0, -1, -1])
    """
    step = torch.tensor(strides, device=boxes.device)
    grid = torch.tensor(sizes, device=boxes.device)  # (levels, 2)
    first = torch.cat([grid.new_zeros(1), grid.prod(1).cumsum(0)])  # where each level begins
    owner = torch.full((int(sum(h * w for h, w in sizes)),), BACKGROUND, device=boxes.device)
    if not len(boxes):
        return owner
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    area = width * height
    wanted = (0.5 * area.log2() - 2).floor()
    level = (wanted - step[0].log2()).long().clamp(0, len(strides) - 1)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    x, y = (middle / step[level, None]).long().unbind(1)
    x, y = x.clamp(min=0).minimum(grid[level, 1] - 1), y.clamp(min=0).minimum(grid[level, 0] - 1)
    place = first[level] + y * grid[level, 1] + x
    # Ranked from the largest to the smallest, so that the greatest rank in a bin is that of the smallest object.
    by_size = area.argsort(descending=True, stable=True)
    rank = owner.scatter_reduce(0, place[by_size], torch.arange(len(boxes), device=boxes.device), "amax")
    return torch.where(rank >= 0, by_size[rank.clamp(min=0)], rank)


def assign_by_overlap(overlap: Tensor, positive: float = 0.5, negative: float = 0.4) -> Tensor:
    """Gives each pseudo box the object that it overlaps most, if enough; each object gets at least its best box.

    Args:
        overlap: ``(G, L)`` intersection over union.
        positive: from here on the box answers for the object.
        negative: below, it shows background; between the two it is left out of the loss.

    Returns:
        ``(L,)`` int64: which object, `BACKGROUND` or `IGNORED`.

    Example:
        >>> assign_by_overlap(torch.tensor([[0.6, 0.45, 0.1, 0.0], [0.0, 0.0, 0.2, 0.1]]))
        tensor([ 0, -2,  1, -1])
    """
    if not len(overlap):
        return torch.full(overlap.shape[1:], BACKGROUND, device=overlap.device)
    most, owner = overlap.max(dim=0)
    owner = torch.where(most >= positive, owner, torch.where(most < negative, BACKGROUND, IGNORED))
    best, place = overlap.max(dim=1)  # (G,)
    objects = torch.arange(len(overlap), device=overlap.device)
    forced = torch.full_like(owner, BACKGROUND)
    # An object that no box touches gets none.
    forced = forced.scatter_reduce(0, place, torch.where(best > 0, objects, BACKGROUND), "amax")
    return torch.where((forced >= 0) & (owner < 0), forced, owner)
