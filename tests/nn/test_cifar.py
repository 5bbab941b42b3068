"""The CIFAR networks have the sizes that papers report, and run packed."""

from __future__ import annotations

import pytest
import torch
from random_masks import draw_mask
from tiny_cnns import randomised
from torch import nn

from fastmkd.nn import PackedFeatures, cifar, convert_cnn, pack
from fastmkd.reference import dense_twin

# Parameters with 100 classes (those of the CRD benchmark), channels and total stride of the last map.
REPORTED = {
    "resnet20": (278_324, 64, 4),
    "resnet32": (472_756, 64, 4),
    "resnet56": (861_620, 64, 4),
    "resnet110": (1_736_564, 64, 4),
    "wrn_16_2": (703_284, 128, 4),
    "wrn_40_1": (569_780, 64, 4),
    "wrn_40_2": (2_255_156, 128, 4),
    "vgg8": (3_965_028, 512, 8),
    "vgg13": (9_462_180, 512, 8),
    "mobilenetv2": (812_836, 1280, 16),
    "shufflenetv1": (949_258, 960, 8),
    "shufflenetv2": (1_355_528, 1024, 8),
}
# The same code at fewer layers or channels, quick enough for float64.
SMALL = {
    "resnet": lambda: cifar.ResNet(14, num_classes=5),
    "wide_resnet": lambda: cifar.WideResNet(10, 1, num_classes=5),
    "vgg": lambda: cifar.VGG((1, 1, 1, 1, 1), num_classes=5),
    "mobilenetv2": lambda: cifar.MobileNetV2(0.25, 2, num_classes=5),
    "shufflenetv1": lambda: cifar.ShuffleNetV1(2, (40, 64, 80), num_classes=5),
    "shufflenetv2": lambda: cifar.ShuffleNetV2((12, 16, 20), 24, num_classes=5),
}


@pytest.mark.parametrize("name", REPORTED)
def test_size(name):
    parameters, channels, stride = REPORTED[name]
    net = getattr(cifar, name)().eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    images = torch.randn(1, 3, 32, 32)
    assert net.forward_features(images).shape == (1, channels, 32 // stride, 32 // stride)
    assert net(images).shape == (1, 100)
    assert getattr(cifar, name)(num_classes=10)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_weighted_layers_are_what_the_depth_says():
    for depth, net in ((20, cifar.resnet20()), (110, cifar.resnet110()), (40, cifar.wrn_40_2())):
        convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
        pointwise = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)]
        # ResNets count convolutions and the classifier, Wide ResNets the three projections too.
        extra = len(pointwise) if isinstance(net, cifar.WideResNet) else 1
        assert len(convs) + extra == depth


@pytest.mark.parametrize(
    ("make", "form"), [(cifar.ResNet, "6 n \\+ 2"), (lambda d: cifar.WideResNet(d, 2), "6 n \\+ 4")]
)
def test_impossible_depths(make, form):
    with pytest.raises(ValueError, match=f"depth is 21; .* has {form} layers"):
        make(21)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_packed_equals_the_dense_twin(name, training):
    torch.manual_seed(0)
    cnn = convert_cnn(randomised(SMALL[name]().double())).train(training)
    twin, visible = dense_twin(cnn), draw_mask("mixed", 3, (2, 2), 4)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    out, expected = cnn(pack(images, visible)), twin(images, visible)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    scale = max(float(p.grad.abs().max()) for p in twin.parameters())
    for p, q in zip(cnn.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10 * scale)
    for a, b in zip(cnn.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", REPORTED)
def test_full_networks_run_packed(name):
    torch.manual_seed(0)
    cnn = convert_cnn(getattr(cifar, name)()).eval()
    side = 32 // REPORTED[name][2] if name == "mobilenetv2" else 4
    images, visible = torch.randn(2, 3, 32, 32), draw_mask("mixed", 2, (side, side), 4)
    features = cnn.forward_features(pack(images, visible))
    assert isinstance(features, PackedFeatures)
    torch.testing.assert_close(cnn.forward_head(features), dense_twin(cnn)(images, visible), rtol=1e-3, atol=1e-3)
