"""The teacher's forward on the kept patches, against the full model, the public code's way and ``torch.compile``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from fastmkd import MaskedViT
from fastmkd.reference import masked_vit_forward

from ..models import autocast, images_for, keep_for, vit, vit_flops
from ..op_entries import compile_variant
from ..registry import Answer, Case, Setting, Variant, benchmark

PATCHES = 196


def _bind(setting: Setting, args: list[Any], function: Callable[..., Any]) -> Callable[[], Any]:
    return autocast(setting, function, *args)


def _grid(setting: Setting) -> list[dict[str, Any]]:
    models = ["DeiT-S"] if setting.quick and not setting.on_gpu else ["DeiT-S", "DeiT-B"]
    shares = [50] if setting.quick else [100, 75, 50, 25]
    return [{"model": model, "percent": percent} for model in models for percent in shares]


@benchmark("masked_teacher", summary="DeiT teacher on part of its patches, against the full model", grid=_grid)
def masked_teacher(setting: Setting, model: str, percent: int) -> Case:
    """Random weights and patches, no gradients; float32 parameters, under autocast for bf16."""
    batch, kept = (256 if setting.on_gpu else 8), PATCHES * percent // 100
    teacher, images = vit(model, setting).requires_grad_(False), images_for(batch, setting)
    masked = MaskedViT(teacher)
    keep = keep_for(batch, PATCHES, kept, setting) if percent < 100 else None

    def exact() -> Any:
        return masked_vit_forward(copy.deepcopy(teacher).double(), images.double(), keep)

    least = Answer(exact, flops=vit_flops(teacher, batch, kept))
    whole = least if keep is None else Answer(flops=vit_flops(teacher, batch, PATCHES))
    variants = [
        Variant("full model", autocast(setting, teacher, images), whole, plain=keep is None),
        Variant("fastmkd", autocast(setting, masked, images, keep), least),
    ]
    if keep is not None:
        public = autocast(setting, masked_vit_forward, teacher, images, keep)
        variants.append(Variant("public code", public, least, plain=True))
    if not setting.quick or (setting.on_gpu and (model, setting.dtype) == ("DeiT-B", "bf16")):
        # The strongest of the plain ways; the same for fastmkd, which must not lose what a compiler gives.
        rivals: list[tuple[Any, ...]] = [("full model", whole, teacher, images)]
        if keep is not None:
            # On a CPU the compiled full model is measured once, with all patches.
            rivals = rivals * setting.on_gpu + [("public code", least, masked_vit_forward, teacher, images, keep)]
        for name, answer, function, *args in (*rivals, ("fastmkd", least, masked, images, keep)):
            bind = partial(_bind, setting, args)
            variants.append(compile_variant(f"{name}, compiled", function, answer, bind))
    return Case(
        label=f"{percent} % kept",
        panel=f"{model}, batch {batch}",
        variants=variants,
        baseline="full model",
        items=batch,
        params={"model": model, "batch": batch, "kept": kept},
    )
