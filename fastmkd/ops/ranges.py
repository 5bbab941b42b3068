"""NVTX ranges around ops, for Nsight Systems and Nsight Compute.

Uses the ``nvtx`` package when it is installed, PyTorch's own NVTX binding otherwise; without CUDA it does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

__all__ = ["annotate"]


def annotate(name: str) -> contextlib.AbstractContextManager[Any]:
    """Marks the enclosed work as ``fastmkd::<name>`` in a profiler's timeline.

    Args:
        name: label without the prefix.

    Example:
        >>> with annotate("my_step"):
        ...     pass
    """
    return _range()(f"fastmkd::{name}")


@lru_cache(maxsize=1)
def _range() -> Callable[[str], contextlib.AbstractContextManager[Any]]:
    if not torch.cuda.is_available():
        return contextlib.nullcontext
    try:
        import nvtx
    except ImportError:
        return torch.cuda.nvtx.range
    return lambda label: nvtx.annotate(label, domain="fastmkd")
