"""Token selection at training sizes, with and without a resize between grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmkd.ops import get_op

from ..op_entries import compiled, op_params, op_variants
from ..registry import Case, Setting, Variant, benchmark

GRID = (14, 14)
TARGETS = {"same grid": (14, 14), "to 16 x 16": (16, 16), "to 24 x 24": (24, 24)}


def topk_then_sort(saliency: Tensor, kept: int) -> Tensor:
    """What one would write in a line of PyTorch: (B, N) -> (B, k); ties fall as they may."""
    return saliency.topk(kept, dim=1).indices.sort(dim=1).values


def _grid(setting: Setting) -> list[dict[str, Any]]:
    return [{"target": name} for name in (["same grid"] if setting.quick and not setting.on_gpu else TARGETS)]


@benchmark("select_tokens", summary="top-k in ascending order, with resize between grids", grid=_grid, dtypes=("fp32",))
def select_tokens(setting: Setting, target: str) -> Case:
    """Half of the target grid's patches from a 14 x 14 saliency map."""
    batch, size = (256 if setting.on_gpu else 8), TARGETS[target]
    kept = size[0] * size[1] // 2
    saliency = torch.rand(batch, GRID[0] * GRID[1], device=setting.device)
    op, args = get_op("select_tokens"), (saliency, kept, *GRID, *size)
    variants = op_variants(op, args, setting)
    if size == GRID:
        answer = variants[0].answer
        variants.append(Variant("topk + sort", lambda: topk_then_sort(saliency, kept), answer))
        if not setting.quick:
            variants.append(compiled("topk + sort, compiled", topk_then_sort, (saliency, kept), answer))
    return Case(
        label=target,
        panel=f"{GRID[0]} x {GRID[1]}, batch {batch}",
        variants=variants,
        baseline="eager",
        items=batch,
        device_time=True,
        params={"batch": batch, "kept": kept, "target": list(size), **op_params(op, args)},
    )
