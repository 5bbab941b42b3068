"""Plain supervised training behind the interface of a method: the baseline, and the way to train a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import DistillOutput
from .dense_checks import check_detection_batch
from .linear_probe import ProbingMethod
from .task_loss import task_loss

__all__ = ["Supervised"]


class Supervised(ProbingMethod):
    """The task's own loss only; no teacher.

    That is cross-entropy for a classifier; one with several heads (a distilled DeiT in training mode) is trained on the
    mean of theirs. For a segmenter it is the mean over the pixels that count, for a detector the sum of its losses.

    Args:
        student: any classifier ``(B, C, H, W)`` -> logits ``(B, K)``, or a tuple of logits; or a detector, which is
            called with a list of images and a list of targets and returns its losses by name, as torchvision's; or a
            segmenter ``(B, C, H, W)`` -> ``(B, K, H, W)``.
        linear_probe: train the classifier only, of a network of timm; the rest is frozen and in eval mode.
        batch_norm: with `linear_probe`, put a batch norm without weights before the classifier (MAE, Appendix A.1); it
            becomes a part of the classifier where the student is saved or released.

    Raises:
        ValueError: `linear_probe` with a student that does not say which layer its classifier is; `batch_norm` without
            `linear_probe`, or with a classifier that is not linear.

    Example:
        >>> import torch
        >>> method = Supervised(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> loss, terms, logits = method(torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]))
        >>> sorted(terms), logits.shape
        (['ce'], torch.Size([2, 3]))
    """

    tasks = ("classification", "detection", "segmentation")

    def __init__(self, student: nn.Module, linear_probe: bool = False, batch_norm: bool = False) -> None:
        super().__init__(student, linear_probe=linear_probe, batch_norm=batch_norm)

    def forward(self, images: Tensor | Sequence[Tensor], targets: Any) -> DistillOutput:
        """Returns the cross-entropy of the student's predictions, or the sum of a detector's losses.

        Args:
            images: ``(B, C, H, W)`` floating point; a list of ``(3, H, W)`` for a detector.
            targets: ``(B,)`` int64 class indices or ``(B, K)`` soft labels; for a detector a list of dicts with
                ``boxes`` and ``labels``; for a segmenter ``(B, H, W)`` int64, 255 where a pixel does not count.

        Returns:
            `DistillOutput` with the term ``ce``, or one term for each of a detector's losses.

        Raises:
            ValueError: targets that do not fit the images or the logits, boxes or labels that make no sense, or a
                detector in eval mode.
            TypeError: images or targets of a wrong type, or an output that is neither logits nor losses.
        """
        if isinstance(images, Tensor) and not hasattr(self.student, "transform"):  # which torchvision's detectors have
            output = self.student(images)
        else:
            check_detection_batch(self.student, images, targets)
            output = self.student(images, targets)
        loss, terms, said = task_loss(output, targets)
        return DistillOutput(loss, {name: term.detach() for name, term in terms.items()}, said)
