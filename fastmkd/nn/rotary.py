"""Rotary positions (EVA-02, DINOv3, RoPE-ViT) of kept patches: each patch keeps the angles of its own place.

Such a model does not add positions to its tokens; every attention turns queries and keys by angles that depend on the
place. Leaving a patch out therefore leaves out its row of the table of sines and cosines, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

__all__ = ["rotary_table", "rotate", "rotations"]


def rotary_table(model: Any, grid: tuple[int, int]) -> Tensor | None:
    """Sines and cosines for every patch of a grid: ``(N, 2d)``, or ``(depth, H, N, 2d)`` if blocks and heads differ.

    Args:
        model: a maskable timm ViT; None is returned for one without rotary positions.
        grid: ``(gh, gw)`` patches.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    fixed = not model.dynamic_img_size and hasattr(rope, "feat_shape")
    table: Tensor = rope.get_embed() if fixed else rope.get_embed(shape=list(grid))
    return table


def rotations(table: Tensor | None, keep: Tensor) -> Iterator[Tensor | None]:
    """Yields for one block after the other what timm's attention takes as `rope`, for the kept patches.

    Args:
        table: from `rotary_table`.
        keep: ``(B, k)`` int64 patch indices.

    Yields:
        ``(B, 1, k, 2d)``, or ``(B, H, k, 2d)`` where heads differ; always None without a table.

    Example:
        >>> table = torch.arange(3.0).view(3, 1)
        >>> next(rotations(table, torch.tensor([[2, 0]]))).flatten()
        tensor([2., 0.])
    """
    if table is None or table.dim() == 2:
        return repeat(None if table is None else table[keep].unsqueeze(1))  # (B, k, 2d) -> (B, 1, k, 2d)
    # One block at a time: all of them at once would be larger than the activations.
    return (angles[:, keep].transpose(0, 1) for angles in table)  # (H, B, k, 2d) -> (B, H, k, 2d)


def rotate(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Turns queries or keys by their angles; prefix tokens stay as they are.

    Args:
        attn: timm's EvaAttention or AttentionRope.
        x: ``(B, H, L, d)``, the first L tokens or all of them, prefix tokens first.
        rope: as `rotations` yields it or the model makes it.
    """
    prefix = attn.num_prefix_tokens
    if x.shape[2] <= prefix:
        return x
    rope = rope[..., : x.shape[2] - prefix, :]
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}
    return torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **half)), dim=2).type_as(x)
