r"""The masked autoencoder's loss: squared error on the pixels of the hidden patches (MAE, Section 3).

.. math:: L = \frac{1}{B m n} \sum_{b,j,i} (\hat{x}_{bji} - t_{bji})^2, \qquad t_{bji} = (x_{bji} - \mu_{bj}) \, r_{bj}

``prediction`` :math:`\hat{x}` is ``(B, m, n)`` for m hidden patches of an image and n = ph * pw * C values in the order
row, column, channel; x are the same patches of ``images (B, C, H, W)``, named by ``hidden (B, m)``. With ``normalize``
:math:`\mu` is a patch's mean and :math:`r = (\mathrm{var} + 10^{-6})^{-1/2}` with the unbiased variance, else 0 and 1.

Only hidden patches are read from the images, and no patchified copy is made. The op also returns
``stats (B, m, 2)``, mu and r, which is all that the gradient keeps: it takes the target from the images again
(`fastmkd.ops.masked_patch_loss_grad`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .hidden_patches import Inputs, check_patches, count_patches, hidden_pixels, patch_samples
from .masked_patch_loss_grad import masked_patch_loss_grad
from .registry import Backend, BadInput, Cost, Sample, declare
from .row_numbers import check_patch_numbers

__all__ = ["masked_patch_loss"]

SCHEMA = (
    "masked_patch_loss(Tensor prediction, Tensor images, Tensor hidden, int patch_h, int patch_w, bool normalize) "
    "-> (Tensor, Tensor)"
)
LOW = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6  # on the variance


def masked_patch_loss(
    prediction: Tensor, images: Tensor, hidden: Tensor, patch_size: int | tuple[int, int], normalize: bool = False
) -> Tensor:
    """Mean squared error between the predicted and the real pixels of the hidden patches (MAE, Section 3).

    Differentiable in `prediction`; the images are a target and carry no gradient.

    Args:
        prediction: ``(B, m, ph * pw * C)``, in the order row, column, channel within a patch.
        images: ``(B, C, H, W)`` floating-point pixels.
        hidden: ``(B, m)`` int64 indices of patches, row-major over the grid ``(H / ph, W / pw)``, no repeats in a row.
        patch_size: side of a patch, or ``(ph, pw)``.
        normalize: compare with each patch normalised by its own mean and standard deviation.

    Returns:
        A float32 scalar whatever the dtypes (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, an index out of range or repeated (on a GPU an asynchronous assert), or
            images that require a gradient.
        TypeError: dtypes that do not fit.

    Example:
        >>> images = torch.arange(16.0).view(1, 1, 4, 4)
        >>> masked_patch_loss(torch.zeros(1, 1, 4), images, torch.tensor([[3]]), patch_size=2)
        tensor(160.5000)
    """
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("images requires a gradient, but the pixels are a target here; pass images.detach().")
    patch_h, patch_w = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    wide = torch.promote_types(prediction.dtype, images.dtype)
    if wide == torch.float64:
        prediction = prediction.to(wide)
    taken = (prediction.dtype, torch.promote_types(prediction.dtype, torch.float32))
    if images.is_floating_point() and images.dtype not in taken:
        images = images.to(wide)
    loss, _ = _entry(prediction.contiguous(), images.contiguous(), hidden.contiguous(), patch_h, patch_w, normalize)
    return loss


def reference(
    prediction: Tensor, images: Tensor, hidden: Tensor, patch_h: int, patch_w: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(prediction.dtype, torch.float32)
    pixels = hidden_pixels(images, hidden, (patch_h, patch_w)).to(wide)  # (B, m, n)
    mean, rstd = torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
    if normalize:
        mean, rstd = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + EPS).rsqrt()
    target = (pixels - mean) * rstd
    return (prediction.to(wide) - target).square().mean(), torch.cat([mean, rstd], -1)


def check(prediction: Tensor, images: Tensor, hidden: Tensor, patch_h: int, patch_w: int, normalize: bool) -> None:
    check_patches(prediction, images, hidden, patch_h, patch_w)
    if normalize and prediction.shape[2] < 2:
        raise ValueError("normalize is True, but a patch holds one value, which has no variance; use larger patches.")


def check_values(
    prediction: Tensor, images: Tensor, hidden: Tensor, patch_h: int, patch_w: int, normalize: bool
) -> Iterator[tuple[Tensor, str]]:
    yield from check_patch_numbers("hidden", hidden, count_patches(images, patch_h, patch_w))


def fake(
    prediction: Tensor, images: Tensor, hidden: Tensor, patch_h: int, patch_w: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.new_empty((), dtype=wide), prediction.new_empty((*hidden.shape, 2), dtype=wide)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, images, hidden, *ctx.patch_size, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(prediction, images, hidden, output[1])


def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    prediction, images, hidden, stats = ctx.saved_tensors
    return masked_patch_loss_grad(prediction, images, hidden, stats, grad, tuple(ctx.patch_size)), *(None,) * 5


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def build(make: Inputs, patch: tuple[int, int], normalize: bool) -> tuple[Any, ...]:
        return *make(), *patch, normalize

    return [
        Sample(
            f"{name}_normalized" if normalize else name,
            partial(build, make, patch, normalize),
            grad=(0,) if small else (),
            huge=name == "huge",
        )
        for name, make, patch, small in patch_samples(device, dtype)
        for normalize in (False, True)
    ]


def bad_inputs() -> list[BadInput]:
    x, hidden = torch.zeros(2, 3, 8, 12), torch.tensor([[0, 5], [3, 2]])
    p = torch.zeros(2, 2, 48)
    bad_images = x.mT.contiguous().mT
    return [
        BadInput("two_dims", (p[0], x, hidden, 4, 4, False), ValueError, "prediction has shape"),
        BadInput("integers", (p.long(), x, hidden, 4, 4, False), TypeError, "prediction has dtype"),
        BadInput("byte_images", (p, x.byte(), hidden, 4, 4, False), TypeError, "images has dtype"),
        BadInput("half_images", (p, x.half(), hidden, 4, 4, False), TypeError, "images has dtype"),
        BadInput("image_dims", (p, x[0], hidden, 4, 4, False), ValueError, "images has shape"),
        BadInput("int32_hidden", (p, x, hidden.int(), 4, 4, False), TypeError, "hidden has dtype"),
        BadInput("hidden_shape", (p, x, hidden[:, :1].clone(), 4, 4, False), ValueError, "hidden has shape"),
        BadInput("nothing_hidden", (p[:, :0], x, hidden[:, :0], 4, 4, False), ValueError, "prediction has shape"),
        BadInput("patch_zero", (p, x, hidden, 0, 4, False), ValueError, "patch_size is"),
        BadInput("patch_does_not_divide", (p, x, hidden, 4, 5, False), ValueError, "patch_size is"),
        BadInput("patch_values", (p[:, :, :47].clone(), x, hidden, 4, 4, False), ValueError, "prediction has shape"),
        BadInput("too_large", (p, x, hidden + 1, 4, 4, False), ValueError, "hidden holds a patch outside 0 to 5"),
        BadInput("negative", (p, x, hidden - 1, 4, 4, True), ValueError, "hidden holds a patch outside 0 to 5"),
        BadInput("repeated", (p, x, hidden // 4 * 4, 4, 4, False), ValueError, "hidden names a patch twice"),
        BadInput("strided", (p, bad_images, hidden, 4, 4, False), ValueError, "images has strides"),
        BadInput("meta_device", (p, x.to("meta"), hidden, 4, 4, False), ValueError, "images is on meta"),
        BadInput(
            "one_value", (p[:1, :1, :1].clone(), x[:1, :1].clone(), hidden[:1, :1].clone(), 1, 1, True),
            ValueError, "has no variance",
        ),
    ]  # fmt: skip


def cost(prediction: Tensor, images: Tensor, hidden: Tensor, patch_h: int, patch_w: int, normalize: bool) -> Cost:
    count = prediction.numel()
    moved = count * (prediction.element_size() + images.element_size()) + hidden.numel() * 16
    return Cost(flops=float(count * (8 if normalize else 3)), bytes=float(moved))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    check_values=check_values,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("masked_patch_loss"), "cpu", LOW, native.missing_cpu),
        Backend("triton", triton.launcher("masked_patch_loss"), "cuda", LOW, triton.missing),
    ],
)
