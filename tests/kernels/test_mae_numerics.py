"""The Triton kernels of a masked autoencoder's two ends; run on a GPU, or in the interpreter (test_interpreter.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import AGAIN, DEVICE, INTERPRETED, check, crossed, draw

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]

# Batch, prefix tokens, patches, kept, width: everything 1, several blocks of keys, several blocks of columns
PLACES = [(1, 0, 1, 1, 1), (3, 1, 8, 3, 8), (2, 5, 300, 200, 20), (1, 1, 9, 9, 1100), (2, 1, 6, 1, 512)]


def tokens(batch: int, prefix: int, patches: int, kept: int, width: int, dtype: torch.dtype, wide: torch.dtype) -> Any:
    keep = draw(batch, patches, seed=1).argsort(1)[:, :kept].contiguous()
    parts = (draw(batch, prefix + kept, width).to(dtype), keep, draw(width).to(wide), draw(prefix + patches, width))
    return tuple(t.to(DEVICE, wide) if i == 3 else t.to(DEVICE) for i, t in enumerate(parts))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), crossed(PLACES))
def test_unshuffle_tokens(shape: tuple[int, ...], dtype: torch.dtype, wide: bool) -> None:
    check("unshuffle_tokens", tokens(*shape, dtype, torch.float32 if wide else dtype))


# Batch, channels, grid, patch, hidden: gray, several tiles, more channels than a line has pixels, one patch
PATCHES = [
    (2, 3, (3, 2), (4, 6), 4),
    (1, 1, (2, 2), (5, 7), 3),
    (1, 7, (2, 1), (3, 2), 2),
    (1, 3, (1, 2), (24, 20), 1),
]


def patches(
    batch: int,
    channels: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    hidden: int,
    dtype: torch.dtype = torch.float32,
    image_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    images = draw(batch, channels, grid[0] * patch[0], grid[1] * patch[1]) + 0.5
    prediction = draw(batch, hidden, patch[0] * patch[1] * channels)
    numbers = draw(batch, grid[0] * grid[1], seed=1).argsort(1)[:, :hidden].contiguous()
    return prediction.to(DEVICE, dtype), images.to(DEVICE, image_dtype), numbers.to(DEVICE)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), crossed(PATCHES))
def test_masked_patch_loss(shape: tuple[Any, ...], dtype: torch.dtype, normalize: bool) -> None:
    run, reference = triton_backend.launcher("masked_patch_loss"), get_op("masked_patch_loss").reference
    for image_dtype in {dtype, torch.float32}:
        args = (*patches(*shape, dtype, image_dtype), *shape[3], normalize)
        out, exact, plain = run(*args), reference(*upcast(args)), reference(*args)
        verdicts = [judge(*parts) for parts in zip(out, exact, plain, strict=True)]
        assert all(verdict.ok for verdict in verdicts), verdicts
        for _ in range(AGAIN):
            assert all(map(torch.equal, run(*args), out)), "two runs on the same inputs differ"


@pytest.mark.parametrize(("shape", "dtype"), crossed(PATCHES))
def test_masked_patch_loss_grad(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    inputs = patches(*shape, dtype)
    stats = (draw(*inputs[2].shape, 2).abs() + 0.5).to(DEVICE, torch.float32)
    check("masked_patch_loss_grad", (*inputs, stats, torch.tensor(-1.5, device=DEVICE), *shape[3]))


def test_a_flat_patch_has_no_variance() -> None:
    images = torch.full((1, 3, 8, 8), 0.3, device=DEVICE)
    run = triton_backend.launcher("masked_patch_loss")
    loss, stats = run(torch.zeros(1, 1, 48, device=DEVICE), images, torch.tensor([[2]], device=DEVICE), 4, 4, True)
    assert loss == 0
    torch.testing.assert_close(stats.flatten().tolist(), [0.3, 1e3])


def test_visible_patches_are_not_read() -> None:
    prediction, images, hidden = patches(2, 3, (3, 3), (4, 4), 4)
    rows = torch.full((2, 9), torch.nan, device=DEVICE).scatter(1, hidden, 0.0).view(2, 1, 3, 3)
    poisoned = images + torch.nn.functional.interpolate(rows, scale_factor=4)
    run = triton_backend.launcher("masked_patch_loss")
    outputs = [run(prediction, x, hidden, 4, 4, True) for x in (images, poisoned)]
    assert all(map(torch.equal, *outputs))
