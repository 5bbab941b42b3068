"""A device that someone asked for, checked before anything is sent there."""

from __future__ import annotations

import torch

__all__ = ["check_device"]


def check_device(argument: str, device: torch.device | str) -> torch.device:
    """Returns the device if it can be one here.

    Args:
        argument: how the caller names it, such as ``"--device"``.
        device: what was given for it.

    Raises:
        ValueError: no device has such a name, or it is a GPU that PyTorch does not see.

    Example:
        >>> check_device("--device", "cpu")
        device(type='cpu')
        >>> check_device("--device", "gpu")
        Traceback (most recent call last):
        ValueError: --device is gpu; expected a device of PyTorch, such as cpu, cuda or cuda:1.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"{argument} is {device}; expected a device of PyTorch, such as cpu, cuda or cuda:1."
        ) from None
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise ValueError(f"{argument} is {device}, but torch.cuda.is_available() is False here; use {argument}=cpu.")
    count = torch.cuda.device_count()
    if found.index is not None and found.index >= count:
        raise ValueError(
            f"{argument} is {device}, but PyTorch sees {count} GPU here; expected at most cuda:{count - 1}."
        )
    return found
