"""Training the classifier only, on a frozen backbone in eval mode (MaskedKD, Appendix C; DPK, Table 16)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import nn

from .base import DistillMethod
from .views import classifier_of

__all__ = ["ProbingMethod", "all_but_classifier"]


def all_but_classifier(student: nn.Module) -> list[str]:
    """Names the parameters that a linear probe freezes.

    Args:
        student: a network of timm, or a `fastmkd.MaskedViT`.

    Raises:
        ValueError: the network has no classifier, or does not say which layer it is.

    Example:
        >>> import timm
        >>> frozen = all_but_classifier(timm.create_model("vit_tiny_patch16_224", depth=1))
        >>> "head.weight" in frozen, "pos_embed" in frozen
        (False, True)
    """
    if not hasattr(getattr(student, "model", student), "get_classifier"):
        raise ValueError(
            f"linear_probe needs a student with get_classifier(), as timm's; {type(student).__name__} has none."
        )
    trained = {id(p) for layer in classifier_of(student) for p in layer.parameters()}
    if not trained:
        raise ValueError("student has no classifier to train; create it with num_classes above 0.")
    return [name for name, p in student.named_parameters() if id(p) not in trained]


class ProbingMethod(DistillMethod):
    """A method that can train the student's classifier alone.

    Args:
        student: the network to train.
        teacher: the network to learn from, or None.
        linear_probe: freeze all but the classifier, and keep it in eval mode.
        teacher_device: keeps the teacher on this device.

    Raises:
        ValueError: `linear_probe` with a student that has no classifier, or does not say which layer it is.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        linear_probe: bool = False,
        teacher_device: torch.device | str | None = None,
    ) -> None:
        self.linear_probe = linear_probe  # unreachable_parameters, which the base class calls, asks for it
        super().__init__(student, teacher, teacher_device=teacher_device)
        if linear_probe:
            self.train(self.training)

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names everything but the classifier if only that is trained.

        Args:
            student: the student, as passed.
        """
        return all_but_classifier(student) if self.linear_probe else ()

    def train(self, mode: bool = True) -> Self:
        """Sets the student's mode, of the classifier alone if only that is trained; the teacher stays in eval mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        if self.linear_probe:
            self.student.eval()
            for layer in classifier_of(self.student):
                layer.train(mode)
        return self
