"""One small member of every family of CNNs that can be converted, by name."""

from __future__ import annotations

from functools import partial

import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from timm.models import convnext, hrnet, regnet, resnet, vgg
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import _efficientnet_conf
from torchvision.models.mobilenetv3 import _mobilenet_v3_conf
from torchvision.models.regnet import BlockParams

RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 24), "stem_width": 4, "num_classes": 5}
BOTTLENECK = {**RESNET, "block": resnet.Bottleneck, "layers": (1, 2, 1, 1), "channels": (4, 8, 8, 12)}
REGNET = {"depth": 8, "w0": 8, "wa": 8.0, "wm": 2.0, "group_size": 4}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "num_classes": 5}


def hrnet_of_four_branches() -> nn.Module:
    widths = (4, 6, 8, 10)
    stages = {
        f"stage{n}": {
            "num_modules": 1,
            "num_branches": n,
            "block_type": "BOTTLENECK" if n == 1 else "BASIC",
            "num_blocks": (1,) * n,
            "num_channels": widths[:n],
            "fuse_method": "SUM",
        }
        for n in (1, 2, 3, 4)
    }
    return hrnet.HighResolutionNet({"stem_width": 8, **stages}, num_classes=5)


def torchvision_vgg() -> nn.Module:
    model = torchvision.models.VGG(
        torchvision.models.vgg.make_layers([4, "M", 6, "M", 8, "M", 8, "M", 8, "M"], batch_norm=True)
    )
    model.classifier = nn.Linear(8 * 49, 5)
    return model


def torchvision_mobilenet_v3() -> nn.Module:
    setting, last = _mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.35)
    return torchvision.models.MobileNetV3(setting, last, num_classes=5, dropout=0.0)


def torchvision_efficientnet() -> nn.Module:
    setting, _ = _efficientnet_conf("efficientnet_b0", width_mult=0.2, depth_mult=0.3)
    return torchvision.models.EfficientNet(setting, dropout=0.0, num_classes=5, last_channel=32)


TINY = {
    "resnet": partial(resnet.ResNet, resnet.BasicBlock, **RESNET),
    "resnet_bottleneck": partial(resnet.ResNet, **BOTTLENECK),
    "resnext": partial(resnet.ResNet, **BOTTLENECK, cardinality=4, base_width=32),
    "wide_resnet": partial(resnet.ResNet, **BOTTLENECK, base_width=128),
    "resnet_d": partial(resnet.ResNet, **BOTTLENECK, stem_type="deep", avg_down=True),
    "seresnet": partial(resnet.ResNet, **BOTTLENECK, block_args={"attn_layer": "se"}),
    "ecaresnet": partial(resnet.ResNet, **BOTTLENECK, block_args={"attn_layer": "eca"}),
    "resnet_drop_path": partial(resnet.ResNet, **BOTTLENECK, drop_path_rate=0.5),
    "resnet_group_norm": partial(
        resnet.ResNet, **BOTTLENECK, norm_layer=lambda channels, **_: nn.GroupNorm(2, channels)
    ),
    "resnet_norm_act": partial(resnet.ResNet, **BOTTLENECK, norm_layer=partial(BatchNormAct2d, apply_act=False)),
    "resnet_max_pool": partial(resnet.ResNet, **RESNET, block=resnet.BasicBlock, global_pool="catavgmax"),
    "regnetx": lambda: regnet.RegNet(regnet.RegNetCfg(**REGNET), num_classes=5),
    "regnety": lambda: regnet.RegNet(regnet.RegNetCfg(**REGNET, se_ratio=0.25), num_classes=5),
    "mobilenetv2": partial(timm.create_model, "mobilenetv2_035", num_classes=5),
    "mobilenetv3": partial(timm.create_model, "mobilenetv3_small_050", num_classes=5),
    "efficientnet": partial(timm.create_model, "tinynet_e", num_classes=5),
    "efficientnet_same": partial(timm.create_model, "tf_mobilenetv3_small_minimal_100", num_classes=5),
    "convnext": partial(convnext.ConvNeXt, **CONVNEXT),
    "convnext_conv_mlp": partial(convnext.ConvNeXt, **CONVNEXT, conv_mlp=True),
    "convnextv2": partial(convnext.ConvNeXt, **CONVNEXT, use_grn=True, ls_init_value=None),
    "hrnet": hrnet_of_four_branches,
    "vgg_bn": lambda: vgg.VGG([4, "M", 6, "M", 8, "M", 8, "M", 8, "M"], norm_layer=nn.BatchNorm2d, num_classes=5),
    "ghostnet": partial(timm.create_model, "ghostnet_050", num_classes=5),
    "torchvision_resnet": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=4
    ),
    "torchvision_regnet": lambda: torchvision.models.RegNet(
        BlockParams.from_init_params(5, 8, 8.0, 2.0, 4, se_ratio=0.25), num_classes=5
    ),
    "torchvision_mobilenet_v2": lambda: torchvision.models.MobileNetV2(num_classes=5, width_mult=0.25, dropout=0.0),
    "torchvision_mobilenet_v3": torchvision_mobilenet_v3,
    "torchvision_efficientnet": torchvision_efficientnet,
    "torchvision_convnext": lambda: torchvision.models.ConvNeXt(
        [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)], num_classes=5
    ),
    "torchvision_vgg_bn": torchvision_vgg,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The network in float64, with parameters and statistics that are not their defaults."""
    torch.manual_seed(seed)
    return randomised(TINY[name]().double())


def randomised(model: nn.Module) -> nn.Module:
    """Draws anew what starts as zeros or ones: norm weights, layer scales, biases, running statistics."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel() and (tensor == tensor.flatten()[0]).all():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model
