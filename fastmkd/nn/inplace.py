"""Blocks that update the residual stream where it lies: the forward pass on a CPU when nobody wants gradients.

A matrix product can add to its output. So the output projection of the attention and the last layer of the MLP add
directly to the residual, which saves the passes over memory that a bias, a branch output and a sum cost; on CPUs, which
do not fuse them, that is about a tenth of a ViT's time. The sums are the same, in another order. The MLP's GELU is
applied while its first product is written, by oneDNN through the operator that PyTorch's own compiler calls for both.
The attention is `fastmkd.ops.packed_attention` where its compiled kernel is there, else PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..ops import get_op
from ..ops.choice import choose
from .attention import PackedMix, attend, attend_packed, attends_packed, has_hooks, runs_on_rows

__all__ = ["compiled_attention", "may_run_in_place", "run_block_in_place"]

_FUSED_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def may_run_in_place(model: Any, x: Tensor) -> bool:
    """Tells whether the blocks of `model` may overwrite `x`, which no one else holds.

    True on a CPU in float32 or float64, without gradients, autocast or compilation, for a model whose blocks are all
    timm's plain ones, when no part of it is in training mode (dropouts may be switched on alone) and no hook anywhere
    in it could have kept or could miss a tensor.

    Args:
        model: a maskable timm ViT.
        x: ``(B, L, D)`` input of the first block.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.is_contiguous():
        return False
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    if any(part.training or has_hooks(part) for part in model.modules()):
        return False
    return all(map(_is_plain, model.blocks.children()))


def compiled_attention(model: Any, x: Tensor, starts: Tensor | None = None) -> PackedMix | None:
    """Returns the compiled attention for a batch; None where PyTorch's is to run.

    The kernel is called without the op's checks, for its arguments are right by construction: they would take as long
    as the attention of a small batch.

    Args:
        model: one for which `may_run_in_place` holds.
        x: ``(B, L, D)`` input of the first block, or ``(T, D)`` with `starts`.
        starts: ``(B + 1,)`` int32, where the images begin, and T; None for images of one length.
    """
    blocks = list(model.blocks.children())
    if not all(attends_packed(block.attn) for block in blocks):
        return None
    tokens = x.shape[:-1].numel()
    offsets = torch.arange(0, tokens + 1, x.shape[1], dtype=torch.int32) if starts is None else starts
    attn = blocks[0].attn
    like = x.new_empty(tokens, 3, attn.num_heads, attn.qkv.out_features // (3 * attn.num_heads))
    backend = choose(get_op("packed_attention"), (like, offsets, 1.0))
    return None if backend.name == "eager" else lambda qkv, scale: backend.run(qkv, offsets, scale)


def run_block_in_place(block: Any, x: Tensor, mix: PackedMix | None = None) -> Tensor:
    """Computes ``block(x)`` into `x` and returns it.

    Args:
        block: a block of a model for which `may_run_in_place` holds.
        x: ``(B, L, D)``, or ``(T, D)`` with `mix`, contiguous; overwritten.
        mix: the attention of a packed batch, where ``attends_packed(block.attn)``; None takes PyTorch's.

    Example:
        >>> block, x = Block(dim=8, num_heads=2).eval(), torch.randn(1, 5, 8)
        >>> with torch.inference_mode():
        ...     torch.allclose(block(x), run_block_in_place(block, x), atol=1e-6)
        True
    """
    attn, normed = block.attn, block.norm1(x)
    mixed = attend(attn, normed, x.shape[1])[0] if mix is None else attend_packed(attn, normed, mix)
    _add_linear(x, mixed, attn.proj, block.ls1)
    mlp = block.mlp
    _add_linear(x, mlp.norm(_expand(mlp, block.norm2(x))), mlp.fc2, block.ls2)
    return x


def _expand(mlp: Mlp, x: Tensor) -> Tensor:
    """``mlp.act(mlp.fc1(x))``, in one pass where oneDNN can."""
    fc1, act = mlp.fc1, mlp.act
    if _FUSED_LINEAR is None or x.dtype != torch.float32 or type(fc1) is not nn.Linear or type(act) is not nn.GELU:
        return act(fc1(x))
    return _FUSED_LINEAR(x, fc1.weight, fc1.bias, "gelu", [], act.approximate)  # (B, L, D) -> (B, L, hidden)


def _add_linear(x: Tensor, branch: Tensor, linear: nn.Linear, scale: nn.Module) -> None:
    """``x += scale(linear(branch))``; without a layer scale the product accumulates into `x`."""
    if not isinstance(scale, nn.Identity):
        x.add_(scale(linear(branch)))
        return
    if linear.bias is not None:
        x.add_(linear.bias)
    x.view(-1, x.shape[-1]).addmm_(branch.view(-1, branch.shape[-1]), linear.weight.t())


def _is_plain(block: Any) -> bool:
    return (
        type(block).forward is Block.forward
        and runs_on_rows(block)
        and type(block.mlp) is Mlp
        and type(block.attn.proj) is nn.Linear
        and type(block.mlp.fc2) is nn.Linear
    )
