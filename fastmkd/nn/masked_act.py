"""The one activation that needs a masked class: PyTorch's compiler sends ``hardswish`` past ``__torch_function__``."""

from __future__ import annotations

from typing import Any

from torch import nn

from .packed import PackedFeatures

__all__ = ["MaskedHardswish"]


class MaskedHardswish(nn.Hardswish):
    """`torch.nn.Hardswish` that also takes packed maps under ``torch.compile``.

    Example:
        >>> import torch
        >>> MaskedHardswish()(torch.tensor([-4.0, 4.0]))
        tensor([-0., 4.])
    """

    def forward(self, input: Any) -> Any:
        """Activates a packed map on its rows, or a dense one.

        Args:
            input: `PackedFeatures` or a tensor.
        """
        if isinstance(input, PackedFeatures):
            return input.with_values(super().forward(input.values))
        return super().forward(input)
