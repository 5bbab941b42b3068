"""Distillation methods: modules whose ``method(images, targets)`` returns loss, terms and the student's output."""

from .base import DistillMethod, DistillOutput, Panel
from .dense_kd import DenseKD
from .dino import MaskedDINO
from .dmae import DMAE
from .dpk import DPK
from .feature_kd import FeatureKD
from .maskedkd import MaskedKD
from .mkd import MKD
from .moco import MoCoV3
from .supervised import Supervised

__all__ = [
    "DMAE",
    "DPK",
    "MKD",
    "DenseKD",
    "DistillMethod",
    "DistillOutput",
    "FeatureKD",
    "MaskedDINO",
    "MaskedKD",
    "MoCoV3",
    "Panel",
    "Supervised",
]
