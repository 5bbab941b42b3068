r"""Multiply-adds of a ViT per image, from the shapes of its layers.

With n tokens (prefix and patches) of width d, a block costs

.. math:: n \, (W_{qkv} + W_{proj} + W_{fc1} + W_{fc2}) + 2 n^2 d

where W is the number of weights of a layer: :math:`12 n d^2 + 2 n^2 d` for the usual block (MaskedKD, Appendix H).
Norms, biases, activations, rotations and additions are left out, as in that appendix. Only shapes are read, so a model
may live on the meta device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from timm.layers import AttentionPoolLatent, AttentionRope
from timm.models.cait import Cait, ClassAttn, TalkingHeadAttn
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import nn

from ..nn import MaskedViT
from ..nn.attention import runs_on_rows
from ..nn.heads import rows_for_head

__all__ = ["IMAGENET_PICTURES", "VitMacs", "block_macs", "encoder_macs", "paper_operations", "vit_macs"]

IMAGENET_PICTURES = 1_281_167  # training pictures of ImageNet-1k
NORM_OPERATIONS = 5  # for each element, as the paper's counter (fvcore) has it

# Layers of an attention by what they run for, when only some rows of its output are wanted.
_OF_ROWS = ("q_proj", "q", "proj", "gate")
_OF_TOKENS = ("k_proj", "v_proj", "k", "v")
_OF_PAIRS = ("proj_l", "proj_w")  # CaiT's talking heads mix the heads of each pair of tokens
_ATTENTIONS = [kind.forward for kind in (Attention, AttentionRope, EvaAttention, TalkingHeadAttn, ClassAttn)]


class VitMacs(NamedTuple):
    """Multiply-adds for one image; `attention`, `projections` and `mlp` are the rows of MaskedKD's Table 9.

    Attributes:
        embed: patch projection.
        attention: products of queries, keys and values, CaiT's talking heads included.
        projections: to queries, keys and values, and of the mixed values.
        mlp: the blocks' fully connected layers.
        head: classifier, and attention pool if there is one.
    """

    embed: int
    attention: int
    projections: int
    mlp: int
    head: int

    @property
    def blocks(self) -> int:
        """Transformer blocks: the total of Table 9."""
        return self.attention + self.projections + self.mlp

    @property
    def total(self) -> int:
        """All of them."""
        return self.embed + self.blocks + self.head


def vit_macs(model: nn.Module, keep: int | None = None, exact_savings: bool = True) -> VitMacs:
    """Counts the multiply-adds of a ViT on one image.

    Args:
        model: any network that `fastmkd.MaskedViT` takes, or a MaskedViT.
        keep: patches that it gets to see; None is all.
        exact_savings: count what `fastmkd.MaskedViT` does: only kept patches are embedded, and if the head reads
            prefix tokens alone, the last block makes queries, projection and MLP for those rows only. False counts the
            public code's way: embed all patches, gather, run whole blocks.

    Raises:
        ValueError: `keep` is below 1 or above the number of patches.
        TypeError: `model` cannot be masked, or has a block or a pool of another kind; says which.

    Example:
        >>> import timm
        >>> deit = timm.create_model("deit_small_patch16_224")
        >>> f"{vit_macs(deit, exact_savings=False).blocks / 1e9:.1f}"
        '4.5'
        >>> f"{vit_macs(deit, 98, exact_savings=False).blocks / 1e9:.1f}, {vit_macs(deit, 98).blocks / 1e9:.2f}"
        '2.2, 2.04'
    """
    vit, patches, kept = _opened(model, keep)
    tokens = kept if isinstance(vit, Cait) else kept + int(vit.num_prefix_tokens)
    blocks = list(vit.blocks.children())
    costs = [block_macs(block, tokens, tokens) for block in blocks]
    if exact_savings and not isinstance(vit, Cait) and runs_on_rows(blocks[-1]):
        costs[-1] = block_macs(blocks[-1], tokens, rows_for_head(vit, tokens))
    if isinstance(vit, Cait):  # the class token joins here; each of these blocks makes its row alone
        costs += [block_macs(block, 1 + tokens, 1) for block in vit.blocks_token_only or ()]
        tokens += 1
    attention, projections, mlp = (sum(parts) for parts in zip(*costs, strict=True))
    embedded = kept if exact_savings else patches
    return VitMacs(
        embed=embedded * vit.patch_embed.proj.weight.numel(),
        attention=attention,
        projections=projections,
        mlp=mlp,
        head=_head_macs(vit, tokens),
    )


def encoder_macs(
    model: nn.Module, keep: int | None = None, depth: int | None = None, exact_savings: bool = True
) -> int:
    """Counts the multiply-adds of embedding an image and of the first blocks, all of whose output is wanted.

    Args:
        model: as in `vit_macs`.
        keep: patches that it gets to see; None is all.
        depth: how many blocks; None is all, but for those that CaiT's class token has to itself.
        exact_savings: False embeds all patches, then gathers, as the public code does.

    Raises:
        ValueError: as `vit_macs`.
        TypeError: as `vit_macs`.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224")
        >>> f"{encoder_macs(vit, 49, 9) / encoder_macs(vit, 49):.2f}"
        '0.76'
    """
    vit, patches, kept = _opened(model, keep)
    tokens = kept if isinstance(vit, Cait) else kept + int(vit.num_prefix_tokens)
    blocks = list(vit.blocks.children())[:depth]
    embedded = kept if exact_savings else patches
    embed: int = embedded * vit.patch_embed.proj.weight.numel()
    return embed + sum(sum(block_macs(block, tokens, tokens)) for block in blocks)


def paper_operations(model: nn.Module, keep: int | None = None) -> int:
    """Counts one image as MaskedKD's Tables 2, 6 and 7 do, whose PFLOPs are this x training pictures x epochs.

    These are the multiply-adds of the public code, patch projection and classifier included, and five operations for
    each element that a layer norm gets.

    Args:
        model: as in `vit_macs`.
        keep: patches that it gets to see; None is all. The paper's 75 % are 144 of 196 patches, 12 x 12.

    Raises:
        ValueError: as `vit_macs`.
        TypeError: as `vit_macs`.

    Example:
        >>> import timm
        >>> deit = timm.create_model("deit_small_patch16_224")
        >>> f"{paper_operations(deit, 98) * IMAGENET_PICTURES * 300 / 1e15:.1f}"  # 866 in Table 2
        '866.9'
    """
    macs = vit_macs(model, keep, exact_savings=False).total
    vit, patches, kept = _opened(model, keep)
    tokens = kept if isinstance(vit, Cait) else kept + int(vit.num_prefix_tokens)
    elements = sum(_norm_elements(block, tokens) for block in vit.blocks.children())
    if isinstance(vit, Cait):
        tokens += 1
        for block in vit.blocks_token_only or ():
            elements += tokens * _width(block.norm1) + _width(block.norm2)
    elements += patches * _width(getattr(vit.patch_embed, "norm", None))
    elements += tokens * (_width(getattr(vit, "norm_pre", None)) + _width(vit.norm))
    elements += _width(getattr(vit, "fc_norm", None))  # after the pooling
    pool = getattr(vit, "attn_pool", None)
    if pool is not None:
        heads = pool.num_heads * (pool.latent_len * _width(pool.q_norm) + tokens * _width(pool.k_norm))
        elements += heads + pool.latent_len * _width(pool.norm)
    return macs + NORM_OPERATIONS * elements


def _opened(model: nn.Module, keep: int | None) -> tuple[Any, int, int]:
    """The timm model, its number of patches and how many of them are kept."""
    wrapped = model if isinstance(model, MaskedViT) else MaskedViT(model)
    patches = math.prod(wrapped.patch_grid())
    if keep is not None and not 1 <= keep <= patches:
        raise ValueError(f"keep is {keep}; the model has {patches} patches, expected 1 to {patches}.")
    return wrapped.model, patches, patches if keep is None else keep


def block_macs(block: Any, tokens: int, rows: int) -> tuple[int, int, int]:
    """Counts attention, projections and MLP of a block: keys and values for all tokens, the rest for some of them.

    Args:
        block: of a timm ViT.
        tokens: how many there are.
        rows: of how many the output is wanted.

    Raises:
        TypeError: a block of another kind; says which.
    """
    attn = getattr(block, "attn", None)
    weights = {name: part.weight.numel() for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    elsewhere = any(not name.startswith(("attn.", "mlp.")) for name in weights)
    if getattr(type(attn), "forward", None) not in _ATTENTIONS or elsewhere or not hasattr(block, "mlp"):
        raise TypeError(
            f"the block {type(block).__name__} with attention {type(attn).__name__} is not one whose multiply-adds are "
            "known; expected timm's blocks with attention and MLP one after the other."
        )
    of_attn = {name.removeprefix("attn."): n for name, n in weights.items() if name.startswith("attn.")}
    qkv = of_attn.get("qkv", 0) // 3
    projections = rows * (qkv + sum(of_attn.get(name, 0) for name in _OF_ROWS))
    projections += tokens * (2 * qkv + sum(of_attn.get(name, 0) for name in _OF_TOKENS))
    attention = 2 * rows * tokens * attn.proj.in_features  # type: ignore[union-attr]  # the width of all heads together
    attention += rows * tokens * sum(of_attn.get(name, 0) for name in _OF_PAIRS)
    return attention, projections, rows * sum(n for name, n in weights.items() if name.startswith("mlp."))


def _head_macs(vit: Any, tokens: int) -> int:
    """Classifier, and the attention pool of SigLIP and its like."""
    heads = [head for name in ("head", "head_dist") if isinstance(head := getattr(vit, name, None), nn.Linear)]
    macs = sum(head.weight.numel() for head in heads)
    pool = getattr(vit, "attn_pool", None)
    if pool is None:
        return macs
    if not isinstance(pool, AttentionPoolLatent):
        raise TypeError(f"the pool {type(pool).__name__} is not one whose multiply-adds are known.")
    of_latent = sum(
        part.weight.numel() for part in pool.modules() if isinstance(part, nn.Linear) and part is not pool.kv
    )
    attention = 2 * tokens * pool.kv.in_features
    return macs + tokens * pool.kv.weight.numel() + pool.latent_len * (of_latent + attention)


def _norm_elements(block: Any, tokens: int) -> int:
    """How many elements the layer norms of a block get."""
    count = 0
    for name, part in block.named_modules():
        heads = 1
        if name in ("attn.q_norm", "attn.k_norm"):  # one norm for all heads, each of which it gets
            kind = "num_heads" if name == "attn.q_norm" else "num_kv_heads"
            heads = getattr(block.attn, kind, block.attn.num_heads)
        count += heads * tokens * _width(part)
    return count


def _width(part: Any) -> int:
    """Elements that a layer norm normalises together; 0 for anything else."""
    return math.prod(part.normalized_shape) if isinstance(part, nn.LayerNorm) else 0
