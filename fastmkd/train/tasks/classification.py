"""Classification: a picture of the networks' size and a class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..augment import Finisher, picture_transform
from ..schema import AugmentRecipe
from .base import Finish, Reader, Task

if TYPE_CHECKING:
    from ..data import DataSource
    from ..loading import Loader

__all__ = ["Classification"]


class Classification(Task):
    """Targets are classes: int64 ``(B,)``, or ``(B, classes)`` where labels are mixed or smoothed.

    Example:
        >>> images, targets = Classification().collate([torch.zeros(1, 4, 4)] * 2, [3, 7])
        >>> images.shape, targets
        (torch.Size([2, 1, 4, 4]), tensor([3, 7]))
    """

    name = "classification"
    augments = tuple(field.name for field in dataclasses.fields(AugmentRecipe))

    def reader(self, augment: AugmentRecipe | None, size: int) -> Reader:
        """Crops, resizes and flips, see `fastmkd.train.augment.picture_transform`."""
        return functools.partial(_transformed, picture_transform(augment, size))

    def collate(self, images: list[Tensor], targets: list[Any]) -> tuple[Any, Any]:
        """Stacks pictures and classes."""
        return torch.stack(images) if images else torch.empty(0), torch.tensor(targets, dtype=torch.int64)

    def finisher(self, source: DataSource, augment: AugmentRecipe | None = None) -> Finish:
        """Normalises, erases and mixes, see `fastmkd.train.augment.Finisher`."""
        return Finisher(source.mean, source.std, source.num_classes, augment)

    def evaluate(
        self, model: nn.Module, loader: Loader, finish: Finish, num_pictures: int, batch_size: int, accelerator: Any
    ) -> dict[str, float]:
        """Counts hits, see `fastmkd.train.evaluate.evaluate`."""
        from ..evaluate import evaluate  # needs the loader, which needs this

        return evaluate(model, loader, finish, num_pictures, batch_size, accelerator)


def _transformed(transform: Callable[[Any], Tensor], picture: Any, label: int) -> tuple[Tensor, int]:
    return transform(picture), label
