"""Segmentation networks by name: any size in, logits of that size out, and the package's own state dict."""

from __future__ import annotations

import pytest
import torch

import fastmkd.nn.segmenters
from fastmkd.nn.segmenters import SEGMENTERS, build_segmenter
from fastmkd.nn.timm_names import names_of_timm

smp = pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize("name", [name for name, (package, _) in SEGMENTERS.items() if package == "smp"])
def test_any_size_gives_logits_of_that_size(name):
    torch.manual_seed(0)
    net = build_segmenter(name, "resnet18", num_classes=4).eval()
    with torch.no_grad():
        for size in ((64, 64), (33, 70)):
            assert net(torch.randn(1, 3, *size)).shape == (1, 4, *size)
    assert net.num_classes == 4


def test_a_size_that_fits_gives_what_the_package_gives():
    torch.manual_seed(0)
    net = build_segmenter("pspnet", "resnet18", num_classes=3).eval()
    plain = smp.PSPNet("resnet18", encoder_weights=None, classes=3).eval()
    plain.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(net(images), plain(images))
        padded = torch.nn.functional.pad(images[..., :45], (0, 3))
        assert torch.equal(net(images[..., :45]), plain(padded)[..., :45])
    assert isinstance(net, smp.PSPNet)


@pytest.mark.parametrize(
    ("name", "encoder"), [("torchvision_deeplabv3", "mobilenet_v3_large"), ("torchvision_fcn", "resnet50")]
)
def test_torchvision_gives_one_tensor(name, encoder):
    from torchvision.models import segmentation

    torch.manual_seed(0)
    net = build_segmenter(name, encoder, num_classes=3).eval()
    plain = getattr(segmentation, f"{name.removeprefix('torchvision_')}_{encoder}")(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    plain.load_state_dict(net.state_dict())
    images = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        assert torch.equal(net(images), plain(images)["out"])
    assert isinstance(net, type(plain))


def test_encoders_of_timm_and_other_channels():
    net = build_segmenter("deeplabv3", "tu-mobilenetv3_small_050", num_classes=2, in_channels=1).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 1, 40, 40)).shape == (1, 2, 40, 40)


def test_weights_of_a_classifier_whether_timm_takes_it_apart_or_not():
    one, two, three = (torch.full((1,), float(i)) for i in range(3))
    whole = {"stages.0.conv.weight": one, "blocks.0.norm.weight": two, "layer1.0.bn1.bias": three, "fc.weight": one}
    own = ["model.stages_0.conv.weight", "model.model.blocks.0.norm.weight", "layer1.0.bn1.bias", "model.other.weight"]
    assert names_of_timm(own, whole) == dict(zip(own, [one, two, three], strict=False))
    assert fastmkd.nn.segmenters.names_of_timm is names_of_timm


def test_gradients_reach_every_parameter():
    net = build_segmenter("pspnet", "resnet18", num_classes=3, encoder_depth=3, psp_out_channels=16)
    net(torch.randn(2, 3, 48, 48)).square().mean().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())
    assert net.encoder.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "unet3"}, r"'unet3' is not known; expected one of pspnet"),
        ({"encoder": "resnet19"}, r"'resnet19' is not one of segmentation-models-pytorch; write tu-NAME"),
        ({"encoder": "resnet26"}, r"timm has it: write tu-resnet26"),
        ({"encoder": "tu-nothing"}, r"'tu-nothing' is not one of"),
        ({"num_classes": 1}, r"num_classes is 1; expected at least 2"),
        ({"name": "torchvision_fcn"}, r"no encoder 'resnet18'; expected one of .*resnet50"),
        ({"name": "torchvision_fcn", "encoder": "resnet50", "in_channels": 1}, r"in_channels is 1; .* takes 3"),
        ({"psp_channels": 9}, r"PSPNet does not know psp_channels, nor does the encoder resnet18"),
        ({"encoder": "tu-resnet18", "psp_channels": 9}, r"PSPNet cannot have the encoder tu-resnet18: .*psp_channels"),
        ({"name": "deeplabv3", "encoder": "tu-swin_tiny_patch4_window7_224"}, r"cannot have the encoder"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(arguments, said):
    with pytest.raises((ValueError, TypeError), match=said):
        build_segmenter(**{"name": "pspnet", "num_classes": 3, **arguments})
