"""Enlarging packed maps equals enlarging the masked dense map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_masks import masks, pixels
from torch import nn

from fastmkd.nn import convert_cnn, pack

VISIBLE = torch.tensor([[[True, False, True], [False, True, False]]])


def packed(channels=4):
    return pack(torch.randn(1, channels, 4, 6, dtype=torch.float64), VISIBLE)


@given(
    visible=masks,
    cell=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    factors=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 5),
    mode=st.sampled_from(("nearest", "nearest-exact")),
    by_size=st.booleans(),
)
def test_as_dense(visible, cell, factors, channels, mode, by_size):
    height, width = visible.shape[1] * cell[0], visible.shape[2] * cell[1]
    size = (height * factors[0], width * factors[1])
    asked = {"size": size} if by_size else {"scale_factor": tuple(map(float, factors))}
    results = []
    for masked in (True, False):
        x = torch.randn(len(visible), channels, height, width, generator=torch.Generator().manual_seed(1)).double()
        x.requires_grad_()
        if masked:
            out = F.interpolate(pack(x, visible), mode=mode, **asked)
            assert out.shape == (len(visible), channels, *size)
            out = out.to_dense()
        else:
            out = F.interpolate(x * pixels(visible, (height, width)), mode=mode, **asked)
        out.square().sum().backward()
        results.append((out, x.grad))
    (out, grad), (expected, d_expected) = results
    assert torch.equal(out, expected)
    torch.testing.assert_close(grad, d_expected)


@pytest.mark.parametrize(
    "layer",
    [nn.Upsample(scale_factor=2), nn.Upsample(size=(8, 12)), nn.UpsamplingNearest2d(scale_factor=2)],
    ids=["factor", "size", "nearest2d"],
)
def test_layers_convert(layer):
    x = torch.randn(1, 3, 4, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), layer)
    expected = net(x * pixels(VISIBLE, (4, 6)).float())
    torch.testing.assert_close(convert_cnn(net)(pack(x, VISIBLE)).to_dense(), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale_factor": 2, "mode": "bilinear"}, "mode='bilinear'.*would mix visible and hidden pixels"),
        ({"scale_factor": 2, "mode": "area"}, "mode='area'"),
        ({"scale_factor": 2, "mode": "nearest", "align_corners": True}, "align_corners=True"),
        ({"scale_factor": 2, "antialias": True}, "antialias=True"),
        ({}, "size=None and scale_factor=None; expected exactly one"),
        ({"size": 8, "scale_factor": 2}, "size=8 and scale_factor=2; expected exactly one"),
        ({"scale_factor": 1.5}, "scale_factor=1.5; expected whole factors of at least 1"),
        ({"scale_factor": 0.5}, "scale_factor=0.5; expected whole factors"),
        ({"scale_factor": float("nan")}, "scale_factor=nan; expected whole factors"),
        ({"scale_factor": float("inf")}, "scale_factor=inf; expected whole factors"),
        ({"scale_factor": (2, 2, 2)}, r"scale_factor=\(2, 2, 2\); expected whole factors"),
        ({"size": (8, 13)}, r"size=\(8, 13\); expected whole factors"),
        ({"size": "large"}, "size=large; expected whole factors"),
        ({"size": 0}, "size=0; expected whole factors"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        F.interpolate(packed(), **options)


def test_refuses_channels_last():
    with pytest.raises(ValueError, match=r"channels last; permute\(0, 3, 1, 2\) first"):
        F.interpolate(packed().permute(0, 2, 3, 1), scale_factor=2)
