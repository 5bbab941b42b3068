"""What the numerics tests of the launchers share: where they run, inputs, and the check against the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast

INTERPRETED = triton_backend.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
AGAIN = 0 if INTERPRETED else 5  # the interpreter does one thing after another: nothing can differ
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def check(name: str, args: tuple[Any, ...]) -> None:
    """Right to the project's accuracy rule, and bit-identical in a second run."""
    run, reference = triton_backend.launcher(name), get_op(name).reference
    out = run(*args)
    verdict = judge(out, reference(*upcast(args)), reference(*args))
    assert verdict.ok, verdict
    for _ in range(AGAIN):
        assert torch.equal(run(*args), out), "two runs on the same inputs differ"


def crossed(cases: Iterable[Any], dtypes: list[torch.dtype] = DTYPES) -> list[Any]:
    """Every case with every dtype; in the interpreter, where they differ in casts only, they take turns unless long."""
    return [
        pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}", marks=long_unless(turn % len(dtypes) == number))
        for turn, case in enumerate(cases)
        for number, dtype in enumerate(dtypes)
    ]


def long_unless(quick: bool) -> list[Any]:
    return [] if quick or not INTERPRETED else [pytest.mark.long]


def small_or_all(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    return small if INTERPRETED else {**small, **large}


def product_dtypes() -> list[torch.dtype]:
    """Without bf16 in the interpreter, which gets its matrix products wrong in silence (it multiplies raw bits)."""
    return [dtype for dtype in DTYPES if not (INTERPRETED and dtype == torch.bfloat16)]
