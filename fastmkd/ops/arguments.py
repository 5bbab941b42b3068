"""The tensors among an op's arguments, those in a list (``Tensor[]``) included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["lead", "map_tensors", "tensors"]


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor of `args`, in order.

    Example:
        >>> import torch
        >>> len(tensors((torch.zeros(1), [torch.zeros(1), torch.zeros(1)], 3, None)))
        3
    """
    found: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)) and not (a and isinstance(a[0], int)):
            found += tensors(tuple(a))
    return found


def lead(args: tuple[Any, ...]) -> Tensor:
    """The first tensor of `args`: its device and dtype stand for the call's."""
    return args[0] if isinstance(args[0], Tensor) else tensors(args)[0]


def map_tensors(function: Callable[[Tensor], Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with `function` applied to every tensor.

    Example:
        >>> import torch
        >>> map_tensors(lambda t: t.dtype, (torch.zeros(1), [torch.ones(1)], 3))
        (torch.float32, [torch.float32], 3)
    """
    return tuple(
        function(a)
        if isinstance(a, Tensor)
        else list(map_tensors(function, tuple(a)))
        if isinstance(a, list | tuple)
        else a
        for a in args
    )
