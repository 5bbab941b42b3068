"""Wide ResNets (Zagoruyko and Komodakis 2016): pre-activation blocks, wider instead of deeper."""

from __future__ import annotations

from torch import Tensor, nn

from .common import CifarNet, stage

__all__ = ["WideResNet", "wrn_16_2", "wrn_40_1", "wrn_40_2"]


class PreActBlock(nn.Module):
    """Norm, ReLU, 3 x 3 convolution, twice; where the shape changes the shortcut is a projection of the activation.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and the projection.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.projection = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, out_channels, H / stride, W / stride)``.

        Args:
            x: ``(B, in_channels, H, W)``.
        """
        activated = self.relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(activated)
        out: Tensor = self.conv2(self.relu(self.norm2(self.conv1(activated)))) + shortcut
        return out


class WideResNet(CifarNet):
    """A Wide ResNet of depth 6 n + 4: three stages of n blocks with 16 k, 32 k and 64 k channels.

    Args:
        depth: number of weighted layers, 6 n + 4.
        width: k, the widening factor.
        num_classes: number of logits.

    Raises:
        ValueError: a depth of another form.

    Example:
        >>> sum(p.numel() for p in WideResNet(16, 2).parameters())
        703284
    """

    def __init__(self, depth: int, width: int, num_classes: int = 100) -> None:
        super().__init__(64 * width, num_classes)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}; a Wide ResNet has 6 n + 4 layers, such as 16, 28 or 40.")
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = stage(PreActBlock, 16, 16 * width, 1, blocks)
        self.layer2 = stage(PreActBlock, 16 * width, 32 * width, 2, blocks)
        self.layer3 = stage(PreActBlock, 32 * width, 64 * width, 2, blocks)
        self.norm = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.initialise()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, ``(B, 64 k, H / 4, W / 4)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        out: Tensor = self.relu(self.norm(self.layer3(self.layer2(self.layer1(self.stem(x))))))
        return out


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """WRN-16-2, 0.70 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> wrn_16_2().num_features
        128
    """
    return WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """WRN-40-1, 0.57 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> wrn_40_1().num_features
        64
    """
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """WRN-40-2, 2.26 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> wrn_40_2().num_features
        128
    """
    return WideResNet(40, 2, num_classes)
