r"""Token merging (ToMe; Bolya et al., 2023): a ViT that sees every patch and merges those that are alike on its way.

It is what MaskedKD compares masking with (Section 4.2, Fig. 3). In each block, between the attention and the MLP, r
patches join another one, so that the sequence grows shorter from block to block:

1. the patches are dealt out in turn: those at even places stay, those at odd places may leave;
2. each that may leave finds the one that stays whose key, averaged over the heads, has the largest cosine;
3. the r pairs with the largest cosines become one token each, the average of all patches in it;
4. from then on a token of s patches counts s times in the attention: log s is added to the scores of its key.

Prefix tokens (CLS, distillation, registers) are never merged. Ties go to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autocast import no_autocast
from .attention import attend
from .embed import check_images, embed_all
from .heads import rows_for_head
from .merge_cost import merges_like_mask
from .ragged import RaggedKeep
from .ragged_vit import why_not_ragged
from .vit import MaskedViT

__all__ = ["MergedViT", "merge_tokens"]


class MergedViT(MaskedViT):
    """Wraps a timm ViT so that it merges patches on the way, without training (ToMe; Bolya et al., 2023).

    The attention of the last block is the last to read the patches if the head reads prefix tokens, so nothing is
    merged in that block; average pooling weighs each token by the patches in it.

    Args:
        model: timm's VisionTransformer of plain blocks, with a head that reads a token or the average.
        r: patches that leave in each block, or a number for each block; at most half of the patches there do. With 0
            the network is that of `MaskedViT`.
        keep_ratio: in the place of `r`: merge evenly in all blocks, until the network needs no more multiply-adds than
            a `MaskedViT` that sees this share of the patches. Found once for each size of images.

    Raises:
        TypeError: the tokens of `model` cannot be merged; says why.
        ValueError: both or neither of `r` and `keep_ratio`, one out of range, or a share that no merging can reach.

    Example:
        >>> import timm
        >>> deit = timm.create_model("deit_tiny_patch16_224", depth=4)
        >>> vit = MergedViT(deit, keep_ratio=0.5)
        >>> vit(torch.randn(2, 3, 224, 224)).shape, vit.merges(196)
        (torch.Size([2, 1000]), (89, 88, 88, 0))
    """

    def __init__(
        self, model: nn.Module, r: int | Sequence[int] | None = None, *, keep_ratio: float | None = None
    ) -> None:
        super().__init__(model)
        reason = why_not_ragged(model)
        if reason is not None:
            raise TypeError(f"model cannot merge tokens: {reason}.")
        if (r is None) == (keep_ratio is None):
            raise ValueError(f"r is {r} and keep_ratio {keep_ratio}; expected one of them.")
        self._fixed = None if r is None else _one_for_each_block(r, len(self.model.blocks))
        self._found: dict[int, tuple[int, ...]] = {}
        self.keep_ratio = keep_ratio
        if keep_ratio is not None:
            self.merges(int(self.model.patch_embed.num_patches))  # raises now rather than in the first step

    def merges(self, patches: int) -> tuple[int, ...]:
        """Returns how many patches are to leave in each block.

        Args:
            patches: N, of an image.

        Raises:
            ValueError: no merging is as cheap as `keep_ratio` asks for.
        """
        if self.keep_ratio is None:
            assert self._fixed is not None
            return self._fixed
        if patches not in self._found:
            self._found[patches] = merges_like_mask(self.model, patches, self.keep_ratio)
        return self._found[patches]

    def forward(
        self,
        images: Tensor,
        keep: Tensor | RaggedKeep | None = None,
        *,
        return_saliency: bool = False,
        include_prefix: bool = False,
    ) -> Any:
        """Returns the model's output, merging on the way.

        Args:
            images: ``(B, C, H, W)`` floating point, of a size the model takes.
            keep: must be None; all patches are seen.
            return_saliency: must be False; at the last block patches are no longer told apart.
            include_prefix: belongs to the saliency.

        Raises:
            ValueError: a wrong image size or channel count, `keep` or `return_saliency`, or a model that has changed
                since so that it cannot be merged.
            TypeError: images that are not floating point.
        """
        if keep is not None or return_saliency:
            raise ValueError(
                "keep and return_saliency name single patches, which a MergedViT merges; use MaskedViT(vit.model)."
            )
        model, prefix = self.model, self.num_prefix_tokens
        check_images(model, images)
        merges = self.merges(math.prod(self.patch_grid((images.shape[-2], images.shape[-1]))))
        if not any(merges):
            return super().forward(images)
        reason = why_not_ragged(model)
        if reason is not None:
            raise ValueError(f"the model can no longer merge tokens: {reason}.")
        x, _ = embed_all(model, images)
        sizes = torch.ones_like(x[..., :1], dtype=torch.promote_types(x.dtype, torch.float32))
        blocks, read = list(model.blocks.children()), rows_for_head(model, 0)  # 0 tokens stands for all
        for block, r in zip(blocks[:-1], merges, strict=False):
            x, sizes = _run_block(block, x, sizes, r, prefix)
        x, sizes = _run_block(blocks[-1], x, sizes, 0 if read else merges[-1], prefix, read or None)
        x = model.norm(x)
        if not read:
            # The mean of the patches in their place: (B, P + 1, D), whose patches have the same mean.
            shares = sizes[:, prefix:] / sizes[:, prefix:].sum(1, keepdim=True)
            x = torch.cat((x[:, :prefix], (x[:, prefix:] * shares).sum(1, keepdim=True).to(x.dtype)), dim=1)
        return model.forward_head(x)

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] | None = None, keep: Tensor | None = None
    ) -> list[Tensor]:
        """Raises: the rows of a merged block belong to no patch.

        Args:
            images: as in `MaskedViT`.
            indices: as in `MaskedViT`.
            keep: as in `MaskedViT`.

        Raises:
            ValueError: always.
        """
        raise ValueError("the blocks of a MergedViT hold no row for each patch; use MaskedViT(vit.model).")


def merge_tokens(x: Tensor, sizes: Tensor, keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merges the r most alike pairs of patches (bipartite soft matching; Bolya et al., 2023, Section 3).

    Sums are matrix products with zeros and ones, so that they have the same order in every run on every device.

    Args:
        x: ``(B, P + n, D)`` tokens.
        sizes: ``(B, P + n, 1)`` how many patches each stands for; float32, or float64 for float64 tokens.
        keys: ``(B, P + n, d)`` what is compared.
        r: how many patches leave; at most ``n // 2`` do.
        prefix: P, tokens in front that are left alone.

    Returns:
        ``(B, P + n - r, D)`` and ``(B, P + n - r, 1)``: prefix tokens, patches that could have left but did not,
        patches that stay; each kind in its order.

    Example:
        >>> x = torch.tensor([[[9.0], [1.0], [2.0], [-1.0], [5.0]]])  # CLS and four patches
        >>> merge_tokens(x, torch.ones(1, 5, 1), x, 1, prefix=1)[0]
        tensor([[[ 9.0000],
                 [ 5.0000],
                 [ 1.5000],
                 [-1.0000]]])
    """
    r = min(r, (x.shape[1] - prefix) // 2)
    if r <= 0:
        return x, sizes
    with no_autocast(x.device):
        unit = F.normalize(keys[:, prefix:].to(sizes.dtype), dim=-1)
        alike, partner = (unit[:, 1::2] @ unit[:, ::2].mT).max(-1)  # (B, n // 2) each
        order = alike.argsort(dim=1, descending=True, stable=True)
        gone, kept = order[:, :r], order[:, r:].sort(dim=1).values
        # The number of patches rides along as one more channel: (B, n, D + 1).
        totals = torch.cat((x * sizes, sizes), dim=-1)[:, prefix:]
        staying, leaving = totals[:, ::2], totals[:, 1::2]
        places = torch.arange(staying.shape[1], device=x.device)
        joins = partner.gather(1, gone)[:, None] == places[:, None]  # (B, ceil(n / 2), r)
        staying = staying + joins.to(totals.dtype) @ _rows(leaving, gone)
        totals = torch.cat((_rows(leaving, kept), staying), dim=1)
        patches, counts = totals[..., :-1] / totals[..., -1:], totals[..., -1:]
    x = torch.cat((x[:, :prefix], patches.to(x.dtype)), dim=1)
    return x, torch.cat((sizes[:, :prefix], counts), dim=1)


def _run_block(
    block: Any, x: Tensor, sizes: Tensor, r: int, prefix: int, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """``block(x)`` with a merge between attention and MLP; with `rows` only these first tokens after the attention."""
    attn = block.attn
    bias = sizes.log().mT[:, None]  # (B, 1, 1, P + n)
    out, _, keys = attend(attn, block.norm1(x), rows or x.shape[1], bias=bias)
    x = x[:, :rows] + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))
    if rows is None:
        x, sizes = merge_tokens(x, sizes, keys.mean(1), r, prefix)  # keys (B, H, P + n, d)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), sizes


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # (B, n, D), (B, k) -> (B, k, D)


def _one_for_each_block(r: int | Sequence[int], depth: int) -> tuple[int, ...]:
    each = (r,) * depth if isinstance(r, int) else tuple(r)
    if len(each) != depth or not all(isinstance(n, int) and n >= 0 for n in each):
        raise ValueError(f"r is {r!r}; expected a number of patches, at least 0, or one for each of {depth} blocks.")
    return each
