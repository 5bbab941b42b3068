"""Attention distillation: the student's class token is to look where the teacher's looks (Wang et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...nn.vit import MaskedViT
from ...nn.vit_attention import why_attention_unreadable
from ..losses import logit_kd
from ..views import Needs, View, blocks_of, on_common_patches
from .base import BaseDistillation, BaseLoss
from .layers import check_pairs, spread

__all__ = ["ClassAttention", "attention_loss"]


class ClassAttention(BaseDistillation):
    r"""Attention distillation of all layers (Wang et al., BMVC 2022, as MaskedKD, Section 4.1, applies it).

    Let :math:`a_h` be the softmax of the class token's attention in head h over the patches that both networks saw. Per
    layer

    .. math:: L_{attn} = \frac{1}{B} \sum_{b} \mathrm{KL}(p^T_b \,\|\, p^S_b), \qquad
        p = \mathrm{softmax}_i \Big( \frac{1}{T} \sum_h \log a_{h,i} \Big)

    which lets the numbers of heads differ; with equal numbers of heads the maps are compared head by head instead and
    the divergences summed. Layers are summed with the same weight (MaskedKD, Appendix A).

    The attention matrix is never formed: only the CLS row is computed besides, and fused attention stays on. Where the
    teacher was masked, both distributions are over its patches; where the grids differ, the probabilities are resized.
    The logit loss is added; ``logit_weight=0`` leaves the attention alone.

    Args:
        attention_weight: weight of each layer; 0.1 in Wang et al.'s code.
        head_temperature: T, flattens the product of the heads; Wang et al.'s code has 10.
        logit_weight: weight of ``tau^2 * KL`` of the predictions inside the distillation loss.
        student_layers: blocks from 0; None takes all, each with the teacher's block at the same relative depth.
        teacher_layers: their partners.

    Raises:
        ValueError: a weight or temperature out of range, layers of only one network or of different numbers.

    Example:
        >>> ClassAttention(logit_weight=0.0).attention_weight
        0.1
    """

    def __init__(
        self,
        attention_weight: float = 0.1,
        head_temperature: float = 10.0,
        logit_weight: float = 1.0,
        student_layers: Sequence[int] | None = None,
        teacher_layers: Sequence[int] | None = None,
    ) -> None:
        for name, value in (("attention_weight", attention_weight), ("logit_weight", logit_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        if not (head_temperature > 0 and math.isfinite(head_temperature)):
            raise ValueError(f"head_temperature is {head_temperature}; expected a finite positive number.")
        self.attention_weight, self.head_temperature = attention_weight, head_temperature
        self.logit_weight = logit_weight
        self.pairs = check_pairs(student_layers, teacher_layers)

    def _pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        return spread(student_depth, teacher_depth) if self.pairs is None else self.pairs

    def needs(self, student: MaskedViT, teacher: MaskedViT) -> tuple[Needs, Needs]:
        """The CLS attention of the paired blocks.

        Args:
            student: the network that learns.
            teacher: the network to learn from.

        Raises:
            ValueError: a layer that a network does not have, or one whose attention cannot be read.
        """
        pairs = self._pairs(len(blocks_of(student)), len(blocks_of(teacher)))
        needs = []
        for role, vit, layers in zip(("student", "teacher"), (student, teacher), zip(*pairs, strict=True), strict=True):
            blocks = blocks_of(vit)
            if not 0 <= min(layers) <= max(layers) < len(blocks):
                raise ValueError(f"{role}_layers is {list(layers)}; the {role} has the blocks 0 to {len(blocks) - 1}.")
            reasons = [reason for i in layers if (reason := why_attention_unreadable(blocks[i])) is not None]
            if vit.num_prefix_tokens < 1:
                reasons = ["it has no CLS token in its blocks"]
            if reasons:
                raise ValueError(f"base 'attention' cannot read the attention of the {role}: {reasons[0]}.")
            needs.append(Needs(attention=frozenset(layers)))
        return needs[0], needs[1]

    def loss(self, student: View, teacher: View, temperature: float) -> BaseLoss:
        """Compares attention, and logits.

        Args:
            student: gradients flow here.
            teacher: constants.
            temperature: tau of the logit loss.
        """
        kd = logit_kd(student.logits, teacher.logits, temperature)
        layers = []
        for i, j in self._pairs(student.depth, teacher.depth):
            s, t = student.attention[i].mT, teacher.attention[j].mT  # (B, H, n) -> (B, n, H)
            if student.grid != teacher.grid:
                # Probabilities are resized, as Wang et al. do; normalising again is left to the loss.
                s, t = _probabilities(s), _probabilities(t)
                s, t = on_common_patches(s, t, student, teacher)
                tiny = torch.finfo(s.dtype).tiny
                s, t = s.clamp_min(tiny).log(), t.clamp_min(tiny).log()
            else:
                s, t = on_common_patches(s, t, student, teacher)
            layers.append(attention_loss(s.mT, t.mT, self.head_temperature))
        attention = torch.stack(layers).sum()
        total = self.logit_weight * kd + self.attention_weight * attention
        return BaseLoss(total, {"kd": kd, "attention": attention})


def attention_loss(student: Tensor, teacher: Tensor, head_temperature: float = 10.0) -> Tensor:
    """Returns ``KL(teacher || student)`` of two attention maps, summed over heads and averaged over the batch.

    Args:
        student: ``(B, H_s, n)`` attention before the softmax; gradients flow here.
        teacher: ``(B, H_t, n)``; constants. With ``H_s != H_t`` the heads of each are first multiplied into one map.
        head_temperature: T, used for that product only.

    Returns:
        Scalar.

    Raises:
        ValueError: different batch or patch counts.

    Example:
        >>> float(attention_loss(torch.zeros(2, 3, 4), torch.zeros(2, 6, 4)))
        0.0
    """
    if (student.shape[0], student.shape[-1]) != (teacher.shape[0], teacher.shape[-1]):
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; both need "
            "(B, H, n) with the same B and n."
        )
    log_s, log_t = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    if log_s.shape[1] != log_t.shape[1]:
        log_s, log_t = ((x.sum(1) / head_temperature).log_softmax(-1) for x in (log_s, log_t))  # (B, n)
    return (log_t.exp() * (log_t - log_s)).sum() / len(student)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(1)  # over the patches of (B, n, H)
