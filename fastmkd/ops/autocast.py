"""Autocast on any device: "meta", on which networks are tried for their shapes alone, has none to ask or switch off."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["autocast_dtype", "no_autocast"]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype to which autocast lowers on a device now; None where it is off.

    Args:
        device: any.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_dtype(torch.device("cpu")), autocast_dtype(torch.device("meta"))
        (torch.bfloat16, None)
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off on a device for a while.

    Args:
        device: any.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), no_autocast(torch.device("cpu")):
        ...     autocast_dtype(torch.device("cpu")) is None
        True
    """
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
