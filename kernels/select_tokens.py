"""Token selection: the k most salient patches of each image, ascending, after an optional bilinear resize.

    keep[b] = sort(the k indices n with the largest saliency[b, n]; of equal values the lower index first)

One program per image. Floats become unsigned integers of the same order, the k-th largest is found by bisection over
its 32 bits (32 counts: no sort, no data-dependent loop), and prefix sums turn "larger, or equal and early enough" into
output slots, which are ascending by construction. It is integer arithmetic throughout, hence deterministic and equal on
every device. Maps of up to 2048 patches stay in registers; of larger ones the rest is read again from the cache at each
count. Up to 256 patches need a single warp, whose counts are register reductions without a barrier.

The resize is defined to the bit so that all backends pick the same tokens. Per axis, in float32, each operation rounded
on its own:

    src = max((dst + 0.5) * ratio - 0.5, 0), i0 = min(int(src), in - 1), i1 = min(i0 + 1, in - 1)
    w1 = src - i0 (0 if i0 == i1), w0 = 1 - w1
    value = h0 * (w0 * x[i0, j0] + w1 * x[i0, j1]) + h1 * (w0 * x[i1, j0] + w1 * x[i1, j1])

A fused multiply-add would round once where this rounds twice, so that kernel is launched with fp fusion off; the
compile test checks that its machine code has neither FFMA nor an operation that flushes subnormal numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device

__all__ = ["AOT_CASES", "select_tokens"]

MIN_BLOCK = 32  # one value a lane of a warp
MAX_BLOCK = 2048  # 8 values a thread at 8 warps; twice as many leave the registers in the prefix sums
RESIZE_BLOCK = 256
RESIZE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # the resize is defined to the bit


@triton.jit
def _taps(dst, ratio, size):
    """Lower and upper source index of the positions `dst` along one axis, and the weight of the upper one."""
    # The maximum first, which changes no bit: sm_100 would round a product and the sum that follows it as one.
    src = tl.maximum((dst.to(tl.float32) + 0.5) * ratio, 0.5) - 0.5
    low = tl.minimum(src.to(tl.int32), size - 1)  # src >= 0: truncation is floor
    high = tl.minimum(low + 1, size - 1)
    weight = tl.where(low == high, 0.0, src - low.to(tl.float32))
    return low, high, weight


@triton.jit
def _resize_kernel(
    x_ptr,  # (B, grid_h * grid_w) fp32
    out_ptr,  # (B, target_h * target_w) fp32, out
    grid_h,
    grid_w,
    target_w,
    num_tokens,  # target_h * target_w
    num_blocks,
    ratio_h,
    ratio_w,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    token = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    valid = token < num_tokens
    top, bottom, h1 = _taps(token // target_w, ratio_h, grid_h)
    left, right, w1 = _taps(token % target_w, ratio_w, grid_w)
    h0 = 1.0 - h1
    w0 = 1.0 - w1
    x_ptr += image * (grid_h * grid_w)
    top_left = tl.load(x_ptr + top * grid_w + left, mask=valid)
    top_right = tl.load(x_ptr + top * grid_w + right, mask=valid)
    bottom_left = tl.load(x_ptr + bottom * grid_w + left, mask=valid)
    bottom_right = tl.load(x_ptr + bottom * grid_w + right, mask=valid)
    value = h0 * (w0 * top_left + w1 * top_right) + h1 * (w0 * bottom_left + w1 * bottom_right)
    tl.store(out_ptr + image * num_tokens + token, value, mask=valid)


@triton.jit
def _load_keys(x_ptr, token, num_tokens):
    """Values as uint32 of the same order: all bits of negative ones flipped, the sign bit of the others.

    -0.0 counts as +0.0. Every finite value has a key above 0, which is the key of tokens past the end.
    """
    bits = tl.load(x_ptr + token, mask=token < num_tokens, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(token < num_tokens, key, 0)


@triton.jit
def _select_kernel(
    x_ptr,  # (B, N) fp32
    keep_ptr,  # (B, k) int64, out
    k,
    num_tokens,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    x_ptr += image * num_tokens
    keep_ptr += image * k
    lane = tl.arange(0, BLOCK)
    first_keys = _load_keys(x_ptr, lane, num_tokens)  # [BLOCK]

    # The k-th largest key, from the highest bit down: a bit stays set if at least k keys are no smaller with it. The
    # last candidate that was refused is threshold + 1 in the end, so its count is the number of larger keys.
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    larger = 0
    for _ in range(32):
        candidate = threshold | bit
        count = tl.sum((first_keys >= candidate).to(tl.int32), axis=0)
        for start in range(BLOCK, num_tokens, BLOCK):
            count += tl.sum((_load_keys(x_ptr, start + lane, num_tokens) >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, candidate, threshold)
        larger = tl.where(count >= k, larger, count)
        bit = bit >> 1

    ties = k - larger  # so many of the tokens at the threshold are kept, the first ones
    equal_before = 0
    kept_before = 0
    for start in range(0, num_tokens, BLOCK):
        token = start + lane
        key = _load_keys(x_ptr, token, num_tokens)
        equal = (key == threshold).to(tl.int32)
        rank = equal_before + tl.cumsum(equal, axis=0)  # among equal keys, from 1
        kept = (key > threshold) | ((key == threshold) & (rank <= ties))
        slot = kept_before + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(keep_ptr + slot, token.to(tl.int64), mask=kept)
        equal_before += tl.sum(equal, axis=0)
        kept_before += tl.sum(kept.to(tl.int32), axis=0)


def _block(num_tokens: int) -> int:
    return min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(num_tokens)))


def _options(block: int) -> dict[str, int | bool]:
    return {"num_warps": max(1, block // 256), "enable_fp_fusion": False}  # 8 values a thread


def _resize(saliency: Tensor, grid_h: int, grid_w: int, target_h: int, target_w: int) -> Tensor:
    num_tokens = target_h * target_w
    num_blocks = triton.cdiv(num_tokens, RESIZE_BLOCK)
    out = torch.empty((saliency.shape[0], num_tokens), dtype=torch.float32, device=saliency.device)
    _resize_kernel[(saliency.shape[0] * num_blocks,)](
        saliency,
        out,
        grid_h,
        grid_w,
        target_w,
        num_tokens,
        num_blocks,
        grid_h / target_h,  # becomes float32, rounded once, at the launch
        grid_w / target_w,
        BLOCK=RESIZE_BLOCK,
        **RESIZE_OPTIONS,
    )
    return out


def select_tokens(saliency: Tensor, k: int, grid_h: int, grid_w: int, target_h: int, target_w: int) -> Tensor:
    """Launches one program per image, after the resize if there is one; the arguments are already checked.

    Args:
        saliency: (B, grid_h * grid_w) float32, contiguous, finite.
        k: number of patches to keep, 1 to target_h * target_w.
        grid_h: height of the saliency grid.
        grid_w: width of the saliency grid.
        target_h: height of the grid that the indices refer to; the map is resized when it differs.
        target_w: width of that grid.

    Returns:
        (B, k) int64, ascending.
    """
    batch = saliency.shape[0]
    num_tokens = target_h * target_w
    keep = torch.empty((batch, k), dtype=torch.int64, device=saliency.device)
    block = _block(num_tokens)
    with on_device(saliency):
        if (grid_h, grid_w) != (target_h, target_w):
            saliency = _resize(saliency, grid_h, grid_w, target_h, target_w)
        _select_kernel[(batch,)](saliency, keep, k, num_tokens, BLOCK=block, **_options(block))
    return keep


def _resize_case(name: str, ones: tuple[str, ...]) -> AotCase:
    ints = ("grid_h", "grid_w", "target_w", "num_tokens", "num_blocks")
    return AotCase(
        name,
        _resize_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "out_ptr"), "*fp32"),
            **{name: "i32" for name in ints if name not in ones},
            **dict.fromkeys(("ratio_h", "ratio_w"), "fp32"),
        },
        constexprs={**dict.fromkeys(ones, 1), "BLOCK": RESIZE_BLOCK},
        options=RESIZE_OPTIONS,
        requires=(r"\bFMUL", r"\bFADD"),
        forbids=(r"\bFFMA", r"\b(FMUL|FADD)\S*\.FTZ"),
    )


def _select_case(block: int, ones: tuple[str, ...] = ()) -> AotCase:
    return AotCase(
        f"select-{block}{'-ones' if ones else ''}",
        _select_kernel,
        signature={
            "x_ptr": "*fp32",
            "keep_ptr": "*i64",
            **{name: "i32" for name in ("k", "num_tokens") if name not in ones},
        },
        constexprs={**dict.fromkeys(ones, 1), "BLOCK": block},
        options=_options(block),
    )


# A launch turns integers that equal 1 into compile-time constants, so both forms are compiled.
AOT_CASES = [
    _resize_case("resize", ones=()),
    _resize_case("resize-ones", ones=("grid_h", "target_w", "num_blocks")),
    _select_case(MIN_BLOCK, ones=("k", "num_tokens")),
    _select_case(256),
    _select_case(MAX_BLOCK),
]
