"""Patch embedding of the kept patches, against embedding all of them and gathering (the public code's way)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmkd.ops import get_op

from ..models import images_for, keep_for
from ..op_entries import compiled, op_params, op_variants
from ..registry import Case, Setting, Variant, benchmark

PATCH, PATCHES = 16, 196
WIDTHS = {"DeiT-S": 384, "DeiT-B": 768}


def embed_then_gather(images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, keep: Tensor) -> Tensor:
    """Embeds every patch, adds every position, then drops what is masked: (B, C, H, W) -> (B, k, D)."""
    rows = F.conv2d(images, weight, bias, stride=PATCH).flatten(2).mT + pos
    return rows.gather(1, keep[..., None].expand(-1, -1, rows.shape[-1]))


def _grid(setting: Setting) -> list[dict[str, Any]]:
    widths = ["DeiT-B"] if setting.quick else list(WIDTHS)
    shares = [50] if setting.quick else [100, 75, 50, 25]
    return [{"model": model, "percent": percent} for model in widths for percent in shares]


@benchmark(
    "patch_embed",
    summary="gather + patch embed on kept tokens against embed-all-then-gather",
    grid=_grid,
    dtypes=("fp32", "bf16", "fp16"),
)
def patch_embed(setting: Setting, model: str, percent: int) -> Case:
    """DeiT's patch embedding with `percent` of 196 patches kept; images and weights in the setting's dtype."""
    batch, dim, kept = (256 if setting.on_gpu else 8), WIDTHS[model], PATCHES * percent // 100
    images, dtype = images_for(batch, setting).to(setting.torch_dtype), setting.torch_dtype
    make = {"device": setting.device, "dtype": dtype}
    weight = torch.randn(dim, 3, PATCH, PATCH, **make) * (3 * PATCH * PATCH) ** -0.5
    bias, pos = torch.randn(dim, **make), torch.randn(PATCHES, dim, **make)
    keep = keep_for(batch, PATCHES, kept, setting)

    op, op_args = get_op("patch_embed"), (images, weight, bias, pos, keep, PATCH, PATCH)
    variants = op_variants(op, op_args, setting)
    answer = variants[0].answer
    args = (images, weight, bias, pos, keep)
    public = [Variant("public code", lambda: embed_then_gather(*args), answer)]
    if not setting.quick:
        public.append(compiled("public code, compiled", embed_then_gather, args, answer))
    return Case(
        label=f"{percent} % kept",
        panel=f"{model}, batch {batch}",
        variants=public + variants,
        baseline="public code",
        items=batch,
        device_time=True,
        params={"batch": batch, "dim": dim, "kept": kept, **op_params(op, op_args)},
    )
