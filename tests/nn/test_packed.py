"""PackedFeatures behaves as the dense map does, wherever it behaves at all; the rest is refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import draw_mask, masks, pixels
from torch import nn

from fastmkd.nn.packed import PackedFeatures, pack
from fastmkd.nn.plan import MaskPlan

VISIBLE = draw_mask("mixed", 3, (2, 3), 1)
SIZE, CHANNELS = (4, 6), 4
SEEN = pixels(VISIBLE, SIZE)


def dense(seed: int = 0, dtype: torch.dtype = torch.float64, positive: bool = False) -> torch.Tensor:
    x = torch.randn(3, CHANNELS, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x.abs() + 0.1 if positive else x).to(dtype)


def same(packed: PackedFeatures, expected: torch.Tensor) -> None:
    """A packed map equals a dense one at visible positions, exactly."""
    assert isinstance(packed, PackedFeatures)
    assert packed.shape == expected.shape
    assert packed.dtype == expected.dtype
    seen = SEEN.permute(0, 2, 3, 1) if packed.channels_last else SEEN
    torch.testing.assert_close(packed.to_dense(), expected * seen.to(expected.dtype), rtol=0, atol=0)


@settings(max_examples=50, deadline=None)
@given(visible=masks, cell=st.tuples(st.integers(1, 4), st.integers(1, 4)), channels=st.sampled_from((1, 3, 24)))
def test_pack_and_to_dense_are_inverse(visible, cell, channels):
    size = (visible.shape[1] * cell[0], visible.shape[2] * cell[1])
    x = torch.randn(len(visible), channels, *size)
    packed, seen = pack(x, visible), pixels(visible, size).bool()
    assert torch.equal(packed.to_dense(), torch.where(seen, x, 0))
    assert torch.equal(packed.to_dense(fill=7.0), torch.where(seen, x, 7.0))
    assert packed.shape == x.shape
    assert packed.values.shape == (int(seen.sum()), channels)


def test_hidden_positions_may_be_filled_with_a_token():
    token = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64).requires_grad_()
    filled = pack(dense(), VISIBLE).to_dense(fill=token)
    assert torch.equal(filled, torch.where(SEEN.bool(), dense(), token[:, None, None]))
    filled.sum().backward()
    assert (token.grad == (1 - SEEN).sum()).all()
    last = pack(dense(), VISIBLE).permute(0, 2, 3, 1).to_dense(fill=token)
    assert torch.equal(last.permute(0, 3, 1, 2), filled)


def test_rows_follow_cells_in_reading_order_then_pixels():
    x = torch.arange(32.0).view(2, 1, 4, 4)
    visible = torch.tensor([[[False, True], [False, False]], [[True, False], [False, True]]])
    assert pack(x, visible).values[:, 0].tolist() == [2, 3, 6, 7, 16, 17, 20, 21, 26, 27, 30, 31]


def test_what_it_says_about_itself():
    x = pack(dense().requires_grad_(), VISIBLE)
    assert x.values is x.values
    assert torch.equal(x.visible, VISIBLE)
    assert (x.shape, x.size(), x.size(1), x.dim(), x.ndim) == (dense().shape, dense().shape, CHANNELS, 4, 4)
    assert (x.dtype, x.device, x.is_cuda, x.requires_grad) == (torch.float64, torch.device("cpu"), False, True)
    assert x.cell == (2, 2)
    assert not x.detach().requires_grad
    assert repr(x) == f"PackedFeatures(shape=(3, 4, 4, 6), rows={len(x.values)}, dtype=torch.float64)"


def add_twice(x):
    out = alias = x + 1
    out += x
    out -= 1
    out *= 2
    out /= 3
    return alias


POINTWISE = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "threshold": lambda x: F.threshold(x, 0.1, 3.0),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=x.dtype)),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "neg": lambda x: -x,
    "exp": torch.exp,
    "erf": torch.erf,
    "sign": torch.sign,
    "square": torch.square,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clip": lambda x: torch.clip(x, -0.5),
    "pow": lambda x: x.pow(2),
    "nan_to_num": torch.nan_to_num,
    "add_scalar": lambda x: x + 1.5,
    "radd": lambda x: 1.5 + x,
    "sub": lambda x: x - 0.5,
    "rsub": lambda x: 1.0 - x,
    "mul": lambda x: 3 * x * 2.0,
    "div": lambda x: x / 3,
    "add_alpha": lambda x: torch.add(x, x, alpha=2),
    "scalar_tensor": lambda x: x * torch.tensor(2.0, dtype=x.dtype),
    "maximum": lambda x: torch.maximum(x, x * 2),
    "residual": lambda x: x + torch.relu(x),
    "per_channel": lambda x: x * torch.arange(1.0, 5.0, dtype=x.dtype).view(1, -1, 1, 1),
    "per_image": lambda x: x * torch.arange(1.0, 4.0, dtype=x.dtype).view(-1, 1, 1, 1),
    "gate": lambda x: torch.linspace(0, 1, 12, dtype=x.dtype).view(3, 4, 1, 1) * x,
    "gate_minus": lambda x: torch.linspace(0, 1, 12, dtype=x.dtype).view(3, 4, 1, 1) - x,
    "addcmul": lambda x: torch.addcmul(torch.ones(1, 4, 1, 1, dtype=x.dtype), torch.ones(4, 1, 1, dtype=x.dtype), x),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "dropout_eval": lambda x: F.dropout(x, 0.5, training=False),
    "permute": lambda x: x.permute(0, 2, 3, 1) * torch.arange(4.0, dtype=x.dtype),
    "permute_back": lambda x: torch.permute(x, (0, 2, 3, 1)).permute((0, 3, 1, 2)),
    "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.eye(4, dtype=x.dtype)[:3], torch.ones(3, dtype=x.dtype)),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,), torch.arange(4.0, dtype=x.dtype)),
    "cat": lambda x: torch.cat((x, x * 2), 1),
    "cat_axis": lambda x: torch.concat([x, x], axis=-3),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "split": lambda x: torch.split(x, [1, 3], dim=1)[1],
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "channel_slice": lambda x: x[:, 1:3],
    "channel_slice_last": lambda x: x.permute(0, 2, 3, 1)[:, :, :, 1:],
    "whole_slice": lambda x: x[:],
    "expand_as": lambda x: x * torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4, 1, 1).expand_as(x),
    "clone": torch.clone,
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "relu_module": nn.ReLU(inplace=True),
    "method": lambda x: x.sigmoid().mul(2).add(1),
    "power": lambda x: x**2 + 1 / (x * x + 1),
    "in_place": lambda x: x.clone().mul_(2).add_(1).clamp_(max=2),
    "augmented_assignment": lambda x: add_twice(x),
}
ROUNDS_DIFFERENTLY = {"linear", "layer_norm"}  # rows are multiplied in blocks of another shape


@pytest.mark.parametrize("name", POINTWISE)
def test_runs_on_rows(name):
    x = dense()
    leaf_packed, leaf_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    packed, expected = POINTWISE[name](pack(leaf_packed, VISIBLE) * 1), POINTWISE[name](leaf_dense * 1)
    if name in ROUNDS_DIFFERENTLY:
        seen = SEEN.permute(0, 2, 3, 1)
        torch.testing.assert_close(packed.to_dense(), expected * seen, rtol=1e-12, atol=1e-12)
        return
    same(packed, expected)
    if packed.requires_grad:
        weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        seen = SEEN.permute(0, 2, 3, 1) if packed.channels_last else SEEN
        (packed.to_dense() * weight).sum().backward()
        (expected * seen * weight).sum().backward()
        torch.testing.assert_close(leaf_packed.grad, leaf_dense.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fn", [torch.log, torch.sqrt, torch.rsqrt, lambda x: x.div(x)])
def test_runs_on_rows_of_positive_numbers(fn):
    x = dense(positive=True)
    same(fn(pack(x, VISIBLE)), fn(x))


def test_dropout_is_random_and_keeps_the_mean():
    x = pack(torch.ones(3, CHANNELS, *SIZE), VISIBLE)
    torch.manual_seed(0)
    out = F.dropout(x, 0.5).values
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_dropout2d_drops_the_channels_that_the_dense_map_drops():
    x = torch.ones(3, CHANNELS, *SIZE)
    torch.manual_seed(0)
    out = F.dropout2d(pack(x, VISIBLE), 0.5)
    torch.manual_seed(0)
    assert torch.equal(out.to_dense(), F.dropout2d(x, 0.5) * SEEN)
    assert torch.equal(nn.Dropout2d().eval()(pack(x, VISIBLE)).values, pack(x, VISIBLE).values)


def test_checks_over_all_values():
    x = pack(dense(), VISIBLE)
    assert bool(torch.isfinite(x).values.all())
    assert not bool(torch.isnan(x / 1).values.any())


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_reductions_see_visible_positions_only(keepdim, last):
    x = dense().requires_grad_()
    packed = pack(x, VISIBLE)
    packed, dims = (packed.permute(0, 2, 3, 1), (1, 2)) if last else (packed, (2, 3))
    count = SEEN.sum((2, 3))
    expected = {
        "mean": (x * SEEN).sum((2, 3)) / count,
        "amax": x.masked_fill(SEEN == 0, -torch.inf).amax((2, 3)),
        "norm": (x * SEEN).square().sum((2, 3)).sqrt(),
    }
    shape = (3, *((1, 1, CHANNELS) if last else (CHANNELS, 1, 1))) if keepdim else (3, CHANNELS)
    actual = {
        "mean": packed.mean(dims, keepdim=keepdim),
        "amax": torch.amax(packed, dims, keepdim),
        "norm": torch.norm(packed, p=2, dim=dims, keepdim=keepdim),
    }
    for name, out in actual.items():
        assert out.shape == shape
        torch.testing.assert_close(out.view(3, CHANNELS), expected[name], rtol=1e-13, atol=1e-13)
        (got,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        (want,) = torch.autograd.grad(expected[name].square().sum(), x, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.mean(packed, dims), packed.mean([d - 4 for d in dims]))


def test_norm_has_no_slope_at_zero():
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    pack(x, torch.ones(1, 1, 1).bool()).norm(dim=(2, 3)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_means_of_low_precision_are_accumulated_in_float32():
    x = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    assert pack(x, torch.ones(1, 4, 4).bool()).mean((2, 3)).item() == 1.0
    assert pack(x, torch.ones(1, 4, 4).bool()).norm(dim=(2, 3)).item() == 64.0


def test_gradients_reach_the_images_and_nothing_hidden():
    x = dense().requires_grad_()
    packed = pack(x, VISIBLE)
    (packed * packed + packed.mean((2, 3), keepdim=True) * packed).to_dense().sum().backward()
    assert (x.grad * (1 - SEEN)).abs().sum() == 0
    assert (x.grad * SEEN != 0).sum() == SEEN.sum() * CHANNELS


def test_gradcheck_of_what_mixes_rows():
    gate = torch.rand(3, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    x = dense()[:, :2].clone().requires_grad_()

    def run(images, gate):
        packed = pack(images, VISIBLE)
        out = packed * gate + torch.cat(packed.chunk(2, 1), 1).norm(dim=(2, 3), keepdim=True) * packed.mean(
            (2, 3), True
        )
        return out.to_dense()

    assert torch.autograd.gradcheck(run, (x, gate))


def test_operators_that_python_asks_for():
    x = pack(dense(), VISIBLE)
    same(abs(x), dense().abs())
    same(2**x, 2 ** dense())
    assert x.to(torch.float32, memory_format=torch.channels_last).dtype == torch.float32


def test_casts():
    x = pack(dense(), VISIBLE)
    assert x.float().dtype == x.to(torch.float32).dtype == torch.float32
    assert x.half().dtype == torch.float16
    assert x.bfloat16().dtype == torch.bfloat16
    assert x.bfloat16().double().dtype == torch.float64
    assert x.type_as(torch.zeros(1)).dtype == x.type_as(x.float()).dtype == torch.float32
    assert x.to("cpu", torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"packed map is on cpu; move images and mask to meta before pack"):
        x.to("meta")


def test_autocast_casts_what_it_casts_in_dense_maps():
    x, weight = dense(dtype=torch.float32), torch.eye(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.linear(pack(x, VISIBLE).permute(0, 2, 3, 1), weight)
        assert out.dtype == F.linear(x.permute(0, 2, 3, 1), weight).dtype == torch.bfloat16
        assert (pack(x, VISIBLE) * 2).dtype == torch.float32


def test_copies_and_pickles():
    x = pack(dense(), VISIBLE)
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        same(other, dense())
        assert other.plan.batch == 3


def test_maps_packed_apart_with_one_mask_belong_together():
    plan = MaskPlan(VISIBLE)
    same(pack(dense(0), plan) + pack(dense(1), plan), dense(0) + dense(1))
    same(pack(dense(0), VISIBLE) + pack(dense(1), VISIBLE), dense(0) + dense(1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_of_a_mask_that_was_refilled_in_between_do_not(mode):
    with mode():
        visible = torch.tensor([[[True, False]]])
        first = pack(torch.ones(1, 1, 1, 2), visible)
        again = pack(torch.ones(1, 1, 1, 2), visible)
        assert (first + again).values.tolist() == [[2]]
        visible.copy_(torch.tensor([[[False, True]]]))
        with pytest.raises(ValueError, match=BELONG):
            first + pack(torch.ones(1, 1, 1, 2), visible)
        assert first.visible.tolist() == [[[True, False]]]


BELONG = "do not belong together; both need the same mask"


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda x: x + pack(dense(), VISIBLE.clone()), ValueError, BELONG),
        (lambda x: x + pack(dense()[:, :, :2, :3], x.plan), ValueError, BELONG),
        (lambda x: x + x.permute(0, 2, 3, 1), ValueError, BELONG),
        (lambda x: x + dense(), ValueError, "does not combine with a packed map.*vary by image and channel only"),
        (lambda x: x * torch.ones(2, 1, 1, 1), ValueError, "does not combine with a packed map"),
        (lambda x: torch.cat((x, x), 2), TypeError, "cat along dim=2 is not supported on PackedFeatures of shape"),
        (lambda x: torch.cat((x, dense()), 1), ValueError, "cat got packed and dense maps; pack the dense ones"),
        (lambda x: x.chunk(2), TypeError, "chunk along dim=0 is not supported"),
        (lambda x: torch.split(x, 2, 2), TypeError, "split along dim=2 is not supported"),
        (lambda x: x.mean(), TypeError, "mean over dim=None is not supported"),
        (lambda x: x.mean(3).mean(2), TypeError, r"take both spatial dimensions at once, dim=\(2, 3\)"),
        (lambda x: x.to_dense(fill=torch.zeros(3)), ValueError, r"fill has shape \(3,\); expected a number or \(4,\)"),
        (lambda x: x.mean(1), TypeError, "mean over dim=1 is not supported"),
        (lambda x: x.amax((1, 2)), TypeError, r"amax over dim=\(1, 2\) is not supported"),
        (lambda x: x.norm(p=1, dim=(2, 3)), TypeError, "norm with p=1 is not supported"),
        (lambda x: x.permute(0, 1, 3, 2), TypeError, r"permute\(0, 1, 3, 2\) is not supported"),
        (lambda x: torch.flatten(x, 1), TypeError, r"flatten is not supported .* call \.to_dense\(\) first"),
        (lambda x: F.unfold(x, 2), TypeError, "unfold is not supported"),
        (lambda x: F.pad(x, (1, 1)), TypeError, "pad is not supported"),
        (lambda x: x[0], TypeError, "indexing with 0 is not supported"),
        (lambda x: x == x.relu(), TypeError, r"a comparison is not supported .* call \.to_dense\(\) first"),
        (lambda x: x != 0, TypeError, "a comparison is not supported"),
        (lambda x: x > 0, TypeError, "a comparison is not supported"),
        (lambda x: x >= 1, TypeError, "a comparison is not supported"),
        (lambda x: x[:, :, ::2, ::2], TypeError, r"indexing with \(slice.* is not supported"),
        (lambda x: x[:, 1], TypeError, "indexing with .* is not supported"),
        (lambda x: torch.ones(4).expand_as(x), TypeError, "expand_as is not supported"),
        (lambda x: F.dropout2d(x.permute(0, 2, 3, 1)), TypeError, "dropout2d in channels-last order is not supported"),
        (lambda x: torch.softmax(x, 1), TypeError, "softmax is not supported"),
        (lambda x: F.batch_norm(x, None, None), TypeError, "batch_norm got a packed map; convert the network"),
        (lambda x: F.linear(x, torch.eye(4)), ValueError, "linear got a packed map .*whose last dimension is not"),
        (lambda x: F.channel_shuffle(x.permute(0, 2, 3, 1), 2), TypeError, "channel_shuffle along dim=1"),
        (lambda x: x.view(3, -1), AttributeError, r"\.view is not supported on PackedFeatures .*to_dense"),
        (lambda x: x.flatten(1), AttributeError, r"\.flatten is not supported"),
        (lambda x: x.with_values(x.values[1:]), ValueError, "a row per visible pixel of the 4 x 6 map"),
        (lambda x: x.with_values(x.values[:, 0]), ValueError, "values has shape"),
    ],
)
def test_refuses(make, error, match):
    with pytest.raises(error, match=match):
        make(pack(dense(), VISIBLE))


@pytest.mark.parametrize(
    ("images", "visible", "error", "match"),
    [
        ([1.0], VISIBLE, TypeError, "images is list; expected a floating-point"),
        (torch.zeros(3, 4, 4, 6, dtype=torch.uint8), VISIBLE, TypeError, "images is torch.uint8"),
        (torch.zeros(4, 4, 6), VISIBLE, ValueError, r"images has shape \(4, 4, 6\); expected \(B, C, H, W\)"),
        (torch.zeros(2, 4, 4, 6), VISIBLE, ValueError, "images holds 2 images but visible 3"),
        (torch.zeros(3, 4, 5, 6), VISIBLE, ValueError, "does not divide a 5 x 6 map"),
        (torch.zeros(3, 4, 4, 6, device="meta"), VISIBLE, ValueError, "visible is on cpu but images on meta"),
        (torch.zeros(3, 4, 4, 6), VISIBLE.float(), TypeError, "visible is torch.float32; expected a bool tensor"),
        (torch.zeros(3, 4, 4, 6), torch.zeros(3, 2, 3).bool(), ValueError, "hides an image entirely"),
    ],
)
def test_pack_refuses(images, visible, error, match):
    with pytest.raises(error, match=match):
        pack(images, visible)


def test_errors_name_the_layer():
    class Shuffle(nn.Module):
        def forward(self, x):
            return F.pixel_shuffle(x, 2)

    net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Identity(), Shuffle()))
    with pytest.raises(TypeError, match=r"pixel_shuffle is not supported on .* \(in 1.1, a Shuffle\); call \.to_dense"):
        net(pack(dense(), VISIBLE))
