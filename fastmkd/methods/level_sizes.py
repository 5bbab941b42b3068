"""How large a detector's levels are for the images that it makes of any: its own transform says how it resizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["resized_size", "size_of_level"]


def resized_size(detector: Any) -> tuple[int, int] | None:
    """Returns ``(H, W)`` pixels of the largest batch that a detector makes of pictures that lie, in tests.

    Args:
        detector: with torchvision's ``transform``.

    Returns:
        None of a network that does not say how it resizes.

    Example:
        >>> from torchvision.models.detection.transform import GeneralizedRCNNTransform
        >>> from types import SimpleNamespace
        >>> resized_size(SimpleNamespace(transform=GeneralizedRCNNTransform([640, 800], 1333, [0.0], [1.0])))
        (800, 1344)
    """
    transform = getattr(detector, "transform", None)
    fixed, shorter, longer = (getattr(transform, name, None) for name in ("fixed_size", "min_size", "max_size"))
    if fixed is not None:
        width, height = fixed
    elif shorter and longer:
        height, width = shorter[-1] if isinstance(shorter, Sequence) else shorter, longer
    else:
        return None
    step = int(getattr(transform, "size_divisible", 1))
    return -(-int(height) // step) * step, -(-int(width) // step) * step


def size_of_level(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Returns ``(h, w)`` of a level, which has a position wherever a stride begins.

    Args:
        image_size: ``(H, W)`` pixels.
        stride: pixels between positions.

    Example:
        >>> size_of_level((800, 1344), 128)
        (7, 11)
    """
    return -(-image_size[0] // stride), -(-image_size[1] // stride)
