"""Asks a frozen teacher: eval mode, no gradients, its own device and precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .features import Features

__all__ = ["ask_teacher", "check_teacher_dtype"]


def check_teacher_dtype(dtype: torch.dtype | None) -> None:
    """Raises unless a teacher can run in a precision.

    Args:
        dtype: None leaves it to the caller's autocast.

    Raises:
        ValueError: any other dtype.

    Example:
        >>> check_teacher_dtype(torch.bfloat16)
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"teacher_dtype is {dtype}; expected torch.bfloat16, float16, float32 or None.")


@torch.no_grad()
def ask_teacher(
    teacher: nn.Module | None,
    images: Tensor,
    dtype: torch.dtype | None,
    observe: Callable[[nn.Module, Tensor], Features],
) -> Features:
    """Runs the teacher and brings what was observed to the device of the images.

    Args:
        teacher: the network.
        images: ``(B, C, H, W)``.
        dtype: precision of its autocast; float32 switches autocast off, None leaves it as it is.
        observe: runs a network on images.

    Example:
        >>> net = nn.Conv2d(1, 2, 1)
        >>> ask_teacher(net, torch.zeros(1, 1, 2, 2), None, lambda net, x: Features(net(x), {})).output.requires_grad
        False
    """
    assert teacher is not None
    if teacher.training:  # somebody called teacher.train() since
        teacher.eval()
    weight = next(teacher.parameters())
    home, device = images.device, weight.device
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if dtype is not None:
        lowered = dtype != torch.float32
        autocast = torch.autocast(device.type, dtype if lowered else None, enabled=lowered)
    with autocast:
        found = observe(teacher, images.to(device=device, dtype=weight.dtype, non_blocking=True))
    output = found.output
    if isinstance(output, tuple):
        output = tuple(part.to(home) for part in output)
    elif isinstance(output, Tensor):
        output = output.to(home)
    return Features(output, {name: x.to(home) for name, x in found.maps.items()})
