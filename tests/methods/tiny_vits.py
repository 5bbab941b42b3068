"""Small ViTs with weights that are far from symmetric, in float64, and pictures for them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils._pytree import tree_leaves

TARGETS = torch.tensor([0, 4, 2])
ON_GPU = {torch.float64: "auto", torch.float32: "triton"}  # the backend of a dtype's kernels; of float64 there are none


def tiny(seed: int = 0, kind: type[VisionTransformer] = VisionTransformer, **options: Any) -> Any:
    torch.manual_seed(seed)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = kind(**{**defaults, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def pictures(size: int = 32, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def full_float32() -> contextlib.AbstractContextManager[None]:
    """Inside the block a GPU computes convolutions of float32 in full; PyTorch's own choice for them is TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def assert_same(found: Any, expected: Any) -> None:
    """Tensors, however nested, are equal to rounding: in float32 to 1e-4 of a tensor's largest value."""
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        loose = isinstance(y, Tensor) and y.dtype == torch.float32
        tolerance = {"rtol": 0.0, "atol": 1e-4 * float(y.detach().abs().max())} if loose else {}
        torch.testing.assert_close(x, y, **tolerance)


def full_attention(model: Any, images: Tensor, layer: int, keep: Tensor | None = None) -> Tensor:
    """``(B, H, L, L)`` attention logits of a layer, prefix tokens first, the long way."""
    x = model._pos_embed(model.patch_embed(images))
    if keep is not None:
        prefix, patches = x.split((model.num_prefix_tokens, x.shape[1] - model.num_prefix_tokens), dim=1)
        x = torch.cat((prefix, patches.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))), dim=1)
    x = model.norm_pre(x)
    blocks = list(model.blocks.children())
    for block in blocks[:layer]:
        x = block(x)
    attn = blocks[layer].attn
    q, k, _ = attn.qkv(blocks[layer].norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q) @ attn.k_norm(k).mT * attn.scale


def kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    p = teacher_logits.softmax(1)
    return (p * (p.log() - student_logits.log_softmax(1))).sum(1).mean()
