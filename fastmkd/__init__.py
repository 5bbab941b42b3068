"""fastmkd: masked knowledge distillation in which hidden work costs nothing.

Public names are loaded when they are first used, so that ``import fastmkd`` is quick and a program that needs only the
ops never imports timm. What each name is for stands in the README; ``fastmkd.show_config()`` says what works here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import show_config
    from .methods import DMAE, DPK, MKD, DenseKD, DistillOutput, MaskedKD, Supervised
    from .metrics import MinibatchCKA, cka_matrix, compare, hsic1
    from .nn import (
        MaskedConv2d,
        MaskedViT,
        PackedFeatures,
        block_mask,
        convert_cnn,
        grid_mask,
        keep_by_mass,
        pack,
        random_mask,
        revert_cnn,
    )
    from .ops.choice import backend
    from .ops.select_tokens import select_tokens

_HOME = {
    "DMAE": "methods",
    "DPK": "methods",
    "MKD": "methods",
    "DenseKD": "methods",
    "DistillOutput": "methods",
    "MaskedConv2d": "nn",
    "MaskedKD": "methods",
    "MaskedViT": "nn",
    "MinibatchCKA": "metrics",
    "PackedFeatures": "nn",
    "Supervised": "methods",
    "backend": "ops.choice",
    "block_mask": "nn",
    "cka_matrix": "metrics",
    "compare": "metrics",
    "convert_cnn": "nn",
    "grid_mask": "nn",
    "hsic1": "metrics",
    "keep_by_mass": "nn",
    "pack": "nn",
    "random_mask": "nn",
    "revert_cnn": "nn",
    "select_tokens": "ops",
    "show_config": "config",
}
_ROOMS = ("kernels", "methods", "metrics", "nn", "ops", "reference", "train")

__all__ = [
    "DMAE",
    "DPK",
    "MKD",
    "DenseKD",
    "DistillOutput",
    "MaskedConv2d",
    "MaskedKD",
    "MaskedViT",
    "MinibatchCKA",
    "PackedFeatures",
    "Supervised",
    "__version__",
    "backend",
    "block_mask",
    "cka_matrix",
    "compare",
    "convert_cnn",
    "grid_mask",
    "hsic1",
    "keep_by_mass",
    "pack",
    "random_mask",
    "revert_cnn",
    "select_tokens",
    "show_config",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
