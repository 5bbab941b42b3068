"""Packed networks equal their dense twins: outputs, all gradients and running statistics, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_masks import draw_mask, masks, pixels
from tiny_cnns import TINY, make
from torch import nn

from fastmkd.nn import convert_cnn, pack
from fastmkd.reference import dense_twin
from fastmkd.reference.dense import upsampled


def require_equal(cnn, twin, images, visible, tolerance=1e-9):
    """One step of each on the same images: outputs, gradients of images and parameters, and buffers agree."""
    twin.train(cnn.training)
    results = []
    for call in (lambda x: cnn(pack(x, visible)), lambda x: twin(x, visible)):
        x = images.clone().requires_grad_()
        torch.manual_seed(7)  # drop path
        out = call(x)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        (out * weight).sum().backward()
        results.append((out, x.grad))
    (out, d_images), (expected, d_expected) = results
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(d_images, d_expected, rtol=tolerance, atol=tolerance * float(d_expected.abs().max()))
    names = [name for name, _ in cnn.named_parameters()]
    assert names == [name for name, _ in twin.named_parameters()]
    # A bias before a batch norm has no gradient but noise, so the scale is the network's.
    scale = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for (name, p), q in zip(cnn.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: n + m
            )
    for (name, a), b in zip(cnn.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_family(name, training):
    cnn = convert_cnn(make(name)).train(training)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    require_equal(cnn, dense_twin(cnn), images, draw_mask("mixed", 2, (2, 2), 4))


@pytest.mark.parametrize("name", ["resnet_bottleneck", "mobilenetv3", "resnet_norm_act", "torchvision_regnet"])
def test_statistics_over_all_positions(name):
    cnn = convert_cnn(make(name), stats="all")
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    require_equal(cnn, dense_twin(cnn), images, draw_mask("mixed", 3, (2, 2), 4))


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "convnextv2"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(visible=masks, seed=st.integers(0, 99))
def test_any_mask(name, visible, seed):
    cnn = convert_cnn(make(name, seed))
    # A batch norm cannot train on one position, and maps any two to -1 and 1, so that their gradient is all rounding.
    cnn.train(int(visible.sum()) > 2)
    size = (visible.shape[1] * 32, visible.shape[2] * 32)
    images = torch.randn(len(visible), 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    require_equal(cnn, dense_twin(cnn), images, visible)


@pytest.mark.parametrize("name", ["vgg_bn", "torchvision_vgg_bn"])
def test_vgg_at_its_own_size(name):
    cnn = convert_cnn(make(name)).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    require_equal(cnn, dense_twin(cnn), images, draw_mask("mixed", 1, (7, 7), 4))


@pytest.mark.parametrize("name", ["resnet", "convnext", "mobilenetv3", "vgg_bn"])
def test_features(name):
    cnn = convert_cnn(make(name)).eval()
    images, visible = torch.randn(2, 3, 64, 64, dtype=torch.float64), draw_mask("mixed", 2, (2, 2), 3)
    features = cnn.forward_features(pack(images, visible))
    expected = dense_twin(cnn).forward_features(images, visible)
    torch.testing.assert_close(features.to_dense(), expected, rtol=1e-10, atol=1e-10)
    assert (expected * (1 - pixels(visible, expected.shape[2:]))).abs().sum() == 0


def test_everything_visible_is_the_plain_network():
    plain = make("resnet_bottleneck")
    cnn = convert_cnn(copy.deepcopy(plain))
    images, visible = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.ones(2, 2, 2, dtype=torch.bool)
    expected = plain(images)
    torch.testing.assert_close(cnn(pack(images, visible)), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dense_twin(plain)(images, visible), expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(plain.buffers(), cnn.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["packed", "twin"])
def test_hidden_pixels_change_nothing(side):
    cnn = convert_cnn(make("resnet_bottleneck"))
    twin, visible = dense_twin(cnn), draw_mask("mixed", 2, (2, 2), 3)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    other = torch.where(pixels(visible, (64, 64)) > 0, images, torch.randn_like(images) * 9)
    run = (lambda x: cnn(pack(x, visible))) if side == "packed" else (lambda x: twin(x, visible))
    torch.testing.assert_close(run(images), run(other), rtol=0, atol=0)


def test_the_twin_is_a_copy_under_the_same_names():
    cnn = convert_cnn(make("resnet"))
    twin = dense_twin(cnn)
    assert list(twin.state_dict()) == list(cnn.state_dict())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in cnn.parameters()}
    assert type(twin.model.conv1) is nn.Conv2d
    twin.load_state_dict(cnn.state_dict())
    again = copy.deepcopy(twin).float()
    assert all(p.dtype == torch.float32 for p in again.model.parameters())
    assert next(twin.parameters()).dtype == torch.float64
    assert not twin.eval().model.training
    assert not twin.model.layer1.training


class Auxiliary(nn.Module):
    """As GoogLeNet: a head that pools to a grid, beside a trunk that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        pooled = nn.AdaptiveAvgPool2d(4), nn.Conv2d(4, 2, 3, padding=1)
        self.head = nn.Sequential(*pooled, nn.Flatten(), nn.Linear(32, 5))

    def forward(self, x):
        x = self.stem(x)
        aside = self.head(x)
        return aside + nn.functional.conv2d(input=x, weight=self.trunk.weight, padding=1).mean((2, 3)).sum()


def test_a_head_that_pools_to_a_grid_leaves_the_trunk_masked():
    torch.manual_seed(0)
    cnn = convert_cnn(Auxiliary().double())
    require_equal(cnn, dense_twin(cnn), torch.randn(2, 3, 16, 16).double(), draw_mask("mixed", 2, (2, 2), 4))


def test_the_twin_refuses():
    cnn = nn.Sequential(convert_cnn(nn.BatchNorm2d(3)), convert_cnn(nn.BatchNorm2d(3), stats="all"))
    with pytest.raises(ValueError, match="disagree on stats"):
        dense_twin(cnn)
    with pytest.raises(ValueError, match="grid 3 x 3 of visible does not divide a 8 x 8 map"):
        dense_twin(nn.Conv2d(1, 1, 3, padding=1))(torch.zeros(1, 1, 8, 8), torch.ones(1, 3, 3).bool())


def test_upsampled():
    visible = draw_mask("mixed", 2, (2, 3), 0)
    assert torch.equal(upsampled(visible, (4, 9)), pixels(visible, (4, 9))[:, 0].bool())
