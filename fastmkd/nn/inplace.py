"""Blocks that update the residual stream where it lies: the forward pass on a CPU when nobody wants gradients.

A matrix product can add to its output. So the output projection of the attention and the last layer of the MLP add
directly to the residual, which saves the passes over memory that a bias, a branch output and a sum cost; on CPUs, which
do not fuse them, that is about a tenth of a ViT's time. The sums are the same, in another order. The MLP's GELU is
applied while its first product is written, by oneDNN through the operator that PyTorch's own compiler calls for both.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .attention import attend, has_hooks, runs_on_rows

__all__ = ["may_run_in_place", "run_block_in_place"]

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


def run_block_in_place(block: Any, x: Tensor) -> Tensor:
    """Computes ``block(x)`` into `x` and returns it.

    Args:
        block: a block of a model for which `may_run_in_place` holds.
        x: ``(B, L, D)`` contiguous; overwritten.

    Example:
        >>> block, x = Block(dim=8, num_heads=2).eval(), torch.randn(1, 5, 8)
        >>> with torch.inference_mode():
        ...     torch.allclose(block(x), run_block_in_place(block, x), atol=1e-6)
        True
    """
    mixed, _, _ = attend(block.attn, block.norm1(x), x.shape[1])
    _add_linear(x, mixed, block.attn.proj, block.ls1)
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
    x.view(-1, x.shape[-1]).addmm_(branch.flatten(0, 1), linear.weight.t())


def _is_plain(block: Any) -> bool:
    return (
        type(block).forward is Block.forward
        and runs_on_rows(block)
        and type(block.mlp) is Mlp
        and type(block.attn.proj) is nn.Linear
        and type(block.mlp.fc2) is nn.Linear
    )
