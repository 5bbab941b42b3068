"""A new classifier on a frozen network: how far what it has learnt carries to other pictures (DPK, Table 16)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from torch import nn

from .supervised import Supervised
from .views import classifier_of

__all__ = ["LinearProbe"]


class LinearProbe(Supervised):
    """Cross-entropy that trains the student's last layer alone; the rest is frozen and in eval mode (Appendix A.7).

    In a recipe ``student.backbone`` names the weights to start from, without their classifier.

    Args:
        student: a timm network, a `MaskedViT` or one of `fastmkd.nn.cifar`.

    Raises:
        TypeError: a network that cannot tell which layer is its classifier.
        ValueError: it has none.

    Example:
        >>> import timm
        >>> method = LinearProbe(timm.create_model("resnet18", num_classes=10)).train()
        >>> [name for name, p in method.student.named_parameters() if p.requires_grad]
        ['fc.weight', 'fc.bias']
        >>> method.student.bn1.training, method.student.fc.training
        (False, True)
    """

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names everything but the classifier.

        Args:
            student: the student, as passed.
        """
        try:
            layers = classifier_of(student)
        except AttributeError:
            kind = type(student).__name__
            raise TypeError(f"student is a {kind} without get_classifier(); pass a timm network.") from None
        trained = {id(p) for layer in layers for p in layer.parameters()}
        if not trained:
            raise ValueError("student has no classifier to train; create it with num_classes above 0.")
        return [name for name, p in student.named_parameters() if id(p) not in trained]

    def train(self, mode: bool = True) -> Self:
        """Sets the classifier's mode; the rest stays in eval mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.student.eval()
        for layer in classifier_of(self.student):
            layer.train(mode)
        return self
