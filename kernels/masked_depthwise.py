"""Depthwise masked convolution of packed rows, and the partial sums of its weight gradient.

    out[o, c] = bias[c] + sum_t weight[c, t] * values[taps[o, t], c]
    grad_weight[c, t] = sum_o grad[o, c] * values[taps[o, t], c]          taps[o, t] = -1 adds nothing

One multiplication for each value read, so both kernels wait for memory: a program takes rows that lie near each other,
with all taps, so that each value comes from device memory once and from L1 for the other taps; threads span channels,
16 bytes each. A tap that a row lacks is a load switched off. The forward kernel also skips a row of the window that its
whole tile lacks; the gradient gives each row of the window to a program of its own, as its sums fill the registers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device
from .taps import lowest_bit, present_groups, step_taps

__all__ = [
    "AOT_CASES",
    "CONFIGS",
    "WEIGHT_CONFIGS",
    "DepthwiseConfig",
    "depthwise_weight_partials",
    "masked_depthwise",
]


class DepthwiseConfig(NamedTuple):
    """Tile of a program: `block_m` rows times at most `block_c` channels.

    Example:
        >>> DepthwiseConfig("tiny", 8, 16, num_warps=1).block_c
        16
    """

    name: str
    block_m: int
    block_c: int
    num_warps: int


# The first is used; a benchmark sweeps all. Fewer channels than threads, else the weights of each tap would be handed
# around through shared memory.
CONFIGS = (
    DepthwiseConfig("wide", 64, 128, num_warps=8),
    DepthwiseConfig("narrow", 64, 64, num_warps=4),
    DepthwiseConfig("few_rows", 32, 128, num_warps=8),
)
WEIGHT_CONFIGS = (
    DepthwiseConfig("narrow", 16, 32, num_warps=4),
    DepthwiseConfig("wide", 8, 64, num_warps=4),
)
SPLIT_ROWS = 1024  # rows of a program of the gradient: fewer cost partial sums, more leave multiprocessors idle


@triton.jit(do_not_specialize=["num_rows", "channel_units"])
def _depthwise_kernel(
    values_ptr,  # (N_in, C)
    weight_ptr,  # (T, C)
    bias_ptr,  # (C) or None
    taps_ptr,  # (N_out, T) int32
    order_ptr,  # (N_out) int32
    out_ptr,  # (N_out, C), out
    num_rows,  # N_out
    channel_units,  # C / ALIGN
    ALIGN: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    STEP_TAPS: tl.constexpr,
    PADDED_STEP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_units * ALIGN
    num_blocks = (channels + BLOCK_C - 1) // BLOCK_C
    position = tl.program_id(0) // num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = position < num_rows
    exists = channel < channels
    row = tl.load(order_ptr + position, mask=valid, other=0).to(tl.int64)  # [BM]

    bits, count = present_groups(taps_ptr, row, valid, NUM_TAPS, STEP_TAPS, PADDED_STEP, PADDED_GROUPS)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for _ in range(count):
        first_tap = lowest_bit(bits) * STEP_TAPS
        bits &= bits - 1
        for i in tl.static_range(STEP_TAPS):
            tap = tl.minimum(first_tap + i, NUM_TAPS - 1)
            source = tl.load(taps_ptr + row * NUM_TAPS + tap, mask=valid, other=-1).to(tl.int64)  # [BM]
            if NUM_TAPS % STEP_TAPS != 0:
                source = tl.where(first_tap + i < NUM_TAPS, source, -1)
            rows_at = values_ptr + (source * channels)[:, None] + channel[None, :]
            rows = tl.load(rows_at, mask=(source >= 0)[:, None] & exists[None, :], other=0.0)  # [BM, BC]
            weight = tl.load(weight_ptr + tap * channels + channel, mask=exists, other=0.0)  # [BC]
            acc += rows.to(tl.float32) * weight.to(tl.float32)[None, :]

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (row * channels)[:, None] + channel[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["num_rows", "channel_units"])
def _depthwise_weight_kernel(
    values_ptr,  # (N_in, C)
    grad_ptr,  # (N_out, C)
    taps_ptr,  # (N_out, T) int32
    order_ptr,  # (N_out) int32
    partial_ptr,  # (S, T, C) fp32, out
    num_rows,  # N_out
    channel_units,  # C / ALIGN
    ALIGN: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    STEP_TAPS: tl.constexpr,
    PADDED_STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = (NUM_TAPS + STEP_TAPS - 1) // STEP_TAPS
    channels = channel_units * ALIGN
    num_blocks = (channels + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) // (num_blocks * NUM_GROUPS)
    first_tap = tl.program_id(0) // num_blocks % NUM_GROUPS * STEP_TAPS
    channel = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    lane = tl.arange(0, PADDED_STEP)
    tap = first_tap + lane  # [taps]
    is_tap = (lane < STEP_TAPS) & (tap < NUM_TAPS)

    acc = tl.zeros((BLOCK_M, PADDED_STEP, BLOCK_C), dtype=tl.float32)
    for start in range(0, tl.minimum(num_rows - split * SPLIT, SPLIT), BLOCK_M):
        position = split * SPLIT + start + tl.arange(0, BLOCK_M)
        valid = position < num_rows
        row = tl.load(order_ptr + position, mask=valid, other=0).to(tl.int64)  # [BM]
        table = taps_ptr + (row * NUM_TAPS)[:, None] + tap[None, :]
        source = tl.load(table, mask=valid[:, None] & is_tap[None, :], other=-1).to(tl.int64)  # [BM, taps]
        used = (tl.max(source, axis=1) >= 0)[:, None] & exists[None, :]
        grad = tl.load(grad_ptr + (row * channels)[:, None] + channel[None, :], mask=used, other=0.0)  # [BM, BC]
        rows_at = values_ptr + (source * channels)[:, :, None] + channel[None, None, :]
        mask = (source >= 0)[:, :, None] & exists[None, None, :]
        rows = tl.load(rows_at, mask=mask, other=0.0)  # [BM, taps, BC]
        acc += rows.to(tl.float32) * grad.to(tl.float32)[:, None, :]
    at = partial_ptr + (split.to(tl.int64) * NUM_TAPS + tap)[:, None] * channels + channel[None, :]
    tl.store(at, tl.sum(acc, axis=0), mask=is_tap[:, None] & exists[None, :])


def _constants(config: DepthwiseConfig, channels: int) -> dict[str, int]:
    return {
        # Triton notices by itself only multiples of 16, which 24 or 72 channels are not.
        "ALIGN": math.gcd(16, channels),
        "BLOCK_M": config.block_m,
        "BLOCK_C": _channel_block(channels, config.block_c),
    }


def _channel_block(channels: int, widest: int) -> int:
    """The widest power of two that leaves at most a quarter of the lanes without a channel."""
    block = min(widest, max(16, triton.next_power_of_2(channels)))
    while block > 16 and triton.cdiv(channels, block) * block * 3 > channels * 4:
        block //= 2
    return block


def _options(config: DepthwiseConfig) -> dict[str, int | bool]:
    return {"num_warps": config.num_warps, "enable_fp_fusion": True}


def _taps_of(kh: int, kw: int) -> dict[str, int]:
    """A row of the window in a step; two where the window has more rows than an integer has bits."""
    return step_taps(kh * kw, wanted=kw)


def _weight_taps_of(kh: int, kw: int) -> dict[str, int]:
    return {name: value for name, value in _taps_of(kh, kw).items() if name != "PADDED_GROUPS"}


def masked_depthwise(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    order: Tensor,
    config: DepthwiseConfig = CONFIGS[0],
) -> Tensor:
    """Launches the depthwise masked convolution; the arguments are already checked.

    Args:
        values: (N_in, C) fp32, bf16 or fp16, contiguous.
        weight: (C, 1, kh, kw) of the same dtype, any strides.
        bias: (C) of the same dtype, contiguous, or None.
        taps: (N_out, kh * kw) int32, contiguous.
        order: (N_out) int32, contiguous, a permutation of the output rows.
        config: tile, for benchmarks.

    Returns:
        (N_out, C), accumulated in fp32, in the dtype of values.
    """
    rows, channels = taps.shape[0], values.shape[1]
    constants = _constants(config, channels)
    num_blocks = triton.cdiv(channels, constants["BLOCK_C"])
    out = torch.empty((rows, channels), dtype=values.dtype, device=values.device)
    with on_device(values):
        _depthwise_kernel[(triton.cdiv(rows, config.block_m) * num_blocks,)](
            values,
            weight.flatten(1).t().contiguous(),  # (T, C): a few kilobytes
            bias,
            taps,
            order,
            out,
            rows,
            channels // constants["ALIGN"],
            **_taps_of(*weight.shape[2:]),
            **constants,
            **_options(config),
        )
    return out


def depthwise_weight_partials(
    values: Tensor,
    grad: Tensor,
    taps: Tensor,
    order: Tensor,
    kh: int,
    kw: int,
    config: DepthwiseConfig = WEIGHT_CONFIGS[0],
) -> Tensor:
    """Launches the weight gradient of each split of the rows; `fastmkd.kernels.masked_conv2d_weight` adds them up.

    Args:
        values: (N_in, C) fp32, bf16 or fp16, contiguous.
        grad: (N_out, C) of the same dtype, contiguous.
        taps: (N_out, kh * kw) int32, contiguous.
        order: (N_out) int32, contiguous, a permutation of the output rows.
        kh: rows of the window.
        kw: columns of the window.
        config: tile, for benchmarks.

    Returns:
        (S, kh * kw, C) fp32, one sum for each split of SPLIT_ROWS rows.
    """
    rows, channels = grad.shape
    constants = _constants(config, channels)
    steps = _weight_taps_of(kh, kw)
    splits = triton.cdiv(rows, SPLIT_ROWS)
    programs = splits * triton.cdiv(kh * kw, steps["STEP_TAPS"]) * triton.cdiv(channels, constants["BLOCK_C"])
    partial = torch.empty((splits, kh * kw, channels), dtype=torch.float32, device=values.device)
    with on_device(values):
        _depthwise_weight_kernel[(programs,)](
            values,
            grad,
            taps,
            order,
            partial,
            rows,
            channels // constants["ALIGN"],
            **steps,
            SPLIT=SPLIT_ROWS,
            **constants,
            **_options(config),
        )
    return partial


def _aot_case(kernel: str, dtype: str, channels: int, kernel_size: int) -> AotCase:
    forward = kernel == "depthwise"
    config = CONFIGS[0] if forward else WEIGHT_CONFIGS[0]
    taps = _taps_of(kernel_size, kernel_size) if forward else _weight_taps_of(kernel_size, kernel_size)
    rows = ("values_ptr", "weight_ptr", "bias_ptr", "out_ptr") if forward else ("values_ptr", "grad_ptr")
    return AotCase(
        f"{kernel}-{dtype}-c{channels}-k{kernel_size}",
        _depthwise_kernel if forward else _depthwise_weight_kernel,
        signature={
            **dict.fromkeys(rows, f"*{dtype}"),
            **({} if forward else {"partial_ptr": "*fp32"}),
            **dict.fromkeys(("taps_ptr", "order_ptr"), "*i32"),
            **dict.fromkeys(("num_rows", "channel_units"), "i32"),
        },
        constexprs={**taps, **({} if forward else {"SPLIT": SPLIT_ROWS}), **_constants(config, channels)},
        options=_options(config),
        requires=(r"LDG\.E\.128",),  # rows come 16 bytes a thread
    )


AOT_CASES = [_aot_case("depthwise", "bf16", 96, 7), _aot_case("depthwise_weight", "bf16", 96, 7)]
