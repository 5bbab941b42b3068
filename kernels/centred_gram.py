"""U-centred Gram matrices of a ragged list of layers (DPK, Eq. 6): shift, product, centring in three launches.

    K = (X - X[0]) (X - X[0])^T, diagonal zeroed
    out[i, j] = K[i, j] - mean[i] - mean[j] + sum(mean) / (n - 1) for i != j, 0 for i = j; mean = K.sum(1) / (n - 2)

The batch n is small and the features d are many, so the work is split over the features. A program of the first launch
makes one BLOCK x BLOCK tile of the lower triangle from SPLIT features of one layer; its layer, split and tile follow
from its number and a table with one row a layer, hence one launch whatever the list. Programs that read the same
features are neighbours in launch order: all but the first of them read from L2. The second launch adds the splits in
order (no atomics), mirrors the triangle and sums its rows in float64; the third centres in float64.

The table holds distances from the first layer's pointer, and everything in it is in units of ALIGN elements, the
largest power of two up to 16 that divides all of it: that is how the compiler learns that 16-byte loads are allowed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device, product_kind

__all__ = ["AOT_CASES", "TileConfig", "centred_gram", "choose_config", "choose_split", "tiles"]


class TileConfig(NamedTuple):
    """Tile of a program: BLOCK x BLOCK images, BLOCK_K features a step.

    Example:
        >>> TileConfig(16, 16, num_warps=4, num_stages=2).block
        16
    """

    block: int
    block_k: int
    num_warps: int
    num_stages: int


# Smallest first; "ieee" is float32 on the CUDA cores, whose operands live in registers.
CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "half": (
        TileConfig(16, 128, num_warps=4, num_stages=3),
        TileConfig(32, 128, num_warps=4, num_stages=3),
        TileConfig(64, 64, num_warps=4, num_stages=4),
        TileConfig(128, 64, num_warps=8, num_stages=3),
    ),
    "tf32": (
        TileConfig(16, 64, num_warps=4, num_stages=3),
        TileConfig(32, 64, num_warps=4, num_stages=3),
        TileConfig(64, 32, num_warps=4, num_stages=4),
        TileConfig(128, 32, num_warps=8, num_stages=3),
    ),
    "ieee": (
        TileConfig(16, 32, num_warps=4, num_stages=2),
        TileConfig(32, 32, num_warps=4, num_stages=2),
        TileConfig(64, 16, num_warps=8, num_stages=2),
    ),
}
FULL_GRID = 528  # four programs for each multiprocessor of a large GPU
SPLITS = (16384, 8192, 4096, 2048, 1024, 512)  # features a program reads; few, so that partial sums stay cheap
COLUMNS = 256  # columns that a program of the second and third launch holds at once
ROW_OPTIONS = {"num_warps": 4}
FIELDS = tl.constexpr(4)  # of a row of the table: offset, stride, width, first program


@triton.jit
def _tile_of(index):
    """Row and column of a tile of the lower triangle: 0, 1, 2, 3 ... are (0, 0), (1, 0), (1, 1), (2, 0) ..."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)  # the square root may round either way
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def _partial_gram_kernel(
    x_ptr,  # the first layer's (n, d)
    table_ptr,  # (L, FIELDS) int64
    sums_ptr,  # (programs, BLOCK, BLOCK) fp32, out
    num_layers,
    n,
    tiles,  # of the lower triangle
    split,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    index = tl.arange(0, BLOCK_L)
    first = tl.load(table_ptr + index * FIELDS + 3, mask=index < num_layers, other=0)
    layer = tl.sum(((first <= program) & (index < num_layers)).to(tl.int32), axis=0) - 1
    fields = table_ptr + layer * FIELDS
    origin = x_ptr + tl.load(fields) * ALIGN
    stride = tl.load(fields + 1) * ALIGN
    width = tl.load(fields + 2).to(tl.int32) * ALIGN
    local = program - tl.load(fields + 3).to(tl.int32)
    tile_row, tile_column = _tile_of(local % tiles)
    begin = local // tiles * split
    end = tl.minimum(begin + split, width)

    # Images beyond the end repeat the last one; nobody reads their sums.
    lanes = tl.arange(0, BLOCK)
    row = tl.minimum(tile_row * BLOCK + lanes, n - 1)
    column = tl.minimum(tile_column * BLOCK + lanes, n - 1)
    rows = origin + (row * stride)[:, None]  # [BLOCK, 1]
    columns = origin + (column * stride)[:, None]
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < end)[None, :]
        shift = tl.load(origin + k[None, :], mask=inside, other=0.0)
        left = tl.load(rows + k[None, :], mask=inside, other=0.0) - shift  # [BLOCK, BK]
        right = tl.load(columns + k[None, :], mask=inside, other=0.0) - shift
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    out = sums_ptr + program.to(tl.int64) * (BLOCK * BLOCK)
    tl.store(out + lanes[:, None] * BLOCK + lanes[None, :], acc)


@triton.jit
def _sum_splits_kernel(
    table_ptr,  # (L, FIELDS) int64
    sums_ptr,  # (programs, BLOCK, BLOCK) fp32
    gram_ptr,  # (L, n, n) fp32, out
    means_ptr,  # (L, n) fp64, out
    n,
    tiles,
    split,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    layer, row = program // n, program % n
    fields = table_ptr + layer * FIELDS
    splits = tl.cdiv(tl.load(fields + 2).to(tl.int32) * ALIGN, split)
    sums = sums_ptr + tl.load(fields + 3) * (BLOCK * BLOCK)
    gram = gram_ptr + program.to(tl.int64) * n
    total = tl.zeros((COLUMNS,), dtype=tl.float64)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        safe = tl.minimum(column, n - 1)
        high, low = tl.maximum(row, safe), tl.minimum(row, safe)
        tile_row = high // BLOCK
        tile = tile_row * (tile_row + 1) // 2 + low // BLOCK
        place = sums + tile.to(tl.int64) * (BLOCK * BLOCK) + high % BLOCK * BLOCK + low % BLOCK
        value = tl.zeros((COLUMNS,), dtype=tl.float32)
        for _ in range(splits):
            value += tl.load(place)
            # Cast so, since a launch makes a single tile a number of Python.
            place += tl.cast(tiles, tl.int64) * (BLOCK * BLOCK)
        value = tl.where((column == row) | (column >= n), 0.0, value)
        tl.store(gram + column, value, mask=column < n)
        total += value.to(tl.float64)
    tl.store(means_ptr + program, tl.sum(total, axis=0) / tl.cast(n - 2, tl.float64))


@triton.jit
def _centre_kernel(
    means_ptr,  # (L, n) fp64
    gram_ptr,  # (L, n, n) fp32, in place
    n,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    layer, row = program // n, program % n
    means = means_ptr + layer.to(tl.int64) * n
    gram = gram_ptr + program.to(tl.int64) * n
    total = tl.zeros((COLUMNS,), dtype=tl.float64)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total += tl.load(means + column, mask=column < n, other=0.0)
    everything = tl.sum(total, axis=0) / tl.cast(n - 1, tl.float64)
    own = tl.load(means + row)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(gram + column, mask=column < n, other=0.0).to(tl.float64)
        value = value - own - tl.load(means + column, mask=column < n, other=0.0) + everything
        tl.store(gram + column, tl.where(column == row, 0.0, value).to(tl.float32), mask=column < n)


def choose_config(dtype: torch.dtype, n: int, align: int = 16) -> TileConfig:
    """The smallest tile that holds the batch, or the largest there is.

    Args:
        dtype: of the features; TF32 follows ``torch.backends.cuda.matmul.fp32_precision``.
        n: images.
        align: elements that a load may have at once. Below 4 bytes there are no asynchronous copies, and the largest
            tile, loaded through registers, does not fit into them.

    Example:
        >>> choose_config(torch.bfloat16, 40).block, choose_config(torch.bfloat16, 256).block
        (64, 128)
        >>> choose_config(torch.bfloat16, 256, align=1).block
        64
    """
    configs = [c for c in CONFIGS[product_kind(dtype)] if c.block <= 64 or align * dtype.itemsize >= 4]
    return next((config for config in configs if config.block >= n), configs[-1])


def tiles(kind: str) -> dict[str, TileConfig]:
    """The tiles that `choose_config` chooses from, by name.

    Args:
        kind: see `fastmkd.kernels.launch.product_kind`.

    Example:
        >>> list(tiles("ieee"))
        ['16', '32', '64']
    """
    return {str(config.block): config for config in CONFIGS[kind]}


def choose_split(widths: list[int], tiles: int) -> int:
    """The most features a program may take so that a large GPU is still full; a function of the shapes alone.

    Args:
        widths: d of each layer.
        tiles: tiles of the lower triangle.

    Example:
        >>> choose_split([802816] * 16, 3), choose_split([25088], 1)
        (16384, 512)
    """
    for split in SPLITS:
        if tiles * sum(triton.cdiv(width, split) for width in widths) >= FULL_GRID:
            return split
    return SPLITS[-1]


def centred_gram(features: list[Tensor], config: TileConfig | None = None) -> Tensor:
    """Launches the three kernels; the arguments are already checked.

    Args:
        features: (n, d) fp32, bf16 or fp16 a layer, of one dtype, rows strided, last dimension contiguous.
        config: tile to use instead of the table's, for benchmarks.

    Returns:
        (L, n, n) float32.

    Source:
        DPK, Eq. 6.
    """
    lead, n = features[0], features[0].shape[0]
    widths = [x.shape[1] for x in features]
    distances = [(x.data_ptr() - lead.data_ptr()) // lead.element_size() for x in features]
    strides = [x.stride(0) for x in features]
    align = math.gcd(16, *distances, *strides, *widths)
    config = config or choose_config(lead.dtype, n, align)
    blocks = triton.cdiv(n, config.block)
    tiles = blocks * (blocks + 1) // 2
    split = choose_split(widths, tiles)
    table, programs = [], 0
    for fields in zip(distances, strides, widths, strict=True):
        table.append([*(field // align for field in fields), programs])
        programs += tiles * triton.cdiv(fields[2], split)
    # From pageable memory: the driver takes its own copy at once, so nobody waits and nothing must be kept alive.
    on_gpu = torch.tensor(table, dtype=torch.int64).to(lead.device, non_blocking=True)
    sums = torch.empty((programs, config.block, config.block), dtype=torch.float32, device=lead.device)
    out = torch.empty((len(features), n, n), dtype=torch.float32, device=lead.device)
    means = torch.empty((len(features), n), dtype=torch.float64, device=lead.device)
    columns = min(COLUMNS, triton.next_power_of_2(n))
    with on_device(lead):
        _partial_gram_kernel[(programs,)](
            lead,
            on_gpu,
            sums,
            len(features),
            n,
            tiles,
            split,
            ALIGN=align,
            BLOCK_L=triton.next_power_of_2(len(features)),
            **_tile_constants(product_kind(lead.dtype), config),
            **_tile_options(config),
        )
        rows = (len(features) * n,)
        _sum_splits_kernel[rows](
            on_gpu, sums, out, means, n, tiles, split, ALIGN=align, BLOCK=config.block, COLUMNS=columns, **ROW_OPTIONS
        )
        _centre_kernel[rows](means, out, n, COLUMNS=columns, **ROW_OPTIONS)
    return out


def _tile_constants(kind: str, config: TileConfig) -> dict[str, int | str]:
    precision = "tf32" if kind == "tf32" else "ieee"  # no effect on bf16 and fp16
    return {"PRECISION": precision, "BLOCK": config.block, "BLOCK_K": config.block_k}


def _tile_options(config: TileConfig) -> dict[str, int | bool]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


_KINDS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "ieee"}


def _partial_case(dtype: str, config: TileConfig, align: int = 16, single: bool = False) -> AotCase:
    kind = _KINDS[dtype]
    ones = dict.fromkeys(("num_layers", "tiles"), 1) if single else {}
    return AotCase(
        f"partial_gram-{dtype}-{config.block}-a{align}{'-single' if single else ''}",
        _partial_gram_kernel,
        signature={
            "x_ptr": "*fp32" if dtype in ("fp32", "tf32") else f"*{dtype}",
            "table_ptr": "*i64",
            "sums_ptr": "*fp32",
            **{name: "i32" for name in ("num_layers", "n", "tiles", "split") if name not in ones},
        },
        constexprs={**ones, "ALIGN": align, "BLOCK_L": 1 if single else 32, **_tile_constants(kind, config)},
        aligned=("split",),
        options=_tile_options(config),
        mma=kind != "ieee" and config.block >= 64,
        # Tiles below 64 images are too low for the warp-group instructions, not for tensor cores.
        requires=(*((r"MMA",) if kind != "ieee" else ()), *((r"(LDGSTS|LDG)\.\S*128",) if align == 16 else ())),
    )


AOT_CASES = [
    *(_partial_case(dtype, config) for dtype, kind in _KINDS.items() if dtype != "fp16" for config in CONFIGS[kind]),
    _partial_case("fp16", CONFIGS["half"][-1]),
    _partial_case("bf16", CONFIGS["half"][-1], align=2),
    _partial_case("bf16", CONFIGS["half"][-2], align=1),
    _partial_case("tf32", CONFIGS["tf32"][-1], align=1),
    _partial_case("bf16", CONFIGS["half"][1], single=True),
    *(
        AotCase(
            f"sum_splits-{block}",
            _sum_splits_kernel,
            signature={
                "table_ptr": "*i64",
                **dict.fromkeys(("sums_ptr", "gram_ptr"), "*fp32"),
                "means_ptr": "*fp64",
                **dict.fromkeys(("n", "tiles", "split"), "i32"),
            },
            constexprs={"ALIGN": 16, "BLOCK": block, "COLUMNS": columns},
            options=ROW_OPTIONS,
        )
        for block, columns in ((16, 16), (128, COLUMNS))
    ),
    AotCase(
        "centre",
        _centre_kernel,
        signature={"means_ptr": "*fp64", "gram_ptr": "*fp32", "n": "i32"},
        constexprs={"COLUMNS": COLUMNS},
        options=ROW_OPTIONS,
    ),
]
