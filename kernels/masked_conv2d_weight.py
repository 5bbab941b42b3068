"""Weight gradient of the masked convolution: for each tap a product of gathered rows, split over the rows.

    grad_weight[:, :, t] = sum_o grad[o] values[taps[o, t]]^T          taps[o, t] = -1 adds nothing

The result is small and the sum long, so the rows, in the given order, are cut into splits. A program takes one tap, a
split and a block of (output channels) x (input channels); BLOCK_K rows a step, and only the steps in which some row has
the tap. It finds those first and keeps them as the bits of an integer (`fastmkd.kernels.taps`), so its main loop is
pipelined like that of `fastmkd.kernels.masked_conv2d`: two pointers deep, order -> table -> rows, hence row numbers are
loaded two steps ahead and table entries one.

A second launch adds the splits up in a fixed order and writes the layout and dtype of the weight: no atomics, the same
bits each time. With few input channels a program takes several taps; narrow groups are computed as one and the second
launch keeps the diagonal blocks; depthwise partial sums come from `fastmkd.kernels.masked_depthwise`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device, product_kind
from .masked_depthwise import depthwise_weight_partials
from .taps import bundle_size, lowest_bit

__all__ = ["AOT_CASES", "CONFIGS", "WeightConfig", "choose_config", "masked_conv2d_weight", "tiles"]


class WeightConfig(NamedTuple):
    """Tile of a program: at most BLOCK_M output and BLOCK_N input channels, BLOCK_K rows a step, `steps` in a split.

    Example:
        >>> WeightConfig("tiny", 16, 16, 16, steps=2, num_warps=4, num_stages=2).steps
        2
    """

    name: str
    block_m: int
    block_n: int
    block_k: int
    steps: int  # at most 62, the bits of a positive int64
    num_warps: int
    num_stages: int


# The static table, to be replaced by measurements; kinds as in `fastmkd.kernels.masked_conv2d`.
CONFIGS: dict[str, tuple[WeightConfig, ...]] = {
    "half": (
        WeightConfig("large", 128, 128, 64, steps=32, num_warps=8, num_stages=3),
        WeightConfig("small", 64, 64, 64, steps=32, num_warps=4, num_stages=4),
    ),
    "tf32": (
        WeightConfig("large", 128, 128, 32, steps=32, num_warps=8, num_stages=3),
        WeightConfig("small", 64, 64, 32, steps=32, num_warps=4, num_stages=4),
    ),
    "ieee": (
        WeightConfig("large", 64, 64, 16, steps=32, num_warps=4, num_stages=3),
        WeightConfig("small", 32, 32, 16, steps=32, num_warps=4, num_stages=3),
    ),
}
FULL_GRID = 256  # programs below which a split gets fewer steps
LEAST_STEPS = 8  # shorter splits would spend more on their partial sums than on products
SUM_TILE = 4096  # partial sums that a program of the second launch holds at once
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _load_row(order_ptr, first, bits, num_rows, BLOCK_K: tl.constexpr):
    """Output rows of the lowest step that is left, -1 beyond the last row; of any step when none is left: [BK]."""
    position = first + tl.maximum(lowest_bit(bits), 0) * BLOCK_K + tl.arange(0, BLOCK_K)
    return tl.load(order_ptr + position, mask=position < num_rows, other=-1)


@triton.jit
def _load_source(taps_ptr, row, tap, NUM_TAPS: tl.constexpr, STEP_TAPS: tl.constexpr):
    """Input rows of output rows under taps: [BK, 1] for one tap, else [BK, BN]."""
    table = taps_ptr + (row.to(tl.int64) * NUM_TAPS)[:, None]
    if STEP_TAPS == 1:
        source = tl.load(table + tap, mask=(row >= 0)[:, None], other=-1)
    else:
        source = tl.load(table + tap[None, :], mask=(row >= 0)[:, None] & (tap < NUM_TAPS)[None, :], other=-1)
    return source


@triton.jit(do_not_specialize=["num_rows"])
def _masked_conv2d_weight_kernel(
    values_ptr,  # (N_in, CIN)
    grad_ptr,  # (N_out, COUT)
    taps_ptr,  # (N_out, T) int32
    order_ptr,  # (N_out) int32
    partial_ptr,  # (S, T, COUT, CIN_GROUP) fp32, out
    num_rows,  # N_out
    CIN: tl.constexpr,
    CIN_GROUP: tl.constexpr,
    COUT: tl.constexpr,
    COUT_GROUP: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    STEP_TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ROW_BLOCKS: tl.constexpr = (COUT_GROUP + BLOCK_M - 1) // BLOCK_M
    COL_BLOCKS: tl.constexpr = (CIN_GROUP + BLOCK_C - 1) // BLOCK_C
    TAP_BLOCKS: tl.constexpr = (NUM_TAPS + STEP_TAPS - 1) // STEP_TAPS
    # Programs of one split are neighbours in launch order: its rows come from L2 after the first of them.
    block = tl.program_id(0)
    col_block = block % COL_BLOCKS
    row_block = block // COL_BLOCKS % ROW_BLOCKS
    group = block // (COL_BLOCKS * ROW_BLOCKS) % (CIN // CIN_GROUP)
    first_tap = block // (COL_BLOCKS * ROW_BLOCKS * (CIN // CIN_GROUP)) % TAP_BLOCKS * STEP_TAPS
    split = block // (COL_BLOCKS * ROW_BLOCKS * (CIN // CIN_GROUP) * TAP_BLOCKS)
    first = split * (STEPS * BLOCK_K)

    out_channel = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, STEP_TAPS * BLOCK_C)
    in_channel = col_block * BLOCK_C + lane % BLOCK_C
    tap = first_tap if STEP_TAPS == 1 else first_tap + lane // BLOCK_C  # [BN]
    is_out = (out_channel < COUT_GROUP)[:, None]
    is_in = (in_channel < CIN_GROUP)[None, :]
    grad_cols = grad_ptr + group * COUT_GROUP + out_channel[:, None]
    values_cols = values_ptr + group * CIN_GROUP + in_channel[None, :]

    position = first + tl.arange(0, STEPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [steps, BK]
    used = position < num_rows
    if STEP_TAPS == 1:
        row = tl.load(order_ptr + position, mask=used, other=0).to(tl.int64)
        used = tl.load(taps_ptr + row * NUM_TAPS + first_tap, mask=used, other=-1) >= 0
    step_used = tl.max(used.to(tl.int32), axis=1).to(tl.int64)  # [steps]
    bits = tl.sum(step_used << tl.arange(0, STEPS).to(tl.int64), axis=0)
    count = tl.sum(step_used, axis=0).to(tl.int32)

    row = _load_row(order_ptr, first, bits, num_rows, BLOCK_K)
    source = _load_source(taps_ptr, row, tap, NUM_TAPS, STEP_TAPS)
    next_row = _load_row(order_ptr, first, bits & (bits - 1), num_rows, BLOCK_K)
    acc = tl.zeros((BLOCK_M, STEP_TAPS * BLOCK_C), dtype=tl.float32)
    for _ in range(count):
        grad_at = grad_cols + (row.to(tl.int64) * COUT)[None, :]
        grad = tl.load(grad_at, mask=(row >= 0)[None, :] & is_out, other=0.0)  # [BM, BK]
        rows_at = values_cols + source.to(tl.int64) * CIN
        rows = tl.load(rows_at, mask=(source >= 0) & is_in, other=0.0)  # [BK, BN]
        acc = tl.dot(grad, rows, acc, input_precision=PRECISION)
        # Loaded ahead, into registers: as stages of the pipeline they would halve its depth. `row` is loaded anew,
        # since a value handed on for two steps would keep the loop from being pipelined at all.
        bits &= bits - 1
        row = _load_row(order_ptr, first, bits, num_rows, BLOCK_K)
        source = _load_source(taps_ptr, next_row, tap, NUM_TAPS, STEP_TAPS)
        next_row = _load_row(order_ptr, first, bits & (bits - 1), num_rows, BLOCK_K)

    matrix = (split.to(tl.int64) * NUM_TAPS + tap) * (COUT * CIN_GROUP)
    weight = (group * COUT_GROUP + out_channel)[:, None] * CIN_GROUP + in_channel[None, :]
    if STEP_TAPS == 1:
        tl.store(partial_ptr + matrix + weight, acc, mask=is_out & is_in)
    else:
        tl.store(partial_ptr + matrix[None, :] + weight, acc, mask=is_out & is_in & (tap < NUM_TAPS)[None, :])


@triton.jit(do_not_specialize=["num_splits", "cout"])
def _sum_splits_kernel(
    partial_ptr,  # (S, T, Cout, BUNDLE * CIN_GROUP) fp32
    out_ptr,  # (Cout, CIN_GROUP, T), out
    num_splits,
    cout,
    NUM_TAPS: tl.constexpr,
    CIN_GROUP: tl.constexpr,
    COUT_GROUP: tl.constexpr,
    BUNDLE: tl.constexpr,
    PADDED_TAPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # output channel * CIN_GROUP + input channel of its group
    tap = tl.arange(0, PADDED_TAPS)
    exists = (tap < NUM_TAPS)[:, None] & (pair < cout * CIN_GROUP)[None, :]  # [taps, pairs]
    out_channel = pair // CIN_GROUP
    col = out_channel // COUT_GROUP % BUNDLE * CIN_GROUP + pair % CIN_GROUP
    matrix = cout.to(tl.int64) * (BUNDLE * CIN_GROUP)
    weight = tap[:, None] * matrix + (out_channel * (BUNDLE * CIN_GROUP) + col)[None, :]
    acc = tl.zeros((BLOCK_S, PADDED_TAPS, BLOCK), dtype=tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = partial_ptr + (split * (NUM_TAPS * matrix))[:, None, None] + weight[None, :, :]
        acc += tl.load(at, mask=(split < num_splits)[:, None, None] & exists[None, :, :], other=0.0)
    out = out_ptr + (pair.to(tl.int64) * NUM_TAPS)[None, :] + tap[:, None]
    tl.store(out, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=exists)


def choose_config(
    dtype: torch.dtype, rows: int, cin: int, cout: int, groups: int = 1, num_taps: int = 9
) -> WeightConfig:
    """The tile that the channels fill, with the longest splits that still give a large GPU enough programs.

    Args:
        dtype: dtype of the values; TF32 follows ``torch.backends.cuda.matmul.fp32_precision``.
        rows: number of output rows, N_out.
        cin: input channels.
        cout: output channels.
        groups: number of groups that are computed apart.
        num_taps: kh * kw.

    Returns:
        A `WeightConfig` of `CONFIGS`, or one of them with fewer steps.

    Example:
        >>> choose_config(torch.bfloat16, rows=50176, cin=128, cout=128)[:1]
        ('large',)
        >>> choose_config(torch.bfloat16, rows=3136, cin=512, cout=512).steps
        32
    """
    large, small = CONFIGS[product_kind(dtype)]
    config = large if min(cin, cout) // groups >= large.block_n else small
    blocks = triton.cdiv(cin // groups, config.block_n) * triton.cdiv(cout // groups, config.block_m) * groups
    steps = config.steps
    while steps > LEAST_STEPS and blocks * num_taps * triton.cdiv(rows, steps * config.block_k) < FULL_GRID:
        steps //= 2
    return config._replace(steps=steps)


def tiles(kind: str) -> dict[str, WeightConfig]:
    """The tiles that `choose_config` chooses from, by name.

    Args:
        kind: see `fastmkd.kernels.launch.product_kind`.

    Example:
        >>> list(tiles("ieee"))
        ['large', 'small']
    """
    return {config.name: config for config in CONFIGS[kind]}


def _constants(
    kind: str, config: WeightConfig, cin: int, cout: int, groups: int, num_taps: int
) -> dict[str, int | str]:
    cin_group, cout_group = cin // groups, cout // groups
    block_c = min(config.block_n, triton.next_power_of_2(cin_group))
    # With few input channels a program takes several taps, 16 columns at least.
    several = (
        max(16 // block_c, min(config.block_n // block_c, triton.next_power_of_2(num_taps))) if block_c < 16 else 1
    )
    return {
        "CIN": cin,
        "CIN_GROUP": cin_group,
        "COUT": cout,
        "COUT_GROUP": cout_group,
        "NUM_TAPS": num_taps,
        "STEP_TAPS": several,
        "STEPS": config.steps,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",  # no effect on bf16 and fp16
        "BLOCK_M": min(config.block_m, max(16, triton.next_power_of_2(cout_group))),
        "BLOCK_C": block_c,
        "BLOCK_K": config.block_k,
    }


def _options(config: WeightConfig) -> dict[str, int | bool]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def _sum_constants(num_taps: int, cin_group: int, cout_group: int, bundle: int) -> dict[str, int]:
    padded = triton.next_power_of_2(num_taps)
    block = min(32, max(4, SUM_TILE // 8 // padded))
    return {
        "NUM_TAPS": num_taps,
        "CIN_GROUP": cin_group,
        "COUT_GROUP": cout_group,
        "BUNDLE": bundle,
        "PADDED_TAPS": padded,
        "BLOCK_S": max(1, SUM_TILE // (padded * block)),
        "BLOCK": block,
    }


def masked_conv2d_weight(
    values: Tensor,
    grad: Tensor,
    taps: Tensor,
    order: Tensor,
    kh: int,
    kw: int,
    groups: int,
    config: WeightConfig | None = None,
) -> Tensor:
    """Launches the weight gradient; the arguments are already checked.

    Args:
        values: (N_in, Cin) fp32, bf16 or fp16, contiguous.
        grad: (N_out, Cout) of the same dtype, contiguous.
        taps: (N_out, kh * kw) int32, contiguous.
        order: (N_out) int32, contiguous, a permutation of the output rows.
        kh: rows of the window.
        kw: columns of the window.
        groups: number of groups.
        config: tile to use instead of the table's, for benchmarks; no effect on depthwise layers.

    Returns:
        (Cout, Cin / groups, kh, kw), accumulated in fp32, in the dtype of values.
    """
    cin, cout, num_taps = values.shape[1], grad.shape[1], kh * kw
    if groups == cin == cout:
        bundle = 1
        partial = depthwise_weight_partials(values, grad, taps, order, kh, kw)
    else:
        bundle = bundle_size(cin // groups, cout // groups, groups)
        partial = _partials(values, grad, taps, order, groups // bundle, config)
    out = torch.empty((cout, cin // groups, kh, kw), dtype=values.dtype, device=values.device)
    constants = _sum_constants(num_taps, cin // groups, cout // groups, bundle)
    with on_device(values):
        _sum_splits_kernel[(triton.cdiv(cout * (cin // groups), constants["BLOCK"]),)](
            partial, out, partial.shape[0], cout, **constants, **SUM_OPTIONS
        )
    return out


def _partials(
    values: Tensor, grad: Tensor, taps: Tensor, order: Tensor, groups: int, config: WeightConfig | None
) -> Tensor:
    """The sums of each split, (S, T, Cout, Cin / groups) fp32."""
    cin, (rows, cout), num_taps = values.shape[1], grad.shape, taps.shape[1]
    config = config or choose_config(values.dtype, rows, cin, cout, groups, num_taps)
    constants = _constants(product_kind(values.dtype), config, cin, cout, groups, num_taps)
    splits = triton.cdiv(rows, config.steps * config.block_k)
    blocks = (
        triton.cdiv(cin // groups, constants["BLOCK_C"])
        * triton.cdiv(cout // groups, constants["BLOCK_M"])
        * triton.cdiv(num_taps, constants["STEP_TAPS"])
        * groups
    )
    partial = torch.empty((splits, num_taps, cout, cin // groups), dtype=torch.float32, device=values.device)
    with on_device(values):
        _masked_conv2d_weight_kernel[(splits * blocks,)](
            values, grad, taps, order, partial, rows, **constants, **_options(config)
        )
    return partial


_KINDS = {"bf16": "half", "tf32": "tf32", "fp32": "ieee"}


def _aot_case(dtype: str, channels: int) -> AotCase:
    kind = _KINDS[dtype]
    config = CONFIGS[kind][0]
    return AotCase(
        f"masked_conv2d_weight-{dtype}-{config.name}-{channels}",
        _masked_conv2d_weight_kernel,
        signature={
            **dict.fromkeys(("values_ptr", "grad_ptr"), f"*{dtype if kind == 'half' else 'fp32'}"),
            **dict.fromkeys(("taps_ptr", "order_ptr"), "*i32"),
            "partial_ptr": "*fp32",
            "num_rows": "i32",
        },
        constexprs=_constants(kind, config, channels, channels, groups=1, num_taps=9),
        options=_options(config),
        mma=kind != "ieee",
        requires=(r"\bLDGSTS",),
        # wgmma takes TF32 with the rows innermost only, so there the copies transpose, 4 bytes each.
        forbids=(r"\bLDGSTS(?!\S*\.128\b)",) if kind == "half" else (),
    )


AOT_CASES = [
    _aot_case("bf16", 128),
    _aot_case("tf32", 128),
    _aot_case("fp32", 128),
    AotCase(
        "sum_splits-bf16",
        _sum_splits_kernel,
        signature={"partial_ptr": "*fp32", "out_ptr": "*bf16", "num_splits": "i32", "cout": "i32"},
        constexprs=_sum_constants(num_taps=9, cin_group=64, cout_group=64, bundle=1),
        options=SUM_OPTIONS,
    ),
]
