"""VGG for CIFAR: five blocks of 3 x 3 convolutions with batch norm, a 2 x 2 maximum after each of the first three."""

from __future__ import annotations

from torch import Tensor, nn

from .common import CifarNet

__all__ = ["VGG", "vgg8", "vgg13"]

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(CifarNet):
    """VGG with a global average and one linear layer for a head.

    Args:
        convs: number of convolutions in each of the five blocks.
        num_classes: number of logits.

    Example:
        >>> sum(p.numel() for p in VGG((1, 1, 1, 1, 1)).parameters())
        3965028
    """

    def __init__(self, convs: tuple[int, int, int, int, int], num_classes: int = 100) -> None:
        super().__init__(_WIDTHS[-1], num_classes)
        blocks, channels = [], 3
        for index, (width, count) in enumerate(zip(_WIDTHS, convs, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            if index < 3:  # 32 x 32 pixels become 4 x 4
                layers.append(nn.MaxPool2d(2))
            blocks.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = blocks
        self.initialise()

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last map, ``(B, 512, H / 8, W / 8)``.

        Args:
            x: ``(B, 3, H, W)`` images, dense or packed.
        """
        out: Tensor = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return out


def vgg8(num_classes: int = 100) -> VGG:
    """VGG-8, 3.97 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> vgg8().num_features
        512
    """
    return VGG((1, 1, 1, 1, 1), num_classes)


def vgg13(num_classes: int = 100) -> VGG:
    """VGG-13, 9.46 M parameters.

    Args:
        num_classes: number of logits.

    Example:
        >>> vgg13().num_features
        512
    """
    return VGG((2, 2, 2, 2, 2), num_classes)
