"""Which layer is running: error messages of packed maps name it, though the map itself does not know."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import nn

__all__ = ["refuse_reentrant_checkpoint", "where"]


def where() -> str:
    """Returns `` (in layer3.0.conv2, a Conv2d)`` for the innermost module whose method is on the call stack, or "".

    Only for error messages. The path is the one in the outermost module on the stack.

    Example:
        >>> where()
        ''
    """
    modules: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
        frame = frame.f_back
    if not modules:
        return ""
    layer, root = modules[0], modules[-1]
    path = next((name for name, module in root.named_modules() if module is layer), "")
    return f" (in {path}, a {type(layer).__name__})" if path else f" (in a {type(layer).__name__})"


def refuse_reentrant_checkpoint(kind: type) -> None:
    """Raises where PyTorch's re-entrant gradient checkpointing was called with a packed map.

    It ties gradients to the tensors among its arguments; those of a packed map would be lost in silence.

    Args:
        kind: of packed maps; this module knows nothing of them.

    Raises:
        TypeError: says what to pass.
    """
    if torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        called = frame.f_code.co_name == "forward" and frame.f_globals.get("__name__") == "torch.utils.checkpoint"
        if called and any(isinstance(value, kind) for value in frame.f_locals.get("args", ())):
            raise TypeError(
                f"torch.utils.checkpoint was called with use_reentrant=True{where()}; it sees tensors only and would "
                "lose the gradients of packed maps. Pass use_reentrant=False, or pass x.values and pack it inside."
            )
        frame = frame.f_back
