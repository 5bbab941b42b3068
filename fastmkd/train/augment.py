"""Augmentation in two places: per picture in worker processes (files), per batch on the device (everything else).

Both hand over uint8 batches; `finish` turns them into what the networks get. Random numbers come from the global
generators, which the caller seeds per position (`fastmkd.train.seeds`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .schema import AugmentRecipe

__all__ = ["Finisher", "needs_pictures", "picture_transform", "shift_and_flip"]


def needs_pictures(augment: AugmentRecipe) -> bool:
    """Whether an augmentation works on single pictures, so that a set in memory must go through worker processes too.

    Args:
        augment: the recipe's part.

    Example:
        >>> needs_pictures(AugmentRecipe(crop="pad")), needs_pictures(AugmentRecipe(crop="resized"))
        (False, True)
    """
    return augment.crop == "resized" or augment.rand_augment is not None


def picture_transform(augment: AugmentRecipe | None, size: int) -> Callable[[Any], Tensor]:
    """Returns the transform of one PIL picture to uint8 ``(C, size, size)``.

    Args:
        augment: what to do to training pictures; None for test pictures: resize to size / 0.875 and take the centre if
            the picture is larger than `size`, only resize if it is not.
        size: side in pixels.

    Raises:
        UserError: timm does not understand `augment.rand_augment`.
    """
    from timm.data.auto_augment import rand_augment_transform
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    steps: list[Any]
    if augment is None:
        steps = [_CentreOf(size)]
    elif augment.crop == "resized":
        steps = [v2.RandomResizedCrop(size, scale=augment.scale, interpolation=bicubic)]
    else:
        steps = [v2.Resize((size, size), interpolation=bicubic)]
        if augment.crop == "pad":
            steps.append(v2.RandomCrop(size, padding=augment.pad))
    if augment is not None:
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment.rand_augment:
            try:
                operations = rand_augment_transform(augment.rand_augment, {"translate_const": int(size * 0.45)})
            except (AssertionError, ValueError, KeyError) as error:
                raise UserError(
                    f"augment.rand_augment is {augment.rand_augment!r}, which timm does not understand ({error}); "
                    "write it like rand-m9-mstd0.5-inc1."
                ) from None
            steps.append(_InColours(operations))
    return v2.Compose([*steps, v2.PILToTensor()])


class _InColours:
    """Applies operations that know three channels to pictures of one, too: what is grey stays grey."""

    def __init__(self, operations: Callable[[Any], Any]) -> None:
        self.operations = operations

    def __call__(self, picture: Any) -> Any:
        if picture.mode != "L":
            return self.operations(picture)
        return self.operations(picture.convert("RGB")).convert("L")


class _CentreOf:
    """Resizes the shorter side so that the crop takes 87.5 % of it, as ImageNet is tested; tiny pictures whole."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Any) -> Any:
        from torchvision.transforms import InterpolationMode, v2

        bicubic = InterpolationMode.BICUBIC
        if min(picture.size) <= self.size:
            return v2.functional.resize(picture, [self.size, self.size], interpolation=bicubic)
        picture = v2.functional.resize(picture, [round(self.size / 0.875)], interpolation=bicubic)
        return v2.functional.center_crop(picture, [self.size, self.size])


def shift_and_flip(images: Tensor, pad: int, flip: float) -> Tensor:
    """Shifts each image by up to `pad` pixels (zeros come in) and flips some; one gather for the whole batch.

    Args:
        images: ``(B, C, H, W)``.
        pad: largest shift in pixels.
        flip: probability of a left-right flip.

    Returns:
        ``(B, C, H, W)``, same dtype.

    Example:
        >>> shift_and_flip(torch.tensor([[[[1, 2]]]]), pad=0, flip=1.0)
        tensor([[[[2, 1]]]])
    """
    B, C, H, W = images.shape
    shift = torch.randint(-pad, pad + 1, (2, B, 1))
    mirrored = torch.rand(B, 1) < flip
    rows = torch.arange(H) + shift[0]  # (B, H) where each output row comes from
    columns = torch.arange(W).expand(B, W)
    columns = torch.where(mirrored, W - 1 - columns, columns) + shift[1]
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]  # (B, H, W)
    source = rows.clamp(0, H - 1)[:, :, None] * W + columns.clamp(0, W - 1)[:, None, :]
    source, inside = source.to(images.device), inside.to(images.device)
    moved = images.flatten(2).gather(2, source.view(B, 1, H * W).expand(B, C, -1))
    return moved.view(B, C, H, W) * inside[:, None]


class Finisher:
    """uint8 batch -> normalised batch, with random erasing, mixup and cutmix for training.

    Args:
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        num_classes: of the data set.
        augment: what to do to training batches; None for test batches.

    Example:
        >>> black = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        >>> images, targets = Finisher([0.5], [0.5], 10)(black, torch.tensor([1, 2]))
        >>> images.unique(), targets
        (tensor([-1.]), tensor([1, 2]))
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], num_classes: int, augment: AugmentRecipe | None = None
    ) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
        self.erase = self.mix = None
        self.num_classes, self.smoothing = num_classes, 0.0
        if augment is None:
            return
        if augment.random_erasing:
            from timm.data.random_erasing import RandomErasing

            self.erase = RandomErasing(augment.random_erasing, mode="pixel")
        self.smoothing = augment.label_smoothing
        if augment.mixup or augment.cutmix:
            from timm.data import Mixup

            self.mix = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Normalises ``(B, C, H, W)`` uint8 to float32 and mixes.

        Targets become ``(B, classes)`` if mixing or label smoothing is on.

        Args:
            images: uint8.
            targets: ``(B,)`` int64.
        """
        if self.scale.device != images.device:
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
        images = images.float() * self.scale + self.shift
        if self.erase is not None:
            self.erase.device = str(images.device)
            images = self.erase(images)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        elif self.smoothing:
            from timm.data.mixup import mixup_target

            targets = mixup_target(targets, self.num_classes, smoothing=self.smoothing)
        return images, targets
