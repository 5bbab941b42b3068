"""The compiled entry points (``fastmkd_native::<name>``) as backends of the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _native_loader

__all__ = ["entry", "missing_cpu", "missing_cuda"]


def entry(name: str) -> Callable[..., Any]:
    """Returns a callable that runs the compiled op `name`; the library is looked up at the call, not at import."""

    def run(*args: Any) -> Any:
        return getattr(torch.ops.fastmkd_native, name).default(*args)

    return run


def missing_cpu() -> str | None:
    """Why the compiled CPU library cannot be used, or None when it can."""
    status = _native_loader.load()
    return None if status.cpu else status.cpu_reason


def missing_cuda() -> str | None:
    """Why the compiled CUDA library cannot be used, or None when it can."""
    status = _native_loader.load()
    if not status.cuda:
        return status.cuda_reason
    return None if torch.cuda.is_available() else "no CUDA device is visible to PyTorch."
