"""Plain supervised training behind the interface of a method: the baseline, and the way to train a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import DistillOutput, split_heads, supervised_loss
from .linear_probe import ProbingMethod

__all__ = ["Supervised"]


class Supervised(ProbingMethod):
    """Cross-entropy only; no teacher.

    A student with several heads (a distilled DeiT in training mode) is trained on the mean of their cross-entropies.

    Args:
        student: any classifier ``(B, C, H, W)`` -> logits ``(B, K)``, or a tuple of logits.
        linear_probe: train the classifier only, of a network of timm; the rest is frozen and in eval mode.
        batch_norm: with `linear_probe`, put a batch norm without weights before the classifier (MAE, Appendix A.1); it
            becomes a part of the classifier where the student is saved or released.

    Raises:
        ValueError: `linear_probe` with a student that does not say which layer its classifier is; `batch_norm` without
            `linear_probe`, or with a classifier that is not linear.

    Example:
        >>> method = Supervised(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> loss, terms, logits = method(torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]))
        >>> sorted(terms), logits.shape
        (['ce'], torch.Size([2, 3]))
    """

    def __init__(self, student: nn.Module, linear_probe: bool = False, batch_norm: bool = False) -> None:
        super().__init__(student, linear_probe=linear_probe, batch_norm=batch_norm)

    def forward(self, images: Tensor, targets: Tensor) -> DistillOutput:
        """Returns the cross-entropy of the student's predictions.

        Args:
            images: ``(B, C, H, W)`` floating point.
            targets: ``(B,)`` int64 class indices or ``(B, K)`` soft labels.

        Returns:
            `DistillOutput` with the term ``ce``.

        Raises:
            ValueError: targets that do not fit the logits.
            TypeError: targets of a wrong dtype.
        """
        heads = split_heads(self.student(images))
        loss = supervised_loss(heads, targets)
        return DistillOutput(loss, {"ce": loss.detach()}, torch.stack(heads).mean(0) if len(heads) > 1 else heads[0])
