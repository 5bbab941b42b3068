"""Visible cells of a level as tokens, the mask token at hidden ones, positions added (MKD, Section 3.1.3).

    out[b, n] = positions[n] + (weight @ cell(level, b, n) + bias    if n is visible in image b
                                mask_token                           else)

It is the product of an implicit matrix of cells with ``weight.T``: a program computes BLOCK_M cells times BLOCK_N
columns and finds its positions by address arithmetic, so no matrix of cells is written. Cells are taken in an order in
which the visible ones come first; how many they are stays on the device. A program behind them has no product to do,
hence hidden cells cost their share of the result, and no step waits for a count.

The reduction runs over (channel, row, column) of a contiguous level and over (row, column, channel) of a channels-last
one, so that neighbours are neighbours in memory; the launcher brings the weight's columns into that order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device, product_kind
from .patch_embed import CONFIGS, TileConfig, choose_config

__all__ = [
    "AOT_CASES",
    "align_cells",
    "aot_case",
    "choose_tile",
    "corners",
    "offsets",
    "ordered_weight",
    "tile_options",
    "tiles",
    "visible_first",
]


@triton.jit
def corners(cell, num_cells, grid_w, width, image_size, PATCH: tl.constexpr, INNER: tl.constexpr):
    """Where the first position of each cell lies: [BM] int64. INNER is the distance of neighbouring positions."""
    n = cell % num_cells
    position = (n // grid_w).to(tl.int64) * (PATCH * width) + n % grid_w * PATCH
    return (cell // num_cells).to(tl.int64) * image_size + position * INNER


@triton.jit
def offsets(
    k, area, width, CHANNELS: tl.constexpr, PATCH: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """Where element k of a cell's row lies behind the cell's first position: [BK]."""
    if CHANNELS_LAST:
        inner = k // CHANNELS
        offset = (inner // PATCH * width + inner % PATCH) * CHANNELS + k % CHANNELS
    else:
        line = k // PATCH  # c * p + y
        offset = line // PATCH * area + line % PATCH * width + k % PATCH
    return offset


@triton.jit
def _align_cells_kernel(
    level_ptr,  # (B, C, H, W) or (B, H, W, C)
    weight_ptr,  # (D, C * p * p), columns as above
    bias_ptr,  # (D) or None
    order_ptr,  # (B * gh * gw) int64, visible cells first, or None
    visible_count_ptr,  # () int64, or None
    mask_token_ptr,  # (D) or None
    positions_ptr,  # (gh * gw, D)
    out_ptr,  # (B * gh * gw, D), out
    num_rows,  # B * gh * gw
    num_cells,  # gh * gw
    grid_w,
    width,
    area,  # H * W
    dim,
    num_col_blocks,
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
    first = tl.program_id(0) // num_col_blocks * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % num_col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_row = tl.minimum(row, num_rows - 1)
    safe_col = tl.minimum(col, dim - 1)

    # A row that is hidden or beyond the end repeats the last visible one: loads need no mask.
    if order_ptr is not None:
        visible_count = tl.load(visible_count_ptr).to(tl.int32)
        cell = tl.load(order_ptr + safe_row).to(tl.int32)  # [BM]
        source = tl.load(order_ptr + tl.maximum(tl.minimum(row, visible_count - 1), 0)).to(tl.int32)
    else:
        visible_count = num_rows
        cell = safe_row
        source = safe_row
    # Cast so, since a launch makes an area of 1 a number of Python.
    cell_rows = (
        level_ptr + corners(source, num_cells, grid_w, width, tl.cast(area, tl.int64) * CHANNELS, PATCH, INNER)[:, None]
    )
    weight_cols = weight_ptr + (safe_col * DEPTH)[None, :]  # [1, BN]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tl.where(first < visible_count, DEPTH, 0), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offset = offsets(k, area, width, CHANNELS, PATCH, CHANNELS_LAST)
        if DEPTH % BLOCK_K == 0:
            values = tl.load(cell_rows + offset[None, :])  # [BM, BK]
            weight = tl.load(weight_cols + k[:, None])  # [BK, BN]
        else:
            values = tl.load(cell_rows + offset[None, :], mask=(k < DEPTH)[None, :], other=0.0)
            weight = tl.load(weight_cols + k[:, None], mask=(k < DEPTH)[:, None], other=0.0)
        acc = tl.dot(values, weight, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + safe_col).to(tl.float32)[None, :]
    if mask_token_ptr is not None:
        mask_token = tl.load(mask_token_ptr + safe_col).to(tl.float32)
        acc = tl.where((row < visible_count)[:, None], acc, mask_token[None, :])
    place = (cell % num_cells).to(tl.int64) * dim
    acc += tl.load(positions_ptr + place[:, None] + safe_col[None, :]).to(tl.float32)
    out = out_ptr + (cell.to(tl.int64) * dim)[:, None] + col[None, :]
    mask = (row < num_rows)[:, None] & (col < dim)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def visible_first(visible: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of all cells, those of visible ones first and ascending, and how many these are; nothing is waited for.

    Args:
        visible: ``(B, gh * gw)`` bool or None.

    Example:
        >>> order, count = visible_first(torch.tensor([[False, True, True]]))
        >>> order.tolist(), count.item()
        ([1, 2, 0], 2)
    """
    if visible is None:
        return None, None
    return (~visible).flatten().to(torch.uint8).argsort(stable=True), visible.sum()


def ordered_weight(weight: Tensor, channels: int, back: bool = False) -> Tensor:
    """Columns (position, channel) as (channel, position), or the other way round.

    Args:
        weight: ``(D, p * p * C)``.
        channels: C.
        back: from (channel, position).

    Example:
        >>> ordered_weight(torch.arange(6.0).view(1, 6), channels=3)
        tensor([[0., 3., 1., 4., 2., 5.]])
    """
    sides = (channels, -1) if back else (-1, channels)
    return weight.unflatten(1, sides).mT.flatten(1).contiguous()


def choose_tile(dtype: torch.dtype, rows: int, width: int) -> TileConfig:
    """As `fastmkd.kernels.patch_embed.choose_config`, without the large tile of TF32, which spills on sm_100 here.

    Args:
        dtype: of the level.
        rows: of the product.
        width: of the product.

    Example:
        >>> choose_tile(torch.bfloat16, rows=16 * 256, width=4096).name
        'large'
    """
    kind = product_kind(dtype)
    return CONFIGS[kind][-1] if kind == "tf32" else choose_config(dtype, rows, width)


def tiles(kind: str) -> dict[str, TileConfig]:
    """The tiles that `choose_tile` chooses from, by name.

    Args:
        kind: see `fastmkd.kernels.launch.product_kind`.

    Example:
        >>> list(tiles("tf32"))
        ['small']
    """
    return {config.name: config for config in (CONFIGS[kind][-1:] if kind == "tf32" else CONFIGS[kind])}


def tile_options(kind: str, config: TileConfig) -> dict[str, int | str | bool]:
    """Compile-time arguments and launch options of a tile.

    Args:
        kind: see `product_kind`.
        config: the tile.

    Example:
        >>> tile_options("half", CONFIGS["half"][1])["BLOCK_M"]
        64
    """
    return {
        "PRECISION": "tf32" if kind == "tf32" else "ieee",  # no effect on bf16 and fp16
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def align_cells(
    level: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    mask_token: Tensor | None,
    positions: Tensor,
    patch: int,
    config: TileConfig | None = None,
) -> Tensor:
    """Launches the kernel; arguments as in `fastmkd.ops.align_cells`, already checked.

    Args:
        level: ``(B, C, H, W)`` float32, bfloat16 or float16, contiguous or channels-last.
        weight: ``(D, p * p * C)`` of the same dtype, as all that follow.
        bias: ``(D,)`` or None.
        visible: ``(B, gh * gw)`` bool or None.
        mask_token: ``(D,)`` or None.
        positions: ``(gh * gw, D)``.
        patch: p.
        config: tile to use instead of the table's, for benchmarks.

    Returns:
        ``(B, gh * gw, D)``, accumulated in float32 and rounded once.
    """
    batch, channels, height, width = level.shape
    (num_cells, dim), num_rows = positions.shape, batch * len(positions)
    out = torch.empty((batch, num_cells, dim), dtype=level.dtype, device=level.device)
    if num_rows == 0:
        return out
    channels_last = level.is_contiguous(memory_format=torch.channels_last)
    order, count = visible_first(visible)
    config = config or choose_tile(level.dtype, num_rows, dim)
    num_col_blocks = triton.cdiv(dim, config.block_n)
    with on_device(level):
        _align_cells_kernel[(triton.cdiv(num_rows, config.block_m) * num_col_blocks,)](
            level,
            weight if channels_last or patch == 1 else ordered_weight(weight, channels),
            bias,
            order,
            count,
            mask_token,
            positions,
            out,
            num_rows,
            num_cells,
            width // patch,
            width,
            height * width,
            dim,
            num_col_blocks,
            CHANNELS=channels,
            PATCH=patch,
            CHANNELS_LAST=channels_last,
            **tile_options(product_kind(level.dtype), config),
        )
    return out


_DTYPES = {"bf16": ("half", "bf16"), "fp16": ("half", "fp16"), "tf32": ("tf32", "fp32"), "fp32": ("ieee", "fp32")}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def aot_case(
    name: str,
    kernel: object,
    dtype: str,
    config: TileConfig,
    tensors: tuple[str, ...],
    ints: tuple[str, ...],
    others: dict[str, str],
    constants: dict[str, object],
) -> AotCase:
    """A compile check of one of the kernels on cells.

    Args:
        name: of the op.
        kernel: what is compiled.
        dtype: key of the table of products: "bf16", "fp16", "tf32" or "fp32".
        config: its tile.
        tensors: pointers of that dtype.
        ints: integer arguments.
        others: further pointers and their types.
        constants: compile-time arguments beside those of the tile.
    """
    kind, element = _DTYPES[dtype]
    tile = tile_options(kind, config)
    layout = f"c{constants['CHANNELS']}-p{constants['PATCH']}{'-last' if constants['CHANNELS_LAST'] else ''}"
    return AotCase(
        f"{name}-{dtype}-{config.name}-{layout}",
        kernel,
        signature={**dict.fromkeys(tensors, f"*{element}"), **others, **dict.fromkeys(ints, "i32")},
        constexprs={**constants, **{key: value for key, value in tile.items() if key not in _OPTIONS}},
        aligned=tuple(name for name in ints if name in ("width", "area", "dim", "num_cells", "num_rows")),
        options={key: tile[key] for key in _OPTIONS},
        mma=kind != "ieee",
    )


def _case(dtype: str, size: int, channels: int, patch: int, channels_last: bool, masked: bool = True) -> AotCase:
    hidden = {"order_ptr": "*i64", "visible_count_ptr": "*i64"} if masked else {}
    absent = {} if masked else dict.fromkeys(("bias_ptr", "order_ptr", "visible_count_ptr", "mask_token_ptr"))
    optional = ("bias_ptr", "mask_token_ptr") if masked else ()
    return aot_case(
        "align_cells" if masked else "align_cells-bare",
        _align_cells_kernel,
        dtype,
        CONFIGS[_DTYPES[dtype][0]][size],
        ("level_ptr", "weight_ptr", "positions_ptr", "out_ptr", *optional),
        ("num_rows", "num_cells", "grid_w", "width", "area", "dim", "num_col_blocks"),
        hidden,
        {"CHANNELS": channels, "PATCH": patch, "CHANNELS_LAST": channels_last, **absent},
    )


AOT_CASES = [
    *(_case(dtype, size, 256, 4, channels_last=False) for dtype, size in (("bf16", 0), ("tf32", 1), ("fp32", 0))),
    _case("bf16", 0, 256, 4, channels_last=True),
    _case("bf16", 1, 256, 1, channels_last=False),
    _case("fp32", 1, 37, 3, channels_last=False, masked=False),
]
