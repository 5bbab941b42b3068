"""What merging tokens costs, and how much of it costs as little as masking does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .heads import rows_for_head

__all__ = ["merged_macs", "merges_like_mask"]


def merged_macs(model: Any, merges: Sequence[int], patches: int) -> int:
    """Counts the multiply-adds of a `fastmkd.nn.MergedViT` on one image, classifier left out.

    As in MaskedKD's Appendix H, norms, biases and additions are left out. Finding and joining the pairs counts.

    Args:
        model: timm's VisionTransformer of plain blocks.
        merges: patches that leave in each block.
        patches: N that the network sees. Without merges this counts a `MaskedViT` that sees so many.

    Example:
        >>> import timm
        >>> deit = timm.create_model("deit_small_patch16_224")
        >>> full, tome = (merged_macs(deit, [r] * 12, 196) for r in (0, 13))
        >>> f"{full / 1e9:.1f} {tome / 1e9:.1f}"
        '4.3 2.6'
    """
    prefix, read, n = int(model.num_prefix_tokens), rows_for_head(model, 0), patches
    total = patches * model.patch_embed.proj.weight.numel()
    blocks = list(model.blocks.children())
    for i, (block, r) in enumerate(zip(blocks, merges, strict=True)):
        attn, tokens = block.attn, prefix + n
        only_prefix = i + 1 == len(blocks) and read > 0
        rows, r = (read, 0) if only_prefix else (tokens, min(r, n // 2))
        width = attn.qkv.out_features // 3  # of queries, keys and values: all heads together
        total += attn.qkv.in_features * width * (rows + 2 * tokens)  # queries; keys and values
        total += 2 * rows * tokens * width + rows * attn.proj.weight.numel()
        if r:
            stay, leave = n - n // 2, n // 2
            total += stay * leave * width // attn.num_heads + stay * r * (model.embed_dim + 1)
        n -= r
        total += (rows - r) * sum(part.weight.numel() for part in block.mlp.modules() if isinstance(part, nn.Linear))
    return total


def merges_like_mask(model: Any, patches: int, keep_ratio: float) -> tuple[int, ...]:
    """Returns the least merging that needs no more multiply-adds than a mask that leaves a share of the patches.

    As many patches leave in every block, one more in the first blocks if that does not come out even; none in the last
    block if the head reads prefix tokens, for which it would change nothing.

    Args:
        model: timm's VisionTransformer of plain blocks.
        patches: N of an image.
        keep_ratio: share of the patches that the masked network sees.

    Returns:
        Patches that leave in each block.

    Raises:
        ValueError: the share is out of range, or merging all it can costs more.

    Example:
        >>> import timm
        >>> merges_like_mask(timm.create_model("deit_tiny_patch16_224", depth=4), 196, 0.75)
        (35, 35, 34, 0)
    """
    if not 0 < keep_ratio <= 1:  # NaN fails too
        raise ValueError(f"keep_ratio is {keep_ratio}; expected a share of the patches above 0 and at most 1.")
    depth = len(model.blocks)
    merging = depth - 1 if rows_for_head(model, 0) else depth
    budget = merged_macs(model, (0,) * depth, max(1, round(keep_ratio * patches)))
    merges: tuple[int, ...] = (0,) * depth
    for leaving in range(merging * (patches // 2) + 1):
        each, more = divmod(leaving, max(merging, 1))
        merges = tuple((each + (i < more)) * (i < merging) for i in range(depth))
        if merged_macs(model, merges, patches) <= budget:
            return merges
    share = merged_macs(model, merges, patches) / merged_macs(model, (0,) * depth, patches)
    raise ValueError(
        f"keep_ratio is {keep_ratio}, but a block merges half of its patches at most, so this network of {depth} "
        f"blocks costs {share:.0%} of its full cost whatever is merged; choose a larger keep_ratio."
    )
