"""Masked ViT the public code's way: embed all patches, add positions, gather the kept ones, run every block whole.

Follows the pseudo code of MaskedKD, Appendix G, for any timm VisionTransformer. The saliency comes from the full
``(P + N, P + N)`` attention matrix with an explicit softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["masked_vit_forward", "masked_vit_intermediates", "masked_vit_saliency"]


def masked_vit_forward(model: Any, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Returns the output of a timm ViT that sees the kept patches only (MaskedKD, Appendix G).

    Args:
        model: a timm VisionTransformer without patch dropout; its dropouts in eval mode.
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` int64 patch indices; None keeps all.

    Returns:
        Logits ``(B, classes)``.

    Example:
        >>> import timm
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=1).eval()
        >>> masked_vit_forward(model, torch.randn(1, 3, 224, 224), torch.tensor([[7, 3]])).shape
        torch.Size([1, 1000])
    """
    x = _tokens(model, images, keep)
    for block in model.blocks.children():
        x = block(x)
    return model.forward_head(model.norm(x))


def masked_vit_intermediates(model: Any, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
    """Returns the output of every block, ``(B, P + k, D)`` each, before the final norm.

    Args:
        model: a timm VisionTransformer without patch dropout; its dropouts in eval mode.
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` int64 patch indices; None keeps all.

    Example:
        >>> import timm
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
        >>> [tuple(x.shape) for x in masked_vit_intermediates(model, torch.randn(1, 3, 224, 224))]
        [(1, 197, 192), (1, 197, 192)]
    """
    x = _tokens(model, images, keep)
    outputs = []
    for block in model.blocks.children():
        x = block(x)
        outputs.append(x)
    return outputs


def masked_vit_saliency(model: Any, images: Tensor, keep: Tensor | None = None, include_prefix: bool = False) -> Tensor:
    """Returns the attention of the CLS token to each patch in the last layer, from the full attention matrix (Eq. 2).

    Args:
        model: a timm VisionTransformer with a prefix token; its dropouts in eval mode.
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` int64 patch indices; None keeps all.
        include_prefix: softmax over prefix tokens too and mean over heads, as the public code does.

    Returns:
        ``(B, N)``, or ``(B, k)`` in the order of `keep`.

    Example:
        >>> import timm
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=1).eval()
        >>> masked_vit_saliency(model, torch.randn(1, 3, 224, 224)).sum().round()  # one for each head
        tensor(3., grad_fn=<RoundBackward0>)
    """
    x = _tokens(model, images, keep)
    *body, last = model.blocks.children()
    for block in body:
        x = block(x)
    attn, prefix = last.attn, model.num_prefix_tokens
    B, L, _ = x.shape
    qkv = attn.qkv(last.norm1(x)).reshape(B, L, 3, attn.num_heads, attn.head_dim)
    q, k = attn.q_norm(qkv[:, :, 0].transpose(1, 2)), attn.k_norm(qkv[:, :, 1].transpose(1, 2))  # (B, H, L, d)
    scores = q @ k.transpose(-2, -1) * attn.scale  # (B, H, L, L)
    if include_prefix:
        return scores.softmax(-1)[:, :, 0, prefix:].mean(1)
    return scores[:, :, 0, prefix:].softmax(-1).sum(1)


def _tokens(model: Any, images: Tensor, keep: Tensor | None) -> Tensor:
    """All patches embedded, positions added, then the kept ones gathered: ``(B, P + k, D)``."""
    x = model._pos_embed(model.patch_embed(images))  # (B, P + N, D)
    if keep is not None:
        prefix, patches = x[:, : model.num_prefix_tokens], x[:, model.num_prefix_tokens :]
        patches = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[-1]))
        x = torch.cat((prefix, patches), dim=1)
    return model.norm_pre(x)
