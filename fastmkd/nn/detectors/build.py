"""``build_detector``: RetinaNet, FCOS and Faster R-CNN of torchvision, and RepPoints, on any backbone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from .body import Backbone, build_body
from .precision import Anchors, keep_boxes_wide
from .reppoints import RepPoints

__all__ = ["DETECTORS", "build_detector"]

LEVELS = 5
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)


def build_detector(
    name: str,
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    image_size: Sequence[Any] = (800, 1333),
    image_mean: Sequence[float] = (0.485, 0.456, 0.406),
    image_std: Sequence[float] = (0.229, 0.224, 0.225),
    out_channels: int = 256,
    anchor_sizes: Sequence[int] | None = None,
    pretrained: bool = False,
    frozen_stages: int = 0,
    norm_eval: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Makes a detector: ``model(images, targets)`` gives its losses in training, ``model(images)`` boxes otherwise.

    Images are a list of ``(3, H, W)`` in [0, 1] of any sizes, targets a list of dicts with ``boxes`` ``(n, 4)`` as
    corners x0 y0 x1 y1 in pixels and ``labels`` ``(n,)`` from 1. ``model.transform`` resizes, normalises and pads,
    ``model.backbone.body`` gives maps and ``model.backbone.fpn`` levels. Under autocast boxes stay in float32.
    ``model.num_classes`` counts the background.

    Args:
        name: retinanet, fcos, faster_rcnn or reppoints (the keys of `DETECTORS`).
        backbone: see `fastmkd.nn.detectors.build_body`.
        num_classes: without the background, which torchvision counts as class 0.
        image_size: what the shorter side becomes, and the most that the longer one may. A list of shorter sides means
            that each training picture draws one of them; tests take the last.
        image_mean: per channel, of pixels in [0, 1].
        image_std: per channel.
        out_channels: of each level of the pyramid.
        anchor_sizes: side in pixels of the smallest anchor of each of the five levels; None is 32 to 512, for FCOS 8 to
            128. For FCOS it also says which boxes a level is for, those of 4 to 8 times that side. RepPoints has none.
        pretrained: download the backbone's weights of ImageNet.
        frozen_stages: 0 for none, else the backbone's stem and this many stages do not learn.
        norm_eval: batch norms of the backbone keep their running statistics.
        backbone_kwargs: further arguments of the backbone, such as the channels of one of timm's.
        kwargs: further arguments of torchvision's class, such as ``detections_per_img`` or ``score_thresh``.

    Raises:
        ValueError: an unknown detector or backbone, sizes or anchors that make no sense.
        TypeError: an argument that the detector does not know.

    Example:
        >>> import torch
        >>> model = build_detector("retinanet", "resnet18", 3, image_size=(64, 96), out_channels=16)
        >>> target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2])}
        >>> sorted(model([torch.rand(3, 60, 70)], [target]))
        ['bbox_regression', 'classification']
        >>> sorted(model.eval()([torch.rand(3, 60, 70)])[0])
        ['boxes', 'labels', 'scores']
    """
    if name not in DETECTORS:
        raise ValueError(f"there is no detector {name!r}; known are {', '.join(DETECTORS)}.")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1, the background not counted.")
    shorter, longer = _checked_size(image_size)
    if anchor_sizes is not None and (len(anchor_sizes) != LEVELS or min(anchor_sizes) < 1):
        raise ValueError(f"anchor_sizes is {list(anchor_sizes)}; expected {LEVELS} numbers of pixels, one a level.")
    make, maps, top = DETECTORS[name]
    body, channels = build_body(
        backbone,
        maps,
        pretrained=pretrained,
        frozen_stages=frozen_stages,
        norm_eval=norm_eval,
        **(backbone_kwargs or {}),
    )
    fpn = FeaturePyramidNetwork(channels, out_channels, top(out_channels))
    resizing = {
        "min_size": shorter,
        "max_size": longer,
        "image_mean": list(image_mean),
        "image_std": list(image_std),
    }
    model: Any = make(Backbone(body, fpn, out_channels), num_classes, anchor_sizes, **resizing, **kwargs)
    model.num_classes = num_classes + 1  # torchvision's count
    detector: nn.Module = model
    return detector


def _checked_size(image_size: Sequence[Any]) -> tuple[tuple[int, ...], int]:
    expected = "expected (shorter, longer) in pixels, the shorter side perhaps as a list of several"
    if isinstance(image_size, int) or len(image_size) != 2:
        raise ValueError(f"image_size is {image_size}; {expected}.")
    shorter, longer = image_size
    sides = tuple(shorter) if isinstance(shorter, Sequence) else (shorter,)
    if not sides or min(sides) < 1 or longer < max(sides):
        raise ValueError(f"image_size is {image_size}; {expected}, at most as long as the longer one.")
    return sides, longer


def _anchors(sizes: Sequence[Sequence[int]], ratios: Sequence[float]) -> Anchors:
    return Anchors(tuple(tuple(level) for level in sizes), (tuple(ratios),) * len(sizes))


def _retinanet(backbone: Backbone, num_classes: int, anchor_sizes: Sequence[int] | None, **kwargs: Any) -> nn.Module:
    sides = anchor_sizes or (32, 64, 128, 256, 512)
    anchors = _anchors([[int(side * octave) for octave in OCTAVES] for side in sides], RATIOS)
    return _make(RetinaNet, backbone, num_classes=num_classes + 1, anchor_generator=anchors, **kwargs)


def _fcos(backbone: Backbone, num_classes: int, anchor_sizes: Sequence[int] | None, **kwargs: Any) -> nn.Module:
    if backbone.out_channels % 32 or backbone.out_channels < 64:  # on a level of one pixel a group of 1 has no variance
        raise ValueError(f"out_channels is {backbone.out_channels}; FCOS normalises in 32 groups: take 64, 96, ...")
    anchors = _anchors([[side] for side in anchor_sizes or (8, 16, 32, 64, 128)], (1.0,))
    # 0.05 is FCOS's own threshold; with torchvision's 0.2 a network that is not sure yet finds nothing at all.
    kwargs = {"score_thresh": 0.05, **kwargs}
    return _make(FCOS, backbone, num_classes=num_classes + 1, anchor_generator=anchors, **kwargs)


def _faster_rcnn(
    backbone: Backbone,
    num_classes: int,
    anchor_sizes: Sequence[int] | None,
    representation_size: int = 1024,
    **kwargs: Any,
) -> nn.Module:
    anchors = _anchors([[side] for side in anchor_sizes or (32, 64, 128, 256, 512)], RATIOS)
    head = TwoMLPHead(backbone.out_channels * 7**2, representation_size)
    predictor = FastRCNNPredictor(representation_size, num_classes + 1)
    parts = {"rpn_anchor_generator": anchors, "box_head": head, "box_predictor": predictor}
    return _make(FasterRCNN, backbone, **parts, **kwargs)


def _reppoints(backbone: Backbone, num_classes: int, anchor_sizes: Sequence[int] | None, **kwargs: Any) -> nn.Module:
    if anchor_sizes is not None:
        raise ValueError(f"anchor_sizes is {list(anchor_sizes)}, but RepPoints has no anchors; leave it out.")
    return _make(RepPoints, backbone, num_classes=num_classes + 1, **kwargs)


def _make(kind: type[nn.Module], backbone: Backbone, **kwargs: Any) -> nn.Module:
    """Makes a detector; these classes hand what they do not know to their transform, which takes anything."""
    known = {"size_divisible", "fixed_size"} | inspect.signature(kind).parameters.keys()
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise TypeError(f"{kind.__name__} does not know {', '.join(unknown)}.")
    detector = kind(backbone, **kwargs)
    keep_boxes_wide(detector)
    return detector


def _two_more(out_channels: int) -> ExtraFPNBlock:
    return LastLevelP6P7(out_channels, out_channels)


def _one_more(out_channels: int) -> ExtraFPNBlock:
    return LastLevelMaxPool()


# Detector: its maker, how many of the body's maps it takes, and what the pyramid has above them.
DETECTORS: dict[str, tuple[Callable[..., nn.Module], int, Callable[[int], ExtraFPNBlock]]] = {
    "retinanet": (_retinanet, 3, _two_more),
    "fcos": (_fcos, 3, _two_more),
    "faster_rcnn": (_faster_rcnn, 4, _one_more),
    "reppoints": (_reppoints, 3, _two_more),
}
