"""Gradient of the aligned cells in the level and in the weight: two products of which one operand is never written.

    d_level cell(b, n) = weight.T @ grad[b, n]  where visible, else 0
    d_weight           = sum over visible (b, n) of grad[b, n] cell(level, b, n)^T

Cells come in the order of `fastmkd.kernels.align_cells`, visible ones first. The sum over them is long and its result
may be small, so it is cut into splits, whose sums are added in their order: the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .align_cells import aot_case, choose_tile, corners, offsets, ordered_weight, tile_options, tiles, visible_first
from .launch import AotCase, on_device, product_kind
from .patch_embed import CONFIGS, TileConfig

__all__ = ["AOT_CASES", "align_cells_grad", "tiles"]

FULL_GRID = 256  # programs below which the sum over cells is cut
LEAST_ROWS = 256  # cells of a split
WEIGHT_WARPS, WEIGHT_CELLS = (
    8,
    32,
)  # fewer warps or more cells a step, and addresses of unaligned cells leave the registers


@triton.jit
def _level_kernel(
    grad_ptr,  # (B * gh * gw, D)
    weight_ptr,  # (D, C * p * p), columns in the level's order
    order_ptr,  # (B * gh * gw) int64, visible cells first, or None
    visible_count_ptr,  # () int64, or None
    out_ptr,  # (B, C, H, W) or (B, H, W, C), out
    num_rows,  # B * gh * gw
    num_cells,  # gh * gw
    grid_w,
    width,
    area,  # H * W
    dim,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    INNER: tl.constexpr = CHANNELS if CHANNELS_LAST else 1
    COL_BLOCKS: tl.constexpr = (DEPTH + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // COL_BLOCKS * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % COL_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_row = tl.minimum(row, num_rows - 1)
    if order_ptr is not None:
        visible_count = tl.load(visible_count_ptr).to(tl.int32)
        cell = tl.load(order_ptr + safe_row).to(tl.int32)  # [BM]
    else:
        visible_count = num_rows
        cell = safe_row
    grad_rows = grad_ptr + (cell.to(tl.int64) * dim)[:, None]
    weight_cols = weight_ptr + tl.minimum(col, DEPTH - 1)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tl.where(first < visible_count, dim, 0), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        grad = tl.load(grad_rows + k[None, :], mask=(k < dim)[None, :], other=0.0)  # [BM, BK]
        weight = tl.load(weight_cols + (k * DEPTH)[:, None], mask=(k < dim)[:, None], other=0.0)  # [BK, BN]
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)

    acc = tl.where((row < visible_count)[:, None], acc, 0.0)
    # Cast so, since a launch makes an area of 1 a number of Python.
    corner = corners(cell, num_cells, grid_w, width, tl.cast(area, tl.int64) * CHANNELS, PATCH, INNER)
    out = out_ptr + corner[:, None] + offsets(col, area, width, CHANNELS, PATCH, CHANNELS_LAST)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row < num_rows)[:, None] & (col < DEPTH)[None, :])


@triton.jit
def _weight_kernel(
    grad_ptr,  # (B * gh * gw, D)
    level_ptr,  # (B, C, H, W) or (B, H, W, C)
    order_ptr,  # (B * gh * gw) int64, visible cells first, or None
    visible_count_ptr,  # () int64, or None
    out_ptr,  # (splits, D, C * p * p) fp32, out
    num_rows,  # B * gh * gw
    num_cells,  # gh * gw
    grid_w,
    width,
    area,  # H * W
    dim,
    split_rows,  # a multiple of BLOCK_K
    num_row_blocks,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    INNER: tl.constexpr = CHANNELS if CHANNELS_LAST else 1
    COL_BLOCKS: tl.constexpr = (DEPTH + BLOCK_N - 1) // BLOCK_N
    out_col = tl.program_id(0) % COL_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    out_row = tl.program_id(0) // COL_BLOCKS % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) // COL_BLOCKS // num_row_blocks
    safe_out_row = tl.minimum(out_row, dim - 1)
    offset = offsets(tl.minimum(out_col, DEPTH - 1), area, width, CHANNELS, PATCH, CHANNELS_LAST)
    visible_count = num_rows
    if order_ptr is not None:
        visible_count = tl.load(visible_count_ptr).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, visible_count), BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        used = position < visible_count
        cell = tl.minimum(position, num_rows - 1)
        if order_ptr is not None:
            cell = tl.load(order_ptr + cell).to(tl.int32)  # [BK]
        at = grad_ptr + (cell.to(tl.int64) * dim)[None, :] + safe_out_row[:, None]
        grad = tl.load(at, mask=used[None, :], other=0.0)  # [BM, BK]
        corner = corners(cell, num_cells, grid_w, width, tl.cast(area, tl.int64) * CHANNELS, PATCH, INNER)
        values = tl.load(level_ptr + corner[:, None] + offset[None, :], mask=used[:, None], other=0.0)  # [BK, BN]
        acc = tl.dot(grad, values, acc, input_precision=PRECISION)

    out = out_ptr + ((split * dim + out_row).to(tl.int64) * DEPTH)[:, None] + out_col[None, :]
    tl.store(out, acc, mask=(out_row < dim)[:, None] & (out_col < DEPTH)[None, :])


def align_cells_grad(
    level: Tensor,
    weight: Tensor,
    visible: Tensor | None,
    grad: Tensor,
    patch: int,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches both kernels; arguments as in `fastmkd.ops.align_cells_grad`, already checked.

    Args:
        level: ``(B, C, H, W)`` float32, bfloat16 or float16, contiguous or channels-last.
        weight: ``(D, p * p * C)`` of the same dtype.
        visible: ``(B, gh * gw)`` bool or None.
        grad: ``(B, gh * gw, D)`` of the same dtype.
        patch: p.
        config: tile of both kernels to use instead of the table's.

    Returns:
        The gradients, like `level` and like `weight`.
    """
    (batch, channels, height, width), (dim, depth) = level.shape, weight.shape
    num_cells = grad.shape[1]
    num_rows = batch * num_cells
    d_level = torch.empty_like(level)
    if num_rows == 0:
        return d_level, torch.zeros_like(weight)
    channels_last = level.is_contiguous(memory_format=torch.channels_last)
    reordered = not channels_last and patch > 1
    order, count = visible_first(visible)
    kind = product_kind(level.dtype)
    sizes = (num_rows, num_cells, width // patch, width, height * width, dim)
    constants = {"CHANNELS": channels, "PATCH": patch, "CHANNELS_LAST": channels_last}
    with on_device(level):
        tile = config or choose_tile(level.dtype, num_rows, depth)
        _level_kernel[(triton.cdiv(num_rows, tile.block_m) * triton.cdiv(depth, tile.block_n),)](
            grad,
            ordered_weight(weight, channels) if reordered else weight,
            order,
            count,
            d_level,
            *sizes,
            **constants,
            **tile_options(kind, tile),
        )
        tile = _weight_tile(config or choose_tile(level.dtype, dim, depth))
        row_blocks = triton.cdiv(dim, tile.block_m)
        blocks = row_blocks * triton.cdiv(depth, tile.block_n)
        splits = max(1, min(FULL_GRID // blocks, num_rows // LEAST_ROWS))
        split_rows = triton.cdiv(triton.cdiv(num_rows, splits), tile.block_k) * tile.block_k
        partial = torch.empty((splits, dim, depth), dtype=torch.float32, device=level.device)
        _weight_kernel[(blocks * splits,)](
            grad,
            level,
            order,
            count,
            partial,
            *sizes,
            split_rows,
            row_blocks,
            **constants,
            **tile_options(kind, tile),
        )
    d_weight = partial.sum(0).to(weight.dtype)
    return d_level, ordered_weight(d_weight, channels, back=True) if reordered else d_weight


def _weight_tile(config: TileConfig) -> TileConfig:
    return config._replace(num_warps=WEIGHT_WARPS, block_k=min(config.block_k, WEIGHT_CELLS))


def _case(
    of: str, dtype: str, size: int, channels: int, patch: int, channels_last: bool, masked: bool = True
) -> AotCase:
    kind = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "ieee"}[dtype]
    hidden = {"order_ptr": "*i64", "visible_count_ptr": "*i64"} if masked else {}
    absent = {} if masked else dict.fromkeys(("order_ptr", "visible_count_ptr"))
    ints = ("num_rows", "num_cells", "grid_w", "width", "area", "dim")
    is_weight = of == "weight"
    return aot_case(
        f"align_cells_grad-{of}{'' if masked else '-bare'}",
        _weight_kernel if is_weight else _level_kernel,
        dtype,
        _weight_tile(CONFIGS[kind][size]) if is_weight else CONFIGS[kind][size],
        ("grad_ptr", "level_ptr") if is_weight else ("grad_ptr", "weight_ptr", "out_ptr"),
        (*ints, "split_rows", "num_row_blocks") if is_weight else ints,
        {**hidden, **({"out_ptr": "*fp32"} if is_weight else {})},
        {"CHANNELS": channels, "PATCH": patch, "CHANNELS_LAST": channels_last, **absent},
    )


AOT_CASES = [
    _case("weight", "bf16", 0, 256, 4, channels_last=False),
    _case("level", "bf16", 0, 256, 4, channels_last=False),
    *(_case(of, "fp32", 0, 256, 4, channels_last=False) for of in ("level", "weight")),
    _case("weight", "tf32", 1, 256, 2, channels_last=True),
    *(_case(of, "fp16", 1, 37, 3, channels_last=False, masked=False) for of in ("level", "weight")),
]
