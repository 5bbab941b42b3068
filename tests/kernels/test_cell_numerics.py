"""The Triton kernels of the aligned cells; run on a GPU, or in the interpreter (test_interpreter.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import AGAIN, DEVICE, INTERPRETED, check_tf32, crossed, draw, product_dtypes

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]

# Batch, channels, grid, patch, width, share of hidden cells: one of everything, odd sizes, whole tiles of hidden cells,
# everything hidden, several splits of the cells
SHAPES = [
    (1, 1, (1, 1), 1, 1, None),
    (2, 5, (3, 4), 2, 7, 0.4),
    (1, 12, (9, 15), 1, 33, 0.8),
    (2, 3, (2, 2), 3, 4, 1.0),
    (2, 4, (16, 17), 2, 16, 0.1),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, product_dtypes()))
def test_aligned_cells_and_their_gradient(
    shape: tuple[int, int, tuple[int, int], int, int, float | None], dtype: torch.dtype, channels_last: bool
) -> None:
    forward, backward = arguments(*shape, dtype, channels_last)
    level, weight, _, *rest = forward
    assert_right("align_cells", forward)
    assert_right("align_cells", (level, weight, None, *rest))
    assert_right("align_cells_grad", backward)


def test_tf32_follows_the_switch_of_pytorch() -> None:
    shape = (2, 5, (3, 4), 2, 7, 0.4) if INTERPRETED else (16, 256, (16, 16), 4, 4096, 0.5)
    forward, backward = arguments(*shape, torch.float32, channels_last=False)
    check_tf32("align_cells", forward)
    check_tf32("align_cells_grad", backward, factors=(0, 1, 3))


def arguments(
    batch: int,
    channels: int,
    grid: tuple[int, int],
    patch: int,
    width: int,
    hidden: float | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Those of align_cells and of align_cells_grad."""
    count, depth = grid[0] * grid[1], patch * patch * channels
    make = lambda *size, seed=0: draw(*size, seed=seed).to(DEVICE, dtype)  # noqa: E731
    level = make(batch, channels, grid[0] * patch, grid[1] * patch)
    if channels_last:
        level = level.contiguous(memory_format=torch.channels_last)
    weight, bias, positions = make(width, depth) * depth**-0.5, make(width), make(count, width)
    visible = mask_token = None
    if hidden is not None:
        generator = torch.Generator().manual_seed(0)
        visible = (torch.rand(batch, count, generator=generator) >= hidden).to(DEVICE)
        mask_token = make(width, seed=1)
    forward = level, weight, bias, visible, mask_token, positions, patch
    return forward, (level, weight, visible, make(batch, count, width, seed=2), patch)


def assert_right(name: str, args: tuple[object, ...]) -> None:
    run, reference = triton_backend.launcher(name), get_op(name).reference
    results = [run(*args), reference(*upcast(args)), reference(*args)]
    out, exact, plain = ([x] if isinstance(x, torch.Tensor) else list(x) for x in results)
    verdicts = [judge(*parts) for parts in zip(out, exact, plain, strict=True)]
    assert all(verdict.ok for verdict in verdicts), verdicts
    assert [x.stride() for x in out] == [x.stride() for x in plain]
    for _ in range(AGAIN):
        again = run(*args)
        assert all(map(torch.equal, [again] if isinstance(again, torch.Tensor) else again, out)), "two runs differ"


def test_hidden_cells_are_not_read() -> None:
    level = draw(1, 16, 8, 8).to(DEVICE, torch.float32)
    level[:, :, :4] = float("nan")
    visible = (torch.arange(16, device=DEVICE) >= 8)[None]
    weight, positions, grad = (draw(*s).to(level) for s in ((8, 64), (16, 8), (1, 16, 8)))
    out = triton_backend.launcher("align_cells")(level, weight, None, visible, weight[:, 0].clone(), positions, 2)
    d_level, d_weight = triton_backend.launcher("align_cells_grad")(level, weight, visible, grad, 2)
    assert out.isfinite().all()
    assert d_weight.isfinite().all()
    assert not d_level[:, :, :4].any()
    assert d_level[:, :, 4:].any()
