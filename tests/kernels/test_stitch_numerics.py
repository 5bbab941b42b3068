"""What the Triton kernel of stitch_tokens computes; run on a GPU, or in the interpreter (test_interpreter.py)."""

from __future__ import annotations

import pytest
import torch
from numerics import DEVICE, INTERPRETED, check, crossed, draw

from fastmkd.ops import triton as triton_backend

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]

SHAPES = [(1, 1, 1), (3, 5, 8), (2, 9, 100), (5, 7, 512), (1, 3, 2051)]


def arguments(batch: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    student, teacher, position = draw(batch, tokens, width), draw(batch, tokens, width, seed=1), draw(tokens, width)
    mask = draw(batch, tokens) > 0
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), mask.to(DEVICE), position.to(DEVICE, dtype)


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES))
def test_stitch_tokens(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check("stitch_tokens", arguments(*shape, dtype))


def test_tokens_that_are_not_taken_are_not_read() -> None:
    student, teacher, mask, position = arguments(3, 7, 40)
    run = triton_backend.launcher("stitch_tokens")
    expected = run(student, teacher, mask, position)
    student, teacher = (
        student.masked_fill(mask[..., None], float("nan")),
        teacher.masked_fill(~mask[..., None], torch.nan),
    )
    assert torch.equal(run(student, teacher, mask, position), expected)
