"""What a ViT's attention says about patches, computed from the output of its qkv projection.

Reading the projection instead of the attention leaves fused attention on: the only rows of the ``(P + N, P + N)``
matrix that are ever formed are those asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..ops.autocast import no_autocast

__all__ = ["cls_attention_logits", "layer_saliency", "patch_attention", "why_attention_unreadable"]


def why_attention_unreadable(block: Any) -> str | None:
    """Says why the attention of a block cannot be read off its qkv projection, or None when it can.

    Args:
        block: a block of a timm ViT.

    Example:
        >>> why_attention_unreadable(nn.Linear(2, 2))
        'Linear has no attention'
    """
    attn = getattr(block, "attn", None)
    if attn is None:
        return f"{type(block).__name__} has no attention"
    if (
        not isinstance(attn, Attention)
        or type(attn).forward is not Attention.forward
        or not isinstance(attn.qkv, nn.Linear)
    ):
        return f"{type(block).__name__} has the attention {type(attn).__name__}, which is not timm's plain softmax one"
    return None


def cls_attention_logits(attn: Any, qkv: Tensor, num_patches: int) -> Tensor:
    r"""Returns the class token's attention to each patch in every head, before the softmax (MaskedKD, Eq. 2).

    .. math:: z_{h,i} = q_{h,cls} \cdot k_{h,i} / \sqrt{d}

    Args:
        attn: timm's `Attention`, for which `why_attention_unreadable` is None.
        qkv: ``(B, P + n, 3 * H * d)`` output of its qkv projection; the CLS token first, the patches last.
        num_patches: n.

    Returns:
        ``(B, H, n)`` float32 (float64 for float64 input), whatever the autocast dtype.

    Example:
        >>> attn = Attention(8, num_heads=2)
        >>> cls_attention_logits(attn, torch.randn(3, 5, 24), 4).shape
        torch.Size([3, 2, 4])
    """
    q, k = _queries_and_keys(attn, qkv)
    return _logits(attn, attn.q_norm(q[:, :, :1]), attn.k_norm(k[:, :, -num_patches:]))[:, :, 0]


def layer_saliency(attn: Any, qkv: Tensor, num_patches: int, include_prefix: bool = False) -> Tensor:
    r"""Returns the saliency of any layer: how much its class token attends to each patch (MaskedKD, Eq. 2).

    .. math:: S_i = \sum_h \mathrm{softmax}_i (q_{h,cls} \cdot k_{h,i} / \sqrt{d})

    Args:
        attn: as in `cls_attention_logits`.
        qkv: as in `cls_attention_logits`.
        num_patches: n.
        include_prefix: the authors' variant: softmax over all tokens, mean over heads.

    Returns:
        ``(B, n)`` float32 (float64 for float64 input).

    Example:
        >>> attn = Attention(8, num_heads=2)
        >>> layer_saliency(attn, torch.zeros(1, 5, 24), 4), layer_saliency(attn, torch.zeros(1, 5, 24), 4, True)
        (tensor([[0.5000, 0.5000, 0.5000, 0.5000]]), tensor([[0.2000, 0.2000, 0.2000, 0.2000]]))
    """
    keys = qkv.shape[1] if include_prefix else num_patches
    logits = cls_attention_logits(attn, qkv, keys)
    return _over_heads(logits.softmax(-1)[:, :, -num_patches:], include_prefix)


def patch_attention(attn: Any, qkv: Tensor, num_patches: int, include_prefix: bool = False) -> Tensor:
    r"""Returns how much the patches attend to each patch, on average (MaskedKD, Table 3 a, "patch-patch").

    .. math:: S_j = \sum_h \frac{1}{n} \sum_i \mathrm{softmax}_j (q_{h,i} \cdot k_{h,j} / \sqrt{d})

    This one does form the ``(n, n)`` matrix; it is there to be compared with.

    Args:
        attn: as in `cls_attention_logits`.
        qkv: as in `cls_attention_logits`.
        num_patches: n.
        include_prefix: as in `layer_saliency`.

    Returns:
        ``(B, n)`` float32 (float64 for float64 input).

    Example:
        >>> attn = Attention(8, num_heads=2)
        >>> patch_attention(attn, torch.zeros(1, 5, 24), 4)
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    q, k = _queries_and_keys(attn, qkv)
    k = k if include_prefix else k[:, :, -num_patches:]
    logits = _logits(attn, attn.q_norm(q[:, :, -num_patches:]), attn.k_norm(k))
    return _over_heads(logits.softmax(-1)[:, :, :, -num_patches:].mean(2), include_prefix)


def _over_heads(attention: Tensor, include_prefix: bool) -> Tensor:
    return attention.mean(1) if include_prefix else attention.sum(1)


def _queries_and_keys(attn: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, P + n, d)
    return q, k


def _logits(attn: Any, q: Tensor, k: Tensor) -> Tensor:
    # timm's fused path leaves the scale to PyTorch and ignores attn.scale.
    scale = attn.head_dim**-0.5 if getattr(attn, "fused_attn", True) else float(attn.scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device):
        return q.to(wide) @ k.to(wide).mT * scale
