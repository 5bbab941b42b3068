"""The masked autoencoder's loss: squared error on the pixels of the hidden patches (MAE, Section 3).

    loss = mean over hidden patches j and their n values i of (prediction[j, i] - (pixel[j, i] - mean[j]) * rstd[j])^2

with mean and 1 / sqrt(variance + 1e-6) of the patch when it is normalised, else 0 and 1. One program per hidden patch.
It finds its pixels by address arithmetic in the order of the prediction (row, column, channel), so that the prediction
is read in full vectors, and the C planes of an image are C streams that share their sectors in L1. The mean comes
first, then the variance around it, then the error: a patch is read again for each, from L1, which is what keeps a patch
of any size exact. The error of each patch is a number in memory; PyTorch's mean of those, which has a fixed order, is
the loss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device

__all__ = ["AOT_CASES", "load_pixels", "masked_patch_loss", "tile"]

TILE = 1024  # values that a program holds at once: 8 a thread
EPS = tl.constexpr(1e-6)  # on the variance
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def load_pixels(images_ptr, hidden_ptr, row, value, inside, num_hidden, height, width, PH, PW, CHANNELS):
    """Pixels of the hidden patch `row` at the places `value` of a prediction, in float32; 0 outside."""
    patch = tl.load(hidden_ptr + row).to(tl.int32)
    grid_w = width // PW
    top = patch // grid_w * PH
    left = patch % grid_w * PW
    channel = value % CHANNELS
    x = left + value // CHANNELS % PW
    y = top + value // (CHANNELS * PW)
    plane = (row // num_hidden).to(tl.int64) * CHANNELS + channel
    return tl.load(images_ptr + (plane * height + y) * width + x, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _loss_kernel(
    prediction_ptr,  # (B * m, n)
    images_ptr,  # (B, C, H, W)
    hidden_ptr,  # (B * m) int64
    stats_ptr,  # (B * m, 2) fp32, out
    errors_ptr,  # (B * m) fp32, out: mean squared error of a patch
    num_hidden,  # m
    height,
    width,
    NORMALIZE: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    COUNT: tl.constexpr = PH * PW * CHANNELS
    lane = tl.arange(0, BLOCK)
    mean = 0.0
    rstd = 1.0
    if NORMALIZE:
        # Shifted by one of the pixels first, so that a flat patch has exactly no variance.
        first = load_pixels(images_ptr, hidden_ptr, row, 0, True, num_hidden, height, width, PH, PW, CHANNELS)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, COUNT, BLOCK):
            value = start + lane
            inside = value < COUNT
            pixel = load_pixels(images_ptr, hidden_ptr, row, value, inside, num_hidden, height, width, PH, PW, CHANNELS)
            total += tl.where(inside, pixel - first, 0.0)
        rest = tl.sum(total, axis=0) / COUNT
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, COUNT, BLOCK):
            value = start + lane
            inside = value < COUNT
            pixel = load_pixels(images_ptr, hidden_ptr, row, value, inside, num_hidden, height, width, PH, PW, CHANNELS)
            distance = tl.where(inside, (pixel - first) - rest, 0.0)
            squares += distance * distance
        mean = first + rest
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / (COUNT - 1) + EPS)

    error = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COUNT, BLOCK):
        value = start + lane
        inside = value < COUNT
        pixel = load_pixels(images_ptr, hidden_ptr, row, value, inside, num_hidden, height, width, PH, PW, CHANNELS)
        prediction = tl.load(prediction_ptr + row * COUNT + value, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, prediction - (pixel - mean) * rstd, 0.0)
        error += distance * distance
    tl.store(stats_ptr + row * 2, mean)
    tl.store(stats_ptr + row * 2 + 1, rstd)
    tl.store(errors_ptr + row, tl.sum(error, axis=0) / COUNT)


def tile(count: int) -> int:
    """Values of a patch that a program holds at once.

    Example:
        >>> tile(16 * 16 * 3)
        1024
    """
    return min(TILE, triton.next_power_of_2(count))


def masked_patch_loss(
    prediction: Tensor, images: Tensor, hidden: Tensor, patch_h: int, patch_w: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Launches one program per hidden patch; arguments as in `fastmkd.ops.masked_patch_loss`, all contiguous.

    Args:
        prediction: ``(B, m, ph * pw * C)`` float32, bfloat16 or float16.
        images: ``(B, C, H, W)``.
        hidden: ``(B, m)`` int64.
        patch_h: height of a patch.
        patch_w: width of a patch.
        normalize: compare with patches normalised on their own.

    Returns:
        The loss, ``()`` float32, and ``(B, m, 2)`` float32, mean and 1 / standard deviation of each patch.
    """
    stats = torch.empty((*hidden.shape, 2), dtype=torch.float32, device=images.device)
    errors = torch.empty(hidden.shape, dtype=torch.float32, device=images.device)
    _, channels, height, width = images.shape
    with on_device(images):
        _loss_kernel[(hidden.numel(),)](
            prediction,
            images,
            hidden,
            stats,
            errors,
            hidden.shape[1],
            height,
            width,
            normalize,
            patch_h,
            patch_w,
            channels,
            tile(prediction.shape[2]),
            **OPTIONS,
        )
    return errors.mean(), stats


def _case(dtype: str, images: str, patch: int, normalize: bool, channels: int = 3) -> AotCase:
    return AotCase(
        f"patch_loss-{dtype}-{images}-p{patch}{'-normalized' if normalize else ''}",
        _loss_kernel,
        signature={
            "prediction_ptr": f"*{dtype}",
            "images_ptr": f"*{images}",
            "hidden_ptr": "*i64",
            **dict.fromkeys(("stats_ptr", "errors_ptr"), "*fp32"),
            **dict.fromkeys(("num_hidden", "height", "width"), "i32"),
        },
        constexprs={
            "NORMALIZE": normalize,
            "PH": patch,
            "PW": patch,
            "CHANNELS": channels,
            "BLOCK": tile(patch * patch * channels),
        },
        aligned=("height", "width"),
        options=OPTIONS,
        # 16 bytes a load of the prediction wherever the alignment allows them.
        requires=(r"LDG\.E\.128",) if patch == 16 else (),
    )


AOT_CASES = [
    *(_case(dtype, dtype, 16, normalize=True) for dtype in ("bf16", "fp16", "fp32")),
    _case("bf16", "fp32", 16, normalize=False),
    _case("bf16", "fp32", 14, normalize=True),
    _case("fp32", "fp32", 32, normalize=True),
]
