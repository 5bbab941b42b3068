"""How much memory a call allocates at its peak, beyond what was there before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes that PyTorch's allocator held for `run` at one time.

    What a library allocates by itself (its scratch, a few MiB) is not seen; on a GPU that is true of cuDNN's too.

    Args:
        run: the call; called once.
        device: where its tensors are.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000).neg().abs(), torch.device("cpu"))
        8000
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative for what is freed; what was there before the call is not counted
        peak = max(peak, held)
    return peak
