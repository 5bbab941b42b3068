r"""Multiply-adds of DMAE and MAE per image, beside those of the public code.

A step runs the student, the decoder and the projection heads forward and backward, which counts three times, and the
teacher forward:

.. math:: 3 \, (S + D + P) + T
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import nn

from ..methods import DMAE
from ..methods.alignment import Alignment, prefix_length
from ..methods.mae_decoder import MAEDecoder
from ..methods.mae_parts import count_hidden
from ..methods.maskedkd_checks import wrap
from .cost import block_macs, encoder_macs

__all__ = ["DmaeMacs", "dmae_macs"]


class DmaeMacs(NamedTuple):
    """Multiply-adds of a forward pass for one image.

    Attributes:
        student: the encoder on the visible patches.
        decoder: of the student.
        teacher: the frozen network; in the public code's way with its norm and a decoder of its own.
        projection: heads on the aligned layers.
    """

    student: int
    decoder: int
    teacher: int
    projection: int

    @property
    def step(self) -> int:
        """Of a training step; a backward pass costs two forward passes."""
        return 3 * (self.student + self.decoder + self.projection) + self.teacher


def dmae_macs(method: DMAE, mask_ratio: float | None = None, exact_savings: bool = True) -> DmaeMacs:
    """Counts the multiply-adds of `fastmkd.DMAE` on one image of the size that its student was made for.

    Args:
        method: with or without a teacher; may live on the meta device, only shapes are read.
        mask_ratio: share of hidden patches; None is the method's own.
        exact_savings: count what the method does: visible patches are embedded, the teacher stops after the last
            aligned layer, the decoder's last block and the prediction run for hidden patches alone. False counts the
            public code's way: all patches are embedded, then gathered; the teacher runs all its layers and a decoder as
            large as the student's; all patches are predicted.

    Raises:
        ValueError: a `mask_ratio` that leaves no visible or no hidden patch.
        TypeError: a block whose multiply-adds are not known.

    Example:
        >>> import timm, torch
        >>> with torch.device("meta"):
        ...     names = ("vit_base_patch16_224", "vit_large_patch16_224")
        ...     method = DMAE(*(timm.create_model(name, num_classes=0) for name in names))
        >>> f"{dmae_macs(method).teacher / 1e9:.1f}, {dmae_macs(method, exact_savings=False).teacher / 1e9:.1f}"
        '11.5, 20.8'
    """
    student = wrap("student", method.student)
    grid = student.patch_grid()
    hidden = count_hidden(method.mask_ratio if mask_ratio is None else mask_ratio, grid)
    keep = math.prod(grid) - hidden
    decoder = cast(MAEDecoder, method.heads["decoder"])
    teacher = projection = 0
    if method.teacher is not None:
        other, project = wrap("teacher", method.teacher), cast(Alignment, method.heads["project"])
        depth = max(layer for _, layer in method.layers) if exact_savings else None
        teacher = encoder_macs(other, keep, depth, exact_savings)
        if not exact_savings:
            teacher += _decoder(decoder, other.embed_dim, prefix_length(other), keep, hidden, exact_savings=False)
        rows = project.common + keep
        projection = rows * sum(part.weight.numel() for part in project.modules() if isinstance(part, nn.Linear))
    return DmaeMacs(
        encoder_macs(student, keep, exact_savings=exact_savings),
        _decoder(decoder, student.embed_dim, prefix_length(student), keep, hidden, exact_savings),
        teacher,
        projection,
    )


def _decoder(decoder: MAEDecoder, embed_dim: int, prefix: int, keep: int, hidden: int, exact_savings: bool) -> int:
    """A decoder on tokens `embed_dim` wide, which may be another network's than those it was made for."""
    tokens, width = prefix + keep + hidden, decoder.embed.out_features
    rows = hidden if exact_savings else tokens
    *body, last = decoder.blocks
    blocks = sum(sum(block_macs(block, tokens, tokens)) for block in body) + sum(block_macs(last, tokens, rows))
    return (prefix + keep) * embed_dim * width + blocks + rows * decoder.predict.weight.numel()
