"""What the masked convolutions share: which taps a tile of rows has, weights of grouped layers, precision.

Rows are processed in an order in which rows with the same taps are neighbours, so a tile skips every tap that all its
rows lack. A kernel steps through groups of neighbouring taps; it reads its part of the table once, keeps the groups
that are present as the bits of one integer, and takes them off that integer from the lowest up. So the main loop has a
known number of steps and no branch, which is what software pipelining needs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BUNDLE_CHANNELS", "MAX_GROUPS", "bundle_size", "bundled", "lowest_bit", "present_groups", "step_taps"]

MAX_GROUPS = 62  # bits of a positive int64
BUNDLE_CHANNELS = 32  # channels to which narrow groups are put together


@triton.jit
def present_groups(
    taps_ptr,
    row,
    valid,
    NUM_TAPS: tl.constexpr,
    STEP_TAPS: tl.constexpr,
    PADDED_STEP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
):
    """Which groups of STEP_TAPS taps some row of a tile has: as the bits of an int64, and their number.

    `row` (int64) and `valid` are [BM]; `step_taps` gives the constants.
    """
    lane = tl.arange(0, PADDED_GROUPS * PADDED_STEP)
    tap = lane // PADDED_STEP * STEP_TAPS + lane % PADDED_STEP
    is_tap = (lane % PADDED_STEP < STEP_TAPS) & (tap < NUM_TAPS)
    at = taps_ptr + (row * NUM_TAPS)[:, None] + tap[None, :]
    source = tl.load(at, mask=valid[:, None] & is_tap[None, :], other=-1)  # [BM, taps]
    in_tile = tl.reshape(tl.max(source, axis=0), (PADDED_GROUPS, PADDED_STEP))
    present = (tl.max(in_tile, axis=1) >= 0).to(tl.int64)  # [groups]
    bits = tl.sum(present << tl.arange(0, PADDED_GROUPS).to(tl.int64), axis=0)
    return bits, tl.sum(present, axis=0).to(tl.int32)


@triton.jit
def lowest_bit(bits):
    """Number of the lowest bit that is set: the exponent of the power of two that it stands for."""
    return (((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)) >> 23) - 127


def step_taps(num_taps: int, wanted: int = 1) -> dict[str, int]:
    """The constants of `present_groups`: how many taps a kernel takes in one step.

    Args:
        num_taps: kh * kw.
        wanted: taps in a step; doubled until the groups of taps fit into the bits of an integer.

    Example:
        >>> step_taps(9)
        {'NUM_TAPS': 9, 'STEP_TAPS': 1, 'PADDED_STEP': 1, 'PADDED_GROUPS': 16}
        >>> step_taps(49, wanted=7)
        {'NUM_TAPS': 49, 'STEP_TAPS': 7, 'PADDED_STEP': 8, 'PADDED_GROUPS': 8}
        >>> step_taps(121)["STEP_TAPS"]
        2
    """
    step = wanted
    while triton.cdiv(num_taps, step) > MAX_GROUPS:
        step *= 2
    return {
        "NUM_TAPS": num_taps,
        "STEP_TAPS": step,
        "PADDED_STEP": triton.next_power_of_2(step),
        "PADDED_GROUPS": triton.next_power_of_2(triton.cdiv(num_taps, step)),
    }


def bundle_size(cin_group: int, cout_group: int, groups: int) -> int:
    """How many groups to compute as one, so that narrow groups fill a tile.

    A tensor core works on 16 channels and memory is read in sectors of 32 bytes; a group of 4 channels would waste most
    of both. A bundle's weight is block-diagonal: more multiplications, but in layers that wait for memory.

    Args:
        cin_group: input channels of a group.
        cout_group: output channels of a group.
        groups: number of groups.

    Returns:
        A divisor of `groups`.

    Example:
        >>> bundle_size(4, 4, 32), bundle_size(64, 64, 1), bundle_size(24, 24, 6)
        (8, 1, 1)
    """
    widest = max(1, BUNDLE_CHANNELS // max(cin_group, cout_group))
    return max(size for size in range(1, min(widest, groups) + 1) if groups % size == 0)


def bundled(weight: Tensor, groups: int, bundle: int) -> Tensor:
    """Weight with the taps first and input channels last, narrow groups put together block-diagonally.

    Each tap's matrix then has its reduction index contiguous, the layout that wgmma wants (of TF32 it takes no other),
    and comes in 16-byte copies. A call repacks once; that is one pass over a tensor far smaller than the rows.

    Args:
        weight: (Cout, Cin / groups, kh, kw), any strides.
        groups: number of groups.
        bundle: groups put together.

    Returns:
        (kh * kw, Cout, bundle * Cin / groups), contiguous.

    Example:
        >>> import torch
        >>> bundled(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1), groups=2, bundle=2)
        tensor([[[2., 0.],
                 [0., 3.]]])
    """
    if bundle == 1:
        return weight.flatten(2).permute(2, 0, 1).contiguous()
    blocks = weight.flatten(2).unflatten(0, (groups // bundle, bundle, -1))  # (g / b, b, Cout / g, Cin / g, T)
    outer, _, cout_group, cin_group, num_taps = blocks.shape
    out = weight.new_zeros(num_taps, outer, bundle, cout_group, bundle, cin_group)
    out.diagonal(dim1=2, dim2=4).copy_(blocks.permute(4, 0, 2, 3, 1))  # both (T, g / b, Cout / g, Cin / g, b)
    return out.view(num_taps, -1, bundle * cin_group)
