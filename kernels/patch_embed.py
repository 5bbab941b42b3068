"""Patch embedding of the kept patches only: a gather and a matrix product in one kernel.

    out[b, j] = sum_{c, y, x} weight[:, c, y, x] * images[b, c, py * stride_h + y, px * stride_w + x] + bias + pos[n]

where n = keep[b, j] and (py, px) = divmod(n, gw). It is the product of an implicit (B * k, C * ph * pw) matrix of
pixels with ``weight.view(D, C * ph * pw).T``: a program computes BLOCK_M kept patches times BLOCK_N embedding
dimensions and finds its pixels by address arithmetic, so hidden patches are never read and no matrix of patches is
written.

How the reads vectorise: the reduction index runs over (c, y, x) with x fastest, so each BLOCK_K slice is a few whole
pixel rows of the patch, and consecutive k are consecutive bytes within a row. With the patch size, strides and image
width as compile-time constants, Triton's axis analysis proves the alignment by itself: patch 16 at stride 16 reads 16
bytes a thread and a 16-pixel bf16 row is one full 32-byte sector; patch 14 or stride 10 reads 4 bytes, all that their
alignment allows, which is still enough for asynchronous copies. The weight slice is contiguous along k as well, the
layout that wgmma wants of both TF32 operands. The price is one compilation for each image width.

Programs that share a row tile are neighbours in launch order, so its pixels come from L2 after the first of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device, product_kind

__all__ = ["AOT_CASES", "CONFIGS", "TileConfig", "choose_config", "patch_embed", "tiles"]


class TileConfig(NamedTuple):
    """Tile of a program: BLOCK_M patches, BLOCK_N embedding dimensions, BLOCK_K pixels a step.

    Example:
        >>> TileConfig("tiny", 16, 16, 16, num_warps=4, num_stages=2).block_m
        16
    """

    name: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# The static table, to be replaced by measurements; a benchmark sweeps CONFIGS[kind]. "half" is bf16 and fp16, "tf32" is
# fp32 on tensor cores, "ieee" is fp32 on the CUDA cores, whose operands live in registers and so want thin slices.
CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "half": (
        TileConfig("large", 128, 128, 64, num_warps=8, num_stages=3),
        TileConfig("small", 64, 64, 64, num_warps=4, num_stages=4),
    ),
    "tf32": (
        TileConfig("large", 128, 128, 32, num_warps=8, num_stages=3),
        TileConfig("small", 64, 64, 32, num_warps=4, num_stages=4),
    ),
    "ieee": (
        TileConfig("large", 128, 64, 16, num_warps=8, num_stages=4),
        TileConfig("small", 32, 32, 16, num_warps=4, num_stages=3),
    ),
}
FULL_GRID = 128  # programs that give each multiprocessor of a large GPU one; below, smaller tiles spread the work


@triton.jit
def _patch_embed_kernel(
    images_ptr,  # (B, C, H, W)
    weight_ptr,  # (D, C * ph * pw)
    bias_ptr,  # (D) or None
    pos_ptr,  # (N, D) or None
    keep_ptr,  # (B, k) int64
    out_ptr,  # (B, k, D), out
    num_rows,  # B * k
    kept,  # k
    height,
    grid_w,
    embed_dim,
    num_col_blocks,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PIXELS: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    row = tl.program_id(0) // num_col_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % num_col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end repeat the last one: loads need no mask, and the store drops them.
    safe_row = tl.minimum(row, num_rows - 1)
    safe_col = tl.minimum(col, embed_dim - 1)

    patch = tl.load(keep_ptr + safe_row).to(tl.int32)  # [BM]
    image = (safe_row // kept).to(tl.int64)
    corner = image * (height * (CHANNELS * WIDTH))
    corner += (patch // grid_w).to(tl.int64) * (STRIDE_H * WIDTH) + patch % grid_w * STRIDE_W
    pixel_rows = images_ptr + corner[:, None]  # [BM, 1]
    weight_cols = weight_ptr + (safe_col * PIXELS)[None, :]  # [1, BN]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, PIXELS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        line = k // PATCH_W  # c * ph + y
        offset = (line // PATCH_H) * (height * WIDTH) + line % PATCH_H * WIDTH + k % PATCH_W
        if PIXELS % BLOCK_K == 0:
            pixels = tl.load(pixel_rows + offset[None, :])  # [BM, BK]
            weight = tl.load(weight_cols + k[:, None])  # [BK, BN]
        else:
            pixels = tl.load(pixel_rows + offset[None, :], mask=(k < PIXELS)[None, :], other=0.0)
            weight = tl.load(weight_cols + k[:, None], mask=(k < PIXELS)[:, None], other=0.0)
        acc = tl.dot(pixels, weight, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + safe_col).to(tl.float32)[None, :]
    if pos_ptr is not None:
        acc += tl.load(pos_ptr + (patch.to(tl.int64) * embed_dim)[:, None] + safe_col[None, :]).to(tl.float32)
    out = out_ptr + (row.to(tl.int64) * embed_dim)[:, None] + col[None, :]
    mask = (row < num_rows)[:, None] & (col < embed_dim)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def choose_config(dtype: torch.dtype, rows: int, embed_dim: int) -> TileConfig:
    """The largest tile of the static table that still gives a large GPU one program a multiprocessor.

    Args:
        dtype: dtype of the images; TF32 follows ``torch.backends.cuda.matmul.fp32_precision``.
        rows: number of kept patches in the batch, B * k.
        embed_dim: D.

    Returns:
        A `TileConfig` of `CONFIGS`.

    Example:
        >>> choose_config(torch.bfloat16, rows=256 * 98, embed_dim=384).name
        'large'
        >>> choose_config(torch.bfloat16, rows=8 * 98, embed_dim=384).name
        'small'
    """
    *large, small = CONFIGS[product_kind(dtype)]
    for config in large:
        if triton.cdiv(rows, config.block_m) * triton.cdiv(embed_dim, config.block_n) >= FULL_GRID:
            return config
    return small


def tiles(kind: str) -> dict[str, TileConfig]:
    """The tiles that `choose_config` chooses from, by name.

    Args:
        kind: see `fastmkd.kernels.launch.product_kind`.

    Example:
        >>> list(tiles("ieee"))
        ['large', 'small']
    """
    return {config.name: config for config in CONFIGS[kind]}


def _tile_constants(kind: str, config: TileConfig) -> dict[str, int | str]:
    return {
        "PRECISION": "tf32" if kind == "tf32" else "ieee",  # no effect on bf16 and fp16
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def _tile_options(config: TileConfig) -> dict[str, int | bool]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    keep: Tensor,
    stride_h: int,
    stride_w: int,
    config: TileConfig | None = None,
) -> Tensor:
    """Launches the fused gather and matrix product; the arguments are already checked.

    Args:
        images: (B, C, H, W) fp32, bf16 or fp16, contiguous.
        weight: (D, C, ph, pw) of the same dtype, contiguous.
        bias: (D) of the same dtype, any stride, or None.
        pos: (N, D) of the same dtype or float32, any strides, or None.
        keep: (B, k) int64, contiguous, patch indices in any order.
        stride_h: vertical distance of patches in pixels, smaller than ph for overlapping patches.
        stride_w: horizontal distance.
        config: tile to use instead of the table's, for benchmarks.

    Returns:
        (B, k, D), accumulated in fp32, in the promoted dtype of images and pos.
    """
    batch, channels, height, width = images.shape
    embed_dim, _, patch_h, patch_w = weight.shape
    # As long as the image leaves one patch, as all longer ones do; a row of pixels times one of those may overflow.
    stride_h, stride_w = min(stride_h, height), min(stride_w, width)
    kept = keep.shape[1]
    rows = batch * kept
    dtype = images.dtype if pos is None else torch.promote_types(images.dtype, pos.dtype)
    out = torch.empty((batch, kept, embed_dim), dtype=dtype, device=images.device)
    config = config or choose_config(images.dtype, rows, embed_dim)
    num_col_blocks = triton.cdiv(embed_dim, config.block_n)
    with on_device(images):
        _patch_embed_kernel[(triton.cdiv(rows, config.block_m) * num_col_blocks,)](
            images,
            weight,
            None if bias is None else bias.contiguous(),
            None if pos is None else pos.contiguous(),
            keep,
            out,
            rows,
            kept,
            height,
            (width - patch_w) // stride_w + 1,
            embed_dim,
            num_col_blocks,
            CHANNELS=channels,
            WIDTH=width,
            PATCH_H=patch_h,
            PATCH_W=patch_w,
            STRIDE_H=stride_h,
            STRIDE_W=stride_w,
            **_tile_constants(product_kind(images.dtype), config),
            **_tile_options(config),
        )
    return out


# Patch, stride, width of a 3-channel image, and how many pixels its alignment lets one copy have.
_GEOMETRIES = {"p16": (16, 16, 224, 16), "p14": (14, 14, 518, 2), "overlap": (16, 10, 1024, 2)}
_DTYPES = {"bf16": ("half", 2), "fp16": ("half", 2), "tf32": ("tf32", 4), "fp32": ("ieee", 4)}


def _aot_case(dtype: str, config: TileConfig, geometry: str, epilogue: bool, ones: tuple[str, ...] = ()) -> AotCase:
    kind, itemsize = _DTYPES[dtype]
    element = "fp32" if itemsize == 4 else dtype
    patch, stride, width, vector = _GEOMETRIES[geometry]
    optional = ("bias_ptr", "pos_ptr") if epilogue else ()
    absent = () if epilogue else ("bias_ptr", "pos_ptr")
    ints = ("num_rows", "kept", "height", "grid_w", "embed_dim", "num_col_blocks")
    return AotCase(
        f"patch_embed-{dtype}-{config.name}-{geometry}{'' if epilogue else '-bare'}{'-ones' if ones else ''}",
        _patch_embed_kernel,
        signature={
            **dict.fromkeys(("images_ptr", "weight_ptr", "out_ptr", *optional), f"*{element}"),
            "keep_ptr": "*i64",
            **{name: "i32" for name in ints if name not in ones},
        },
        constexprs={
            **dict.fromkeys(absent),
            **dict.fromkeys(ones, 1),
            "CHANNELS": 3,
            "WIDTH": width,
            "PATCH_H": patch,
            "PATCH_W": patch,
            "STRIDE_H": stride,
            "STRIDE_W": stride,
            **_tile_constants(kind, config),
        },
        aligned=("embed_dim",),
        options=_tile_options(config),
        mma=kind != "ieee",
        # Pixels and weights come by asynchronous copies; with 16-pixel rows, all of them 16 bytes wide.
        requires=(r"\bLDGSTS",),
        forbids=(r"\bLDGSTS(?!\S*\.128\b)",) if vector * itemsize >= 16 else (),
    )


AOT_CASES = [
    *(
        _aot_case(dtype, config, "p16", epilogue=True)
        for dtype, (kind, _) in _DTYPES.items()
        for config in CONFIGS[kind]
    ),
    *(
        _aot_case(dtype, CONFIGS[_DTYPES[dtype][0]][0], geometry, epilogue=False)
        for dtype, geometry in (("bf16", "p14"), ("bf16", "overlap"), ("fp32", "p14"))
    ),
    # A launch turns integers that equal 1 into compile-time constants.
    _aot_case(
        "bf16",
        CONFIGS["half"][1],
        "p16",
        epilogue=True,
        ones=("num_rows", "kept", "height", "grid_w", "num_col_blocks"),
    ),
]
