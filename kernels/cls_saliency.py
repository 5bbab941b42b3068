"""CLS saliency: how much the class token of the last layer attends to each patch (MaskedKD, Eq. 2).

For image b, head h and key i:

    logit[b, h, i] = scale * <q[b, h], k[b, h, i]>
    saliency[b, n] = sum_h softmax(logit[b, h, P:])[n]            include_prefix=False  (Eq. 2)
    saliency[b, n] = mean_h softmax(logit[b, h, :])[P + n]        include_prefix=True   (the public code)

The work is to read k once: 2 flops for each 2 or 4 bytes, far below the ridge of any GPU. So there is one small program
per (image, head), many of them on each multiprocessor, which hides the latency of the reads at every batch size; it
writes raw logits and the head's softmax denominator while k streams past (online softmax, hence any number of keys). A
second launch normalises and adds the heads. It costs 8 / (d * itemsize) of k's traffic (6 % for d = 64 in bf16, mostly
in L2) and makes the sum over heads deterministic: a fixed tree, no atomics. One program per image that loops over its
heads would save that launch, but it leaves most multiprocessors idle below some 130 images, and past about 256 keys the
logits of a head no longer fit in registers, so that k would be read twice.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device

__all__ = ["AOT_CASES", "cls_saliency"]

KEY_TILE = 8192  # elements of k that a program holds at once: 64 fp32 registers a thread
KEY_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUM_TILE = 2048  # logits that a program of the second pass holds at once
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _head_logits_kernel(
    q_ptr,  # (B, H, d)
    k_ptr,  # (B, H, P + N, d)
    logits_ptr,  # (B, H, N) fp32, out
    stats_ptr,  # (B, H, 2) fp32, out: largest logit, sum of exponentials
    q_stride_b,  # strides in units of ALIGN elements
    q_stride_h,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    heads,
    num_prefix,
    num_patches,
    first_key,  # 0 when the softmax runs over the prefix too, else P
    scale,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # image * H + head: neighbours read neighbouring bytes of the qkv tensor
    image = row // heads
    head = row % heads
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    q_row = q_ptr + (image * q_stride_b + head * q_stride_h) * ALIGN
    q = tl.load(q_row + dims, mask=in_head, other=0.0).to(tl.float32)  # [BD]

    lanes = tl.arange(0, BLOCK_N)
    rows = image * k_stride_b + head * k_stride_h + (first_key + lanes).to(tl.int64) * k_stride_n
    k_tile = k_ptr + (rows * ALIGN)[:, None] + dims[None, :]  # [BN, BD]
    num_keys = num_prefix + num_patches
    largest = -float("inf")
    total = 0.0
    for start in range(first_key, num_keys, BLOCK_N):
        key = start + lanes
        valid = key < num_keys
        k = tl.load(k_tile, mask=valid[:, None] & in_head[None, :], other=0.0).to(tl.float32)
        logit = tl.sum(k * q[None, :], axis=1) * scale  # [BN]
        tl.store(logits_ptr + row * num_patches + (key - num_prefix), logit, mask=valid & (key >= num_prefix))

        logit = tl.where(valid, logit, -float("inf"))
        larger = tl.maximum(largest, tl.max(logit, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logit - larger), axis=0)
        largest = larger
        k_tile += BLOCK_N * k_stride_n * ALIGN
    tl.store(stats_ptr + row * 2, largest)
    tl.store(stats_ptr + row * 2 + 1, total)


@triton.jit
def _sum_heads_kernel(
    logits_ptr,  # (B, H, N) fp32
    stats_ptr,  # (B, H, 2) fp32
    out_ptr,  # (B, N) fp32, out
    heads,
    num_patches,
    num_blocks,
    share,  # weight of a head: 1 for the sum, 1 / H for the mean
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    patch = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.arange(0, BLOCK_H)
    row = image * heads + head  # [BH]
    largest = tl.load(stats_ptr + row * 2, mask=head < heads, other=0.0)
    total = tl.load(stats_ptr + row * 2 + 1, mask=head < heads, other=1.0)
    mask = (head < heads)[:, None] & (patch < num_patches)[None, :]
    logits = logits_ptr + row[:, None] * num_patches + patch[None, :]  # [BH, BN]
    logit = tl.load(logits, mask=mask, other=-float("inf"))
    probability = tl.exp(logit - largest[:, None]) / total[:, None]  # 0 for heads that are not there
    tl.store(out_ptr + image * num_patches + patch, tl.sum(probability, axis=0) * share, mask=patch < num_patches)


def _key_constants(head_dim: int, align: int) -> dict[str, int]:
    block_d = max(16, triton.next_power_of_2(head_dim))
    # At most 256 keys, since ViTs have about 200 and masked lanes still compute.
    block_n = min(256, max(16, KEY_TILE // block_d))
    return {"ALIGN": align, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_N": block_n}


def _sum_blocks(heads: int) -> dict[str, int]:
    block_h = triton.next_power_of_2(heads)
    return {"BLOCK_H": block_h, "BLOCK_N": min(256, max(16, SUM_TILE // block_h))}


def cls_saliency(q: Tensor, k: Tensor, num_prefix_tokens: int, scale: float, include_prefix: bool) -> Tensor:
    """Launches the two passes; the arguments are already checked.

    Args:
        q: (B, H, d) fp32, bf16 or fp16, query of the class token, last dim contiguous.
        k: (B, H, P + N, d) of the same dtype, last dim contiguous, other strides free (a view into qkv is not copied).
        num_prefix_tokens: P >= 1.
        scale: factor on the logits.
        include_prefix: False for Eq. 2, True for the public code's mean over heads with the prefix in the softmax.

    Returns:
        (B, N) float32.

    Source:
        MaskedKD, Eq. 2.
    """
    batch, heads, num_keys, head_dim = k.shape
    num_patches = num_keys - num_prefix_tokens
    logits = torch.empty((batch, heads, num_patches), dtype=torch.float32, device=k.device)
    stats = torch.empty((batch, heads, 2), dtype=torch.float32, device=k.device)
    out = torch.empty((batch, num_patches), dtype=torch.float32, device=k.device)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2))
    # Triton notices by itself only strides that are multiples of 16, which a head of 72 or 24 does not give.
    align = math.gcd(16, *strides)
    sum_blocks = _sum_blocks(heads)
    num_blocks = triton.cdiv(num_patches, sum_blocks["BLOCK_N"])
    with on_device(k):
        _head_logits_kernel[(batch * heads,)](
            q,
            k,
            logits,
            stats,
            *(stride // align for stride in strides),
            heads,
            num_prefix_tokens,
            num_patches,
            0 if include_prefix else num_prefix_tokens,
            scale,
            **_key_constants(head_dim, align),
            **KEY_OPTIONS,
        )
        _sum_heads_kernel[(batch * num_blocks,)](
            logits,
            stats,
            out,
            heads,
            num_patches,
            num_blocks,
            1.0 / heads if include_prefix else 1.0,
            **sum_blocks,
            **SUM_OPTIONS,
        )
    return out


def _head_logits_case(dtype: str, head_dim: int, num_prefix: int) -> AotCase:
    ones = dict.fromkeys(("num_prefix", "first_key"), 1) if num_prefix == 1 else {}
    strides = ("q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h", "k_stride_n")
    ints = ("heads", "num_prefix", "num_patches", "first_key")
    return AotCase(
        f"head_logits-{dtype}-d{head_dim}-p{num_prefix}",
        _head_logits_kernel,
        signature={
            **dict.fromkeys(("q_ptr", "k_ptr"), f"*{dtype}"),
            **dict.fromkeys(("logits_ptr", "stats_ptr"), "*fp32"),
            **{name: "i32" for name in (*strides, *ints) if name not in ones},
            "scale": "fp32",
        },
        constexprs={**ones, **_key_constants(head_dim, align=math.gcd(16, head_dim))},
        options=KEY_OPTIONS,
        # 16 bytes a load wherever the alignment allows them.
        requires=(r"LDG\.E\.128",) if head_dim % 8 == 0 else (),
    )


def _sum_heads_case(heads: int, num_patches: int | None = None) -> AotCase:
    ints = {"heads": heads, "num_patches": num_patches, "num_blocks": num_patches}
    ones = {name: 1 for name, value in ints.items() if value == 1}
    return AotCase(
        f"sum_heads-h{heads}{'-n1' if num_patches == 1 else ''}",
        _sum_heads_kernel,
        signature={
            **dict.fromkeys(("logits_ptr", "stats_ptr", "out_ptr"), "*fp32"),
            **{name: "i32" for name in ints if name not in ones},
            "share": "fp32",
        },
        constexprs={**ones, **_sum_blocks(heads)},
        options=SUM_OPTIONS,
    )


# A launch turns integers that equal 1 into compile-time constants, so both forms are compiled.
AOT_CASES = [
    *(_head_logits_case("bf16", head_dim, num_prefix=1) for head_dim in (16, 64, 72, 127, 128)),
    *(_head_logits_case(dtype, 64, num_prefix=5) for dtype in ("bf16", "fp16", "fp32")),
    _head_logits_case("fp32", 128, num_prefix=1),
    _sum_heads_case(3),
    _sum_heads_case(16),
    _sum_heads_case(1, num_patches=1),
]
