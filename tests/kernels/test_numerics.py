"""What the Triton launchers compute, against the ops' references.

With a GPU these tests run on it. Without one, test_interpreter.py runs this same file in a child session with
``TRITON_INTERPRET=1``, where the launchers take CPU tensors and kernels run as NumPy: the small samples only, and no
bf16 in patch_embed, whose products the interpreter gets wrong in silence (it multiplies raw bits).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    check,
    check_tf32,
    crossed,
    draw,
    long_unless,
    product_dtypes,
    small_or_all,
)
from torch import Tensor

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast
from fastmkd.ops.registry import Sample
from fastmkd.ops.select_tokens import resize

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]


def saliency_args(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    prefix: int,
    patches: int,
    dim: int,
    whole: bool = False,
    spread: float = 1,
) -> tuple[Any, ...]:
    """Arguments of cls_saliency, k being a view into qkv as in timm; `whole` is include_prefix."""
    qkv = (draw(batch, prefix + patches, 3, heads, dim) * spread).to(DEVICE, dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, 0], k, prefix, dim**-0.5, whole


def map_args(scores: Tensor, k: int, grid: tuple[int, int], target: tuple[int, int] | None = None) -> tuple[Any, ...]:
    return scores.to(DEVICE, torch.float32), k, *grid, *(target or grid)


def patch_args(
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    patch: tuple[int, int],
    dim: int,
    k: int,
    stride: tuple[int, int] | None = None,
    bias: bool = True,
    pos: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Arguments of patch_embed; size is (B, C, H, W)."""
    stride = stride or patch
    n = ((size[2] - patch[0]) // stride[0] + 1) * ((size[3] - patch[1]) // stride[1] + 1)
    weight = draw(dim, size[1], *patch) * (size[1] * patch[0] * patch[1]) ** -0.5
    keep = torch.rand(size[0], n, generator=torch.Generator().manual_seed(n)).argsort(1)[:, :k]
    positions = None if pos is None else draw(n, dim).to(DEVICE, pos)
    return (
        draw(*size).to(DEVICE, dtype),
        weight.to(DEVICE, dtype),
        draw(dim).to(DEVICE, dtype) if bias else None,
        positions,
        keep.contiguous().to(DEVICE),
        *stride,
    )


SALIENCY = {
    "one_of_everything": {"batch": 1, "heads": 1, "prefix": 1, "patches": 1, "dim": 16},
    "tiny_head": {"batch": 2, "heads": 3, "prefix": 1, "patches": 5, "dim": 8},
    "unaligned_head": {"batch": 1, "heads": 2, "prefix": 2, "patches": 17, "dim": 17},
    "head_of_24": {"batch": 2, "heads": 3, "prefix": 1, "patches": 49, "dim": 24},
    "two_key_blocks": {"batch": 1, "heads": 2, "prefix": 1, "patches": 197, "dim": 64},
    "prefix_in_softmax": {"batch": 2, "heads": 3, "prefix": 5, "patches": 130, "dim": 72, "whole": True},
    "many_heads": {"batch": 1, "heads": 33, "prefix": 1, "patches": 70, "dim": 16, "whole": True},
    "head_of_128": {"batch": 1, "heads": 1, "prefix": 1, "patches": 65, "dim": 128},
    "sharp": {"batch": 1, "heads": 2, "prefix": 1, "patches": 150, "dim": 64, "spread": 6},
}
SALIENCY_LARGE = {
    "deit_small": {"batch": 256, "heads": 6, "prefix": 1, "patches": 196, "dim": 64},
    "dinov2_giant": {"batch": 16, "heads": 24, "prefix": 5, "patches": 1369, "dim": 64},
    "so400m": {"batch": 8, "heads": 16, "prefix": 1, "patches": 729, "dim": 72, "whole": True},
    "high_resolution": {"batch": 2, "heads": 12, "prefix": 1, "patches": 4099, "dim": 80},
}

MAPS = {
    "one": lambda: map_args(draw(1, 1), 1, (1, 1)),
    "five_keep_one": lambda: map_args(draw(3, 5), 1, (1, 5)),
    "keep_all": lambda: map_args(draw(2, 17), 17, (1, 17)),
    "all_equal": lambda: map_args(torch.full((2, 49), -0.25), 20, (7, 7)),
    "ties": lambda: map_args((draw(3, 196) * 2).round(), 98, (14, 14)),
    "negative": lambda: map_args(-draw(2, 49).abs(), 11, (7, 7)),
    "signed_zeros": lambda: map_args(torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]]), 3, (1, 5)),
    "extremes": lambda: map_args(torch.tensor([[1e-45, -1e-45, 3.4e38, -3.4e38, 0.0, 1e-38]]), 3, (2, 3)),
    "several_blocks": lambda: map_args((draw(2, 2145) * 4).round(), 1700, (33, 65)),
    "several_blocks_keep_one": lambda: map_args(draw(1, 4097), 1, (1, 4097)),
    "finer": lambda: map_args(draw(3, 196), 128, (14, 14), (16, 16)),
    "finer_ties": lambda: map_args(draw(2, 36).round(), 77, (6, 6), (15, 13)),
    "coarser": lambda: map_args(draw(2, 196), 50, (14, 14), (9, 11)),
    "one_row_to_one_column": lambda: map_args(draw(2, 12), 3, (1, 12), (5, 1)),
    "to_one": lambda: map_args(draw(2, 49), 1, (7, 7), (1, 1)),
}
MAPS_LARGE = {
    "batch": lambda: map_args(draw(4096, 196), 98, (14, 14)),
    "many_tokens": lambda: map_args(draw(64, 16384), 5000, (128, 128)),
    "many_tokens_ties": lambda: map_args((draw(16, 16384) * 8).round(), 9999, (128, 128)),
    "to_many_tokens": lambda: map_args(draw(16, 576), 12345, (24, 24), (181, 127)),
}

PATCHES = {
    "one_of_everything": {"size": (1, 1, 2, 2), "patch": (2, 2), "dim": 1, "k": 1},
    "small": {"size": (2, 3, 8, 12), "patch": (4, 4), "dim": 24, "k": 5, "pos": torch.float32},
    "awkward_patch": {"size": (1, 3, 15, 21), "patch": (5, 7), "dim": 70, "k": 9, "bias": False},
    "overlapping": {"size": (2, 1, 22, 26), "patch": (6, 4), "stride": (4, 3), "dim": 33, "k": 17},
    "gaps_and_border": {"size": (2, 2, 13, 11), "patch": (2, 4), "stride": (3, 5), "dim": 16, "k": 3},
    "several_tiles": {"size": (3, 1, 28, 28), "patch": (4, 4), "dim": 130, "k": 49, "pos": torch.float32},
}
PATCHES_LARGE = {
    "deit_base": {"size": (128, 3, 224, 224), "patch": (16, 16), "dim": 768, "k": 98, "pos": torch.float32},
    "deit_small_few": {"size": (4, 3, 224, 224), "patch": (16, 16), "dim": 384, "k": 49},
    "dinov2_patch14": {"size": (32, 3, 518, 518), "patch": (14, 14), "dim": 1024, "k": 684},
    "audio_overlap": {"size": (16, 1, 128, 1024), "patch": (16, 16), "stride": (10, 10), "dim": 768, "k": 300},
    "odd_everything": {"size": (7, 5, 101, 103), "patch": (7, 9), "stride": (5, 3), "dim": 201, "k": 123},
}


@pytest.mark.parametrize(("case", "dtype"), crossed(small_or_all(SALIENCY, SALIENCY_LARGE)))
def test_cls_saliency(case: str, dtype: torch.dtype) -> None:
    check("cls_saliency", saliency_args(dtype, **{**SALIENCY, **SALIENCY_LARGE}[case]))


@pytest.mark.parametrize("case", small_or_all(MAPS, MAPS_LARGE))
def test_select_tokens(case: str) -> None:
    check("select_tokens", {**MAPS, **MAPS_LARGE}[case]())


@pytest.mark.parametrize(("case", "dtype"), crossed(small_or_all(PATCHES, PATCHES_LARGE), product_dtypes()))
def test_patch_embed(case: str, dtype: torch.dtype) -> None:
    check("patch_embed", patch_args(dtype, **{**PATCHES, **PATCHES_LARGE}[case]))


@pytest.mark.parametrize("dtype", product_dtypes(), ids=str)
def test_every_tile_of_the_table(dtype: torch.dtype) -> None:
    from fastmkd.kernels import patch_embed as kernel

    args = patch_args(dtype, (2, 3, 24, 32), (8, 8), dim=72, k=7, pos=dtype)
    reference = get_op("patch_embed").reference
    exact, plain = reference(*upcast(args)), reference(*args)
    for config in kernel.CONFIGS["ieee" if dtype == torch.float32 else "half"]:
        verdict = judge(kernel.patch_embed(*args, config=config), exact, plain)
        assert verdict.ok, (config, verdict)


def registry_samples() -> list[Any]:
    return [
        pytest.param(
            name, sample, id=f"{name}-{str(dtype)[6:]}-{sample.name}", marks=long_unless(turn % len(dtypes) == number)
        )
        for name, dtypes in (
            ("cls_saliency", DTYPES),
            ("select_tokens", [torch.float32]),
            ("patch_embed", product_dtypes()),
        )
        for number, dtype in enumerate(dtypes)
        for turn, sample in enumerate(get_op(name).samples(DEVICE, dtype))
        if not sample.huge  # those are left to the tests generated from the registry
        if not INTERPRETED or get_op(name).cost(*sample.args).flops < 1e8
    ]


@pytest.mark.parametrize(("name", "sample"), registry_samples())
def test_registry_samples(name: str, sample: Sample) -> None:
    check(name, sample.args)


@pytest.mark.parametrize(("grid", "target"), [((14, 14), (16, 16)), ((7, 5), (31, 23)), ((24, 24), (14, 11))], ids=str)
def test_resize_equals_its_definition_to_the_bit(grid: tuple[int, int], target: tuple[int, int]) -> None:
    from fastmkd.kernels import select_tokens as kernel

    scores = (draw(3, grid[0] * grid[1]) * 1e-3).float()
    expected = resize(scores.view(3, *grid), target).flatten(1)
    assert torch.equal(kernel._resize(scores.to(DEVICE), *grid, *target).cpu(), expected)
    smooth = F.interpolate(scores.view(3, 1, *grid), target, mode="bilinear", align_corners=False).flatten(1)
    torch.testing.assert_close(expected, smooth, rtol=1e-4, atol=1e-7)


def test_subnormal_scores_are_not_flushed() -> None:
    scores = torch.tensor([[4e-45, 8e-45, 1e-45, 3e-45]])  # a flush to zero would make them ties
    for k, expected in ((1, [1]), (2, [0, 1]), (3, [0, 1, 3])):
        out = triton_backend.launcher("select_tokens")(*map_args(scores, k, (2, 2)))
        assert out.tolist() == [expected]


@pytest.mark.parametrize("dtype", product_dtypes(), ids=str)
def test_hidden_patches_are_not_read(dtype: torch.dtype) -> None:
    images, weight, bias, pos, keep, *stride = patch_args(dtype, (2, 3, 16, 24), (4, 4), dim=20, k=7, pos=dtype)
    expected = triton_backend.launcher("patch_embed")(images, weight, bias, pos, keep, *stride)
    visible = torch.zeros(2, 4 * 6, dtype=torch.bool, device=DEVICE).scatter_(1, keep, True).view(2, 1, 4, 6)
    pixels = visible.repeat_interleave(4, 2).repeat_interleave(4, 3)
    masked = images.masked_fill(~pixels, float("nan"))
    hidden = ~visible.flatten(1).any(0)
    pos = pos.masked_fill(hidden[:, None], float("nan"))
    assert torch.equal(triton_backend.launcher("patch_embed")(masked, weight, bias, pos, keep, *stride), expected)


def test_order_of_kept_patches_is_the_order_of_rows() -> None:
    images, weight, bias, pos, keep, *stride = patch_args(torch.float32, (2, 3, 16, 24), (4, 4), dim=20, k=9)
    run = triton_backend.launcher("patch_embed")
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = run(images, weight, bias, pos, keep, *stride)[:, shuffle]
    assert torch.equal(run(images, weight, bias, pos, keep[:, shuffle].contiguous(), *stride), expected)


def test_tf32_follows_the_switch_of_pytorch() -> None:
    size = (
        {"size": (2, 3, 32, 32), "dim": 40, "k": 3} if INTERPRETED else {"size": (8, 3, 224, 224), "dim": 384, "k": 98}
    )
    check_tf32("patch_embed", patch_args(torch.float32, patch=(16, 16), **size))


@pytest.mark.gpu
def test_launches_leave_the_host_alone() -> None:
    """No launch waits for the GPU, so a student's step is never held up."""
    calls = [
        ("cls_saliency", saliency_args(torch.bfloat16, 2, 3, 1, 49, 64)),
        ("select_tokens", map_args(draw(2, 49), 20, (7, 7), (8, 8))),
        ("patch_embed", patch_args(torch.bfloat16, (2, 3, 64, 64), (16, 16), dim=64, k=8)),
    ]
    for name, args in calls:
        triton_backend.launcher(name)(*args)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, args in calls:
            triton_backend.launcher(name)(*args)
    finally:
        torch.cuda.set_sync_debug_mode(before)
