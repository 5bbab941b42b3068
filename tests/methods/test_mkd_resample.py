"""The small matrices that resize MKD's positions and coarse levels: right, made once, and never of the wrong kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from fastmkd.methods import mkd_decoder
from fastmkd.methods.mkd_decoder import AdaptiveDecoder, resample, resample_map


@pytest.fixture
def made(monkeypatch):
    """Sizes of the matrices that were made since the test began, none of them kept from before."""
    sizes, make = [], mkd_decoder._make_matrix

    def remember(source, target, *rest):
        sizes.append((source, target))
        return make(source, target, *rest)

    monkeypatch.setattr(mkd_decoder, "_make_matrix", remember)
    mkd_decoder._kept_matrix.cache_clear()
    yield sizes
    mkd_decoder._kept_matrix.cache_clear()


@pytest.mark.parametrize("size", [(3, 9), (28, 28), (40, 17)])
def test_it_is_bilinear(size):
    table = torch.randn(28, 28, 5, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
    found, pull = resample(table, size, "linear"), torch.randn(*size, 5, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad((x * pull).sum(), table)[0] for x in (found, expected)))


def test_averages_are_adaptive_pooling():
    x = torch.randn(2, 3, 25, 42, dtype=torch.float64)
    torch.testing.assert_close(resample_map(x, (13, 21), "average"), F.adaptive_avg_pool2d(x, (13, 21)))


def test_a_matrix_is_made_once_for_each_size_and_dtype(made):
    table = torch.randn(28, 28, 4)
    for _ in range(3):
        resample(table, (4, 7), "linear")
        resample(table, (7, 4), "linear")
    assert made == [(28, 4), (28, 7)]
    resample(table.double(), (4, 4), "linear")
    assert made == [(28, 4), (28, 7), (28, 4)]


def test_one_that_was_made_in_inference_mode_can_be_trained_through(made):
    decoder = AdaptiveDecoder(4, 4, 1, width=8, depth=0)
    level, visible = torch.randn(1, 4, 3, 5), torch.ones(1, 3, 5, dtype=torch.bool)
    with torch.inference_mode():
        expected = decoder(level, visible)
    rows = decoder(level, visible)
    rows.square().sum().backward()
    assert decoder.position.grad.abs().sum() > 0
    assert torch.equal(rows, expected)
    assert made == [(28, 3), (28, 5)]


def test_fake_tensors_leave_nothing_behind(made):
    with FakeTensorMode() as mode:
        table = mode.from_tensor(nn.Parameter(torch.randn(28, 28, 4)))
        assert resample(table, (5, 6), "linear").shape == (5, 6, 4)
    table = torch.randn(28, 28, 4)
    real = resample(table, (5, 6), "linear")
    assert type(real) is torch.Tensor
    with FakeTensorMode() as mode:
        assert resample(mode.from_tensor(table), (5, 6), "linear").shape == (5, 6, 4)
    assert torch.equal(resample(table, (5, 6), "linear"), real)


def test_it_compiles_as_a_whole(made):
    table = torch.randn(28, 28, 4)
    compiled = torch.compile(resample, backend="eager", fullgraph=True)
    found = compiled(table, (3, 5), "linear")
    assert mkd_decoder._kept_matrix.cache_info().currsize == 0  # what is traced is not kept
    assert torch.equal(found, resample(table, (3, 5), "linear"))
