"""The last block of a ViT, run only for the tokens that something reads, and the CLS saliency of its attention.

Nothing after the last block mixes tokens any more, so when the head reads only the first rows (the CLS token), every
row but those can be left out of the last block's query, projection and MLP; keys and values are still needed for all.
This is exact, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import Tensor, nn

from ..ops import cls_saliency
from .rotary import rotate

__all__ = [
    "PackedMix",
    "SaliencyOptions",
    "attend",
    "attend_packed",
    "attends_packed",
    "has_hooks",
    "run_block",
    "run_block_on_rows",
    "run_whole_block",
    "runs_on_rows",
]

_PRE_NORM = (Block.forward, EvaBlock.forward)
_POST_NORM = (ResPostBlock.forward, EvaBlockPostNorm.forward)
_ATTENTIONS = (Attention.forward, AttentionRope.forward, EvaAttention.forward)
# A part that is not named here may mix tokens or change the sum; such a block is run whole.
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj")
_ATTENTION_PARTS = {*_PROJECTIONS, "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_TOKENWISE_MLPS = (GluMlp, Mlp, SwiGLU)

# (T, 3, H, d) queries, keys and values of a batch whose images it knows, and the scale -> (T, H, d).
PackedMix = Callable[[Tensor, float], Tensor]


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

    True for timm's ordinary blocks (norm before or after, ViT or EVA) with timm's attention, plain or rotary, and an
    MLP that treats each token alone, when no hook watches the block, its attention or the projections to queries, keys
    and values (hooks, FSDP's included, expect the whole call).

    Args:
        block: a block of a timm ViT.

    Example:
        >>> runs_on_rows(Block(dim=8, num_heads=2))
        True
    """
    if type(block).forward not in _PRE_NORM + _POST_NORM or not block._modules.keys() <= _BLOCK_PARTS:
        return False
    attn = block.attn
    projections = [part for name in _PROJECTIONS if (part := getattr(attn, name, None)) is not None]
    return (
        type(attn).forward in _ATTENTIONS
        and attn._modules.keys() <= _ATTENTION_PARTS
        and all(type(part) is nn.Linear for part in projections)
        and type(block.mlp) in _TOKENWISE_MLPS
        and not any(has_hooks(part) for part in (block, attn, *projections))
    )


def run_block(block: Any, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """Calls a block as it is.

    Args:
        block: any block of a maskable timm ViT.
        x: ``(B, L, D)`` input of the block.
        rope: rotary positions of this block; None for a model without.
    """
    out: Tensor = block(x) if rope is None else block(x, rope)
    return out


def run_block_on_rows(
    block: Any, x: Tensor, rows: int, saliency: SaliencyOptions | None, rope: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Runs a block for the first `rows` tokens: their queries, projection and MLP, keys and values of all tokens.

    Args:
        block: one for which `runs_on_rows` holds.
        x: ``(B, L, D)`` input of the block.
        rows: how many leading tokens to compute, 1 to L.
        saliency: also return the CLS saliency of this block's attention; None for no saliency.
        rope: rotary positions of this block; None for a model without.

    Returns:
        ``block(x)[:, :rows]``, that is ``(B, rows, D)``, and the saliency ``(B, N)`` or None.

    Example:
        >>> block, x = Block(dim=8, num_heads=2).eval(), torch.randn(1, 5, 8)
        >>> torch.allclose(run_block_on_rows(block, x, 1, None)[0], block(x)[:, :1], atol=1e-6)
        True
    """
    attn, norm_after = block.attn, type(block).forward in _POST_NORM
    out, q, k = attend(attn, x if norm_after else block.norm1(x), rows, rope)
    scores = None if saliency is None else _saliency(attn, q[:, :, 0], k, saliency)
    out = attn.proj_drop(attn.proj(out))
    x = x[:, :rows] + block.drop_path1(block.norm1(out) if norm_after else _scale_branch(block, 1, out))
    out = block.norm2(block.mlp(x)) if norm_after else _scale_branch(block, 2, block.mlp(block.norm2(x)))
    return x + block.drop_path2(out), scores


def attend(
    attn: Any, x: Tensor, rows: int, rope: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs timm's attention for the first `rows` tokens, up to its output projection.

    Args:
        attn: attention of a block for which `runs_on_rows` holds.
        x: ``(B, L, D)`` input of the attention.
        rows: how many leading tokens to compute, 1 to L.
        rope: rotary positions of this block; None for a model without.
        bias: ``(B, 1, 1, L)`` to add to the scores of each key; None for nothing.

    Returns:
        The mixed values ``(B, rows, H * d)``, and the queries ``(B, H, rows, d)`` and keys ``(B, H, L, d)`` used.
    """
    q, k, v = _project_rows(attn, x, rows)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = rotate(attn, q, rope).type_as(v), rotate(attn, k, rope).type_as(v)
    k, v = _one_per_query_head(attn, k), _one_per_query_head(attn, v)
    dropout = attn.attn_drop.p if attn.training else 0.0
    mask = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=_scale(attn, q))
    out = out.transpose(1, 2).flatten(2)  # (B, H, rows, d) -> (B, rows, H * d)
    return _finish_mix(attn, out, x[:, :rows]), q, k


def attends_packed(attn: Any) -> bool:
    """Tells whether `attend_packed` computes what this attention does.

    Args:
        attn: attention of a block for which `runs_on_rows` holds.
    """
    return type(attn).forward is Attention.forward and type(attn.qkv) is nn.Linear


def attend_packed(attn: Any, x: Tensor, mix: PackedMix) -> Tensor:
    """Runs timm's attention for all tokens of a packed batch, up to its output projection.

    Args:
        attn: one for which `attends_packed` holds, its attention dropout off.
        x: ``(T, D)`` or ``(B, L, D)`` input of the attention, contiguous.
        mix: `fastmkd.ops.packed_attention` with the images' offsets.

    Returns:
        The mixed values, of the shape of `x` but for ``H * d`` channels.
    """
    heads = attn.num_heads
    qkv = attn.qkv(x)
    qkv = qkv.view(-1, 3, heads, qkv.shape[-1] // (3 * heads))  # (T, 3, H, d)
    if not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)):
        q, k, v = qkv.unbind(1)
        qkv = torch.stack((attn.q_norm(q).type_as(v), attn.k_norm(k).type_as(v), v), dim=1)
    out = mix(qkv, _scale(attn, qkv)).view(*x.shape[:-1], -1)
    return _finish_mix(attn, out, x)


def _finish_mix(attn: Any, out: Tensor, x: Tensor) -> Tensor:
    """Norm and gate that some attentions have between the mixed values and the projection; `x` is their input."""
    if getattr(attn, "norm", None) is not None:
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return out


def run_whole_block(
    block: Any, x: Tensor, saliency: SaliencyOptions, rope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Calls a block as it is and reads its saliency from queries and keys on their way, through passing hooks.

    Args:
        block: any block of a maskable timm ViT.
        x: ``(B, L, D)`` input of the block.
        saliency: how to compute it.
        rope: rotary positions of this block; None for a model without.

    Returns:
        ``block(x)`` and the saliency ``(B, N)``.

    Raises:
        ValueError: the block has no ordinary softmax attention to read a saliency from.
    """
    attn: Any = getattr(block, "attn", None)
    if getattr(type(attn), "forward", None) not in _ATTENTIONS or not hasattr(attn, "q_norm"):
        raise ValueError(
            f"the last block is a {type(block).__name__} with attention {type(attn).__name__}; return_saliency needs "
            "timm's Attention, AttentionRope or EvaAttention there, whose CLS query and keys are the saliency. Use "
            "another student, or no saliency."
        )
    with _outputs_of(attn.q_norm, attn.k_norm) as found:
        out = run_block(block, x, rope)
    q, k = found  # (B, H, L, d) each
    if rope is not None:
        k = rotate(attn, k, rope)  # the CLS query is not turned
    return out, _saliency(attn, q[:, :, 0], _one_per_query_head(attn, k), saliency)


@contextmanager
def _outputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the modules return while the context is open, in the order of their calls."""
    found: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _m, _args, out: found.append(out)) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _project_rows(attn: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x (B, L, D)`` -> queries ``(B, H, rows, d)`` of the first rows, keys and values ``(B, H, L, d)`` of all."""
    heads = attn.num_heads
    if attn.qkv is None:
        kv_heads = getattr(attn, "num_kv_heads", heads)
        q = _split_heads(attn.q_proj(x[:, :rows]), heads)
        return q, _split_heads(attn.k_proj(x), kv_heads), _split_heads(attn.v_proj(x), kv_heads)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:  # EVA: keys have no bias
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if rows == x.shape[1]:
        q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    width = weight.shape[0] // 3
    w_q, w_kv = weight.split((width, 2 * width))
    b_q, b_kv = (None, None) if bias is None else bias.split((width, 2 * width))
    q = _split_heads(F.linear(x[:, :rows], w_q, b_q), heads)
    k, v = F.linear(x, w_kv, b_kv).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, L, H * d) -> (B, H, L, d)


def _one_per_query_head(attn: Any, x: Tensor) -> Tensor:
    """Grouped queries share a head of keys and values: ``(B, H_kv, L, d)`` -> ``(B, H, L, d)``."""
    groups = getattr(attn, "num_kv_groups", 1)
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _scale_branch(block: Any, branch: int, x: Tensor) -> Tensor:
    """LayerScale of a block's attention (1) or MLP (2): a module in `Block`, a parameter or None in `EvaBlock`."""
    module = getattr(block, f"ls{branch}", None)
    if module is not None:
        return module(x)
    gamma = getattr(block, f"gamma_{branch}", None)
    return x if gamma is None else gamma * x


def _saliency(attn: Any, q: Tensor, k: Tensor, options: SaliencyOptions) -> Tensor:
    return cls_saliency(q, k, options.num_prefix_tokens, _scale(attn, q), options.include_prefix)


def _scale(attn: Any, q: Tensor) -> float:
    # timm's fused path leaves the scale to PyTorch and ignores attn.scale.
    return q.shape[-1] ** -0.5 if getattr(attn, "fused_attn", True) else float(attn.scale)


def has_hooks(module: nn.Module) -> bool:
    """Tells whether somebody watches calls of this module.

    Args:
        module: any module; its children do not count.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
