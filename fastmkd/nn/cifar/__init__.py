"""The small networks on which distillation papers report CIFAR results, as CRD's benchmark fixed them.

Each function returns a network for 32 x 32 images with ``forward_features(x) -> (B, C, h, w)`` and ``forward(x) ->
logits``. They are plain PyTorch; `fastmkd.convert_cnn` teaches them packed maps, with a grid of image side / total
stride: 8 x 8 for ResNets and Wide ResNets, 4 x 4 for VGGs and ShuffleNets, 2 x 2 for MobileNetV2.
"""

from .mobilenet import MobileNetV2, mobilenetv2
from .resnet import ResNet, resnet20, resnet32, resnet56, resnet110
from .shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenetv1, shufflenetv2
from .vgg import VGG, vgg8, vgg13
from .wide_resnet import WideResNet, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "VGG",
    "MobileNetV2",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideResNet",
    "mobilenetv2",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "shufflenetv1",
    "shufflenetv2",
    "vgg8",
    "vgg13",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
