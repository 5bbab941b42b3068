"""Pooling of packed maps: y = pool(x * m_in) * m_out for windows, visible positions only for whole maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import draw_mask, masks, pixels
from timm.layers import EffectiveSEModule, SelectAdaptivePool2d, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn
from torchvision.ops import SqueezeExcitation

from fastmkd.nn.masked_pool import adaptive_max_pool2d, max_pool2d
from fastmkd.nn.packed import pack

WINDOWS = {
    "max_resnet": nn.MaxPool2d(3, stride=2, padding=1),
    "max_2x2": nn.MaxPool2d(2),
    "max_same": nn.MaxPool2d(3, stride=1, padding=1),
    "max_dilated": nn.MaxPool2d(3, stride=4, padding=1, dilation=2),
    "max_rectangular": nn.MaxPool2d((2, 3), stride=(2, 1), padding=(0, 1)),
    "max_ceil": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "max_ceil_padded": nn.MaxPool2d(5, stride=2, padding=1, ceil_mode=True),
    "max_stride4": nn.MaxPool2d(5, stride=4, padding=1),
    "avg_2x2": nn.AvgPool2d(2),
    "avg_shuffle": nn.AvgPool2d(3, stride=2, padding=1),
    "avg_same": nn.AvgPool2d(3, stride=1, padding=1),
    "avg_without_padding_in_divisor": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "avg_resnet_d": nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False),
    "avg_ceil": nn.AvgPool2d(3, stride=2, ceil_mode=True),
    "avg_ceil_padded": nn.AvgPool2d((5, 4), stride=2, padding=1, ceil_mode=True),
    "avg_ceil_without_padding": nn.AvgPool2d((5, 4), stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    "avg_divisor": nn.AvgPool2d(2, divisor_override=3),
    "avg_rectangular": nn.AvgPool2d((1, 4), stride=(1, 2), padding=(0, 1)),
}


@pytest.mark.parametrize("name", WINDOWS)
@settings(max_examples=12, deadline=None)
@given(visible=masks, cell=st.tuples(st.sampled_from((4, 8)), st.just(4)), seed=st.integers(0, 99))
def test_local_pooling(name, visible, cell, seed):
    pool = WINDOWS[name]
    torch.manual_seed(seed)
    size = (visible.shape[1] * cell[0], visible.shape[2] * cell[1])
    x = (torch.randn(len(visible), 3, *size, dtype=torch.float64) - 0.5).requires_grad_()  # mostly below the hidden 0
    expected = pool(x * pixels(visible, size))
    expected = expected * pixels(visible, expected.shape[2:])
    out = pool(pack(x, visible)).to_dense()
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    weight = torch.randn_like(expected)
    (got,), (want,) = (torch.autograd.grad((y * weight).sum(), x) for y in (out, expected))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_max_pool_treats_ties_and_nan_as_pytorch():
    visible = torch.ones(1, 1, 1).bool()
    x = torch.tensor([[[[1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 2.0, 2.0]]]], requires_grad=True)
    (got,) = torch.autograd.grad(F.max_pool2d(pack(x, visible), 2).values.sum(), x)
    (want,) = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)
    assert torch.equal(got, want)
    x = torch.tensor([[[[1.0, float("nan"), 2.0, 0.0], [1.0, 1.0, 2.0, 2.0]]]])
    torch.testing.assert_close(F.max_pool2d(pack(x, visible), 2).to_dense(), F.max_pool2d(x, 2), equal_nan=True)


def test_max_pool_gradcheck():
    visible = draw_mask("mixed", 2, (2, 2), 3)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.max_pool2d(pack(x, visible), 3, 2, 1).values, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    visible = draw_mask("mixed", 2, (2, 2), 3)
    x = torch.randn(2, 3, 4, 4).to(dtype)
    for pool in (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)):
        expected = pool(x * pixels(visible, (4, 4)).to(dtype)) * pixels(visible, (2, 2)).to(dtype)
        torch.testing.assert_close(pool(pack(x, visible)).to_dense(), expected, rtol=0.02, atol=0.02)


def visible_only(x, visible):
    """Mean and maximum over the visible positions of each image, ``(B, C, 1, 1)``."""
    seen = pixels(visible, x.shape[2:])
    mean = (x * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)
    return mean, x.masked_fill(seen == 0, -torch.inf).amax((2, 3), keepdim=True)


def draw(visible, channels=4):
    g = torch.Generator().manual_seed(0)
    shape = (len(visible), channels, visible.shape[1] * 2, visible.shape[2] * 2)
    return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()


def compare(out, expected, inputs):
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    got = torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)
    want = torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(visible=masks)
def test_pooling_of_the_whole_map(visible):
    x = draw(visible)
    packed, (mean, largest) = pack(x, visible), visible_only(x, visible)
    compare(nn.AdaptiveAvgPool2d(1)(packed), mean, (x,))
    compare(nn.AdaptiveAvgPool2d((1, 1))(packed), mean, (x,))
    compare(nn.AdaptiveMaxPool2d(1)(packed), largest, (x,))
    combinations = {
        "avg": mean,
        "max": largest,
        "avgmax": (mean + largest) / 2,
        "catavgmax": torch.cat((mean, largest), 1),
        "fast": mean,
        "fastmax": largest,
        "fastavgmax": (mean + largest) / 2,
        "fastcatavgmax": torch.cat((mean, largest), 1),
    }
    for kind, expected in combinations.items():
        for flatten in (False, True):
            pool = SelectAdaptivePool2d(pool_type=kind, flatten=flatten)
            compare(pool(packed), expected.flatten(1) if flatten else expected, (x,))


def test_no_pooling_leaves_the_map_packed():
    x = pack(torch.randn(1, 4, 2, 2), torch.ones(1, 1, 1).bool())
    assert SelectAdaptivePool2d(pool_type="")(x) is x


def test_pooling_to_a_grid_ends_the_masked_part():
    visible = draw_mask("mixed", 2, (2, 3), 0)
    x = draw(visible)
    masked = x * pixels(visible, x.shape[2:])
    for pool in (nn.AdaptiveAvgPool2d((3, 2)), nn.AdaptiveMaxPool2d((3, 2)), nn.AdaptiveAvgPool2d(7)):
        compare(pool(pack(x, visible)), pool(masked), (x,))


SQUEEZES = {
    "timm_se": lambda: SEModule(8, rd_channels=4),
    "timm_se_max_norm": lambda: SEModule(8, rd_channels=4, add_maxpool=True, norm_layer=nn.BatchNorm2d).eval(),
    "timm_effective": lambda: EffectiveSEModule(8),
    "timm_effective_max": lambda: EffectiveSEModule(8, add_maxpool=True),
    "timm_efficientnet": lambda: SqueezeExcite(8, rd_ratio=0.5),
    "torchvision": lambda: SqueezeExcitation(8, 4),
    "torchvision_hard": lambda: SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid),
}


@pytest.mark.parametrize("name", SQUEEZES)
@settings(max_examples=8, deadline=None)
@given(visible=masks)
def test_squeeze_and_excitation(name, visible):
    torch.manual_seed(0)
    layer, x = SQUEEZES[name]().double(), draw(visible, 8)
    expected = []
    for b in range(len(x)):  # each image as a map of its visible positions alone
        rows = x[b].permute(1, 2, 0)[pixels(visible, x.shape[2:])[b, 0].bool()]  # (n, C)
        expected.append(layer(rows.t()[None, :, :, None])[0, :, :, 0].t())
    out = layer(pack(x, visible)).to_dense().permute(0, 2, 3, 1)[pixels(visible, x.shape[2:])[:, 0].bool()]
    compare(out, torch.cat(expected), (x, *layer.parameters()))


X = pack(torch.randn(1, 4, 8, 8), torch.ones(1, 2, 2).bool())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (nn.MaxPool2d(3, 2), ValueError, r"into 3 x 3, so the masked cells do not stay whole \(in a MaxPool2d\)"),
        (nn.AvgPool2d(2, divisor_override=0), ValueError, "divisor_override is 0; expected what to divide"),
        (nn.AvgPool2d(8), ValueError, r"as large as the 8 x 8 map \(in a AvgPool2d\) would mix cells; use adaptive"),
        (nn.MaxPool2d(2, return_indices=True), TypeError, "max_pool2d_with_indices is not supported"),
        (nn.AdaptiveMaxPool2d(1, return_indices=True), TypeError, "adaptive_max_pool2d_with_indices is not"),
        (lambda x: max_pool2d(x, 2, return_indices=True), TypeError, "max_pool2d with return_indices=True is not"),
        (lambda x: adaptive_max_pool2d(x, 1, True), TypeError, "adaptive_max_pool2d with return_indices=True"),
        (nn.LPPool2d(2, 2), TypeError, "is not supported on PackedFeatures"),
        (lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), 2), ValueError, "pooling got a packed map .* channels last"),
        (lambda x: F.adaptive_avg_pool2d(x.permute(0, 2, 3, 1), 1), ValueError, "channels last"),
    ],
)
def test_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call(X)
