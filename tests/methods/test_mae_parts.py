"""The parts of a masked autoencoder against loops."""

from __future__ import annotations

import math

import pytest
import torch
from mae_oracle import patchify
from torch.autograd import gradcheck

import fastmkd
from fastmkd.methods.mae_parts import (
    draw_patches,
    paste_patches,
    patch_pixels,
    sincos_positions,
)
from fastmkd.ops import masked_patch_loss, unshuffle_tokens


@pytest.mark.parametrize(("grid", "width", "prefix"), [((3, 5), 8, 1), ((1, 1), 4, 0), ((4, 2), 16, 5)])
def test_positions(grid, width, prefix):
    found = sincos_positions(grid, width, prefix)
    assert found.shape == (prefix + grid[0] * grid[1], width)
    assert (found[:prefix] == 0).all()
    quarter = width // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(found[prefix + row * grid[1] + column], torch.tensor(expected))


def test_drawn_patches_are_the_random_mask():
    torch.manual_seed(4)
    keep, hidden = draw_patches(5, (4, 6), 0.7)
    torch.manual_seed(4)
    visible = fastmkd.random_mask(5, (4, 6), 0.7).flatten(1)
    for row in range(5):
        assert keep[row].tolist() == visible[row].nonzero().flatten().tolist()
        assert hidden[row].tolist() == (~visible[row]).nonzero().flatten().tolist()


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_unshuffle(prefix):
    keep = torch.stack([torch.randperm(6)[:2] for _ in range(3)])
    tokens, mask, positions = (torch.randn(*shape) for shape in ((3, prefix + 2, 4), (4,), (prefix + 6, 4)))
    expected = positions.repeat(3, 1, 1)
    for b in range(3):
        expected[b, :prefix] += tokens[b, :prefix]
        for patch in range(6):
            seen = (keep[b] == patch).nonzero().flatten().tolist()
            expected[b, prefix + patch] += tokens[b, prefix + seen[0]] if seen else mask
    torch.testing.assert_close(unshuffle_tokens(tokens, keep, mask, positions), expected)
    wide = [x.double().requires_grad_() for x in (tokens, mask, positions)]
    assert gradcheck(lambda t, m, p: unshuffle_tokens(t, keep, m, p), wide)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("patch", "channels"), [((4, 4), 3), ((2, 8), 1)])
def test_masked_patch_loss(normalize, patch, channels):
    images = torch.randn(3, channels, 8, 16, dtype=torch.float64)
    target = patchify(images, patch)
    hidden = torch.stack([torch.randperm(target.shape[1])[:5] for _ in range(3)])
    prediction = torch.randn(3, 5, target.shape[2], dtype=torch.float64, requires_grad=True)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = torch.stack([(prediction[b] - target[b, hidden[b]]).square().mean() for b in range(3)]).mean()
    torch.testing.assert_close(masked_patch_loss(prediction, images, hidden, patch, normalize), expected)
    assert gradcheck(lambda p: masked_patch_loss(p, images, hidden, patch, normalize), [prediction])
    low = masked_patch_loss(prediction.bfloat16(), images.float(), hidden, patch, normalize)
    assert low.dtype == torch.float32


def test_a_flat_patch_has_a_finite_target():
    images = torch.full((1, 3, 8, 8), 2.0)
    loss = masked_patch_loss(torch.zeros(1, 1, 48), images, torch.tensor([[2]]), 4, True)
    assert loss == 0


def test_pixels_there_and_back():
    images = torch.randn(2, 3, 8, 12)
    patches = torch.tensor([[0, 5], [3, 1]])
    pixels = patch_pixels(images, patches, 4)
    torch.testing.assert_close(pixels, patchify(images, (4, 4))[torch.arange(2)[:, None], patches])
    assert torch.equal(paste_patches(images, patches, pixels, 4), images)
    other = torch.randn_like(pixels)
    pasted = paste_patches(images, patches, other, 4)
    assert torch.equal(patch_pixels(pasted, patches, 4), other)
    rest = torch.tensor([[1, 2, 3, 4], [0, 2, 4, 5]])
    assert torch.equal(patch_pixels(pasted, rest, 4), patch_pixels(images, rest, 4))
