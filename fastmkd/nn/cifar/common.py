"""What the CIFAR networks share: features, then the mean over the map, then one linear layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["CifarNet", "conv_norm", "stage"]


class CifarNet(nn.Module):
    """Base of the CIFAR networks; a subclass defines ``forward_features``.

    Args:
        num_features: channels of the last map.
        num_classes: number of logits.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = num_features, num_classes
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(num_features, num_classes)

    def get_classifier(self) -> nn.Module:
        """Returns the last layer."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, ``(B, C, h, w)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Tensor:
        """Returns the logits of a last map.

        Args:
            x: ``(B, C, h, w)``.
        """
        logits: Tensor = self.fc(torch.flatten(self.global_pool(x), 1))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``(B, num_classes)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        return self.forward_head(self.forward_features(x))

    def initialise(self) -> None:
        """He initialisation of the convolutions, biases zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Returns convolution, batch norm and, unless `act` is False, ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: odd kernel size.
        stride: stride.
        groups: number of groups.
        act: end with a ReLU.

    Example:
        >>> len(conv_norm(3, 8, 3, act=False))
        2
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


def stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, stride: int, count: int
) -> nn.Sequential:
    """Returns `count` residual blocks, of which the first changes width and resolution.

    Args:
        block: makes a block of input channels, output channels and stride.
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first block.
        count: number of blocks, at least 1.

    Example:
        >>> len(stage(lambda *_: nn.Identity(), 16, 32, 2, 3))
        3
    """
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))
