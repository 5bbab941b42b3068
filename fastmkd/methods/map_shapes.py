"""Which shapes the maps of a network have for images of any size, from a copy of it that holds no numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["MapShapes"]

Size = tuple[int, int]


class MapShapes:
    """Answers what a network's outputs would look like, without computing them.

    Layers round up or down when a stride does not divide a map, each in its own way, so the network itself is asked: a
    copy on PyTorch's meta device, in eval mode. A size is tried once.

    Args:
        network: takes ``(B, C, H, W)``; copied as it is now, without its numbers.

    Example:
        >>> shapes = MapShapes(nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 3, stride=2, padding=1)))
        >>> shapes.of("", (9, 8)).shape, shapes.of("0", (9, 8)).shape
        (torch.Size([1, 8, 2, 2]), torch.Size([1, 8, 4, 4]))
    """

    def __init__(self, network: nn.Module) -> None:
        self._copy: nn.Module | None = None
        self._why = ""
        self._wanted: set[str] = set()
        self._found: dict[Size, dict[str, Any]] = {}
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in network.parameters()
        }
        memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
        try:
            self._copy = copy.deepcopy(network, memo).eval()
        except Exception as error:  # whatever a foreign module holds that cannot be copied
            self._why = _first_line(error)

    def of(self, name: str, size: Size) -> Any:
        """Returns what a module of the network would return for one image: meta tensors, held as it holds them.

        Args:
            name: of the module, as in ``named_modules()``.
            size: ``(H, W)`` of the image.

        Raises:
            ValueError: the network does not take such an image, or could not be copied.
        """
        self._wanted.add(name)
        if name not in self._found.get(size, {}):
            self._found[size] = self._run(size)
        return self._found[size][name]

    def _run(self, size: Size) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def reader(name: str) -> Callable[..., None]:
            def read(_module: nn.Module, _args: Any, output: Any) -> None:
                found[name] = output

            return read

        if self._copy is None:
            raise ValueError(f"the network cannot be copied ({self._why}), so the shapes of its maps are unknown.")
        first = next(part for part in self._copy.modules() if isinstance(part, nn.Conv2d))
        images = torch.empty(1, first.in_channels, *size, dtype=first.weight.dtype, device="meta")
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name in self._wanted:
                stack.callback(self._copy.get_submodule(name).register_forward_hook(reader(name)).remove)
            try:
                self._copy(images)
            except Exception as error:  # whatever a foreign network raises for a size that it does not take
                raise ValueError(
                    f"the network does not take images of {size[0]} x {size[1]} pixels ({_first_line(error)})."
                ) from error
        return found


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
