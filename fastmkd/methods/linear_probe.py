"""Training the classifier only, on a frozen backbone in eval mode (MaskedKD, Appendix C; DPK, Table 16)."""

from __future__ import annotations

from torch import nn

from .views import classifier_of

__all__ = ["all_but_classifier", "train_classifier_alone"]


def all_but_classifier(student: nn.Module) -> list[str]:
    """Names the parameters that a linear probe freezes.

    Args:
        student: a network of timm, or a `fastmkd.MaskedViT`.

    Raises:
        ValueError: the network has no classifier.

    Example:
        >>> import timm
        >>> frozen = all_but_classifier(timm.create_model("vit_tiny_patch16_224", depth=1))
        >>> "head.weight" in frozen, "pos_embed" in frozen
        (False, True)
    """
    trained = {id(p) for layer in classifier_of(student) for p in layer.parameters()}
    if not trained:
        raise ValueError("student has no classifier to train; create it with num_classes above 0.")
    return [name for name, p in student.named_parameters() if id(p) not in trained]


def train_classifier_alone(student: nn.Module, mode: bool) -> None:
    """Sets the classifier's mode and puts the rest in eval mode.

    Args:
        student: as in `all_but_classifier`.
        mode: True for training.
    """
    student.eval()
    for layer in classifier_of(student):
        layer.train(mode)
