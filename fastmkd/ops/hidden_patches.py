"""What the masked autoencoder's loss and its gradient share: hidden patches as rows of values, checks, samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .patch_embed import patch_rows

__all__ = ["Inputs", "check_patches", "count_patches", "hidden_pixels", "patch_samples"]

Inputs = Callable[[], tuple[Tensor, Tensor, Tensor]]


def hidden_pixels(images: Tensor, hidden: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Gathers hidden patches in the order of a prediction: row, column, channel.

    Args:
        images: ``(B, C, H, W)``.
        hidden: ``(B, m)`` int64 indices of patches.
        patch_size: ``(ph, pw)``.

    Returns:
        ``(B, m, ph * pw * C)``.

    Example:
        >>> hidden_pixels(torch.arange(8.0).view(1, 2, 2, 2), torch.tensor([[1]]), (2, 1))
        tensor([[[1., 5., 3., 7.]]])
    """
    rows = patch_rows(images, hidden, patch_size, patch_size)
    return rows.unflatten(2, (images.shape[1], -1)).mT.flatten(2)  # (B, m, C, ph*pw) -> (B, m, ph*pw*C)


def count_patches(images: Tensor, patch_h: int, patch_w: int) -> int:
    """Patches of an image.

    Args:
        images: ``(B, C, H, W)``.
        patch_h: divides H.
        patch_w: divides W.

    Example:
        >>> count_patches(torch.empty(2, 3, 8, 12), 4, 4)
        6
    """
    return images.shape[2] // patch_h * (images.shape[3] // patch_w)


def check_patches(prediction: Tensor, images: Tensor, hidden: Tensor, patch_h: int, patch_w: int) -> None:
    """Checks what the loss and its gradient share; raises a sentence."""
    for name, tensor, dims, layout in (
        ("prediction", prediction, 3, "(B, m, n)"),
        ("images", images, 4, "(B, C, H, W)"),
    ):
        if tensor.dim() != dims or min(tensor.shape) < 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {layout}, none of them 0.")
    if not prediction.is_floating_point():
        raise TypeError(f"prediction has dtype {prediction.dtype}; expected a floating-point dtype.")
    wide = torch.promote_types(prediction.dtype, torch.float32)
    if images.dtype not in (prediction.dtype, wide):
        raise TypeError(f"images has dtype {images.dtype}; expected {wide}, scale the pixels first.")
    if hidden.dtype != torch.int64:
        raise TypeError(f"hidden has dtype {hidden.dtype}; expected torch.int64.")
    batch, channels, height, width = images.shape
    if min(patch_h, patch_w) < 1 or height % patch_h or width % patch_w:
        raise ValueError(
            f"patch_size is ({patch_h}, {patch_w}); expected two numbers that divide the images' {height} x {width}."
        )
    values = patch_h * patch_w * channels
    if hidden.dim() != 2 or hidden.shape != prediction.shape[:2]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; expected {tuple(prediction.shape[:2])}, a number for each patch "
            "that is predicted."
        )
    if tuple(prediction.shape) != (batch, hidden.shape[1], values):
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}; expected ({batch}, m, {values}) for {patch_h} x "
            f"{patch_w} patches of images {tuple(images.shape)}."
        )
    for name, tensor in (("prediction", prediction), ("images", images), ("hidden", hidden)):
        if tensor.device != prediction.device:
            raise ValueError(
                f"{name} is on {tensor.device} but prediction is on {prediction.device}; move one of them."
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def patch_samples(device: str, dtype: torch.dtype) -> list[tuple[str, Inputs, tuple[int, int], bool]]:
    """What the samples of the loss and of its gradient are made of.

    Args:
        device: of the tensors.
        dtype: of the prediction.

    Returns:
        For each sample its name, a function that makes prediction, images and hidden, the patch size, and whether it
        is small enough for a gradient check.
    """

    def make(
        batch: int,
        channels: int,
        grid: tuple[int, int],
        patch: tuple[int, int],
        m: int,
        image_dtype: torch.dtype = dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(batch * 31 + m * 7 + patch[1])
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        images = draw(batch, channels, grid[0] * patch[0], grid[1] * patch[1]) + 0.5
        prediction = draw(batch, m, patch[0] * patch[1] * channels)
        hidden = torch.rand(batch, grid[0] * grid[1], generator=g).argsort(1)[:, :m].contiguous().to(device)
        return prediction.to(device, dtype), images.to(device, torch.promote_types(image_dtype, dtype)), hidden

    def huge() -> tuple[Tensor, Tensor, Tensor]:
        images = torch.randn(15_000, 3, 224, 224, device=device, dtype=dtype)  # 2.26e9 pixels: offsets need 64 bits
        hidden = torch.rand(15_000, 196, device=device).argsort(1)[:, :191].contiguous()
        return torch.randn(15_000, 191, 768, device=device, dtype=dtype), images, hidden

    return [
        ("small", lambda: make(2, 3, (2, 3), (4, 4), 4), (4, 4), True),
        ("gray", lambda: make(3, 1, (3, 3), (2, 5), 2), (2, 5), True),
        ("five_channels", lambda: make(1, 5, (2, 2), (3, 2), 4), (3, 2), True),
        ("images_in_float32", lambda: make(2, 3, (3, 4), (8, 8), 9, torch.float32), (8, 8), False),
        ("patch14", lambda: make(2, 3, (4, 4), (14, 14), 12), (14, 14), False),
        ("large_patch", lambda: make(1, 3, (2, 2), (48, 40), 3), (48, 40), False),
        ("vit_base_mae", lambda: make(16, 3, (14, 14), (16, 16), 147), (16, 16), False),
        ("huge", huge, (16, 16), False),
    ]
