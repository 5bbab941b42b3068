"""Pictures of what a mask strategy thinks and does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.ragged import RaggedKeep
from .base import Panel

__all__ = ["kept_panel", "saliency_panel"]


def saliency_panel(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Panel:
    """Draws the patches' scores, stretched to 0..1 per image.

    Args:
        scores: ``(B, gh * gw)``.
        grid: ``(gh, gw)``.
        size: ``(H, W)`` pixels of the picture.

    Example:
        >>> saliency_panel(torch.tensor([[2.0, 4.0]]), (1, 2), (1, 4)).image
        tensor([[[0., 0., 1., 1.]]])
    """
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    heat = (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)
    return Panel("saliency", _enlarge(heat, grid, size), "heat")


def kept_panel(keep: Tensor | RaggedKeep, grid: tuple[int, int], size: tuple[int, int]) -> Panel:
    """Draws which patches are kept.

    Args:
        keep: ``(B, k)`` indices, or another number of each image.
        grid: ``(gh, gw)``.
        size: ``(H, W)`` pixels of the picture.

    Example:
        >>> kept_panel(torch.tensor([[1]]), (1, 2), (1, 4)).image
        tensor([[[0., 0., 1., 1.]]])
    """
    patches = grid[0] * grid[1]
    if isinstance(keep, RaggedKeep):
        kept = keep.visible(patches).float()
    else:
        kept = torch.zeros(len(keep), patches, device=keep.device).scatter_(1, keep, 1.0)
    return Panel("kept patches", _enlarge(kept, grid, size), "mask")


def _enlarge(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``(B, gh * gw)`` values of cells -> ``(B, H, W)``, each cell filled with its value."""
    return F.interpolate(values.view(-1, 1, *grid), size, mode="nearest")[:, 0]
