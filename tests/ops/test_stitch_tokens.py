"""What the operator under `stitch_tokens` refuses beyond what every op is tested for."""

from __future__ import annotations

import pytest
import torch

import fastmkd.ops  # noqa: F401  registers the operator


def test_stitching_takes_bool_for_the_choice_alone() -> None:
    student, choice = torch.zeros(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"teacher has dtype torch\.bool but student has torch\.float32"):
        torch.ops.fastmkd.stitch_tokens(student, student.bool(), choice, torch.zeros(5, 8))
