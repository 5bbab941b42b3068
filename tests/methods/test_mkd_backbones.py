"""MKD on detectors with torchvision's and timm's backbones: every parameter learns, hidden pixels do not count."""

from __future__ import annotations

import pytest
import torch
from dense_nets import SMALL, batch

import fastmkd
from fastmkd.nn.detectors import build_detector
from fastmkd.reference.dense import upsampled

SWIN = {"img_size": 96, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 3}
BODIES = {
    "timm.resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)},
    "timm.resnext50_32x4d": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "cardinality": 2, "base_width": 8},
    "timm.mobilenetv2_035": {},
    "mobilenet_v2": {"width_mult": 0.25},
    "timm.swin_tiny_patch4_window7_224": SWIN,
}


@pytest.mark.parametrize("backbone", BODIES)
def test_every_family_learns_from_what_is_visible(backbone):
    torch.manual_seed(0)
    small = {"num_classes": 3, "image_size": (96, 96), "out_channels": 16}
    student = build_detector("retinanet", backbone, **small, backbone_kwargs=BODIES[backbone])
    teacher = build_detector("retinanet", "timm.resnet18", **small, backbone_kwargs=BODIES["timm.resnet50"])
    method = fastmkd.MKD(student, teacher, mask_ratio=0.3, image_size=96, **SMALL).train()
    assert [level.stride for level in method.levels] == [8, 16, 32, 64, 128]
    drawn, draw = [], method.draw
    method.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    images, targets = batch()
    images = [image.requires_grad_() for image in images]
    method(images, targets).loss.backward()
    missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    for image, visible in zip(images, upsampled(drawn[0][0], (96, 96)), strict=True):
        seen = visible[: image.shape[1], : image.shape[2]]
        assert not image.grad[:, ~seen].any()
        assert image.grad[:, seen].any()
    assert method.release() is student
