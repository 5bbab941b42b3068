"""Gradient of the recovered loss in the rows and in the queries of the attention pooling, in one pass over both maps.

    d_s = grad_error / n (s - t) + grad_difference + weight grad_context + d_logit query
    weight = exp(query . s - log_sum),  d_logit = weight (s . grad_context - shift),  d_query = sum d_logit s

and from d_s through the layer norm of each position. A program takes some tiles of positions of one image as the loss
does (`fastmkd.kernels.recovered_loss`) and makes their statistics again. The sums for the queries are one row of each
side a program; PyTorch's sum of those, which has a fixed order, is the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device
from .recovered_loss import load_maps, normalise, tiling

__all__ = ["AOT_CASES", "recovered_loss_grad"]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _grad_kernel(
    rows_ptr,  # (B, gh * gw, p, p, C)
    teacher_ptr,  # (B, C, H, W) or (B, H, W, C)
    queries_ptr,  # (2, C) fp32
    log_sums_ptr,  # (2, B) fp32
    grad_error_ptr,  # () fp32
    grad_difference_ptr,  # (B, C) fp32
    grad_contexts_ptr,  # (2, B, C) fp32
    shifts_ptr,  # (2, B) fp32
    out_ptr,  # like rows, out
    query_sums_ptr,  # (programs, 2, C) fp32, out
    share,  # 1 / (B * H * W * C)
    batch,
    count,  # H * W
    width,
    programs,  # of an image
    tiles,  # of a program
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    image = program // programs
    channel = tl.arange(0, BLOCK_C)
    exists = channel < CHANNELS
    query_s = tl.load(queries_ptr + channel, mask=exists, other=0.0)
    query_t = tl.load(queries_ptr + CHANNELS + channel, mask=exists, other=0.0)
    shared = tl.load(grad_difference_ptr + image * CHANNELS + channel, mask=exists, other=0.0)
    pooled_s = tl.load(grad_contexts_ptr + image * CHANNELS + channel, mask=exists, other=0.0)
    pooled_t = tl.load(grad_contexts_ptr + (batch + image) * CHANNELS + channel, mask=exists, other=0.0)
    log_sum_s = tl.load(log_sums_ptr + image)
    log_sum_t = tl.load(log_sums_ptr + batch + image)
    shift_s = tl.load(shifts_ptr + image)
    shift_t = tl.load(shifts_ptr + batch + image)
    scale = tl.load(grad_error_ptr) * share
    d_query_s = tl.zeros((BLOCK_C,), tl.float32)
    d_query_t = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tiles):
        position = (program % programs * tiles + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        student, teacher, place, inside = load_maps(
            rows_ptr, teacher_ptr, image, position, count, width, PATCH, CHANNELS, BLOCK_C, CHANNELS_LAST
        )
        s, rstd = normalise(student, inside, CHANNELS)
        t, _ = normalise(teacher, inside, CHANNELS)
        # Outside the features are 0, and so is all that is made of them.
        weight_t = tl.exp(tl.sum(t * query_t[None, :], axis=1) - log_sum_t)  # [BLOCK_P]
        d_logit_t = weight_t * (tl.sum(t * pooled_t[None, :], axis=1) - shift_t)
        d_query_t += tl.sum(d_logit_t[:, None] * t, axis=0)
        weight_s = tl.exp(tl.sum(s * query_s[None, :], axis=1) - log_sum_s)
        d_logit_s = weight_s * (tl.sum(s * pooled_s[None, :], axis=1) - shift_s)
        d_query_s += tl.sum(d_logit_s[:, None] * s, axis=0)
        d = scale * (s - t) + shared[None, :]
        d += weight_s[:, None] * pooled_s[None, :] + d_logit_s[:, None] * query_s[None, :]
        mean = tl.sum(d, axis=1) / CHANNELS
        slope = tl.sum(d * s, axis=1) / CHANNELS
        out = rstd[:, None] * (d - mean[:, None] - s * slope[:, None])
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    sums = query_sums_ptr + program.to(tl.int64) * (2 * CHANNELS) + channel
    tl.store(sums, d_query_s, mask=exists)
    tl.store(sums + CHANNELS, d_query_t, mask=exists)


def recovered_loss_grad(
    rows: Tensor,
    teacher: Tensor,
    queries: Tensor,
    log_sums: Tensor,
    grad_error: Tensor,
    grad_difference: Tensor,
    grad_contexts: Tensor,
    shifts: Tensor,
    patch: int,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; arguments as in `fastmkd.ops.recovered_loss_grad`.

    Args:
        rows: ``(B, gh * gw, p * p * C)`` float32, bfloat16 or float16.
        teacher: ``(B, C, H, W)``.
        queries: ``(2, C)`` float32.
        log_sums: ``(2, B)`` float32.
        grad_error: ``()`` float32.
        grad_difference: ``(B, C)`` float32.
        grad_contexts: ``(2, B, C)`` float32.
        shifts: ``(2, B)`` float32.
        patch: p.

    Returns:
        ``(B, gh * gw, p * p * C)`` and ``(2, C)`` float32.
    """
    batch, channels, height, width = teacher.shape
    programs, tiles, blocks = tiling(batch, height * width, channels)
    out = torch.empty_like(rows)
    query_sums = torch.empty((batch * programs, 2, channels), dtype=torch.float32, device=rows.device)
    with on_device(rows):
        _grad_kernel[(batch * programs,)](
            rows,
            teacher,
            queries,
            log_sums,
            grad_error,
            grad_difference,
            grad_contexts,
            shifts,
            out,
            query_sums,
            1.0 / rows.numel(),
            batch,
            height * width,
            width,
            programs,
            tiles,
            PATCH=patch,
            CHANNELS=channels,
            CHANNELS_LAST=teacher.is_contiguous(memory_format=torch.channels_last),
            **blocks,
            **OPTIONS,
        )
    return out, query_sums.sum(0)


def _case(dtype: str, teacher: str, channels: int, patch: int, channels_last: bool) -> AotCase:
    blocks = tiling(16, 4096, channels)[2]
    small = ("queries", "log_sums", "grad_error", "grad_difference", "grad_contexts", "shifts", "query_sums")
    return AotCase(
        f"recovered_grad-{dtype}-{teacher}-c{channels}-p{patch}{'-last' if channels_last else ''}",
        _grad_kernel,
        signature={
            **dict.fromkeys(("rows_ptr", "out_ptr"), f"*{dtype}"),
            "teacher_ptr": f"*{teacher}",
            **{f"{name}_ptr": "*fp32" for name in small},
            "share": "fp32",
            **dict.fromkeys(("batch", "count", "width", "programs", "tiles"), "i32"),
        },
        constexprs={"PATCH": patch, "CHANNELS": channels, "CHANNELS_LAST": channels_last, **blocks},
        aligned=("count", "width"),
        options=OPTIONS,
        # 16 bytes a load and a store of the rows wherever the alignment allows them.
        requires=(r"LDG\.E\.128", r"STG\.E\.128") if channels % 16 == 0 else (),
    )


AOT_CASES = [
    *(_case(dtype, dtype, 256, 4, channels_last=True) for dtype in ("bf16", "fp16", "fp32")),
    _case("bf16", "bf16", 256, 4, channels_last=False),
    _case("bf16", "fp32", 256, 2, channels_last=False),
    _case("bf16", "bf16", 2048, 1, channels_last=False),
    _case("fp32", "fp32", 37, 1, channels_last=False),
]
