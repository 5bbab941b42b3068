"""Detectors on any backbone with a feature pyramid; needs torchvision, which nothing else in `fastmkd.nn` does."""

from ..frozen import frozen_parts
from .body import Backbone, TimmBody, TorchvisionBody, build_body
from .build import DETECTORS, build_detector

__all__ = [
    "DETECTORS",
    "Backbone",
    "TimmBody",
    "TorchvisionBody",
    "build_body",
    "build_detector",
    "frozen_parts",
]
