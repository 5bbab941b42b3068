"""Stitching: each token from the student or the teacher, with its position added (DPK, Section 2.2).

    out[b, n] = (teacher[b, n] if from_teacher[b, n] else student[b, n]) + position[n]

A program takes a tile of rows and columns of the flattened (B * N, d) tokens. Both sources are read under complementary
masks that are the same for a whole row, so a row costs the bytes of one of them, and one write: 2 passes over the
tokens where a select and an addition on their own make 5. The positions, (N, d), stay in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, on_device

__all__ = ["AOT_CASES", "stitch_tokens"]

TILE = 2048  # elements of a program: 16 a thread
WIDEST = 1024  # columns of a tile
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _stitch_kernel(
    student_ptr,  # (B * N, d)
    teacher_ptr,  # (B * N, d)
    mask_ptr,  # (B * N), True = the teacher's
    position_ptr,  # (N, d)
    out_ptr,  # (B * N, d), out
    num_rows,  # B * N
    num_tokens,  # N
    width,  # d
    num_col_blocks,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) // num_col_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(0) % num_col_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (col < width)[None, :]
    from_teacher = tl.load(mask_ptr + row, mask=row < num_rows, other=0)[:, None] != 0  # [BR, 1]
    at = row.to(tl.int64)[:, None] * width + col[None, :]  # [BR, BD]
    student = tl.load(student_ptr + at, mask=inside & (from_teacher == 0), other=0.0)
    teacher = tl.load(teacher_ptr + at, mask=inside & from_teacher, other=0.0)
    place = (row % num_tokens).to(tl.int64)[:, None] * width + col[None, :]
    position = tl.load(position_ptr + place, mask=inside, other=0.0)
    total = tl.where(from_teacher, teacher, student).to(tl.float32) + position.to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _blocks(width: int) -> dict[str, int]:
    columns = min(WIDEST, triton.next_power_of_2(width))
    return {"BLOCK_R": max(1, TILE // columns), "BLOCK_D": columns}


def stitch_tokens(student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor) -> Tensor:
    """Launches the kernel; arguments as in `fastmkd.ops.stitch_tokens`, all contiguous.

    Args:
        student: ``(B, N, d)`` float32, bfloat16 or float16.
        teacher: ``(B, N, d)``.
        from_teacher: ``(B, N)`` bool.
        position: ``(N, d)``.

    Returns:
        ``(B, N, d)``.
    """
    batch, tokens, width = student.shape
    out = torch.empty_like(student)
    if out.numel() == 0:
        return out
    blocks = _blocks(width)
    num_col_blocks = triton.cdiv(width, blocks["BLOCK_D"])
    grid = (triton.cdiv(batch * tokens, blocks["BLOCK_R"]) * num_col_blocks,)
    with on_device(student):
        _stitch_kernel[grid](
            student,
            teacher,
            from_teacher.view(torch.uint8),
            position,
            out,
            batch * tokens,
            tokens,
            width,
            num_col_blocks,
            **blocks,
            **OPTIONS,
        )
    return out


def _case(dtype: str, width: int) -> AotCase:
    blocks = _blocks(width)
    one = {"num_col_blocks": 1} if triton.cdiv(width, blocks["BLOCK_D"]) == 1 else {}
    pointers = ("student_ptr", "teacher_ptr", "position_ptr", "out_ptr")
    aligned = width % 16 == 0
    return AotCase(
        f"stitch-{dtype}-d{width}",
        _stitch_kernel,
        signature={
            **dict.fromkeys(pointers, f"*{dtype}"),
            "mask_ptr": "*u8",
            **{name: "i32" for name in ("num_rows", "num_tokens", "width", "num_col_blocks") if name not in one},
        },
        constexprs={**one, **blocks},
        aligned=("width",) if aligned else (),
        options=OPTIONS,
        # 16 bytes a load and a store wherever the alignment allows them.
        requires=(r"LDG\.E\.128", r"STG\.E\.128") if aligned else (),
    )


AOT_CASES = [*(_case(dtype, 512) for dtype in ("bf16", "fp16", "fp32")), _case("bf16", 100), _case("fp32", 2048)]
