"""Manifold distillation: the student's patches are to lie to each other as the teacher's do (Hao et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.vit import MaskedViT
from ...ops.autocast import no_autocast
from ..losses import logit_kd
from ..views import Needs, View, blocks_of, on_common_patches
from .base import BaseDistillation, BaseLoss
from .layers import check_pairs, ends

__all__ = ["Manifold", "manifold_loss"]


class Manifold(BaseDistillation):
    r"""Fine-grained manifold distillation (Hao et al., NeurIPS 2022), base "Manifold" of MaskedKD's Table 2.

    With rows of the features normalised to length 1, the relation map of a set of patches is
    :math:`M(F) = F F^\top`. For each pair of layers

    .. math:: L_{mf} = \alpha \, \overline{\|M(F^S_b) - M(F^T_b)\|^2}
        + \beta \, \overline{\|M(F^S_{\cdot j}) - M(F^T_{\cdot j})\|^2}
        + \gamma \, \overline{\|M(F^S_r) - M(F^T_r)\|^2}

    over the patches of one image b, over the j-th patches of all images, and over K patches r drawn from the batch. As
    in the authors' code a bar is a mean over the elements of the maps, and layers are averaged. The logit loss is
    added, as there.

    Only patches that both networks saw are compared: those the masked teacher kept. The j-th patches of different
    images are then the j-th kept ones. Prefix tokens take no part, since not every teacher has them in its blocks.

    Args:
        patch_weight: alpha.
        sample_weight: beta.
        random_weight: gamma.
        samples: K; all patches of the batch if there are fewer.
        logit_weight: weight of ``tau^2 * KL`` inside the distillation loss.
        student_layers: blocks from 0; None takes the first and the last four of each network.
        teacher_layers: their partners.

    Raises:
        ValueError: a weight that is negative or not finite, samples below 1, layers of only one network or of different
            numbers.

    Example:
        >>> Manifold(student_layers=[0, 11], teacher_layers=[0, 23]).samples
        192
    """

    def __init__(
        self,
        patch_weight: float = 4.0,
        sample_weight: float = 0.1,
        random_weight: float = 0.2,
        samples: int = 192,
        logit_weight: float = 1.0,
        student_layers: Sequence[int] | None = None,
        teacher_layers: Sequence[int] | None = None,
    ) -> None:
        weights = {"patch_weight": patch_weight, "sample_weight": sample_weight, "random_weight": random_weight,
                   "logit_weight": logit_weight}  # fmt: skip
        for name, value in weights.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        if samples < 1:
            raise ValueError(f"samples is {samples}; expected at least 1 patch.")
        self.patch_weight, self.sample_weight, self.random_weight = patch_weight, sample_weight, random_weight
        self.samples, self.logit_weight = samples, logit_weight
        self.pairs = check_pairs(student_layers, teacher_layers)

    def _pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        return ends(student_depth, teacher_depth) if self.pairs is None else self.pairs

    def needs(self, student: MaskedViT, teacher: MaskedViT) -> tuple[Needs, Needs]:
        """The outputs of the paired blocks.

        Args:
            student: the network that learns.
            teacher: the network to learn from.

        Raises:
            ValueError: a layer that a network does not have.
        """
        depths = len(blocks_of(student)), len(blocks_of(teacher))
        pairs = self._pairs(*depths)
        for role, layers, depth in zip(("student", "teacher"), zip(*pairs, strict=True), depths, strict=True):
            if not 0 <= min(layers) <= max(layers) < depth:
                raise ValueError(f"{role}_layers is {list(layers)}; the {role} has the blocks 0 to {depth - 1}.")
        return Needs(blocks=frozenset(i for i, _ in pairs)), Needs(blocks=frozenset(j for _, j in pairs))

    def loss(self, student: View, teacher: View, temperature: float) -> BaseLoss:
        """Compares relation maps, and logits.

        Args:
            student: gradients flow here.
            teacher: constants.
            temperature: tau of the logit loss.
        """
        pairs = self._pairs(student.depth, teacher.depth)
        parts = []
        for i, j in pairs:
            s, t = on_common_patches(student.blocks[i], teacher.blocks[j], student, teacher)
            parts.append(torch.stack(manifold_loss(s, t, self.samples)))
        patch, sample, rand = torch.stack(parts).mean(0)
        kd = logit_kd(student.logits, teacher.logits, temperature)
        total = self.logit_weight * kd + self.patch_weight * patch
        total = total + self.sample_weight * sample + self.random_weight * rand
        return BaseLoss(total, {"kd": kd, "manifold_patch": patch, "manifold_sample": sample, "manifold_random": rand})


def manifold_loss(student: Tensor, teacher: Tensor, samples: int = 192) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the mean squared difference of the relation maps within images, across images, and of random patches.

    Args:
        student: ``(B, n, D_s)`` features of patches; gradients flow here.
        teacher: ``(B, n, D_t)`` of the same patches; constants.
        samples: K, how many patches of the batch to draw for the third map.

    Returns:
        Three scalars in float32 (float64 for float64 input), whatever the autocast dtype.

    Raises:
        ValueError: different batch or patch counts.

    Example:
        >>> x = torch.randn(2, 3, 4)
        >>> [float(loss) for loss in manifold_loss(x, 2 * x)]
        [0.0, 0.0, 0.0]
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; both need "
            "(B, n, D) with the same B and n."
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    with no_autocast(student.device):
        s = F.normalize(student.to(wide), dim=-1)
        t = F.normalize(teacher.detach().to(wide), dim=-1)
        drawn = torch.randperm(s.shape[0] * s.shape[1], device=s.device)[:samples]
        return (
            _difference(s, t),  # (B, n, n)
            _difference(s.transpose(0, 1), t.transpose(0, 1)),  # (n, B, B)
            _difference(s.flatten(0, 1)[drawn], t.flatten(0, 1)[drawn]),  # (K, K)
        )


def _difference(s: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(s @ s.mT, t @ t.mT)
