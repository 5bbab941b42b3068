"""Norms of packed maps against the same statistics written out over boolean-indexed positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import draw_mask, masks, pixels
from timm.layers import GroupNorm1
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from fastmkd.nn.masked_norm import MaskedBatchNorm2d, MaskedSyncBatchNorm
from fastmkd.nn.packed import pack

CHANNELS = 6


def seen_values(x, visible):
    """``(N, C)`` visible positions of a dense map, differentiable, in reading order."""
    return x.permute(0, 2, 3, 1)[pixels(visible, x.shape[2:])[:, 0].bool()]


def randomised(norm, seed=0):
    """The layer in float64 with parameters and statistics that are not their defaults."""
    g = torch.Generator().manual_seed(seed)
    norm = norm.double()
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=g, dtype=torch.float64) + 0.5)
    return norm


def map_of(visible, seed=0):
    size = (visible.shape[1] * 2, visible.shape[2] * 3)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(visible), CHANNELS, *size, generator=g, dtype=torch.float64) * 2 + 1
    return x.requires_grad_()


def compare(out, expected, inputs):
    """Values and all gradients of two ``(N, C)`` results in reading order."""
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    got = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    want = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def batch_norm_by_hand(norm, x, visible, training):
    """``(N, C)`` result, and the running statistics that a training step should leave."""
    rows = seen_values(x, visible)
    everything = norm.stats == "all"
    counted = (x * pixels(visible, x.shape[2:])).permute(0, 2, 3, 1).flatten(0, 2) if everything else rows
    if not training and norm.running_mean is not None:
        mean, var = norm.running_mean, norm.running_var
    else:
        mean, var = counted.mean(0), counted.var(0, unbiased=False)
    out = (rows - mean) / (var + norm.eps).sqrt()
    out = out if norm.weight is None else out * norm.weight + norm.bias
    if not training or norm.running_mean is None:
        return out, None
    share = 1 / (1 + int(norm.num_batches_tracked)) if norm.momentum is None else norm.momentum
    update = [(1 - share) * old + share * new for old, new in (
        (norm.running_mean, counted.mean(0)), (norm.running_var, counted.var(0)))]  # fmt: skip
    return out, update


@pytest.mark.parametrize("kind", [MaskedBatchNorm2d, MaskedSyncBatchNorm])
@pytest.mark.parametrize("stats", ["visible", "all"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.3, "eps": 0.1}],
)
@settings(max_examples=6, deadline=None)
@given(visible=masks, seed=st.integers(0, 99))
def test_batch_norm(kind, stats, training, options, visible, seed):
    norm = randomised(kind(CHANNELS, **options), seed).train(training)
    norm.stats = stats
    x = map_of(visible, seed)
    for _ in range(2):
        expected, update = batch_norm_by_hand(norm, x, visible, training)
        before = None if norm.running_mean is None else (norm.running_mean.clone(), norm.running_var.clone())
        out = norm(pack(x, visible))
        compare(seen_values(out.to_dense(), visible), expected, (x, *norm.parameters()))
        if update is not None:
            for new, target in zip((norm.running_mean, norm.running_var), update, strict=True):
                torch.testing.assert_close(new, target.detach(), rtol=1e-12, atol=1e-12)
        elif before is not None:
            assert torch.equal(before[0], norm.running_mean)
            assert torch.equal(before[1], norm.running_var)
    if norm.running_mean is not None:
        assert int(norm.num_batches_tracked) == (2 if training else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stats", ["visible", "all"])
def test_batch_norm_of_low_precision_maps(dtype, stats):
    visible = draw_mask("mixed", 3, (2, 2), 0)
    x = map_of(visible).detach()
    norm, exact = MaskedBatchNorm2d(CHANNELS), MaskedBatchNorm2d(CHANNELS)
    norm.stats = exact.stats = stats
    out = norm(pack(x.to(dtype), visible))
    assert out.dtype == dtype
    torch.testing.assert_close(out.values.float(), exact(pack(x.float(), visible)).values, rtol=0.03, atol=0.03)
    torch.testing.assert_close(norm.running_var, exact.running_var, rtol=0.02, atol=0.02)


def test_batch_norm_of_dense_maps_is_pytorchs():
    norm, plain = randomised(MaskedBatchNorm2d(CHANNELS)), randomised(nn.BatchNorm2d(CHANNELS))
    norm.stats = "all"
    x = torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64)
    assert torch.equal(norm(x), plain(x))
    assert torch.equal(norm.running_var, plain.running_var)


def test_batch_norm_refuses():
    x = pack(torch.randn(1, CHANNELS, 2, 3), torch.ones(1, 1, 1).bool())
    with pytest.raises(ValueError, match=r"a batch norm got a packed map .*; expected 4 channels"):
        MaskedBatchNorm2d(4)(x)
    with pytest.raises(ValueError, match="a batch norm got a packed map"):
        MaskedBatchNorm2d(CHANNELS)(x.permute(0, 2, 3, 1))
    single = pack(torch.randn(1, CHANNELS, 1, 1), torch.ones(1, 1, 1).bool())
    for stats in ("visible", "all"):
        norm = MaskedBatchNorm2d(CHANNELS)
        norm.stats = stats
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(single)


@settings(max_examples=15, deadline=None)
@given(visible=masks, groups=st.sampled_from((1, 2, 3, 6)), seed=st.integers(0, 99))
def test_group_norm(visible, groups, seed):
    x, norm = map_of(visible, seed), randomised(nn.GroupNorm(groups, CHANNELS), seed)
    expected = [
        F.group_norm(seen_values(x[b : b + 1], visible[b : b + 1]).t()[None], groups, norm.weight, norm.bias)[0].t()
        for b in range(len(x))
    ]
    out = norm(pack(x, visible))
    compare(seen_values(out.to_dense(), visible), torch.cat(expected), (x, *norm.parameters()))


PER_POSITION = {
    "timm_layer_norm": lambda: TimmLayerNorm2d(CHANNELS),
    "torchvision_layer_norm": lambda: LayerNorm2d(CHANNELS),
    "frozen_batch_norm": lambda: FrozenBatchNorm2d(CHANNELS),
}


@pytest.mark.parametrize("name", PER_POSITION)
@settings(max_examples=10, deadline=None)
@given(visible=masks)
def test_norms_of_each_position_equal_the_dense_layer(name, visible):
    x, norm = map_of(visible), randomised(PER_POSITION[name]())
    out, expected = norm(pack(x, visible)).to_dense(), norm(x)
    compare(seen_values(out, visible), seen_values(expected, visible), (x, *norm.parameters()))


def test_layer_norm_of_channels_last_maps():
    visible = draw_mask("mixed", 2, (2, 2), 0)
    x, norm = map_of(visible), randomised(nn.LayerNorm(CHANNELS))
    out, expected = norm(pack(x, visible).permute(0, 2, 3, 1)), norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    compare(
        seen_values(out.permute(0, 3, 1, 2).to_dense(), visible),
        seen_values(expected, visible),
        (x, *norm.parameters()),
    )


@pytest.mark.parametrize("channels_last", [True, False])
@settings(max_examples=10, deadline=None)
@given(visible=masks)
def test_global_response_norm_needs_no_change(channels_last, visible):
    x, norm = map_of(visible), randomised(GlobalResponseNorm(CHANNELS, channels_last=channels_last))
    masked = x * pixels(visible, x.shape[2:])
    if channels_last:
        out = norm(pack(x, visible).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        expected = norm(masked.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        out, expected = norm(pack(x, visible)), norm(masked)
    compare(seen_values(out.to_dense(), visible), seen_values(expected, visible), (x, *norm.parameters()))


def test_timm_group_norm_one():
    visible = draw_mask("mixed", 2, (2, 2), 0)
    x, norm = map_of(visible), randomised(GroupNorm1(CHANNELS))
    plain = randomised(nn.GroupNorm(1, CHANNELS, eps=norm.eps))
    assert torch.equal(norm(pack(x, visible)).values, plain(pack(x, visible)).values)


@pytest.mark.parametrize(
    ("norm", "last", "match"),
    [
        (nn.LayerNorm(CHANNELS), False, r"layer_norm over \(6,\) got a packed map .*permute\(0, 2, 3, 1\) first"),
        (nn.LayerNorm((4, CHANNELS)), True, "it can normalise the channels"),
        (nn.GroupNorm(2, CHANNELS), True, "group_norm with 2 groups"),
    ],
)
def test_refuses(norm, last, match):
    x = pack(torch.randn(1, CHANNELS, 4, 4), torch.ones(1, 2, 2).bool())
    with pytest.raises(ValueError, match=match):
        norm(x.permute(0, 2, 3, 1) if last else x)
