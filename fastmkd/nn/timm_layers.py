"""Masked forms of the layers that timm's CNNs have of their own; imported only for models that hold such layers."""

from __future__ import annotations

from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.norm_act import SyncBatchNormAct
from timm.models.vgg import ConvMlp
from torch import Tensor

from .masked_conv import MaskedConv2d, convolve
from .masked_norm import MaskedSyncBatchNorm, VisibleStatistics
from .packed import PackedFeatures
from .plan import Pair, Window

__all__ = ["PLAIN_AND_MASKED", "MaskedBatchNormAct2d", "MaskedConv2dSame", "MaskedConvMlp", "MaskedSyncBatchNormAct"]


class MaskedBatchNormAct2d(VisibleStatistics, BatchNormAct2d):
    """timm's batch norm with activation that also takes packed maps.

    Example:
        >>> MaskedBatchNormAct2d(4).stats
        'visible'
    """

    def forward(self, x: Any) -> Any:
        """Normalises and activates a packed map, or a dense one as timm does.

        Args:
            x: `PackedFeatures` or ``(B, C, H, W)``.
        """
        return self.act(self.drop(self.normalise(x))) if isinstance(x, PackedFeatures) else super().forward(x)


class MaskedSyncBatchNormAct(SyncBatchNormAct, MaskedSyncBatchNorm):
    """timm's synchronised batch norm with activation; its forward reaches the masked norm through ``super()``.

    Example:
        >>> MaskedSyncBatchNormAct(4).stats
        'visible'
    """


class MaskedConv2dSame(MaskedConv2d, Conv2dSame):
    """timm's convolution with TensorFlow's "same" padding, which may lie on one side only.

    Example:
        >>> import torch
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1).bool())
        >>> MaskedConv2dSame(1, 2, 3, stride=2)(x)
        PackedFeatures(shape=(1, 2, 2, 2), rows=4, dtype=torch.float32)
    """

    def _convolve_rows(self, x: PackedFeatures) -> PackedFeatures:
        before, after = zip(*(self._padding(x.size_hw[axis], axis) for axis in (0, 1)), strict=True)
        kernel, stride, dilation = (_two(n) for n in (self.kernel_size, self.stride, self.dilation))
        window = Window(kernel, stride, _two(before), dilation, _two(after))
        return convolve(x, self.weight, self.bias, window, self.groups)

    def _padding(self, size: int, axis: int) -> Pair:
        reach, stride = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1, self.stride[axis]
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        return total // 2, total - total // 2


class MaskedConvMlp(ConvMlp):
    """The classifier of timm's VGG: one window over the whole map, so the map becomes dense, zeros where hidden.

    Example:
        >>> import torch
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.ones(1, 2, 7, 7), torch.ones(1, 1, 1).bool())
        >>> MaskedConvMlp(2, 3)(x).shape
        torch.Size([1, 3, 1, 1])
    """

    def forward(self, x: Any) -> Tensor:
        """Returns ``(B, features, 1, 1)``.

        Args:
            x: `PackedFeatures` or ``(B, C, H, W)``.
        """
        out: Tensor = super().forward(x.to_dense() if isinstance(x, PackedFeatures) else x)
        return out


PLAIN_AND_MASKED = (
    (BatchNormAct2d, MaskedBatchNormAct2d),
    (SyncBatchNormAct, MaskedSyncBatchNormAct),
    (Conv2dSame, MaskedConv2dSame),
    (ConvMlp, MaskedConvMlp),
)


def _two(values: tuple[int, ...]) -> Pair:
    return values[0], values[1]
