"""What a ViT's head reads of the last block's output."""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from .spectrogram import SpectrogramTransformer

__all__ = ["averages_patches", "rows_for_head"]

_TWO_TOKEN_HEADS = (VisionTransformerDistilled.forward_head, SpectrogramTransformer.forward_head)
_HEADS = (VisionTransformer.forward_head, Eva.forward_head)
_POOLS = (VisionTransformer.pool, Eva.pool)


def rows_for_head(model: Any, length: int) -> int:
    """Returns how many leading tokens the head reads; all of them unless it is known to read fewer.

    Args:
        model: a maskable timm ViT.
        length: number of tokens.
    """
    if type(model).forward_head in _TWO_TOKEN_HEADS:
        return 2
    return 1 if _pools(model, "token") else length


def averages_patches(model: Any) -> bool:
    """Tells whether the head reads nothing but the mean of the patches.

    Args:
        model: a maskable timm ViT.
    """
    return _pools(model, "avg") and not getattr(model, "pool_include_prefix", False)


def _pools(model: Any, how: str) -> bool:
    kind = type(model)
    if kind.forward_head not in _HEADS or kind.pool not in _POOLS:
        return False
    return bool(model.global_pool == how) and getattr(model, "attn_pool", None) is None
