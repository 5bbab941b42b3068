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
    from .methods import DistillOutput, MaskedKD, Supervised
    from .nn import MaskedViT, block_mask, grid_mask, random_mask
    from .ops.choice import backend
    from .ops.select_tokens import select_tokens

_HOME = {
    "DistillOutput": "methods",
    "MaskedKD": "methods",
    "MaskedViT": "nn",
    "Supervised": "methods",
    "backend": "ops.choice",
    "block_mask": "nn",
    "grid_mask": "nn",
    "random_mask": "nn",
    "select_tokens": "ops",
    "show_config": "config",
}
_ROOMS = ("kernels", "methods", "metrics", "nn", "ops", "reference", "train")

__all__ = [
    "DistillOutput",
    "MaskedKD",
    "MaskedViT",
    "Supervised",
    "__version__",
    "backend",
    "block_mask",
    "grid_mask",
    "random_mask",
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
