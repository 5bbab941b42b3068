"""Modules and masks. Names load when first used: `MaskedViT` and `MergedViT` bring in timm, the rest only torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_cnn, revert_cnn
    from .masked_conv import MaskedConv2d
    from .masks import block_mask, grid_mask, random_mask
    from .packed import PackedFeatures, pack
    from .ragged import RaggedKeep, keep_by_mass
    from .token_merging import MergedViT
    from .vit import MaskedViT

_HOME = {
    "MaskedConv2d": "masked_conv",
    "MaskedViT": "vit",
    "MergedViT": "token_merging",
    "PackedFeatures": "packed",
    "RaggedKeep": "ragged",
    "block_mask": "masks",
    "convert_cnn": "convert",
    "grid_mask": "masks",
    "keep_by_mass": "ragged",
    "pack": "packed",
    "random_mask": "masks",
    "revert_cnn": "convert",
}

__all__ = [
    "MaskedConv2d",
    "MaskedViT",
    "MergedViT",
    "PackedFeatures",
    "RaggedKeep",
    "block_mask",
    "convert_cnn",
    "grid_mask",
    "keep_by_mass",
    "pack",
    "random_mask",
    "revert_cnn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
