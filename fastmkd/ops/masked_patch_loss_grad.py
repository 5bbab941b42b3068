r"""Gradient of the masked autoencoder's loss in the prediction, in one pass over the hidden patches.

.. math:: \partial \hat{x}_{bji} = \frac{2 g}{B m n} \left(\hat{x}_{bji} - (x_{bji} - \mu_{bj}) \, r_{bj}\right)

``g`` is the scalar gradient of the loss; ``prediction``, ``images``, ``hidden`` and ``stats`` (mu and r) are those of
`fastmkd.ops.masked_patch_loss`. The target comes from the images again: reading it twice is cheaper than keeping it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .hidden_patches import Inputs, check_patches, count_patches, hidden_pixels, patch_samples
from .registry import Backend, BadInput, Cost, Sample, declare
from .row_numbers import check_patch_numbers

__all__ = ["masked_patch_loss_grad"]

SCHEMA = (
    "masked_patch_loss_grad(Tensor prediction, Tensor images, Tensor hidden, Tensor stats, Tensor grad, "
    "int patch_h, int patch_w) -> Tensor"
)
LOW = (torch.float32, torch.bfloat16, torch.float16)


def masked_patch_loss_grad(
    prediction: Tensor, images: Tensor, hidden: Tensor, stats: Tensor, grad: Tensor, patch_size: tuple[int, int]
) -> Tensor:
    """Returns the gradient of `fastmkd.ops.masked_patch_loss` in the prediction.

    Args:
        prediction: ``(B, m, ph * pw * C)`` contiguous.
        images: ``(B, C, H, W)`` contiguous; the dtype of `prediction` or float32.
        hidden: ``(B, m)`` int64 indices of patches.
        stats: ``(B, m, 2)`` float32, what the pixels of a patch are shifted and scaled by.
        grad: ``()`` float32, gradient of the loss.
        patch_size: ``(ph, pw)``.

    Returns:
        ``(B, m, ph * pw * C)`` in the dtype of `prediction`.

    Raises:
        ValueError: shapes that do not fit, or an index out of range or repeated (on a GPU an asynchronous assert).
        TypeError: dtypes that do not fit.

    Example:
        >>> images, stats = torch.arange(4.0).view(1, 1, 2, 2), torch.tensor([[[0.0, 1.0]]])
        >>> masked_patch_loss_grad(torch.ones(1, 1, 4), images, torch.tensor([[0]]), stats, torch.tensor(2.0), (2, 2))
        tensor([[[ 1.,  0., -1., -2.]]])
    """
    return _entry(prediction, images, hidden, stats, grad, *patch_size)


def reference(
    prediction: Tensor, images: Tensor, hidden: Tensor, stats: Tensor, grad: Tensor, patch_h: int, patch_w: int
) -> Tensor:
    mean, rstd = stats.unbind(-1)
    target = (hidden_pixels(images, hidden, (patch_h, patch_w)).to(stats.dtype) - mean[..., None]) * rstd[..., None]
    return ((prediction.to(stats.dtype) - target) * (2 * grad / prediction.numel())).to(prediction.dtype)


def check(
    prediction: Tensor, images: Tensor, hidden: Tensor, stats: Tensor, grad: Tensor, patch_h: int, patch_w: int
) -> None:
    check_patches(prediction, images, hidden, patch_h, patch_w)
    for name, tensor, shape in (("stats", stats, (*hidden.shape, 2)), ("grad", grad, ())):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
        wide = torch.promote_types(prediction.dtype, torch.float32)
        if tensor.dtype != wide:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {wide}.")
        if tensor.device != prediction.device:
            raise ValueError(
                f"{name} is on {tensor.device} but prediction is on {prediction.device}; move one of them."
            )
    if not stats.is_contiguous():
        raise ValueError(f"stats has strides {stats.stride()}; expected a contiguous tensor, call .contiguous().")


def check_values(
    prediction: Tensor, images: Tensor, hidden: Tensor, stats: Tensor, grad: Tensor, patch_h: int, patch_w: int
) -> Iterator[tuple[Tensor, str]]:
    yield from check_patch_numbers("hidden", hidden, count_patches(images, patch_h, patch_w))


def fake(
    prediction: Tensor, images: Tensor, hidden: Tensor, stats: Tensor, grad: Tensor, patch_h: int, patch_w: int
) -> Tensor:
    return torch.empty_like(prediction)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, images, hidden, stats, grad, *ctx.patch_size = inputs
    ctx.save_for_backward(prediction, images, hidden, stats, grad)


def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    # Second derivatives only: the op is linear in the prediction and in the loss's gradient.
    prediction, images, hidden, stats, grad = ctx.saved_tensors
    d_prediction = grad_out * (2 * grad / grad_out.numel()).to(grad_out.dtype)
    of_one = masked_patch_loss_grad(prediction, images, hidden, stats, torch.ones_like(grad), tuple(ctx.patch_size))
    d_grad = (of_one.to(grad.dtype) * grad_out.to(grad.dtype)).sum()
    return d_prediction, None, None, None, d_grad, None, None


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    wide = torch.promote_types(dtype, torch.float32)

    def build(make: Inputs, patch: tuple[int, int]) -> tuple[Any, ...]:
        prediction, images, hidden = make()
        g = torch.Generator().manual_seed(hidden.numel())
        stats = torch.rand(*hidden.shape, 2, generator=g, dtype=torch.float64).to(device, wide) + 0.5
        return prediction, images, hidden, stats, torch.tensor(1.5, dtype=wide, device=device), *patch

    return [
        Sample(name, partial(build, make, patch), grad=(0, 4) if small else (), huge=name == "huge")
        for name, make, patch, small in patch_samples(device, dtype)
    ]


def bad_inputs() -> list[BadInput]:
    p, x, hidden = torch.zeros(2, 2, 48), torch.zeros(2, 3, 8, 12), torch.tensor([[0, 5], [3, 2]])
    stats, g = torch.zeros(2, 2, 2), torch.tensor(1.0)
    return [
        BadInput("prediction_shape", (p[:, :1].clone(), x, hidden, stats, g, 4, 4), ValueError, "hidden has shape"),
        BadInput("images_dtype", (p, x.double(), hidden, stats, g, 4, 4), TypeError, "images has dtype"),
        BadInput("patch_size", (p, x, hidden, stats, g, 4, 7), ValueError, "patch_size is"),
        BadInput("stats_shape", (p, x, hidden, stats[0], g, 4, 4), ValueError, "stats has shape"),
        BadInput("stats_dtype", (p, x, hidden, stats.half(), g, 4, 4), TypeError, "stats has dtype"),
        BadInput("grad_of_each_patch", (p, x, hidden, stats, g.expand(2, 2), 4, 4), ValueError, "grad has shape"),
        BadInput("grad_dtype", (p, x, hidden, stats, g.double(), 4, 4), TypeError, "grad has dtype"),
        BadInput("meta_stats", (p, x, hidden, stats.to("meta"), g, 4, 4), ValueError, "stats is on meta"),
        BadInput("strided_stats", (p, x, hidden, stats.mT, g, 4, 4), ValueError, "stats has strides"),
        BadInput("too_large", (p, x, hidden + 1, stats, g, 4, 4), ValueError, "hidden holds a patch outside 0 to 5"),
    ]


def cost(
    prediction: Tensor, images: Tensor, hidden: Tensor, stats: Tensor, grad: Tensor, patch_h: int, patch_w: int
) -> Cost:
    count = prediction.numel()
    moved = count * (2 * prediction.element_size() + images.element_size()) + hidden.numel() * 16
    return Cost(flops=float(4 * count), bytes=float(moved))


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
        Backend("cpp", native.entry("masked_patch_loss_grad"), "cpu", LOW, native.missing_cpu),
        Backend("triton", triton.launcher("masked_patch_loss_grad"), "cuda", LOW, triton.missing),
    ],
)
