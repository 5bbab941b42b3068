"""The two ends of a masked autoencoder against the way its authors describe: concatenate, gather, patchify, mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmkd.ops import masked_patch_loss, unshuffle_tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def shuffled(batch: int, patches: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Kept and hidden patches of a random order, and the inverse of that order."""
    order = draw(batch, patches).argsort(1)
    return order[:, :kept], order[:, kept:], order.argsort(1)


def by_concatenation(tokens: Tensor, restore: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    hidden = mask_token.expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
    patches = torch.cat([tokens[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], 1) + positions


def patchify(images: Tensor, patch: int) -> Tensor:
    """``(B, C, H, W) -> (B, N, p * p * C)``."""
    batch, channels, height, width = images.shape
    cells = images.view(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def by_mask(prediction: Tensor, images: Tensor, hidden: Tensor, patch: int, normalize: bool) -> Tensor:
    target = patchify(images, patch)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = torch.zeros(target.shape[:2]).scatter(1, hidden, 1.0)
    spread = torch.zeros_like(target).scatter(1, hidden[..., None].expand_as(prediction), prediction)
    return ((spread - target).square().mean(-1) * mask).sum() / mask.sum()


def test_tokens_and_gradients_are_those_of_a_concatenation_and_a_gather() -> None:
    keep, _, restore = shuffled(3, 12, 5)
    ours = [draw(3, 6, 20), draw(20), draw(13, 20)]
    theirs = [tensor.clone() for tensor in ours]
    for tensor in (*ours, *theirs):
        tensor.requires_grad_()
    out = unshuffle_tokens(ours[0], keep, ours[1], ours[2])
    want = by_concatenation(theirs[0], restore, theirs[1], theirs[2])
    assert torch.equal(out, want)
    weight = draw(3, 13, 20, seed=1)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_only_the_gradients_that_are_needed_are_made() -> None:
    keep, *_ = shuffled(2, 4, 2)
    mask_token = draw(8).requires_grad_()
    out = unshuffle_tokens(draw(2, 3, 8), keep, mask_token, draw(5, 8))
    (grad,) = torch.autograd.grad(out.sum(), mask_token)
    assert torch.equal(grad, torch.full((8,), 4.0))


@pytest.mark.parametrize(
    ("tokens", "mask_token", "positions", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),  # autocast: parameters stay float32
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_result_has_the_dtype_of_the_sum(tokens, mask_token, positions, expected) -> None:
    keep, _, restore = shuffled(2, 4, 2)
    args = draw(2, 3, 8).to(tokens), draw(8).to(mask_token), draw(5, 8).to(positions)
    out = unshuffle_tokens(args[0].requires_grad_(), keep, *args[1:])
    assert out.dtype == expected == by_concatenation(args[0], restore, *args[1:]).dtype
    out.sum().backward()
    assert args[0].grad.dtype == tokens


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_and_gradient_are_those_of_a_masked_mean(normalize: bool) -> None:
    _, hidden, _ = shuffled(3, 12, 4)
    images, prediction = draw(3, 3, 24, 32), draw(3, 8, 192).requires_grad_()
    loss = masked_patch_loss(prediction, images, hidden, 8, normalize)
    want = by_mask(prediction, images, hidden, 8, normalize)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(2 * x, prediction)[0] for x in (loss, want)))


def test_a_patch_need_not_be_square() -> None:
    images = torch.arange(12.0).view(1, 1, 2, 6)
    assert masked_patch_loss(torch.tensor([[[4.0, 5.0, 10.0, 12.0]]]), images, torch.tensor([[2]]), (2, 2)) == 0.25
    assert masked_patch_loss(torch.tensor([[[3.0, 4.0, 5.0]]]), images, torch.tensor([[1]]), (1, 3)) == 0


@pytest.mark.parametrize("prediction", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pixels", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_is_wide_whatever_comes_in(prediction: torch.dtype, pixels: torch.dtype) -> None:
    images, hidden, guess = draw(1, 3, 8, 8), torch.tensor([[1, 2]]), draw(1, 2, 48)
    loss = masked_patch_loss(guess.to(prediction).requires_grad_(), images.to(pixels), hidden, 4)
    wide = torch.float64 if torch.float64 in (prediction, pixels) else torch.float32
    assert loss.dtype == wide
    plain = by_mask(guess.to(prediction).to(wide), images.to(pixels).to(wide), hidden, 4, normalize=False)
    torch.testing.assert_close(loss.detach(), plain, rtol=1e-2, atol=0)  # an image that is cast loses digits


def test_images_that_want_a_gradient_are_refused() -> None:
    images = torch.zeros(1, 1, 4, 4, requires_grad=True)
    guess, hidden = torch.zeros(1, 1, 4), torch.tensor([[0]])
    with pytest.raises(ValueError, match=r"images requires a gradient.*images.detach\(\)"):
        masked_patch_loss(guess, images, hidden, 2)
    with torch.no_grad():
        assert masked_patch_loss(guess, images, hidden, 2) == 0


def test_the_loss_has_a_second_derivative() -> None:
    guess = draw(1, 2, 4).double().requires_grad_()
    images, hidden = draw(1, 1, 4, 4).double(), torch.tensor([[1, 2]])
    assert torch.autograd.gradgradcheck(lambda x: masked_patch_loss(x, images, hidden, 2, normalize=True), guess)


def test_an_empty_batch_has_gradients() -> None:
    tokens, position = torch.zeros(0, 3, 8, requires_grad=True), torch.zeros(7, 8)
    out = unshuffle_tokens(tokens, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(8), position)
    out.sum().backward()
    assert out.shape == (0, 7, 8)
    assert tokens.grad is not None
    assert tokens.grad.shape == (0, 3, 8)
