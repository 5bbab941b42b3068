"""The last block of a ViT, run only for the tokens that something reads, and the CLS saliency of its attention.

Nothing after the last block mixes tokens any more, so when the head reads only the first rows (the CLS token), every
row but those can be left out of the last block's query, projection and MLP; keys and values are still needed for all.
This is exact, forward and backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ..ops import cls_saliency

__all__ = ["SaliencyOptions", "attend", "has_hooks", "run_block_on_rows", "run_whole_block", "runs_on_rows"]

# A part that is not named here may mix tokens or change the sum; such a block is run whole.
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_TOKENWISE_MLPS = (GluMlp, Mlp, SwiGLU)


class SaliencyOptions(NamedTuple):
    """How `fastmkd.ops.cls_saliency` is to be called.

    Attributes:
        num_prefix_tokens: tokens before the patches.
        include_prefix: the authors' variant instead of Eq. 2.
    """

    num_prefix_tokens: int
    include_prefix: bool


def runs_on_rows(block: Any) -> bool:
    """Tells whether `run_block_on_rows` computes the same as ``block(x)[:, :rows]``.

    True for timm's plain pre-norm `Block` with timm's `Attention` and an MLP that treats each token alone, when no hook
    watches the block, its attention or its qkv projection (hooks, FSDP's included, expect the whole call).

    Args:
        block: a block of a timm ViT.

    Example:
        >>> runs_on_rows(Block(dim=8, num_heads=2))
        True
    """
    if type(block).forward is not Block.forward or not block._modules.keys() <= _BLOCK_PARTS:
        return False
    attn = block.attn
    return (
        type(attn).forward is Attention.forward
        and attn._modules.keys() <= _ATTENTION_PARTS
        and type(attn.qkv) is nn.Linear
        and type(block.mlp) in _TOKENWISE_MLPS
        and not any(has_hooks(part) for part in (block, attn, attn.qkv))
    )


def run_block_on_rows(
    block: Any, x: Tensor, rows: int, saliency: SaliencyOptions | None
) -> tuple[Tensor, Tensor | None]:
    """Runs a block for the first `rows` tokens: their queries, projection and MLP, keys and values of all tokens.

    Args:
        block: one for which `runs_on_rows` holds.
        x: ``(B, L, D)`` input of the block.
        rows: how many leading tokens to compute, 1 to L.
        saliency: also return the CLS saliency of this block's attention; None for no saliency.

    Returns:
        ``block(x)[:, :rows]``, that is ``(B, rows, D)``, and the saliency ``(B, N)`` or None.

    Example:
        >>> import torch
        >>> block, x = Block(dim=8, num_heads=2).eval(), torch.randn(1, 5, 8)
        >>> torch.allclose(run_block_on_rows(block, x, 1, None)[0], block(x)[:, :1], atol=1e-6)
        True
    """
    attn = block.attn
    normed = block.norm1(x)
    out, q, k = attend(attn, normed, rows)
    scores = None if saliency is None else _saliency(attn, q, k, saliency)
    out = attn.proj_drop(attn.proj(out))
    x = x[:, :rows] + block.drop_path1(block.ls1(out))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), scores


def attend(attn: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs timm's attention for the first `rows` tokens, up to its output projection.

    Args:
        attn: attention of a block for which `runs_on_rows` holds.
        x: ``(B, L, D)`` input of the attention.
        rows: how many leading tokens to compute, 1 to L.

    Returns:
        The mixed values ``(B, rows, H * d)``, and the queries ``(B, H, rows, d)`` and keys ``(B, H, L, d)`` used.
    """
    q, k, v = _project_rows(attn, x, rows)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=_scale(attn))
    out = out.transpose(1, 2).flatten(2)  # (B, H, rows, d) -> (B, rows, H * d)
    if getattr(attn, "norm", None) is not None:
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x[:, :rows]).sigmoid()
    return out, q, k


def run_whole_block(block: Any, x: Tensor, saliency: SaliencyOptions | None) -> tuple[Tensor, Tensor | None]:
    """Calls a block as it is; the saliency is read from the output of its qkv projection through a passing hook.

    Args:
        block: any block of a timm ViT.
        x: ``(B, L, D)`` input of the block.
        saliency: also return the CLS saliency of this block's attention; None for no saliency.

    Returns:
        ``block(x)`` and the saliency ``(B, N)`` or None.

    Raises:
        ValueError: a saliency is wanted but the block has no ordinary softmax attention to read it from.
    """
    if saliency is None:
        return block(x), None
    attn = getattr(block, "attn", None)
    if not isinstance(attn, Attention) or type(attn).forward is not Attention.forward:
        raise ValueError(
            f"the last block is a {type(block).__name__} with attention {type(attn).__name__}; return_saliency needs "
            "timm's Attention there, whose CLS query and keys are the saliency. Use another student, or no saliency."
        )
    found: list[Tensor] = []

    def read(_module: nn.Module, _args: tuple[Tensor, ...], qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, L, d)
        found.append(_saliency(attn, attn.q_norm(q[:, :, :1]), attn.k_norm(k), saliency))

    handle = attn.qkv.register_forward_hook(read)
    try:
        out = block(x)
    finally:
        handle.remove()
    return out, found[0]


def _project_rows(attn: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x (B, L, D)`` -> queries ``(B, H, rows, d)`` of the first rows, keys and values ``(B, H, L, d)`` of all."""
    heads = attn.num_heads
    if rows == x.shape[1]:
        q, k, v = attn.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        width = attn.qkv.out_features // 3
        w_q, w_kv = attn.qkv.weight.split((width, 2 * width))
        b_q, b_kv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split((width, 2 * width))
        q = F.linear(x[:, :rows], w_q, b_q).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = F.linear(x, w_kv, b_kv).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _saliency(attn: Any, q: Tensor, k: Tensor, options: SaliencyOptions) -> Tensor:
    return cls_saliency(q[:, :, 0], k, options.num_prefix_tokens, _scale(attn), options.include_prefix)


def _scale(attn: Any) -> float:
    # timm's fused path leaves the scale to PyTorch and ignores attn.scale.
    return attn.head_dim**-0.5 if getattr(attn, "fused_attn", True) else float(attn.scale)


def has_hooks(module: nn.Module) -> bool:
    """Tells whether somebody watches calls of this module.

    Args:
        module: any module; its children do not count.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
