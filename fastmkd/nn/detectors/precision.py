"""Boxes in float32 under autocast: of pixels above 512 bfloat16 knows every fourth, above 1024 every eighth.

Convolutions stay in the lower precision. Only what holds pixels is wider: torchvision makes anchors in the dtype of the
levels, and decodes boxes in the dtype of what the heads say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ...ops.autocast import autocast_dtype

__all__ = ["Anchors", "keep_boxes_wide", "widen"]

# What says how far a box is from its anchor, in torchvision's detectors of one and of two stages.
SPEAKERS = ("head", "rpn.head", "roi_heads.box_predictor")


class Anchors(AnchorGenerator):
    """torchvision's anchors, in float32 for levels in a lower precision.

    Args:
        sizes: sides in pixels of the anchors of each level.
        aspect_ratios: height by width, of each level.

    Example:
        >>> from torchvision.models.detection.image_list import ImageList
        >>> level = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
        >>> Anchors(((8,),), ((1.0,),))(ImageList(torch.zeros(1, 3, 8, 16), [(8, 16)]), [level])[0]
        tensor([[-4., -4.,  4.,  4.],
                [ 4., -4., 12.,  4.]])
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the anchors of one position.

        Args:
            dtype: of the levels.
            device: of the levels.
        """
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


def keep_boxes_wide(detector: nn.Module) -> None:
    """Lets a detector with `Anchors` decode boxes in float32; parameters, names and float32 results stay.

    Args:
        detector: one of torchvision's, of one or two stages.
    """
    modules = dict(detector.named_modules())
    for name in SPEAKERS:
        if name in modules:
            modules[name].register_forward_hook(_widen_output)
    if "roi_heads.box_roi_pool" in modules:
        modules["roi_heads.box_roi_pool"].register_forward_pre_hook(_match_maps)


def widen(said: Any) -> Any:
    """Returns tensors in float32 or wider, in the tuples, lists and mappings that they came in.

    Args:
        said: what a head returned.

    Example:
        >>> widen({"boxes": [torch.zeros(1, dtype=torch.bfloat16)]})
        {'boxes': [tensor([0.])]}
    """
    if isinstance(said, Tensor):
        return said.to(torch.promote_types(said.dtype, torch.float32))
    if isinstance(said, Mapping):
        return {key: widen(value) for key, value in said.items()}
    return type(said)(widen(value) for value in said)


def _widen_output(_module: nn.Module, _args: Any, said: Any) -> Any:
    return widen(said)


def _match_maps(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Boxes in the dtype of the maps that are read there, for networks that are in float16 without autocast."""
    maps, boxes, sizes = args
    level = next(iter(maps.values()))
    if autocast_dtype(level.device) is not None:  # which reads them in float32
        return None
    return maps, [corners.to(level.dtype) for corners in boxes], sizes
