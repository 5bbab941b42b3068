"""The Triton launchers of ``fastmkd.kernels`` as backends of the registry; imported at their first call."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

__all__ = ["interpreted", "launcher", "missing"]


def launcher(name: str) -> Callable[..., Any]:
    """Returns a callable that launches ``fastmkd.kernels.<name>.<name>``."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastmkd.kernels.{name}"), name)(*args)

    return run


def interpreted() -> bool:
    """True when ``TRITON_INTERPRET=1`` makes kernels run on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why Triton cannot be used, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (Linux only)."
    if not torch.cuda.is_available():
        return "no CUDA device is visible to PyTorch."
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}."
    return None
