"""Detection: pictures of any size and boxes, for networks that resize, normalise and pad by themselves."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...nn.frozen import frozen_parts
from ..errors import shorten
from ..schema import AugmentRecipe
from .base import Finish, Reader, Task

if TYPE_CHECKING:
    from ..data import DataSource
    from ..loading import Loader

__all__ = ["Detection", "mirrored", "without_crowds"]


class Detection(Task):
    """Images are a list of float32 ``(3, H, W)`` in [0, 1], targets a list of dicts, see `fastmkd.train.boxes`.

    Sizes differ from picture to picture; the detector's own transform resizes (to one of several sizes, if its
    `image_size` names more than one), normalises and pads.

    Example:
        >>> images, targets = Detection().collate([torch.zeros(3, 4, 6), torch.zeros(3, 5, 5)], [{}, {}])
        >>> [tuple(image.shape) for image in images]
        [(3, 4, 6), (3, 5, 5)]
    """

    name = "detection"
    augments = ("flip",)

    def reader(self, augment: AugmentRecipe | None, size: int) -> Reader:
        """For training leaves out crowds and flips; otherwise all stays as it is."""
        return functools.partial(_read, None if augment is None else augment.flip)

    def collate(self, images: list[Tensor], targets: list[Any]) -> tuple[Any, Any]:
        """Keeps lists."""
        return images, targets

    def finisher(self, source: DataSource, augment: AugmentRecipe | None = None) -> Finish:
        """Scales pixels to [0, 1]."""
        return _to_unit

    def evaluate(
        self, model: nn.Module, loader: Loader, finish: Finish, num_pictures: int, batch_size: int, accelerator: Any
    ) -> dict[str, float]:
        """Mean average precision as COCO defines it, see `fastmkd.train.average_precision.evaluate_boxes`."""
        from ..average_precision import evaluate_boxes  # needs the loader, which needs this

        return evaluate_boxes(model, loader, finish, num_pictures, batch_size, accelerator)

    def notes(self, student: nn.Module) -> list[str]:
        """Names what is frozen."""
        frozen = frozen_parts(student)
        return [f"frozen in the student: {shorten(frozen)}"] if frozen else []


def without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out boxes around crowds, which no loss may see.

    Args:
        target: of one picture.

    Example:
        >>> target = {"boxes": torch.rand(2, 4), "iscrowd": torch.tensor([True, False]), "image_id": torch.tensor(7)}
        >>> without_crowds(target)["boxes"].shape
        torch.Size([1, 4])
    """
    single = ~target["iscrowd"]
    return {name: value[single] if value.dim() else value for name, value in target.items()}


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Flips a picture and its boxes left-right.

    Args:
        image: ``(3, H, W)``.
        target: its ``boxes`` are ``(n, 4)``, corners x0 y0 x1 y1 in pixels.

    Example:
        >>> mirrored(torch.zeros(3, 8, 10), {"boxes": torch.tensor([[0.0, 1.0, 4.0, 3.0]])})[1]["boxes"]
        tensor([[ 6.,  1., 10.,  3.]])
    """
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    W = image.shape[-1]
    return image.flip(-1), {**target, "boxes": torch.stack([W - x1, y0, W - x0, y1], dim=1)}


def _read(flip: float | None, picture: Any, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    from torchvision.transforms.v2.functional import pil_to_tensor

    image = pil_to_tensor(picture)
    if flip is None:
        return image, target
    target = without_crowds(target)
    return mirrored(image, target) if flip and float(torch.rand(())) < flip else (image, target)


def _to_unit(images: list[Tensor], targets: Any) -> tuple[list[Tensor], Any]:
    return [image.float() / 255 for image in images], targets
