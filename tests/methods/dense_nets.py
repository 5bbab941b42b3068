"""Tiny detectors, segmenters and batches for the tests of MKD and the methods beside it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from fastmkd.nn.detectors.reppoints import RepPoints

SMALL: dict[str, Any] = {"decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2, "mlp_ratio": 2.0}
CLASSES = 4  # with the background


def stages(widths: tuple[int, ...], norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """A ResNet of one block a stage, strides 4 to 32."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), bn1=norm(widths[0]), relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, 2, 1),
    )  # fmt: skip
    before = widths[0]
    for i, width in enumerate(widths):
        stride = 1 if i == 0 else 2
        short = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width)) if stride > 1 else None
        layers[f"layer{i + 1}"] = nn.Sequential(BasicBlock(before, width, stride, short, norm_layer=norm))
        before = width
    return nn.Sequential(layers)


def pyramid(
    widths: tuple[int, ...] = (4, 4, 8, 8),
    out: int = 8,
    norm: type[nn.Module] = nn.BatchNorm2d,
    two_stage: bool = False,
) -> BackboneWithFPN:
    """Levels 0 to 2 at strides 8 to 32, p6 and p7; or 0 to 3 at strides 4 to 32 and pool."""
    first = 1 if two_stage else 2
    names = {f"layer{i}": str(i - first) for i in range(first, 5)}
    last = LastLevelMaxPool() if two_stage else LastLevelP6P7(out, out)
    return BackboneWithFPN(stages(widths, norm), names, list(widths[first - 1 :]), out, last)


def detector(kind: str = "retinanet", seed: int = 0, size: int = 96, **backbone: Any) -> Any:
    """RetinaNet, FCOS, RepPoints or Faster R-CNN; images are made `size` pixels."""
    torch.manual_seed(seed)
    if kind == "fcos":
        backbone["out"] = 32  # its head has 32 groups
    body = pyramid(two_stage=kind == "faster_rcnn", **backbone)
    sides = {"min_size": size, "max_size": size}
    if kind == "retinanet":
        return RetinaNet(body, CLASSES, **sides)
    if kind == "fcos":
        model: Any = FCOS(body, CLASSES, **sides)
        # The group norms of a level of one position say exactly their bias: at 0 the ReLU behind them has no slope.
        for norm in (part for part in model.head.modules() if isinstance(part, nn.GroupNorm)):
            nn.init.normal_(norm.bias, std=0.1)
        return model
    if kind == "reppoints":
        return RepPoints(body, CLASSES, width=32, **sides)
    anchors = AnchorGenerator(tuple((side,) for side in (8, 16, 32, 64, 96)), ((1.0,),) * 5)
    return FasterRCNN(body, CLASSES, rpn_anchor_generator=anchors, rpn_pre_nms_top_n_train=50,
                      rpn_post_nms_top_n_train=20, **sides)  # fmt: skip


def teacher_of(kind: str = "retinanet", seed: int = 7, **backbone: Any) -> Any:
    """A wider detector."""
    return detector(kind, seed, **{"widths": (4, 8, 8, 16), "out": 12, **backbone})


def batch(
    seed: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different sizes; the second has no boxes."""
    g = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=g, dtype=dtype) for size in ((96, 80), (64, 96))]
    boxes = [torch.tensor([[10.0, 12, 60, 70], [30, 8, 44, 30]], dtype=dtype), torch.zeros(0, 4, dtype=dtype)]
    labels = [torch.tensor([1, 3]), torch.zeros(0, dtype=torch.int64)]
    return images, [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]


class Segmenter(nn.Module):
    """The face of segmentation-models-pytorch."""

    def __init__(self, widths: tuple[int, ...] = (4, 4, 8, 8), classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = _Encoder(widths)
        self.decoder = nn.Conv2d(widths[-1], 8, 3, padding=1)
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, classes, 1), nn.Upsample(scale_factor=32, mode="bilinear"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.segmentation_head(self.decoder(self.encoder(images)[-1]))
        return logits[:, :, : images.shape[2], : images.shape[3]]


class _Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = stages(widths)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        found = [images]
        x = images
        for name, layer in self.stages.named_children():
            x = layer(x)
            if name.startswith("layer"):
                found.append(x)
        return found
