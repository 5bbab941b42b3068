"""Base distillation algorithms of MaskedKD: one file each, all behind `BaseDistillation`."""

from .attention import ClassAttention, attention_loss
from .base import BaseDistillation, BaseLoss
from .logit import G2SD, Logit
from .manifold import Manifold, manifold_loss

__all__ = [
    "BASES",
    "G2SD",
    "BaseDistillation",
    "BaseLoss",
    "ClassAttention",
    "Logit",
    "Manifold",
    "attention_loss",
    "manifold_loss",
]

# By the name that MaskedKD(base=...) and a recipe use.
BASES: dict[str, type[BaseDistillation]] = {
    "logit": Logit,
    "manifold": Manifold,
    "attention": ClassAttention,
    "g2sd": G2SD,
}
