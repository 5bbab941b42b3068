"""Distillation of predictions: softened ones (Hinton et al., 2015) and decisions (DeiT; G2SD's second stage)."""

from __future__ import annotations

from timm.models.deit import VisionTransformerDistilled

from ...nn.vit import MaskedViT
from ..losses import cross_entropy, logit_kd
from ..views import Needs, View
from .base import BaseDistillation, BaseLoss

__all__ = ["G2SD", "Logit"]


class Logit(BaseDistillation):
    r"""``tau^2 * KL(teacher || student)`` of the predictions (MaskedKD, Section 4.1; Hinton et al., 2015).

    The paper trains with ``CE + KD`` at ``tau = 1`` (Appendix A). Its public code trains with half of each: set
    ``ce_weight=0.5`` and ``weight=0.5`` for that.

    Example:
        >>> Logit().reads_logits_only
        True
    """

    reads_logits_only = True

    def needs(self, student: MaskedViT, teacher: MaskedViT) -> tuple[Needs, Needs]:
        """Nothing but the logits.

        Args:
            student: the network that learns.
            teacher: the network to learn from.
        """
        return Needs(), Needs()

    def loss(self, student: View, teacher: View, temperature: float) -> BaseLoss:
        """Compares the logits.

        Args:
            student: gradients flow here.
            teacher: constants.
            temperature: tau.
        """
        kd = logit_kd(student.logits, teacher.logits, temperature)
        return BaseLoss(kd, {"kd": kd})


class G2SD(BaseDistillation):
    r"""Second, task-specific stage of G2SD: the distillation token learns the teacher's decision (Huang et al., 2023).

    .. math:: L_{KD} = \mathrm{CE}(z^S_{dist}, \arg\max_c z^T_c)

    The student comes from the first (generic, MAE-based) stage and has a distillation token; its class head learns the
    labels. MaskedKD masks the teacher in this stage only (Appendix A). G2SD's public code takes the mean of both terms:
    ``ce_weight=0.5, weight=0.5``; its other settings are 200 epochs, layer decay 0.75, mixup 0.8 and cutmix 1.0.

    Example:
        >>> G2SD().two_heads
        True
    """

    two_heads = True
    reads_logits_only = True

    def needs(self, student: MaskedViT, teacher: MaskedViT) -> tuple[Needs, Needs]:
        """Nothing but the logits, of a student with a distillation head.

        Args:
            student: the network that learns.
            teacher: the network to learn from.

        Raises:
            ValueError: the student has no distillation token.
        """
        if not isinstance(student.model, VisionTransformerDistilled):
            raise ValueError(
                f"student is a {type(student.model).__name__} without a distillation token, which base 'g2sd' trains; "
                "create a distilled one such as deit_small_distilled_patch16_224, or use base='logit'."
            )
        return Needs(), Needs()

    def loss(self, student: View, teacher: View, temperature: float) -> BaseLoss:
        """Cross-entropy of the distillation head against the teacher's decision.

        Args:
            student: gradients flow here.
            teacher: constants.
            temperature: has no part in a decision.
        """
        kd = cross_entropy(student.logits, teacher.logits.argmax(1))
        return BaseLoss(kd, {"kd": kd})
