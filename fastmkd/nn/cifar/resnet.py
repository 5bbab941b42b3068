"""CIFAR ResNets (He et al. 2016, Section 4.2), with the projection shortcuts that the distillation papers use."""

from __future__ import annotations

from torch import Tensor, nn

from .common import CifarNet, conv_norm, stage

__all__ = ["ResNet", "resnet20", "resnet32", "resnet56", "resnet110"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, with a 1 x 1 projection where the shape changes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and the projection.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(in_channels, out_channels, 3, stride)
        self.conv2 = conv_norm(out_channels, out_channels, 3, act=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_norm(in_channels, out_channels, 1, stride, act=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, out_channels, H / stride, W / stride)``.

        Args:
            x: ``(B, in_channels, H, W)``.
        """
        out: Tensor = self.relu(self.conv2(self.conv1(x)) + self.shortcut(x))
        return out


class ResNet(CifarNet):
    """A CIFAR ResNet of depth 6 n + 2: three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: number of weighted layers, 6 n + 2.
        num_classes: number of logits.

    Raises:
        ValueError: a depth of another form.

    Example:
        >>> sum(p.numel() for p in ResNet(20).parameters())
        278324
    """

    def __init__(self, depth: int, num_classes: int = 100) -> None:
        super().__init__(64, num_classes)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; a CIFAR ResNet has 6 n + 2 layers, such as 20, 32, 56 or 110.")
        blocks = (depth - 2) // 6
        self.stem = conv_norm(3, 16, 3)
        self.layer1 = stage(BasicBlock, 16, 16, 1, blocks)
        self.layer2 = stage(BasicBlock, 16, 32, 2, blocks)
        self.layer3 = stage(BasicBlock, 32, 64, 2, blocks)
        self.initialise()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, ``(B, 64, H / 4, W / 4)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        out: Tensor = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return out


def resnet20(num_classes: int = 100) -> ResNet:
    """ResNet-20, 0.28 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> resnet20().num_features
        64
    """
    return ResNet(20, num_classes)


def resnet32(num_classes: int = 100) -> ResNet:
    """ResNet-32, 0.47 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> resnet32().num_features
        64
    """
    return ResNet(32, num_classes)


def resnet56(num_classes: int = 100) -> ResNet:
    """ResNet-56, 0.86 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> resnet56().num_features
        64
    """
    return ResNet(56, num_classes)


def resnet110(num_classes: int = 100) -> ResNet:
    """ResNet-110, 1.74 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> resnet110().num_features
        64
    """
    return ResNet(110, num_classes)
