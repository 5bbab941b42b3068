"""Segmentation: a picture and the class of each of its pixels, cut and mirrored together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..augment import Finisher
from ..mask_pictures import IGNORE
from ..schema import AugmentRecipe
from .base import Finish, Reader, Task

if TYPE_CHECKING:
    from ..data import DataSource
    from ..loading import Loader

__all__ = ["Segmentation"]


class Segmentation(Task):
    """Targets are ``(B, H, W)`` int64, 255 where a pixel does not count.

    Training pictures come out as squares of the data's `image_size`; test pictures keep their sizes, and where those
    differ a batch is a list.

    Example:
        >>> pictures, masks = [torch.zeros(3, 4, 6)] * 2, [torch.zeros(4, 6, dtype=torch.uint8)] * 2
        >>> images, targets = Segmentation().collate(pictures, masks)
        >>> images.shape, targets.shape, targets.dtype
        (torch.Size([2, 3, 4, 6]), torch.Size([2, 4, 6]), torch.int64)
    """

    name = "segmentation"
    augments = ("crop", "pad", "scale", "flip")

    def reader(self, augment: AugmentRecipe | None, size: int) -> Reader:
        """For training crops, resizes and flips picture and mask alike; what comes in from outside does not count."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        if augment is None:
            return functools.partial(_read, None)
        steps: list[Any] = []
        if augment.crop == "resized":
            steps.append(v2.RandomResizedCrop(size, scale=augment.scale, antialias=True))
        else:
            steps.append(v2.Resize((size, size), antialias=True))
            if augment.crop == "pad":
                outside = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
                steps.append(v2.RandomCrop(size, padding=augment.pad, fill=outside))
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        return functools.partial(_read, v2.Compose(steps))

    def collate(self, images: list[Tensor], targets: list[Any]) -> tuple[Any, Any]:
        """Stacks pictures and masks if their sizes allow it."""
        targets = [target.long() for target in targets]
        if len({image.shape for image in images}) != 1:
            return images, targets
        return torch.stack(images), torch.stack(targets)

    def finisher(self, source: DataSource, augment: AugmentRecipe | None = None) -> Finish:
        """Normalises."""
        return functools.partial(_normalised, Finisher(source.mean, source.std, source.num_classes))

    def evaluate(
        self, model: nn.Module, loader: Loader, finish: Finish, num_pictures: int, batch_size: int, accelerator: Any
    ) -> dict[str, float]:
        """Mean IoU and pixel accuracy, see `fastmkd.train.mean_iou.evaluate_masks`."""
        from ..mean_iou import evaluate_masks  # needs the loader, which needs this

        return evaluate_masks(model, loader, finish, num_pictures, batch_size, accelerator)


def _read(transform: Callable[[Any, Any], Any] | None, picture: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
    from torchvision import tv_tensors
    from torchvision.transforms.v2.functional import pil_to_tensor

    image = pil_to_tensor(picture)
    if transform is None:
        return image, mask
    image, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def _normalised(finish: Finisher, images: Any, targets: Any) -> tuple[Any, Any]:
    if isinstance(images, Tensor):
        return finish(images, targets)
    return [finish(image, target)[0] for image, target in zip(images, targets, strict=True)], targets
