"""ShuffleNet V1 (Zhang et al. 2018) and V2 (Ma et al. 2018) for CIFAR: a 1 x 1 stem, and a total stride of 8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import CifarNet, conv_norm

__all__ = ["ShuffleNetV1", "ShuffleNetV2", "shufflenetv1", "shufflenetv2"]


class GroupedBottleneck(nn.Module):
    """V1's unit: grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1; with a stride the input is appended, pooled.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, with the appended input.
        stride: 1 or 2.
        groups: groups of the 1 x 1 convolutions.
        first_groups: groups of the first of them.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        own = out_channels if stride == 1 else out_channels - in_channels
        inner = own // 4
        self.conv1 = conv_norm(in_channels, inner, 1, groups=first_groups)
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = conv_norm(inner, inner, 3, stride, groups=inner)
        self.conv3 = conv_norm(inner, own, 1, groups=groups, act=False)
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, out_channels, H / stride, W / stride)``.

        Args:
            x: ``(B, in_channels, H, W)``.
        """
        own = self.conv3(self.conv2(self.shuffle(self.conv1(x))))
        out: Tensor = self.relu(own + x if self.pool is None else torch.cat((own, self.pool(x)), dim=1))
        return out


class ShuffleNetV1(CifarNet):
    """ShuffleNet V1 with stages of 4, 8 and 4 units.

    Args:
        groups: groups of the 1 x 1 convolutions.
        widths: output channels of the stages.
        num_classes: number of logits.

    Example:
        >>> sum(p.numel() for p in ShuffleNetV1().parameters())
        949258
    """

    def __init__(self, groups: int = 3, widths: tuple[int, int, int] = (240, 480, 960), num_classes: int = 100) -> None:
        super().__init__(widths[-1], num_classes)
        self.stem = conv_norm(3, 24, 1)
        stages, channels = [], 24
        for width, units in zip(widths, (4, 8, 4), strict=True):
            stage = []
            for unit in range(units):
                first_groups = 1 if channels == 24 else groups  # 24 channels are too few for groups
                stage.append(GroupedBottleneck(channels, width, 1 if unit else 2, groups, first_groups))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.initialise()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, ``(B, 960, H / 8, W / 8)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        out: Tensor = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return out


class SplitUnit(nn.Module):
    """V2's unit: half of the channels pass, the other half goes through 1 x 1, depthwise 3 x 3, 1 x 1.

    Args:
        channels: channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *conv_norm(half, half, 1), *conv_norm(half, half, 3, groups=half, act=False), *conv_norm(half, half, 1)
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, channels, H, W)``.

        Args:
            x: ``(B, channels, H, W)``.
        """
        passed, worked = torch.chunk(x, 2, dim=1)
        out: Tensor = self.shuffle(torch.cat((passed, self.branch(worked)), dim=1))
        return out


class DownUnit(nn.Module):
    """V2's unit with stride 2: both branches see all channels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(
            *conv_norm(in_channels, in_channels, 3, 2, groups=in_channels, act=False), *conv_norm(in_channels, half, 1)
        )
        self.right = nn.Sequential(
            *conv_norm(in_channels, half, 1),
            *conv_norm(half, half, 3, 2, groups=half, act=False),
            *conv_norm(half, half, 1),
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, out_channels, H / 2, W / 2)``.

        Args:
            x: ``(B, in_channels, H, W)``.
        """
        out: Tensor = self.shuffle(torch.cat((self.left(x), self.right(x)), dim=1))
        return out


class ShuffleNetV2(CifarNet):
    """ShuffleNet V2 1x: a unit with stride 2, then 3, 7 and 3 units that keep the size.

    Args:
        widths: output channels of the stages.
        last: channels of the last map.
        num_classes: number of logits.

    Example:
        >>> sum(p.numel() for p in ShuffleNetV2().parameters())
        1355528
    """

    def __init__(
        self, widths: tuple[int, int, int] = (116, 232, 464), last: int = 1024, num_classes: int = 100
    ) -> None:
        super().__init__(last, num_classes)
        self.stem = conv_norm(3, 24, 1)
        stages, channels = [], 24
        for width, units in zip(widths, (3, 7, 3), strict=True):
            stages.append(nn.Sequential(DownUnit(channels, width), *(SplitUnit(width) for _ in range(units))))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.last = conv_norm(channels, last, 1)
        self.initialise()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, ``(B, 1024, H / 8, W / 8)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        out: Tensor = self.last(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return out


def shufflenetv1(num_classes: int = 100) -> ShuffleNetV1:
    """ShuffleNet V1 with three groups, 0.95 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> shufflenetv1().num_features
        960
    """
    return ShuffleNetV1(num_classes=num_classes)


def shufflenetv2(num_classes: int = 100) -> ShuffleNetV2:
    """ShuffleNet V2 1x, 1.36 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> shufflenetv2().num_features
        1024
    """
    return ShuffleNetV2(num_classes=num_classes)
