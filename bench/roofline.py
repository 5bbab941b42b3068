"""The physical bound: what this device copies and multiplies per second, measured, and the least time of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .timing import CpuClock, CudaClock

__all__ = ["Bound", "bound", "copy_rate", "matmul_rate"]


@dataclass(frozen=True)
class Bound:
    """The least time of a call, in seconds, and what sets it: ``"memory"`` or ``"compute"``."""

    seconds: float
    by: str


def bound(flops: float, bytes: float, device: torch.device, dtype: torch.dtype) -> Bound | None:
    """The larger of bytes over the copy rate and FLOPs over the matmul rate of this device.

    A share of the bound above one is possible: data that stay in a cache move faster than a copy of large buffers.

    Args:
        flops: floating-point operations (a multiply-add counts two).
        bytes: bytes read plus bytes written.
        device: where the case runs.
        dtype: the dtype of the matrix products.

    Returns:
        None when neither is counted.
    """
    if not flops and not bytes:
        return None
    memory = bytes / copy_rate(device) if bytes else 0.0
    # A way to compute it may cast up first, which is faster on a CPU without units for the lower precision.
    rate = max(matmul_rate(device, dtype), matmul_rate(device, torch.float32)) if flops else 1.0
    compute = flops / rate
    return Bound(memory, "memory") if memory >= compute else Bound(compute, "compute")


@lru_cache(maxsize=8)
def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a copy several times larger than the caches."""
    size = (1 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _least_seconds(lambda: target.copy_(source), device)


@lru_cache(maxsize=16)
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product of random matrices in `dtype`.

    float32 runs at the precision that PyTorch is set to (``torch.get_float32_matmul_precision``).
    """
    side = (8192 if dtype.itemsize < 4 else 4096) if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _least_seconds(lambda: a @ b, device)


def _least_seconds(run: Callable[[], Any], device: torch.device) -> float:
    clock = CudaClock(device, device_time=True) if device.type == "cuda" else CpuClock()
    clock.warm_up("run", run, 0.1)
    return min(clock.sample("run", run) for _ in range(9))  # a ceiling is the best that was seen
