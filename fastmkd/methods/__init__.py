"""Distillation methods: modules whose ``method(images, targets)`` returns loss, terms and the student's output."""

from .base import DistillMethod, DistillOutput, Panel
from .dino import MaskedDINO
from .maskedkd import MaskedKD
from .supervised import Supervised

__all__ = ["DistillMethod", "DistillOutput", "MaskedDINO", "MaskedKD", "Panel", "Supervised"]
