"""A ViT on images that keep different numbers of patches: all tokens in one packed row, no padding.

Norms, projections and MLPs treat each token alone, so the packed row ``(T, D)`` passes through them as it is; only the
attention has to know where an image begins, and `fastmkd.ops.packed_attention` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import DropPath, PatchDropout
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import packed_attention
from ..ops.registry import require
from .attention import PackedMix, attend_packed, attends_packed, runs_on_rows
from .embed import check_images, embed_ragged, patch_grid
from .heads import averages_patches, rows_for_head
from .inplace import compiled_attention, may_run_in_place, run_block_in_place
from .ragged import RaggedKeep

__all__ = ["run_ragged", "why_not_ragged"]


def why_not_ragged(model: Any) -> str | None:
    """Says why images of this model cannot keep different numbers of patches, or None when they can.

    Merging tokens (`fastmkd.nn.MergedViT`) asks for the same: blocks that can be opened, and a head that does not ask
    which patch is which.

    Args:
        model: a maskable timm ViT.

    Example:
        >>> import timm
        >>> why_not_ragged(timm.create_model("eva02_tiny_patch14_224", depth=1))
        'Eva turns queries and keys by rotary positions or attends in its own way; VisionTransformer does not'
    """
    kind = type(model).__name__
    if not isinstance(model, VisionTransformer):
        how = "turns queries and keys by rotary positions or attends in its own way"
        return f"{kind} {how}; VisionTransformer does not"
    for i, block in enumerate(model.blocks.children()):
        if type(block).forward is not Block.forward or not runs_on_rows(block) or not attends_packed(block.attn):
            return f"block {i} ({type(block).__name__}) is not timm's plain one, or a hook on it expects to be called"
    if rows_for_head(model, 0) == 0 and not averages_patches(model):
        return f"its head ({model.global_pool or 'no'} pooling) reads all patches of an image side by side"
    return None


@torch.no_grad()
def _check(model: Any, images: Tensor, keep: RaggedKeep) -> None:
    reason = why_not_ragged(model)
    if reason is not None:
        raise ValueError(f"keep has a number of patches for each image, but {reason}; pass a (B, k) tensor.")
    if any(_draws_by_image(part) for part in model.modules()):
        raise ValueError(
            "keep has a number of patches for each image, but the model drops paths, attention or patches in training, "
            "which is drawn image by image; call eval(), create it without them, or pass a (B, k) tensor."
        )
    check_images(model, images)
    indices, starts = keep
    for name, part, dtype, shape in (
        ("indices", indices, torch.int64, None),
        ("starts", starts, torch.int32, len(images) + 1),
    ):
        if part.dtype != dtype:
            raise TypeError(f"keep.{name} has dtype {part.dtype}; expected {dtype}.")
        if part.dim() != 1 or shape not in (None, len(part)):
            expected = "(K,)" if shape is None else f"({shape},), an offset per image and the end"
            raise ValueError(f"keep.{name} has shape {tuple(part.shape)}; expected {expected}.")
        if part.device != images.device:
            raise ValueError(f"keep.{name} is on {part.device} but images is on {images.device}; use keep.to(device).")
    patches = math.prod(patch_grid(model, (images.shape[-2], images.shape[-1])))
    fits = (starts[0] == 0) & (starts[-1] == len(indices)) & (starts.diff() > 0).all()
    require(fits, f"keep.starts does not rise from 0 to {len(indices)}, with at least one patch for each image.")
    inside = ((indices >= 0) & (indices < patches)).all()
    require(inside, f"keep.indices holds an index outside 0 to {patches - 1}, the patches of the grid.")
    ordered = (keep.images * patches + indices).sort().values
    require((ordered.diff() > 0).all(), "keep.indices names a patch twice for one image; each may occur once.")


def _draws_by_image(part: nn.Module) -> bool:
    if isinstance(part, Attention):
        return part.attn_drop.training and part.attn_drop.p > 0
    if isinstance(part, DropPath):
        return part.training and bool(part.drop_prob)
    return isinstance(part, PatchDropout) and part.training and part.prob > 0


def run_ragged(model: Any, images: Tensor, keep: RaggedKeep) -> Tensor:
    """Returns the model's output, for each image that of its own patches.

    Args:
        model: a maskable timm ViT.
        images: ``(B, C, H, W)``.
        keep: the patches of each image.

    Raises:
        ValueError: a model, images or `keep` that do not fit (values on a GPU: an asynchronous assert).
        TypeError: images or parts of `keep` of a wrong dtype.
    """
    _check(model, images, keep)
    x, starts, prefix, patches = embed_ragged(model, images, keep)
    read = rows_for_head(model, 0)  # 0 tokens stands for all
    rows = prefix[:, :read] if read else None
    *body, last = model.blocks.children()
    mix: PackedMix = lambda qkv, scale: packed_attention(qkv, starts, scale)  # noqa: E731
    if may_run_in_place(model, x):
        mix = compiled_attention(model, x, starts) or mix
        for block in body:
            x = run_block_in_place(block, x, mix)
    else:
        recompute = model.grad_checkpointing and torch.is_grad_enabled()
        for block in body:
            x = checkpoint(_run_block, block, x, mix, use_reentrant=False) if recompute else _run_block(block, x, mix)
    x = model.norm(_run_block(last, x, mix, rows))
    if rows is None:
        # The mean of the patches in their place: (B, P + 1, D), whose patches have the same mean.
        wide = x[patches].to(torch.promote_types(x.dtype, torch.float32))
        means = torch.segment_reduce(wide, "mean", offsets=keep.starts, unsafe=True).to(x.dtype)
        x = torch.cat((x[prefix], means[:, None]), dim=1)
    output: Tensor = model.forward_head(x)
    return output


def _run_block(block: Any, x: Tensor, mix: PackedMix, rows: Tensor | None = None) -> Tensor:
    """``block(x)`` of packed tokens ``(T, D)``; with `rows` only these after the attention, in their shape."""
    attn = block.attn
    out = attend_packed(attn, block.norm1(x), mix)
    if rows is not None:
        x, out = x[rows], out[rows]  # (B, P, D)
    x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
