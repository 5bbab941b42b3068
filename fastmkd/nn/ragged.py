"""Which patches each image keeps when images keep different numbers of them, and a rule that gives such a choice.

MaskedKD keeps the same number of patches of every image. An image whose saliency sits on a few patches needs fewer: a
share of the saliency instead of a number of patches asks each image for as many as hold that share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.registry import require
from ..ops.select_tokens import resize

__all__ = ["RaggedKeep", "keep_by_mass"]

# Saliencies are added as whole numbers of 2^-40 of an image's largest: exact, so the count is the same everywhere.
STEPS = 2.0**40


class RaggedKeep(NamedTuple):
    """The kept patches of images that keep different numbers of them; ``vit(images, keep=...)`` takes one.

    Attributes:
        indices: ``(K,)`` int64 patch indices, image after image, without repeats within an image.
        starts: ``(B + 1,)`` int32: image b keeps ``indices[starts[b] : starts[b + 1]]``, at least one patch.

    Example:
        >>> keep = RaggedKeep(torch.tensor([3, 0, 1]), torch.tensor([0, 1, 3], dtype=torch.int32))
        >>> keep.counts, keep.visible(4)
        (tensor([1, 2], dtype=torch.int32), tensor([[False, False, False,  True],
                [ True,  True, False, False]]))
    """

    indices: Tensor
    starts: Tensor

    @property
    def counts(self) -> Tensor:
        """``(B,)`` int32, how many patches each image keeps."""
        return self.starts.diff()

    @property
    def images(self) -> Tensor:
        """``(K,)`` int64, the image that each index belongs to; found without asking the device for a number."""
        at = torch.arange(len(self.indices), dtype=torch.int32, device=self.indices.device)
        return torch.searchsorted(self.starts[1:].contiguous(), at, right=True)

    @classmethod
    def cat(cls, parts: Sequence[RaggedKeep]) -> RaggedKeep:
        """The choices of consecutive parts of a batch as one.

        Args:
            parts: at least one.
        """
        counts = torch.cat([part.counts for part in parts])
        return cls(torch.cat([part.indices for part in parts]), F.pad(counts.cumsum(0), (1, 0)).int())

    def visible(self, num_patches: int) -> Tensor:
        """The choice as a mask ``(B, N)``, True = kept.

        Args:
            num_patches: N.
        """
        mask = self.indices.new_zeros(len(self.starts) - 1, num_patches, dtype=torch.bool)
        mask[self.images, self.indices] = True
        return mask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RaggedKeep:
        """The same on another device.

        Args:
            device: where.
            non_blocking: as in ``Tensor.to``.
        """
        return RaggedKeep(*(part.to(device, non_blocking=non_blocking) for part in self))


def keep_by_mass(
    saliency: Tensor,
    mass: float,
    min_keep: int = 1,
    max_keep: int | None = None,
    *,
    grid: tuple[int, int] | None = None,
    target_grid: tuple[int, int] | None = None,
) -> RaggedKeep:
    r"""Keeps, of each image, the smallest number of patches that hold a share of its saliency.

    .. math:: k_b = \min \Big\{ k : \sum_{i=1}^k S_{b,(i)} \ge \mathrm{mass} \sum_i S_{b,i} \Big\}

    where :math:`S_{b,(1)} \ge S_{b,(2)} \ge \dots` is the saliency of MaskedKD's Eq. 2, sorted. The host reads one
    number from the device, how many patches are kept in all; it is the size of the result.

    Args:
        saliency: ``(B, N)`` finite scores of at least 0, row-major over `grid`.
        mass: share of each image's saliency to keep, above 0 and at most 1.
        min_keep: no image keeps fewer patches.
        max_keep: no image keeps more; None means all N (of the target grid).
        grid: ``(gh, gw)`` of the scores; needed only with `target_grid`.
        target_grid: grid in which to select; the map is resized as in `select_tokens`.

    Returns:
        A `RaggedKeep`, the indices of each image ascending. Ties go to the lower index, as in `select_tokens`.

    Raises:
        ValueError: an argument out of range, grids that do not fit, or scores that are negative or not finite (on a GPU
            an asynchronous assert).
        TypeError: scores that are not floating point.

    Example:
        >>> keep_by_mass(torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.3, 0.2, 0.2, 0.3]]), 0.6)
        RaggedKeep(indices=tensor([2, 0, 3]), starts=tensor([0, 1, 3], dtype=torch.int32))
    """
    if not isinstance(saliency, Tensor) or not saliency.is_floating_point():
        what = saliency.dtype if isinstance(saliency, Tensor) else type(saliency).__name__
        raise TypeError(f"saliency is {what}; expected a (B, N) floating-point tensor.")
    if saliency.dim() != 2:
        raise ValueError(f"saliency has shape {tuple(saliency.shape)}; expected (B, N), a score per patch.")
    if not 0 < mass <= 1:  # NaN fails too
        raise ValueError(f"mass is {mass}; expected a share of the saliency above 0 and at most 1.")
    scores = _on_target_grid(saliency.detach(), grid, target_grid)
    patches = scores.shape[1]
    most = patches if max_keep is None else max_keep
    if not 1 <= min_keep <= most <= patches:
        raise ValueError(f"min_keep is {min_keep} and max_keep {max_keep}; expected 1 <= min <= max <= {patches}.")
    require(((scores >= 0) & scores.isfinite()).all(), "saliency holds a negative number, NaN or infinity.")

    best, order = scores.double().sort(dim=1, descending=True, stable=True)
    largest = best[:, :1].clamp_min(torch.finfo(best.dtype).tiny)
    held = (best / largest * STEPS).round().long().cumsum(1)  # (B, N), by the i + 1 best patches
    enough = 1 + (held < mass * held[:, -1:].double()).sum(1)
    counts = enough.clamp(min_keep, most)
    chosen = torch.arange(patches, device=scores.device) < counts[:, None]
    kept = torch.zeros_like(chosen).scatter_(1, order, chosen)
    return RaggedKeep(kept.nonzero()[:, 1], F.pad(counts.cumsum(0), (1, 0)).int())


def _on_target_grid(scores: Tensor, grid: tuple[int, int] | None, target: tuple[int, int] | None) -> Tensor:
    if target is not None and grid is None:
        raise ValueError("target_grid was given without grid; pass the (gh, gw) of the saliency map too.")
    if grid is not None and math.prod(grid) != scores.shape[1]:
        raise ValueError(f"grid is {grid} but saliency has {scores.shape[1]} patches; expected gh * gw of them.")
    if target is None or grid is None or target == grid:
        return scores
    if min(target) < 1:
        raise ValueError(f"target_grid is {target}; expected two positive numbers.")
    return resize(scores.float().view(-1, *grid), target).flatten(1)
