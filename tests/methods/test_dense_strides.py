"""Strides of levels: the same whatever image the method was made on, and what cannot be known is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from dense_nets import SMALL, detector, stages, teacher_of
from torch import nn

import fastmkd
from fastmkd.methods.dense_strides import strides_of

RESNET = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "num_classes": 3}


def classifiers(name="resnet18", **small):
    torch.manual_seed(0)
    return [timm.create_model(name, **(small or RESNET)) for _ in range(2)]


@pytest.mark.parametrize("size", [32, 36, 40, 64, (40, 200), 224])
def test_small_images_tell_the_same_strides(size):
    """36 pixels are two positions at stride 32 and would be two at 16; 32 are one at any stride from 32 on."""
    method = fastmkd.MKD(detector(), teacher_of(), image_size=size, **SMALL)
    assert [level.stride for level in method.levels] == [8, 16, 32, 64, 128]
    assert method.part_stride == 32
    method = fastmkd.MKD(*classifiers(), layers={"layer4": "layer4", "layer3": "layer3"}, image_size=size, **SMALL)
    assert [level.stride for level in method.levels] == [32, 16]


def test_the_method_remembers_the_image_it_was_made_on():
    """Some losses are made for the size of a level; a second, larger image is for strides alone."""
    method = fastmkd.DenseKD(*classifiers(), base="fitnet", layers={"layer4": "layer4"}, image_size=40)
    assert [(level.stride, level.size) for level in method.levels] == [(32, (2, 2))]


def test_an_image_that_tells_is_tried_once():
    nets, runs = classifiers(), []
    for net in nets:
        net.layer4.register_forward_hook(lambda _m, args, _o: runs.append(tuple(args[0].shape[2:])))
    fastmkd.DenseKD(*nets, base="fitnet", layers={"layer4": "layer4"}, image_size=224)
    assert runs == [(14, 14)] * 2


def test_levels_of_different_strides_are_not_paired_where_both_have_one_position():
    with pytest.raises(
        ValueError, match=r"'layer3' has a position every 16 pixels but the teacher's 'layer4' every 32"
    ):
        fastmkd.DenseKD(*classifiers(), base="fitnet", layers={"layer3": "layer4"}, image_size=16)


SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2, "num_classes": 3}


@pytest.mark.parametrize("side", [40, 64])
def test_a_network_of_one_size_rounds_up(side):
    """A Swin made for 40 pixels has 10, 5, 3 and 2 positions."""
    nets = classifiers("swin_tiny_patch4_window7_224", img_size=side, **SWIN)
    method = fastmkd.DenseKD(*nets, base="fitnet", layers={f"layers.{i}": f"layers.{i}" for i in range(4)})
    assert [level.stride for level in method.levels] == [4, 8, 16, 32]


class Pooled(nn.Module):
    """Layers named as a ResNet's, the last of which pools over the image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.layer4 = nn.AdaptiveAvgPool2d(1)

    def forward(self, images):
        return self.layer4(self.conv(images)).flatten(1)


def test_one_position_has_no_stride():
    with pytest.raises(
        ValueError, match=r"'layer4' of the student has one position for an image of 256 x 256 pixels, "
    ):
        fastmkd.DenseKD(Pooled(), Pooled(), base="fitnet", image_size=64)
    nets = classifiers("swin_tiny_patch4_window7_224", img_size=32, **SWIN)
    with pytest.raises(ValueError, match=r"one position for an image of 32 x 32 pixels, and it takes no larger one"):
        fastmkd.DenseKD(*nets, base="fitnet")


def test_layers_that_do_not_pad():
    """37 positions of 299 pixels are no power of two apart; the nearest one counts."""
    assert strides_of({"block": (35, 35)}, (299, 299)) == {"block": None}
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, 2)) for _ in range(2)]
    method = fastmkd.DenseKD(*nets, base="fitnet", layers={"2": "2", "0": "0"}, image_size=60)
    assert [level.stride for level in method.levels] == [4, 2]


class Named(nn.Module):
    """A classifier that timm does not know."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, layer in stages((4, 4, 8, 8)).named_children():
            setattr(self, name, layer)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("make", [classifiers, lambda: [Named(), Named()]])
def test_an_early_level_does_not_hide_how_coarse_the_network_becomes(make):
    """Cells of 16 pixels must grow before the last stage, compared or not."""
    method = fastmkd.MKD(
        *make(), layers={"layer2": "layer2"}, mask_patch=16, sam=16, mask_ratio=0.3, image_size=64, **SMALL
    )
    assert [level.name for level in method.levels] == ["layer2"]
    assert method.part_stride == 32
    method(torch.randn(2, 3, 72, 64), torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
