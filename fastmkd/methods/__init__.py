"""Distillation methods: modules whose ``method(images, targets)`` returns loss, terms and the student's output."""

from .base import DistillMethod, DistillOutput, Panel
from .maskedkd import MaskedKD
from .supervised import Supervised

__all__ = ["DistillMethod", "DistillOutput", "MaskedKD", "Panel", "Supervised"]
