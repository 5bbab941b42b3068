"""Softmax attention of packed images of different lengths.

    out[i, h] = sum_j softmax_j(scale * <q[i, h], k[j, h]>) v[j, h]          j over the tokens of i's own image

A program computes BLOCK_M queries of one image and head; keys and values stream past with an online softmax, so no
score is ever written. Queries, keys and values are read where the projection wrote them, in one (T, 3, H, d) tensor.

How a program finds its image without the host knowing any length (that would be a sync): image b is given the programs
from ``starts[b] // BLOCK_M + b`` on. The next image's first program is then at least ceil(length / BLOCK_M) further on,
since rounding down both offsets loses less than the one that b adds. So ``T // BLOCK_M + B`` programs a head are
enough; those left over, at most one an image, leave at once. The image is the last one whose first program is not
behind this one: a count over the offsets, which are in the second-level cache after the first program.

Heads are neighbours in launch order, since they are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device, product_kind

__all__ = ["AOT_CASES", "CONFIGS", "AttentionConfig", "choose_config", "packed_attention", "tiles"]

LOG2_E = 1.4426950408889634
SEARCH_BLOCK = 256  # offsets that a program looks at together


class AttentionConfig(NamedTuple):
    """Tile of a program: BLOCK_M queries, and BLOCK_N keys a step.

    Example:
        >>> AttentionConfig("tiny", 16, 16, num_warps=4, num_stages=2).block_n
        16
    """

    name: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# The static table, to be replaced by measurements; a benchmark sweeps CONFIGS[kind]. "half" is bf16 and fp16, "tf32" is
# fp32 on tensor cores, "ieee" is fp32 on the CUDA cores, whose operands live in registers. A program holds whole heads:
# "deep" is for those of more than 128 channels. So every tile fits into the 99 KiB that a block of sm_86, sm_89 and
# sm_120 has.
CONFIGS: dict[str, dict[str, AttentionConfig]] = {
    kind: {config.name: config for config in configs}
    for kind, configs in {
        "half": (
            AttentionConfig("large", 128, 64, num_warps=8, num_stages=3),
            AttentionConfig("small", 64, 32, num_warps=4, num_stages=3),
            AttentionConfig("deep", 64, 32, num_warps=8, num_stages=2),
        ),
        "tf32": (
            AttentionConfig("large", 128, 32, num_warps=8, num_stages=2),
            AttentionConfig("small", 64, 32, num_warps=4, num_stages=2),
            AttentionConfig("deep", 32, 16, num_warps=4, num_stages=2),
        ),
        "ieee": (
            AttentionConfig("small", 32, 32, num_warps=8, num_stages=2),
            AttentionConfig("deep", 32, 16, num_warps=8, num_stages=2),
        ),
    }.items()
}
FULL_GRID = 128  # programs that give each multiprocessor of a large GPU one; below, smaller tiles spread the work


@triton.jit
def _image_of(starts_ptr, num_images, slot, BLOCK_M: tl.constexpr, SEARCH: tl.constexpr):
    """The last image whose first program is not behind `slot`."""
    count = 0
    for first in range(0, num_images, SEARCH):
        image = first + tl.arange(0, SEARCH)
        start = tl.load(starts_ptr + image, mask=image < num_images, other=0)
        count += tl.sum(((image < num_images) & (start // BLOCK_M + image <= slot)).to(tl.int32), axis=0)
    return count - 1


@triton.jit(do_not_specialize=["num_images"])  # else a batch with one image more would compile anew
def _packed_attention_kernel(
    qkv_ptr,  # (T, 3, H, d)
    starts_ptr,  # (B + 1) int32
    out_ptr,  # (T, H, d), out
    num_images,  # B
    factor,  # scale * log2(e): powers of two are what the hardware computes
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEARCH: tl.constexpr,
):
    slot = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    image = _image_of(starts_ptr, num_images, slot, BLOCK_M, SEARCH)
    begin = tl.load(starts_ptr + image)
    end = tl.load(starts_ptr + image + 1)
    row = begin + (slot - begin // BLOCK_M - image) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    if begin + (slot - begin // BLOCK_M - image) * BLOCK_M >= end:
        return

    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    dim = tl.arange(0, BLOCK_D)
    in_head = (dim < HEAD_DIM)[None, :]
    columns = qkv_ptr + (head * HEAD_DIM + dim)[None, :]
    valid = (row < end)[:, None]
    q = tl.load(columns + row.to(tl.int64)[:, None] * (3 * WIDTH), mask=valid & in_head, other=0.0)  # [BM, BD]

    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        at = columns + key.to(tl.int64)[:, None] * (3 * WIDTH)  # [BN, BD]
        exists = (key < end)[:, None] & in_head
        k = tl.load(at + WIDTH, mask=exists, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [BM, BN]
        score = tl.where((key < end)[None, :], score, -float("inf"))
        larger = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weight, axis=1)
        v = tl.load(at + 2 * WIDTH, mask=exists, other=0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = larger

    out = out_ptr + row.to(tl.int64)[:, None] * WIDTH + (head * HEAD_DIM + dim)[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid & in_head)


def choose_config(dtype: torch.dtype, tokens: int, images: int, heads: int, head_dim: int) -> AttentionConfig:
    """The tile for a batch, from what the host knows: the mean length stands for all.

    Args:
        dtype: dtype of the tensor; TF32 follows ``torch.backends.cuda.matmul.fp32_precision``.
        tokens: of all images, T.
        images: B, at least 1.
        heads: H.
        head_dim: d, at most 256.

    Returns:
        A `AttentionConfig` of `CONFIGS`.

    Example:
        >>> choose_config(torch.bfloat16, tokens=256 * 197, images=256, heads=12, head_dim=64).name
        'large'
        >>> choose_config(torch.bfloat16, tokens=256 * 50, images=256, heads=12, head_dim=64).name
        'small'
        >>> choose_config(torch.bfloat16, tokens=256 * 197, images=256, heads=4, head_dim=192).name
        'deep'
    """
    table = CONFIGS[product_kind(dtype)]
    if head_dim > 128:
        return table["deep"]
    large = table.get("large", table["small"])
    # Half of a large tile would idle at 64 tokens or fewer.
    if tokens > 64 * images and triton.cdiv(tokens, large.block_m) * heads >= FULL_GRID:
        return large
    return table["small"]


def tiles(kind: str) -> dict[str, AttentionConfig]:
    """The tiles that `choose_config` chooses from, by name.

    Args:
        kind: see `fastmkd.kernels.launch.product_kind`.

    Example:
        >>> list(tiles("ieee"))
        ['small']
    """
    return dict(CONFIGS[kind])


def _constants(kind: str, config: AttentionConfig, heads: int, head_dim: int) -> dict[str, int | str]:
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",  # no effect on bf16 and fp16
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "SEARCH": SEARCH_BLOCK,
    }


def _options(config: AttentionConfig) -> dict[str, int | bool]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def packed_attention(qkv: Tensor, starts: Tensor, scale: float, config: AttentionConfig | None = None) -> Tensor:
    """Launches the attention; the arguments are already checked.

    Args:
        qkv: (T, 3, H, d) fp32, bf16 or fp16, contiguous, d at most 256.
        starts: (B + 1) int32, contiguous, from 0 to T and never descending.
        scale: factor on the scores.
        config: tile to use instead of the table's, for benchmarks.

    Returns:
        (T, H, d), accumulated in fp32, in the dtype of qkv.
    """
    tokens, _, heads, head_dim = qkv.shape
    images = starts.shape[0] - 1
    out = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out
    config = config or choose_config(qkv.dtype, tokens, images, heads, head_dim)
    with on_device(qkv):
        _packed_attention_kernel[((tokens // config.block_m + images) * heads,)](
            qkv,
            starts,
            out,
            images,
            scale * LOG2_E,
            **_constants(product_kind(qkv.dtype), config, heads, head_dim),
            **_options(config),
        )
    return out


_KINDS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "ieee"}


def _aot_case(dtype: str, config: AttentionConfig, heads: int, head_dim: int) -> AotCase:
    kind = _KINDS[dtype]
    element = f"*{dtype if kind == 'half' else 'fp32'}"
    return AotCase(
        f"packed_attention-{dtype}-{config.name}-h{heads}-d{head_dim}",
        _packed_attention_kernel,
        signature={
            "qkv_ptr": element,
            "starts_ptr": "*i32",
            "out_ptr": element,
            "num_images": "i32",
            "factor": "fp32",
        },
        constexprs=_constants(kind, config, heads, head_dim),
        options=_options(config),
        mma=kind != "ieee" and config.block_m >= 64,  # wgmma takes no fewer rows
        # Keys and values come by asynchronous copies, 16 bytes each but where TF32 wants its values transposed.
        requires=(r"\bLDGSTS",),
        forbids=(r"\bLDGSTS(?!\S*\.128\b)",) if kind == "half" else (),
    )


def _aot_cases(heads: int, head_dim: int, dtypes: Iterable[str] = ("bf16",)) -> list[AotCase]:
    """One for each tile that `choose_config` has for such heads."""
    tiles = [(dtype, config) for dtype in dtypes for config in CONFIGS[_KINDS[dtype]].values()]
    return [_aot_case(*tile, heads, head_dim) for tile in tiles if (tile[1].name == "deep") == (head_dim > 128)]


AOT_CASES = [
    *_aot_cases(6, 64, _KINDS),
    *_aot_cases(12, 32),
    *_aot_cases(16, 72),
    *_aot_cases(16, 128),
    *_aot_cases(4, 256, _KINDS),
]
