"""A CNN on masked images as one writes it without the library: maps times the mask, layers as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmkd.reference.dense import upsampled

__all__ = ["Multiplied"]


class Multiplied(nn.Module):
    """Multiplies by the mask before each layer that looks beyond one pixel, so that none sees what is hidden.

    Batch norm stays the ordinary one: in training its statistics count what convolutions leave at hidden positions. So
    this is a faster way to a slightly different network than the dense twin and fastmkd, whose statistics are those of
    visible positions. In evaluation, visible positions of all three agree.

    Args:
        network: whose layers get hooks; not copied.

    Example:
        >>> conv = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False)
        >>> _ = nn.init.ones_(conv.weight)
        >>> visible = torch.tensor([[[True, True, False]]])
        >>> Multiplied(conv)(torch.tensor([[[[1.0, 2.0, 4.0]]]]), visible).flatten().tolist()
        [3.0, 3.0, 2.0]
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._visible: Tensor | None = None
        self._masks: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and layer.kernel_size not in (1, (1, 1)):
                layer.register_forward_pre_hook(self._hide)

    def forward(self, images: Tensor, visible: Tensor) -> Any:
        """Returns what the network returns.

        Args:
            images: ``(B, C, H, W)``.
            visible: ``(B, gh, gw)`` bool, True = visible.
        """
        self._visible = visible
        self._masks.clear()  # a training step has a mask of its own
        return self.network(images)

    def _hide(self, _layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        assert self._visible is not None
        (x,) = inputs
        key = (x.shape[2:], x.dtype)
        if key not in self._masks:
            self._masks[key] = upsampled(self._visible, (x.shape[2], x.shape[3]))[:, None].to(x.dtype)
        return (x * self._masks[key],)
