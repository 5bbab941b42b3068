"""Gradient of the masked autoencoder's loss in the prediction, in one pass over the hidden patches.

    out[j, i] = 2 * grad / count * (prediction[j, i] - (pixel[j, i] - mean[j]) * rstd[j])

One program per tile of a hidden patch; its pixels come from the image again (`fastmkd.kernels.masked_patch_loss`), and
the loss's gradient is read by the kernel, so that nothing waits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device
from .masked_patch_loss import load_pixels, tile

__all__ = ["AOT_CASES", "masked_patch_loss_grad"]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _grad_kernel(
    prediction_ptr,  # (B * m, n)
    images_ptr,  # (B, C, H, W)
    hidden_ptr,  # (B * m) int64
    stats_ptr,  # (B * m, 2) fp32
    grad_ptr,  # () fp32
    out_ptr,  # (B * m, n), out
    share,  # 2 / (B * m * n)
    num_hidden,  # m
    height,
    width,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COUNT: tl.constexpr = PH * PW * CHANNELS
    TILES: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // TILES).to(tl.int64)
    value = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    inside = value < COUNT
    mean = tl.load(stats_ptr + row * 2)
    rstd = tl.load(stats_ptr + row * 2 + 1)
    scale = tl.load(grad_ptr) * share
    pixel = load_pixels(images_ptr, hidden_ptr, row, value, inside, num_hidden, height, width, PH, PW, CHANNELS)
    prediction = tl.load(prediction_ptr + row * COUNT + value, mask=inside, other=0.0).to(tl.float32)
    gradient = scale * (prediction - (pixel - mean) * rstd)
    tl.store(out_ptr + row * COUNT + value, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def masked_patch_loss_grad(
    prediction: Tensor, images: Tensor, hidden: Tensor, stats: Tensor, grad: Tensor, patch_h: int, patch_w: int
) -> Tensor:
    """Launches one program per tile of a hidden patch; arguments as in `fastmkd.ops.masked_patch_loss_grad`.

    Args:
        prediction: ``(B, m, ph * pw * C)`` float32, bfloat16 or float16.
        images: ``(B, C, H, W)``.
        hidden: ``(B, m)`` int64.
        stats: ``(B, m, 2)`` float32.
        grad: ``()`` float32.
        patch_h: height of a patch.
        patch_w: width of a patch.

    Returns:
        ``(B, m, ph * pw * C)``.
    """
    out = torch.empty_like(prediction)
    _, channels, height, width = images.shape
    block = tile(prediction.shape[2])
    with on_device(images):
        _grad_kernel[(hidden.numel() * triton.cdiv(prediction.shape[2], block),)](
            prediction,
            images,
            hidden,
            stats,
            grad,
            out,
            2.0 / prediction.numel(),
            hidden.shape[1],
            height,
            width,
            patch_h,
            patch_w,
            channels,
            block,
            **OPTIONS,
        )
    return out


def _case(dtype: str, images: str, patch: int, channels: int = 3) -> AotCase:
    return AotCase(
        f"patch_loss_grad-{dtype}-{images}-p{patch}",
        _grad_kernel,
        signature={
            **dict.fromkeys(("prediction_ptr", "out_ptr"), f"*{dtype}"),
            "images_ptr": f"*{images}",
            "hidden_ptr": "*i64",
            **dict.fromkeys(("stats_ptr", "grad_ptr"), "*fp32"),
            "share": "fp32",
            **dict.fromkeys(("num_hidden", "height", "width"), "i32"),
        },
        constexprs={"PH": patch, "PW": patch, "CHANNELS": channels, "BLOCK": tile(patch * patch * channels)},
        aligned=("height", "width"),
        options=OPTIONS,
        # 16 bytes a store wherever the alignment allows them.
        requires=(r"STG\.E\.128",) if patch == 16 else (),
    )


AOT_CASES = [
    *(_case(dtype, dtype, 16) for dtype in ("bf16", "fp16", "fp32")),
    _case("bf16", "fp32", 14),
    _case("fp32", "fp32", 32),
]
