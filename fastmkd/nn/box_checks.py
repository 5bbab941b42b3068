"""What can be wrong with the boxes and labels of a batch for a detector, in sentences; needs no torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_boxes"]


def check_boxes(
    images: Sequence[Tensor], targets: Any, classes: tuple[int, int] | None, on_any_device: bool = False
) -> None:
    """Checks the targets of a detector.

    Args:
        images: one at least.
        targets: for each image a mapping with ``boxes`` (n, 4) and ``labels`` (n,) int64; n may be 0.
        classes: first and last label that there is; None asks nothing of labels.
        on_any_device: looks at numbers on a GPU too, which waits for them; False looks at those on a CPU.

    Raises:
        TypeError: another type or dtype.
        ValueError: no image, shapes or numbers that do not belong together, a box without area or end, or a label
            without a class.

    Example:
        >>> check_boxes([torch.zeros(3, 9, 9)], [], None)
        Traceback (most recent call last):
        ValueError: images holds 1 images but targets 0; give one dict an image.
    """
    if not isinstance(targets, list | tuple) or not all(isinstance(target, Mapping) for target in targets):
        raise TypeError("targets of a detector must be a list of dicts with 'boxes' and 'labels', one an image.")
    if not len(images):
        raise ValueError("images is empty; give a detector at least one image, and no batch where there is none.")
    if len(images) != len(targets):
        raise ValueError(f"images holds {len(images)} images but targets {len(targets)}; give one dict an image.")
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
        if on_any_device or boxes.device.type == "cpu":
            _check_values(i, boxes, labels, classes)


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
