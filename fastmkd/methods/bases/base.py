"""What a base distillation algorithm is: the loss that MaskedKD makes cheap (MaskedKD, Section 4.1)."""

from __future__ import annotations

import abc
from typing import NamedTuple

from torch import Tensor

from ...nn.vit import MaskedViT
from ..views import Needs, View

__all__ = ["BaseDistillation", "BaseLoss"]


class BaseLoss(NamedTuple):
    """A distillation loss and its parts.

    Attributes:
        total: scalar; what MaskedKD multiplies by lambda.
        terms: scalars by name before any weighting, for logging.
    """

    total: Tensor
    terms: dict[str, Tensor]


class BaseDistillation(abc.ABC):
    """A distillation loss between a student and a teacher that may have seen different patches.

    `needs` is asked once per forward pass, so it must be quick; `loss` gets views with exactly what was asked for. An
    object keeps options only, never anything about the networks, and may serve many methods.

    Attributes:
        two_heads: a distilled DeiT student is to answer with both heads in training.
        reads_logits_only: makes sense when the student's backbone is frozen.
    """

    two_heads: bool = False
    reads_logits_only: bool = False

    @abc.abstractmethod
    def needs(self, student: MaskedViT, teacher: MaskedViT) -> tuple[Needs, Needs]:
        """Says what to record of student and teacher.

        Args:
            student: the network that learns.
            teacher: the network to learn from.

        Raises:
            ValueError: the two do not fit this loss.
        """

    @abc.abstractmethod
    def loss(self, student: View, teacher: View, temperature: float) -> BaseLoss:
        """Compares the two.

        Args:
            student: gradients flow here.
            teacher: constants.
            temperature: tau of softened predictions.
        """
