"""The end of CaiT: the CLS token joins after the patch blocks and reads the patches through class attention.

Class attention computes the CLS row alone, so there is no row to leave out; its CLS query and keys are the saliency.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.cait import ClassAttn
from torch import Tensor

from ..ops import cls_saliency
from .attention import SaliencyOptions

__all__ = ["run_class_blocks"]


def run_class_blocks(model: Any, x: Tensor, saliency: SaliencyOptions | None) -> tuple[Tensor, Tensor | None]:
    """Runs the class-attention blocks of a CaiT on patch tokens.

    Args:
        model: timm's Cait.
        x: ``(B, k, D)`` output of the patch blocks.
        saliency: also return the CLS saliency of the last class attention; None for no saliency.

    Returns:
        The tokens before the final norm, ``(B, 1 + k, D)`` with the CLS token first, or ``(B, 1, D)`` when the head
        reads that token alone; and the saliency ``(B, k)`` or None.

    Raises:
        ValueError: a saliency is wanted but the last class block has no `ClassAttn`.
    """
    if model.blocks_token_only is None:  # timm's prune_intermediate_layers
        return x, None
    cls, before = model.cls_token.expand(x.shape[0], -1, -1), None
    for block in model.blocks_token_only:
        before, cls = cls, block(x, cls)
    scores = None if saliency is None else _score(list(model.blocks_token_only), x, before, saliency)
    reads_cls = model.global_pool not in ("", "avg")
    return cls if reads_cls else torch.cat((cls, x), dim=1), scores


def _score(blocks: list[Any], x: Tensor, cls: Tensor | None, options: SaliencyOptions) -> Tensor:
    """Saliency of the last class attention; makes its keys once more, a third of a percent of a CaiT-S24's work."""
    attn = getattr(blocks[-1], "attn", None) if blocks else None
    if cls is None or attn is None or type(attn).forward is not ClassAttn.forward:
        raise ValueError(
            f"the model ends in {type(attn).__name__}; return_saliency needs timm's ClassAttn in the last class block. "
            "Use another student, or no saliency."
        )
    tokens = blocks[-1].norm1(torch.cat((cls, x), dim=1))  # (B, 1 + k, D)
    q, k = (out.unflatten(-1, (attn.num_heads, -1)) for out in (attn.q(tokens[:, 0]), attn.k(tokens)))
    scale = q.shape[-1] ** -0.5 if attn.fused_attn else float(attn.scale)
    return cls_saliency(q, k.transpose(1, 2), options.num_prefix_tokens, scale, options.include_prefix)
