"""What can be wrong with a batch for a detector, said in a sentence before torchvision stumbles over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_detection_batch", "check_normalisation"]


def check_normalisation(student: Any, teacher: Any) -> None:
    """Checks that two detectors normalise images alike, for the teacher gets the student's batch.

    Args:
        student: a detector, or anything else.
        teacher: likewise.

    Raises:
        ValueError: different means or deviations.
    """
    for name in ("image_mean", "image_std"):
        own, other = (getattr(getattr(network, "transform", None), name, None) for network in (student, teacher))
        if own is not None and other is not None and list(own) != list(other):
            raise ValueError(
                f"the student's transform has {name} {list(own)} but the teacher's {list(other)}; the teacher gets the "
                f"batch that the student's transform made, so build both with the same {name}."
            )


def check_detection_batch(student: Any, images: Any, targets: Any) -> None:
    """Checks the images and targets of a detector.

    Args:
        student: the detector.
        images: a list of ``(C, H, W)`` floating point.
        targets: for each image a mapping with ``boxes`` (n, 4) and ``labels`` (n,) int64; n may be 0.

    Raises:
        TypeError: another type or dtype.
        ValueError: shapes or numbers that do not belong together, and on a CPU a box without area or end or a
            label without a class.
    """
    if isinstance(images, Tensor) or not all(isinstance(image, Tensor) and image.dim() == 3 for image in images):
        raise TypeError("images of a detector must be a list of (C, H, W) tensors, one an image; sizes may differ.")
    if not isinstance(targets, list | tuple) or not all(isinstance(target, Mapping) for target in targets):
        raise TypeError("targets of a detector must be a list of dicts with 'boxes' and 'labels', one an image.")
    if len(images) != len(targets):
        raise ValueError(f"images holds {len(images)} images but targets {len(targets)}; give one dict an image.")
    classes = _classes(student)
    for i, target in enumerate(targets):
        for key in ("boxes", "labels"):
            if not isinstance(target.get(key), Tensor):
                raise TypeError(f"targets[{i}] has no tensor {key!r}; expected 'boxes' (n, 4) and 'labels' (n,).")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"targets[{i}]['boxes'] has shape {tuple(boxes.shape)}; expected (n, 4), corners in pixels."
            )
        if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
            raise TypeError(
                f"targets[{i}]['labels'] is {labels.dtype} of shape {tuple(labels.shape)}; expected int64 of shape "
                f"({len(boxes)},), a class for each box."
            )
        if boxes.device.type == "cpu":  # on a GPU torchvision looks at the boxes, and nobody waits for the labels
            _check_values(i, boxes, labels, classes)


def _classes(student: Any) -> tuple[int, int] | None:
    """First and last label that a torchvision detector has, None if it does not say."""
    one_stage: Any = getattr(getattr(student, "head", None), "classification_head", None)
    if hasattr(one_stage, "num_classes"):
        return 0, one_stage.num_classes - 1
    if isinstance(getattr(student, "num_classes", None), int):
        return 1, student.num_classes - 1
    two_stage = getattr(getattr(getattr(student, "roi_heads", None), "box_predictor", None), "cls_score", None)
    return (1, two_stage.out_features - 1) if two_stage is not None else None


def _check_values(i: int, boxes: Tensor, labels: Tensor, classes: tuple[int, int] | None) -> None:
    wrong = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))  # NaN too
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        what = "a box without area" if boxes[first].isfinite().all() else "no box"
        raise ValueError(
            f"targets[{i}]['boxes'][{first}] is {boxes[first].tolist()}, {what}; expected finite corners "
            "x0, y0, x1, y1 with x0 < x1 and y0 < y1. Leave such boxes out."
        )
    if classes is not None:
        unknown = labels[(labels < classes[0]) | (labels > classes[1])]
        if len(unknown):
            raise ValueError(
                f"targets[{i}]['labels'] holds {unknown[0].item()}, but this detector has the classes {classes[0]} to "
                f"{classes[1]}; build it with more classes, or renumber the labels."
            )
