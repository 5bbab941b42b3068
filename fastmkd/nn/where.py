"""Which layer is running: error messages of packed maps name it, though the map itself does not know."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

__all__ = ["where"]


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
