"""Plain supervised training behind the interface of a method: the baseline, and the way to train a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from .base import DistillMethod, DistillOutput, split_heads, supervised_loss
from .linear_probe import all_but_classifier, train_classifier_alone

__all__ = ["Supervised"]


class Supervised(DistillMethod):
    """Cross-entropy only; no teacher.

    A student with several heads (a distilled DeiT in training mode) is trained on the mean of their cross-entropies.

    Args:
        student: any classifier ``(B, C, H, W)`` -> logits ``(B, K)``, or a tuple of logits.
        linear_probe: train the classifier only, of a network of timm; the rest is frozen and in eval mode.

    Raises:
        ValueError: `linear_probe` with a student that does not say which layer its classifier is.

    Example:
        >>> method = Supervised(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> loss, terms, logits = method(torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]))
        >>> sorted(terms), logits.shape
        (['ce'], torch.Size([2, 3]))
    """

    def __init__(self, student: nn.Module, linear_probe: bool = False) -> None:
        if linear_probe and not hasattr(getattr(student, "model", student), "get_classifier"):
            raise ValueError(
                f"linear_probe needs a student with get_classifier(), as timm's; {type(student).__name__} has none."
            )
        self.__dict__["linear_probe"] = linear_probe  # asked for by unreachable_parameters, which the base class calls
        super().__init__(student)
        if linear_probe:
            self.train(self.training)

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

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names everything but the classifier if only that is trained.

        Args:
            student: the student, as passed.
        """
        return all_but_classifier(student) if self.__dict__["linear_probe"] else ()

    def train(self, mode: bool = True) -> Self:
        """Sets the student's mode, of the classifier alone if only that is trained.

        Args:
            mode: True for training.
        """
        super().train(mode)
        if self.__dict__["linear_probe"]:
            train_classifier_alone(self.student, mode)
        return self
