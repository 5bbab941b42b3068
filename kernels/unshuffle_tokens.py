"""Un-shuffling: kept tokens back at their places, the mask token at all others, positions added (MAE, Section 3).

    out[b, n] = positions[n] + (tokens[b, n]             if n < P
                                tokens[b, P + j]         if n = P + keep[b, j]
                                mask_token               else)

A program makes a tile of rows and columns of the flattened (B * (P + N), D) result. Which token stands at a row is
found by comparing the row with the image's list of kept patches, all of it: k comparisons against D elements that are
moved, on 8 k bytes that the image's programs share in L2. That is cheaper than a launch for the inverse permutation,
and an index that is out of range reads nothing. Each token is read once, the result written once; the positions,
(P + N, D), stay in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device

__all__ = ["AOT_CASES", "unshuffle_tokens"]

TILE = 2048  # elements of a program: 8 a thread; 16 leave the registers on sm_80 where bf16 becomes fp32
WIDEST = 1024  # columns of a tile
KEYS = 512  # comparisons at once: 2 a thread
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _unshuffle_kernel(
    tokens_ptr,  # (B, P + k, D)
    keep_ptr,  # (B, k) int64
    mask_token_ptr,  # (D,)
    positions_ptr,  # (P + N, D)
    out_ptr,  # (B * (P + N), D), out
    num_rows,  # B * (P + N)
    num_places,  # P + N
    num_prefix,  # P
    num_kept,  # k
    width,  # D
    num_col_blocks,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) // num_col_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(0) % num_col_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (col < width)[None, :]
    image = (row // num_places).to(tl.int64)  # [BR]
    place = row % num_places
    patch = place - num_prefix

    source = tl.where(patch < 0, place, -1)  # [BR], row of the image's tokens
    for start in range(0, num_kept, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        listed = (row < num_rows)[:, None] & (j < num_kept)[None, :]
        kept = tl.load(keep_ptr + (image * num_kept)[:, None] + j[None, :], mask=listed, other=-1)  # [BR, BK]
        found = tl.where(listed & (kept == patch[:, None]), num_prefix + j[None, :], -1)
        source = tl.maximum(source, tl.max(found, axis=1))

    at = row.to(tl.int64)[:, None] * width + col[None, :]  # [BR, BD]
    taken = (source >= 0)[:, None]
    from_row = (image * (num_prefix + num_kept) + source)[:, None] * width + col[None, :]
    token = tl.load(tokens_ptr + from_row, mask=inside & taken, other=0.0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + col, mask=col < width, other=0.0).to(tl.float32)  # [BD]
    position = tl.load(positions_ptr + place.to(tl.int64)[:, None] * width + col[None, :], mask=inside, other=0.0)
    total = tl.where(taken, token, mask_token[None, :]) + position.to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _blocks(width: int, num_kept: int) -> dict[str, int]:
    columns = min(WIDEST, triton.next_power_of_2(width))
    rows = max(1, TILE // columns)
    keys = min(triton.next_power_of_2(num_kept), max(16, KEYS // rows))
    return {"BLOCK_R": rows, "BLOCK_D": columns, "BLOCK_K": keys}


def unshuffle_tokens(tokens: Tensor, keep: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    """Launches the kernel; arguments as in `fastmkd.ops.unshuffle_tokens`, all contiguous.

    Args:
        tokens: ``(B, P + k, D)`` float32, bfloat16 or float16.
        keep: ``(B, k)`` int64.
        mask_token: ``(D,)``, in the dtype of `positions`.
        positions: ``(P + N, D)``, in the dtype of `tokens` or float32.

    Returns:
        ``(B, P + N, D)`` in the dtype of `positions`.
    """
    (batch, num_kept), (places, width) = keep.shape, positions.shape
    out = torch.empty((batch, places, width), dtype=positions.dtype, device=tokens.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(width, num_kept)
    num_col_blocks = triton.cdiv(width, blocks["BLOCK_D"])
    grid = (triton.cdiv(batch * places, blocks["BLOCK_R"]) * num_col_blocks,)
    with on_device(tokens):
        _unshuffle_kernel[grid](
            tokens,
            keep,
            mask_token,
            positions,
            out,
            batch * places,
            places,
            tokens.shape[1] - num_kept,
            num_kept,
            width,
            num_col_blocks,
            **blocks,
            **OPTIONS,
        )
    return out


def _case(dtype: str, width: int, wide: str | None = None, num_kept: int = 49, ones: tuple[str, ...] = ()) -> AotCase:
    blocks = _blocks(width, num_kept)
    if triton.cdiv(width, blocks["BLOCK_D"]) == 1:
        ones = (*ones, "num_col_blocks")
    aligned = width % 16 == 0
    ints = ("num_rows", "num_places", "num_prefix", "num_kept", "width", "num_col_blocks")
    return AotCase(
        f"unshuffle-{dtype}-{wide or dtype}-d{width}-k{num_kept}",
        _unshuffle_kernel,
        signature={
            "tokens_ptr": f"*{dtype}",
            "keep_ptr": "*i64",
            **dict.fromkeys(("mask_token_ptr", "positions_ptr", "out_ptr"), f"*{wide or dtype}"),
            **{name: "i32" for name in ints if name not in ones},
        },
        constexprs={**dict.fromkeys(ones, 1), **blocks},
        aligned=("width",) if aligned else (),
        options=OPTIONS,
        # 16 bytes a load and a store wherever the alignment allows them.
        requires=(r"LDG\.E\.128", r"STG\.E\.128") if aligned else (),
    )


# A launch turns integers that equal 1 into compile-time constants: a class token, a single kept patch.
AOT_CASES = [
    *(_case(dtype, 512, ones=("num_prefix",)) for dtype in ("bf16", "fp16", "fp32")),
    _case("bf16", 512, wide="fp32", ones=("num_prefix",)),
    _case("bf16", 100, num_kept=300),
    _case("fp32", 2048, num_kept=1, ones=("num_prefix", "num_kept")),
]
