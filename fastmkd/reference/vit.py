"""Masked ViT the public code's way: embed all patches, add positions, gather the kept ones, run every block whole.

Follows the pseudo code of MaskedKD, Appendix G, for timm's VisionTransformer, Eva (rotary positions: the rows of the
kept patches are gathered too) and Cait. The saliency comes from the full ``(P + N, P + N)`` attention matrix with an
explicit softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_keep_indices_nlc, apply_rot_embed_cat
from timm.models.cait import Cait
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor

__all__ = ["masked_vit_forward", "masked_vit_intermediates", "masked_vit_saliency"]


def masked_vit_forward(model: Any, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Returns the output of a timm ViT that sees the kept patches only (MaskedKD, Appendix G).

    Args:
        model: a timm ViT without patch dropout; its dropouts in eval mode.
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
    x, ropes = _tokens(model, images, keep)
    for block, rope in zip(model.blocks.children(), ropes, strict=True):
        x = block(x, *rope)
    if isinstance(model, Cait):
        x = model.forward_cls(x)
    return model.forward_head(model.norm(x))


def masked_vit_intermediates(model: Any, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
    """Returns the output of every block, ``(B, P + k, D)`` each, before the final norm; CaiT's have no prefix tokens.

    Args:
        model: a timm ViT without patch dropout; its dropouts in eval mode.
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` int64 patch indices; None keeps all.

    Example:
        >>> import timm
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
        >>> [tuple(x.shape) for x in masked_vit_intermediates(model, torch.randn(1, 3, 224, 224))]
        [(1, 197, 192), (1, 197, 192)]
    """
    x, ropes = _tokens(model, images, keep)
    outputs = []
    for block, rope in zip(model.blocks.children(), ropes, strict=True):
        x = block(x, *rope)
        outputs.append(x)
    return outputs


def masked_vit_saliency(model: Any, images: Tensor, keep: Tensor | None = None, include_prefix: bool = False) -> Tensor:
    """Returns the attention of the CLS token to each patch in the last layer, from the full attention matrix (Eq. 2).

    Args:
        model: a timm ViT with a prefix token; its dropouts in eval mode.
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
    x, ropes = _tokens(model, images, keep)
    *body, last = model.blocks.children()
    for block, rope in zip(body, ropes[:-1], strict=True):
        x = block(x, *rope)
    if isinstance(model, Cait):
        q, k, scale = _class_attention(model, last(x))
    else:
        normed = x if isinstance(last, ResPostBlock | EvaBlockPostNorm) else last.norm1(x)
        q, k = _queries_and_keys(last.attn, normed, *ropes[-1])  # (B, H, L, d)
        scale = last.attn.scale
    prefix = model.num_prefix_tokens
    scores = q @ k.transpose(-2, -1) * scale  # (B, H, L, L); only the CLS row in CaiT
    if include_prefix:
        return scores.softmax(-1)[:, :, 0, prefix:].mean(1)
    return scores[:, :, 0, prefix:].softmax(-1).sum(1)


def _tokens(model: Any, images: Tensor, keep: Tensor | None) -> tuple[Tensor, list[list[Tensor]]]:
    """All patches embedded, positions added, then the kept ones gathered: ``(B, P + k, D)``; and each block's rope."""
    x, rope, prefix, depth = model.patch_embed(images), None, model.num_prefix_tokens, len(model.blocks)
    if isinstance(model, Cait):
        x, prefix = model.pos_drop(x + model.pos_embed), 0  # (B, N, D): the CLS token comes later
    elif isinstance(model, Eva):
        x, rope = model._pos_embed(x)  # (B, P + N, D); (N, 2d) or (depth, H, N, 2d)
    else:
        x = model._pos_embed(x)
    if keep is not None:
        patches = x[:, prefix:].gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))
        if rope is not None:
            rope = apply_keep_indices_nlc(patches, rope, keep)  # (B, k, 2d) or (B, depth, H, k, 2d)
            rope = rope[:, None] if rope.dim() == 3 else rope.transpose(0, 1)
        x = torch.cat((x[:, :prefix], patches), dim=1)
    if rope is None:
        ropes: list[list[Tensor]] = [[]] * depth
    else:
        ropes = [[each] for each in rope] if getattr(model, "rope_mixed", False) else [[rope]] * depth
    return getattr(model, "norm_pre", torch.nn.Identity())(x), ropes


def _queries_and_keys(attn: Any, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if attn.qkv is None:
        q, k = attn.q_proj(x), attn.k_proj(x)
    else:
        q, k, _ = attn.qkv(x).chunk(3, dim=-1)
        if getattr(attn, "q_bias", None) is not None:
            q = q + attn.q_bias
    q, k = (t.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for t in (q, k))  # (B, L, H * d) -> (B, H, L, d)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        p, half = attn.num_prefix_tokens, attn.rotate_half
        q, k = (torch.cat((t[:, :, :p], apply_rot_embed_cat(t[:, :, p:], rope, half)), dim=2) for t in (q, k))
    return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _class_attention(model: Any, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """CLS query ``(B, H, 1, d)`` and keys ``(B, H, 1 + k, d)`` of CaiT's last block."""
    cls = model.cls_token.expand(len(x), -1, -1)
    *body, last = model.blocks_token_only
    for block in body:
        cls = block(x, cls)
    normed, attn = last.norm1(torch.cat((cls, x), dim=1)), last.attn
    q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (attn.q(normed[:, :1]), attn.k(normed)))
    return q, k, attn.scale
