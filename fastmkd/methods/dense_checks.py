"""What can be wrong with a batch for a detector, said in a sentence before torchvision stumbles over it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..nn.box_checks import check_boxes

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
        ValueError: no image, shapes or numbers that do not belong together, and on a CPU a box without area or end or
            a label without a class.
    """
    if isinstance(images, Tensor) or not all(isinstance(image, Tensor) and image.dim() == 3 for image in images):
        raise TypeError("images of a detector must be a list of (C, H, W) tensors, one an image; sizes may differ.")
    # On a GPU torchvision looks at the boxes, and nobody waits for the labels.
    check_boxes(images, targets, _classes(student))


def _classes(student: Any) -> tuple[int, int] | None:
    """First and last label that a detector has, None if it does not say."""
    if isinstance(getattr(student, "num_classes", None), int):  # those of `build_detector`: 0 is the background
        return 1, student.num_classes - 1
    one_stage: Any = getattr(getattr(student, "head", None), "classification_head", None)
    if hasattr(one_stage, "num_classes"):  # torchvision's own have a score for 0 as for any other class
        return 0, one_stage.num_classes - 1
    two_stage = getattr(getattr(getattr(student, "roi_heads", None), "box_predictor", None), "cls_score", None)
    return (1, two_stage.out_features - 1) if two_stage is not None else None
