"""MaskedConv2d: y = conv(x * m_in) * m_out, forward and all gradients, for any geometry that keeps cells whole."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import draw_mask, masks, pixels
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmkd
from fastmkd.nn.masked_conv import MaskedConv2d
from fastmkd.nn.packed import PackedFeatures, pack
from fastmkd.nn.plan import MaskPlan

# channels in, channels out, and the arguments of nn.Conv2d
GEOMETRIES = {
    "3x3": (3, 5, {"kernel_size": 3, "padding": 1}),
    "3x3_stride2": (4, 6, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "3x3_stride4": (2, 3, {"kernel_size": 3, "padding": 1, "stride": 4}),
    "no_bias": (3, 4, {"kernel_size": 3, "padding": 1, "bias": False}),
    "resnet_stem": (3, 4, {"kernel_size": 7, "padding": 3, "stride": 2, "bias": False}),
    "patch_stem": (3, 4, {"kernel_size": 4, "stride": 4}),
    "downsample": (3, 4, {"kernel_size": 2, "stride": 2}),
    "1x1": (24, 7, {"kernel_size": 1}),
    "1x1_stride2": (3, 4, {"kernel_size": 1, "stride": 2}),
    "1x1_grouped": (6, 9, {"kernel_size": 1, "groups": 3}),
    "1x1_grouped_stride2": (6, 4, {"kernel_size": 1, "groups": 2, "stride": 2, "bias": False}),
    "grouped": (6, 4, {"kernel_size": 3, "padding": 1, "groups": 2}),
    "depthwise": (24, 24, {"kernel_size": 3, "padding": 1, "groups": 24}),
    "depthwise_7x7": (5, 5, {"kernel_size": 7, "padding": 3, "groups": 5}),
    "depthwise_multiplier": (3, 6, {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 3}),
    "dilated": (3, 4, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "rectangular": (3, 4, {"kernel_size": (1, 7), "padding": (0, 3), "stride": (2, 1)}),
    "same": (3, 4, {"kernel_size": 5, "padding": "same", "dilation": 3}),
    "same_even": (3, 4, {"kernel_size": (2, 4), "padding": "same"}),
    "valid_1x1": (3, 4, {"kernel_size": 1, "padding": "valid"}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=12, deadline=None)
@given(visible=masks, cell=st.tuples(st.sampled_from((4, 8)), st.just(4)), seed=st.integers(0, 99))
def test_equals_a_convolution_between_masks(name, visible, cell, seed):
    torch.manual_seed(seed)
    c_in, c_out, options = GEOMETRIES[name]
    conv = MaskedConv2d(c_in, c_out, **options).double()
    plain = nn.Conv2d(c_in, c_out, **options).double()
    plain.load_state_dict(conv.state_dict())
    size = (visible.shape[1] * cell[0], visible.shape[2] * cell[1])
    x = torch.randn(len(visible), c_in, *size, dtype=torch.float64, requires_grad=True)

    expected = plain(x * pixels(visible, size))
    expected = expected * pixels(visible, expected.shape[2:])
    weight = torch.randn_like(expected)
    want = torch.autograd.grad((expected * weight).sum(), (x, *plain.parameters()))
    for out in (conv(x, visible), conv(pack(x, visible)).to_dense(), conv(x, MaskPlan(visible))):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad((out * weight).sum(), (x, *conv.parameters()))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 144), (144, 24), (96, 1000)])
def test_odd_widths(c_in, c_out):
    torch.manual_seed(0)
    visible = draw_mask("mixed", 2, (2, 2), 4)
    conv, x = MaskedConv2d(c_in, c_out, 3, padding=1).double(), torch.randn(2, c_in, 4, 4, dtype=torch.float64)
    expected = nn.Conv2d.forward(conv, x * pixels(visible, (4, 4))) * pixels(visible, (4, 4))
    torch.testing.assert_close(conv(x, visible), expected, rtol=1e-12, atol=1e-12)


def test_a_dense_map_alone_meets_a_plain_convolution():
    conv, plain = MaskedConv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(conv(x), plain(x))
    assert list(conv.state_dict()) == list(plain.state_dict())
    assert repr(conv) == repr(plain).replace("Conv2d", "MaskedConv2d")
    assert isinstance(copy.deepcopy(conv), MaskedConv2d)


def test_gradcheck():
    torch.manual_seed(0)
    visible = draw_mask("mixed", 2, (2, 2), 4)
    conv = MaskedConv2d(2, 2, 3, padding=1, stride=2).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(conv.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(conv, dict(zip(parameters, values, strict=True)), (x, visible))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_tables_are_shared_by_the_layers_of_a_batch():
    x = pack(torch.randn(2, 3, 8, 8), draw_mask("mixed", 2, (2, 2), 0))
    first, second = MaskedConv2d(3, 3, 3, padding=1), MaskedConv2d(3, 5, 3, padding=1)
    with fastmkd.backend("eager"):  # never the dense way
        second(first(x))
    assert len(x.plan._tables) == 2  # one for both layers, one for the gradient in the second's input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast(dtype, kernel):
    torch.manual_seed(0)
    visible = draw_mask("mixed", 2, (2, 2), 0)
    conv, x = MaskedConv2d(4, 4, kernel, padding=kernel // 2), torch.randn(2, 4, 4, 4, requires_grad=True)
    exact = conv(x, visible)
    with torch.autocast("cpu", dtype):
        out = conv(pack(x, visible))
        dense = conv(x, visible)
    assert out.dtype == dense.dtype == dtype
    torch.testing.assert_close(out.to_dense().float(), exact, rtol=0.05, atol=0.05)
    out.values.float().square().sum().backward()
    assert x.grad.dtype == conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):  # autocast leaves float64 alone
        assert copy.deepcopy(conv).double()(pack(x.double(), visible)).dtype == torch.float64


def test_rows_that_are_not_contiguous_give_the_same_numbers():
    x = pack(torch.randn(2, 6, 4, 4), draw_mask("mixed", 2, (2, 2), 0))
    half = x.chunk(2, dim=1)[1]
    assert not half.values.is_contiguous()
    conv = MaskedConv2d(3, 4, 3, padding=1)
    assert torch.equal(conv(half).values, conv(half.with_values(half.values.contiguous())).values)


PACKED = pack(torch.randn(2, 4, 8, 8), draw_mask("mixed", 2, (2, 2), 0))


@pytest.mark.parametrize(
    ("layer", "call", "error", "match"),
    [
        (
            {"kernel_size": 3},
            lambda c: c(PACKED),
            ValueError,
            r"turns 8 x 8 pixels .* into 6 x 6, so the masked cells do",
        ),
        ({"kernel_size": 3, "padding": 2}, lambda c: c(PACKED), ValueError, "needs 'same' padding"),
        ({"kernel_size": 1, "padding": 1}, lambda c: c(PACKED), ValueError, "needs 'same' padding"),
        ({"kernel_size": 3, "padding": "valid"}, lambda c: c(PACKED), ValueError, "into 6 x 6"),
        ({"kernel_size": 8, "stride": 8}, lambda c: c(PACKED), ValueError, "a stride that divides the cell"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, lambda c: c(PACKED), ValueError, "padding_mode"),
        ({"kernel_size": 1}, lambda c: c(PACKED.double()), TypeError, "dtype torch.float64 but weight torch.float32"),
        ({"kernel_size": 3, "padding": 1}, lambda c: c(PACKED.half()), TypeError, "dtype torch.float16 but weight"),
        ({"kernel_size": 1}, lambda c: c(PACKED.chunk(2, 1)[0]), ValueError, "has 2 channels but weight .* takes 4"),
        ({"kernel_size": 1}, lambda c: c(PACKED.permute(0, 2, 3, 1)), ValueError, "channels last"),
        ({"kernel_size": 1}, lambda c: c(PACKED, PACKED.visible), ValueError, "input is packed and carries its mask"),
        ({"kernel_size": 1}, lambda c: c(torch.zeros(1, 4, 8, 8), PACKED.visible), ValueError, "images holds 1 images"),
        ({"kernel_size": 1}, lambda c: c(torch.zeros(2, 4, 8, 8).int(), PACKED.visible), TypeError, "images is"),
    ],
)
def test_refuses(layer, call, error, match):
    with pytest.raises(error, match=match):
        call(MaskedConv2d(4, 4, **layer))


def test_errors_name_the_layer():
    net = nn.Sequential(nn.Identity(), nn.Sequential(MaskedConv2d(3, 4, 1)))
    with pytest.raises(ValueError, match=r"has 4 channels .* takes 3 \(in 1\.0, a MaskedConv2d\)"):
        net(PACKED)
    net = nn.Sequential(nn.Identity(), nn.Sequential(MaskedConv2d(4, 4, 3)))
    with pytest.raises(ValueError, match=r"do not stay whole \(in 1\.0, a MaskedConv2d\)"):
        net(PACKED)


def test_functional_form_and_plain_layers_work_too():
    plain = nn.Conv2d(4, 4, 3, padding=1)
    masked = MaskedConv2d(4, 4, 3, padding=1)
    masked.load_state_dict(plain.state_dict())
    out = plain(PACKED)
    assert isinstance(out, PackedFeatures)
    assert torch.equal(out.values, masked(PACKED).values)


def test_tables_of_an_unwanted_gradient_are_not_built():
    images = torch.randn(2, 3, 8, 8)
    visible = torch.tensor([[[True, False], [True, True]], [[False, True], [True, False]]])
    conv = MaskedConv2d(3, 4, 3, padding=1)
    with fastmkd.backend("eager"):
        plain = conv(pack(images, visible))
        wanted = pack(images.clone().requires_grad_(), visible)
        with_gradient = conv(wanted)
    assert not any(transposed for *_, transposed in plain.plan._tables)
    assert any(transposed for *_, transposed in wanted.plan._tables)
    torch.testing.assert_close(plain.values, with_gradient.values, rtol=0, atol=0)
    of_plain = torch.autograd.grad(plain.values.sum(), conv.weight)[0]
    torch.testing.assert_close(of_plain, torch.autograd.grad(with_gradient.values.sum(), conv.weight)[0])


def checkpointed(reentrant):
    torch.manual_seed(0)
    stem, block = (nn.Sequential(MaskedConv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2))
    x = stem(pack(torch.randn(2, 4, 8, 8), draw_mask("mixed", 2, (2, 2), 1)))
    out = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
    out.values.square().sum().backward()
    return [p.grad for p in (*stem.parameters(), *block.parameters())]


def test_gradient_checkpointing():
    for got, want in zip(checkpointed(False), checkpointed(None), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(TypeError, match=r"use_reentrant=True \(in 0, a MaskedConv2d\); .* Pass use_reentrant=False"):
        checkpointed(True)
