"""Masked convolution of packed rows: an implicit gather and a matrix product for each tap that is present.

    out[o] = bias + sum_t weight[:, :, t] @ values[taps[o, t]]          taps[o, t] = -1 adds nothing

A program computes BLOCK_M output rows, taken in the given order, times BLOCK_N output channels, and runs over the taps
that any of its rows has, times blocks of input channels. It finds its rows by the table, so no matrix of patches is
written, hidden pixels are never read, and a tap that the whole tile lacks costs nothing (`fastmkd.kernels.taps`).

How the loop is pipelined: one flat loop over (tap, channel block), since a 64-channel layer has a single block a tap
and a pipeline that drained at each tap would never fill. Gathered rows and weights arrive by asynchronous copies, 16
bytes each where the channels allow; the row numbers of a step are loaded into registers during the step before. The
sizes of a layer are compile-time constants: that proves the alignment of a gathered row, for one compilation for each
layer shape.

With few input channels (a stem has 3) a step takes several taps, so that the reduction still fills the tensor core.
Narrow groups are computed as one with a block-diagonal weight; there a NaN or infinity in one channel reaches all
outputs of its bundle, not of its group only. Depthwise layers have kernels of their own, see
`fastmkd.kernels.masked_depthwise`.

Programs that share a row tile are neighbours in launch order, so its rows come from L2 after the first of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device, product_kind
from .masked_depthwise import masked_depthwise
from .taps import MAX_GROUPS, bundle_size, bundled, lowest_bit, present_groups, step_taps

__all__ = ["AOT_CASES", "CONFIGS", "ConvConfig", "choose_config", "masked_conv2d", "tiles"]


class ConvConfig(NamedTuple):
    """Tile of a program: BLOCK_M rows, at most BLOCK_N output channels and BLOCK_K products a step.

    `gather` is the cache that gathered rows go through: ".ca" keeps them in L1, where the other taps of neighbouring
    rows find them; ".cg" goes to L2 each time, and so does Triton 3.6 whatever is asked. `maxnreg` caps the registers
    of a thread, so that one more program fits on a multiprocessor.

    Example:
        >>> ConvConfig("tiny", 16, 16, 16, num_warps=4, num_stages=2).gather
        '.ca'
    """

    name: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    gather: str = ".ca"
    maxnreg: int | None = None


# The static table, to be replaced by measurements; a benchmark sweeps CONFIGS[kind]. "half" is bf16 and fp16, "tf32" is
# fp32 on tensor cores, "ieee" is fp32 on the CUDA cores, whose operands live in registers and so want thin slices.
# Twice as many threads as rows: with fewer, each step would hand its row numbers around through shared memory.
# Every tile fits into the 99 KiB that a block of sm_86, sm_89 and sm_120 has.
CONFIGS: dict[str, dict[str, ConvConfig]] = {
    kind: {config.name: config for config in configs}
    for kind, configs in {
        "half": (
            ConvConfig("large", 128, 128, 64, num_warps=8, num_stages=4),
            ConvConfig("tall", 128, 64, 64, num_warps=8, num_stages=3),
            ConvConfig("small", 64, 64, 64, num_warps=4, num_stages=4),
            ConvConfig("wide", 128, 256, 64, num_warps=8, num_stages=3),
            ConvConfig("pair", 128, 128, 64, num_warps=8, num_stages=3, maxnreg=128),
            ConvConfig("lean", 128, 64, 64, num_warps=4, num_stages=3),
        ),
        "tf32": (
            ConvConfig("large", 128, 128, 32, num_warps=8, num_stages=3),
            ConvConfig("tall", 128, 64, 32, num_warps=8, num_stages=3),
            ConvConfig("small", 64, 64, 32, num_warps=4, num_stages=4),
        ),
        "ieee": (
            ConvConfig("tall", 128, 64, 16, num_warps=8, num_stages=4),
            ConvConfig("small", 32, 32, 16, num_warps=4, num_stages=3),
        ),
    }.items()
}
CHOICE = ("large", "tall", "small")  # the first that fits; the others are for sweeps
FULL_GRID = 128  # programs that give each multiprocessor of a large GPU one; below, smaller tiles spread the work


@triton.jit
def _first_tap(bits, STEP_TAPS: tl.constexpr):
    """The first tap of the lowest group that is left; tap 0, to be ignored, after the last one."""
    return tl.maximum(lowest_bit(bits), 0) * STEP_TAPS


@triton.jit
def _load_sources(table, valid, tap, step, NUM_TAPS: tl.constexpr, STEP_TAPS: tl.constexpr):
    """Input rows of a step: [BM, 1] if it has one tap, else [BM, BK]."""
    if STEP_TAPS == 1:
        source = tl.load(table + tap, mask=valid[:, None], other=-1)
    else:
        exists = valid[:, None] & (tap + step < NUM_TAPS)[None, :]
        source = tl.load(table + tap + step[None, :], mask=exists, other=-1)
    return source


@triton.jit(do_not_specialize=["num_rows"])  # else a batch with one row more would compile anew
def _masked_conv2d_kernel(
    values_ptr,  # (N_in, CIN)
    weight_ptr,  # (T, COUT, CIN_GROUP)
    bias_ptr,  # (COUT) or None
    taps_ptr,  # (N_out, T) int32
    order_ptr,  # (N_out) int32
    out_ptr,  # (N_out, COUT), out
    num_rows,  # N_out
    CIN: tl.constexpr,
    CIN_GROUP: tl.constexpr,
    COUT: tl.constexpr,
    COUT_GROUP: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    STEP_TAPS: tl.constexpr,
    PADDED_STEP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS_GROUP: tl.constexpr = (COUT_GROUP + BLOCK_N - 1) // BLOCK_N
    NUM_BLOCKS: tl.constexpr = CIN // CIN_GROUP * BLOCKS_GROUP
    CHANNEL_STEPS: tl.constexpr = (CIN_GROUP + BLOCK_C - 1) // BLOCK_C
    position = tl.program_id(0) // NUM_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(0) % NUM_BLOCKS // BLOCKS_GROUP
    col = tl.program_id(0) % BLOCKS_GROUP * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_col = group * COUT_GROUP + tl.minimum(col, COUT_GROUP - 1)  # the store drops repeated columns
    valid = position < num_rows
    row = tl.load(order_ptr + position, mask=valid, other=0).to(tl.int64)  # [BM]

    bits, count = present_groups(taps_ptr, row, valid, NUM_TAPS, STEP_TAPS, PADDED_STEP, PADDED_GROUPS)
    k = tl.arange(0, STEP_TAPS * BLOCK_C)
    table = taps_ptr + (row * NUM_TAPS)[:, None]
    group_values = values_ptr + group * CIN_GROUP
    weight_cols = weight_ptr + (safe_col * CIN_GROUP)[None, :]
    tap = _first_tap(bits, STEP_TAPS)
    source = _load_sources(table, valid, tap, k // BLOCK_C, NUM_TAPS, STEP_TAPS)
    start = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(count * CHANNEL_STEPS):
        channel = start + k % BLOCK_C  # [BK]
        rows_at = group_values + source.to(tl.int64) * CIN + channel[None, :]
        weight_at = weight_cols + ((tap + k // BLOCK_C) * (COUT * CIN_GROUP) + channel)[:, None]
        if CIN_GROUP % BLOCK_C == 0 and NUM_TAPS % STEP_TAPS == 0:
            rows = tl.load(rows_at, mask=source >= 0, other=0.0, cache_modifier=GATHER)  # [BM, BK]
            weight = tl.load(weight_at)  # [BK, BN]
        else:
            exists = (channel < CIN_GROUP) & (tap + k // BLOCK_C < NUM_TAPS)
            rows = tl.load(rows_at, mask=(source >= 0) & exists[None, :], other=0.0, cache_modifier=GATHER)
            weight = tl.load(weight_at, mask=exists[:, None], other=0.0)
        acc = tl.dot(rows, weight, acc, input_precision=PRECISION)
        if CHANNEL_STEPS == 1:
            bits &= bits - 1
        else:
            last = start == (CHANNEL_STEPS - 1) * BLOCK_C
            bits = tl.where(last, bits & (bits - 1), bits)
            start = tl.where(last, 0, start + BLOCK_C)
        # Row numbers are loaded a step ahead, into registers: as stages of the pipeline they would halve its depth.
        tap = _first_tap(bits, STEP_TAPS)
        source = _load_sources(table, valid, tap, k // BLOCK_C, NUM_TAPS, STEP_TAPS)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + safe_col).to(tl.float32)[None, :]
    out = out_ptr + (row * COUT)[:, None] + (group * COUT_GROUP + col)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (col < COUT_GROUP)[None, :])


def choose_config(dtype: torch.dtype, rows: int, cout: int, groups: int = 1) -> ConvConfig:
    """The largest tile of the static table that the channels fill and that gives a large GPU enough programs.

    Args:
        dtype: dtype of the values; TF32 follows ``torch.backends.cuda.matmul.fp32_precision``.
        rows: number of output rows, N_out.
        cout: output channels.
        groups: number of groups that are computed apart.

    Returns:
        A `ConvConfig` of `CONFIGS`.

    Example:
        >>> choose_config(torch.bfloat16, rows=50176, cout=128).name
        'large'
        >>> choose_config(torch.bfloat16, rows=200704, cout=64).name
        'tall'
        >>> choose_config(torch.bfloat16, rows=784, cout=512).name
        'small'
    """
    table = CONFIGS[product_kind(dtype)]
    width = cout // groups
    for config in (table[name] for name in CHOICE if name in table):
        programs = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n) * groups
        if config.block_n <= triton.next_power_of_2(width) and programs >= FULL_GRID:
            return config
    return table["small"]


def tiles(kind: str) -> dict[str, ConvConfig]:
    """The tiles that `choose_config` chooses from, by name.

    Args:
        kind: see `fastmkd.kernels.launch.product_kind`.

    Example:
        >>> list(tiles("ieee"))
        ['tall', 'small']
    """
    return {name: CONFIGS[kind][name] for name in CHOICE if name in CONFIGS[kind]}


def _constants(kind: str, config: ConvConfig, cin: int, cout: int, groups: int, num_taps: int) -> dict[str, int | str]:
    cin_group, cout_group = cin // groups, cout // groups
    # A window of more taps than bits takes several taps a step, each with fewer channels: a step stays BLOCK_K wide.
    least = step_taps(num_taps)["STEP_TAPS"]
    block_c = _channel_block(cin_group, max(config.block_k // least, 1))
    # With few channels a step takes several taps; the narrowest step that hides its latency, since the last is padded.
    wanted = 1 if cin_group >= 16 else min(config.block_k, 32) // block_c
    return {
        "CIN": cin,
        "CIN_GROUP": cin_group,
        "COUT": cout,
        "COUT_GROUP": cout_group,
        **step_taps(num_taps, wanted),
        "PRECISION": "tf32" if kind == "tf32" else "ieee",  # no effect on bf16 and fp16
        "GATHER": config.gather,
        "BLOCK_M": config.block_m,
        "BLOCK_N": min(config.block_n, max(16, triton.next_power_of_2(cout_group))),
        "BLOCK_C": block_c,
    }


def _channel_block(cin_group: int, widest: int) -> int:
    """The channels of a step: the widest power of two that wastes at most a tenth more than the narrowest one would."""
    if min(cin_group, widest) < 16:
        return min(triton.next_power_of_2(cin_group), widest)
    blocks = [16 << i for i in range((widest // 16).bit_length())]
    least = min(triton.cdiv(cin_group, b) * b for b in blocks)
    return max(b for b in blocks if triton.cdiv(cin_group, b) * b <= 1.1 * least)


def _options(config: ConvConfig, num_taps: int) -> dict[str, int | bool | None]:
    return {
        "num_warps": config.num_warps,
        # Row numbers of several taps at once go through shared memory too, under Triton 3.6.
        "num_stages": config.num_stages if num_taps <= MAX_GROUPS else min(config.num_stages, 3),
        "maxnreg": config.maxnreg,
        "enable_fp_fusion": True,
    }


def masked_conv2d(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    taps_back: Tensor,
    order: Tensor,
    order_back: Tensor,
    groups: int,
    config: ConvConfig | None = None,
) -> Tensor:
    """Launches the masked convolution; the arguments are already checked.

    Args:
        values: (N_in, Cin) fp32, bf16 or fp16, contiguous.
        weight: (Cout, Cin / groups, kh, kw) of the same dtype, any strides.
        bias: (Cout) of the same dtype, any stride, or None.
        taps: (N_out, kh * kw) int32, contiguous.
        taps_back: the table of the gradient, not used here.
        order: (N_out) int32, contiguous, a permutation of the output rows.
        order_back: the order of the gradient, not used here.
        groups: number of groups.
        config: tile to use instead of the table's, for benchmarks; no effect on depthwise layers.

    Returns:
        (N_out, Cout), accumulated in fp32, in the dtype of values.
    """
    (_, cin), cout, (rows, num_taps) = values.shape, weight.shape[0], taps.shape
    bias = None if bias is None else bias.contiguous()
    if groups == cin == cout:
        return masked_depthwise(values, weight, bias, taps, order)
    bundle = bundle_size(cin // groups, cout // groups, groups)
    outer = groups // bundle
    config = config or choose_config(values.dtype, rows, cout, outer)
    constants = _constants(product_kind(values.dtype), config, cin, cout, outer, num_taps)
    num_blocks = outer * triton.cdiv(cout // outer, constants["BLOCK_N"])
    out = torch.empty((rows, cout), dtype=values.dtype, device=values.device)
    with on_device(values):
        _masked_conv2d_kernel[(triton.cdiv(rows, config.block_m) * num_blocks,)](
            values,
            bundled(weight, groups, bundle),
            bias,
            taps,
            order,
            out,
            rows,
            **constants,
            **_options(config, num_taps),
        )
    return out


_KINDS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "ieee"}


def _aot_case(dtype: str, config: str, cin: int, cout: int, num_taps: int = 9, bias: bool = False) -> AotCase:
    kind = _KINDS[dtype]
    tile = CONFIGS[kind][config]
    rows = ("values_ptr", "weight_ptr", "out_ptr", *(("bias_ptr",) if bias else ()))
    return AotCase(
        f"masked_conv2d-{dtype}-{config}-{cin}x{cout}-t{num_taps}{'-bias' if bias else ''}",
        _masked_conv2d_kernel,
        signature={
            **dict.fromkeys(rows, f"*{dtype if kind == 'half' else 'fp32'}"),
            **dict.fromkeys(("taps_ptr", "order_ptr"), "*i32"),
            "num_rows": "i32",
        },
        constexprs={
            **({} if bias else {"bias_ptr": None}),
            **_constants(kind, tile, cin, cout, groups=1, num_taps=num_taps),
        },
        options=_options(tile, num_taps),
        mma=kind != "ieee",
        # Rows and weights come by asynchronous copies of 16 bytes, wherever a tap has as many channels.
        requires=(r"\bLDGSTS",) if cin >= 16 else (),
        forbids=(r"\bLDGSTS(?!\S*\.128\b)",) if cin >= 16 else (),
    )


AOT_CASES = [
    _aot_case("bf16", "large", 128, 128),
    _aot_case("fp16", "tall", 64, 64, bias=True),
    _aot_case("bf16", "tall", 3, 64, num_taps=49),
    # More taps than bits.
    _aot_case("bf16", "large", 128, 128, num_taps=121),
    _aot_case("tf32", "large", 128, 128, num_taps=64),
    _aot_case("fp32", "small", 128, 128, num_taps=81),
    _aot_case("tf32", "large", 128, 128),
    _aot_case("fp32", "tall", 64, 64),
]
