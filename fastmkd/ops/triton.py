"""The Triton launchers of ``fastmkd.kernels`` as backends of the registry; imported at their first call."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

__all__ = ["interpreted", "launcher", "missing", "tiles"]


def launcher(name: str) -> Callable[..., Any]:
    """Returns a callable that launches ``fastmkd.kernels.<name>.<name>``."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastmkd.kernels.{name}"), name)(*args)

    return run


def tiles(name: str) -> Callable[[str], dict[str, Callable[..., Any]]]:
    """Returns what lists the tiles that the launcher `name` chooses from, for `fastmkd.ops.registry.Backend`."""

    def of(kind: str) -> dict[str, Callable[..., Any]]:
        kernel = importlib.import_module(f"fastmkd.kernels.{name}")
        return {label: partial(getattr(kernel, name), config=config) for label, config in kernel.tiles(kind).items()}

    return of


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
