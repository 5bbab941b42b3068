"""MobileNetV2 (Sandler et al. 2018) of half width with expansion 6, as the CIFAR-100 distillation papers use it."""

from __future__ import annotations

from torch import Tensor, nn

from .common import CifarNet, conv_norm

__all__ = ["MobileNetV2", "mobilenetv2"]

# output channels at full width, number of blocks, stride of the first; the first stage does not expand
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise, linear 1 x 1, with a shortcut where the shape stays.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the depthwise convolution.
        expansion: inner channels over `in_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv = nn.Sequential(
            *conv_norm(in_channels, inner, 1),
            *conv_norm(inner, inner, 3, stride, groups=inner),
            *conv_norm(inner, out_channels, 1, act=False),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, out_channels, H / stride, W / stride)``.

        Args:
            x: ``(B, in_channels, H, W)``.
        """
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(CifarNet):
    """MobileNetV2 for small images: the total stride is 16.

    Args:
        width: factor on the channels of every stage; the last map keeps 1280.
        expansion: inner channels of a block over its input channels, from the second stage on.
        num_classes: number of logits.

    Example:
        >>> sum(p.numel() for p in MobileNetV2().parameters())
        812836
    """

    def __init__(self, width: float = 0.5, expansion: int = 6, num_classes: int = 100) -> None:
        super().__init__(1280, num_classes)
        channels = int(32 * width)
        self.stem = conv_norm(3, channels, 3, 2)
        stages = []
        for index, (full, blocks, stride) in enumerate(_STAGES):
            stage, out = [], int(full * width)
            for block in range(blocks):
                stage.append(InvertedResidual(channels, out, stride if block == 0 else 1, expansion if index else 1))
                channels = out
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.last = conv_norm(channels, 1280, 1)
        self.initialise()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, ``(B, 1280, H / 16, W / 16)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        out: Tensor = self.last(self.stages(self.stem(x)))
        return out


def mobilenetv2(num_classes: int = 100) -> MobileNetV2:
    """MobileNetV2 at half width, 0.81 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> mobilenetv2().num_features
        1280
    """
    return MobileNetV2(num_classes=num_classes)
