"""Aligned cells: against a convolution, a choice and a sum; what hidden cells may hold; autocast; layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastmkd
from fastmkd.ops import align_cells, align_cells_grad


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(patch: int = 2, grid: tuple[int, int] = (3, 4)) -> tuple[torch.Tensor, ...]:
    """Level, weight of a convolution, bias, positions, visible, mask token."""
    level, weight = draw(2, 5, grid[0] * patch, grid[1] * patch), draw(8, 5, patch, patch) / patch
    visible = draw(2, *grid, seed=1) > -0.5
    assert 0 < visible.sum() < visible.numel()
    return level, weight, draw(8), draw(grid[0] * grid[1], 8), visible, draw(8, seed=2)


def rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.movedim(1, 3).flatten(1)


def by_convolution(
    level: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor,
    mask_token: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    tokens = F.conv2d(level, weight, bias, stride=weight.shape[2]).flatten(2).mT
    return torch.where(visible.flatten(1)[..., None], tokens, mask_token) + positions


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_it_is_a_convolution_with_a_mask_token_and_positions(patch: int, channels_last: bool, backend: str) -> None:
    level, weight, bias, positions, visible, mask_token = inputs(patch)
    if channels_last:
        level = level.contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_() for x in (level, weight, bias, positions, mask_token)]
    with fastmkd.backend(backend):
        found = align_cells(level, rows(weight), bias, positions, patch, visible, mask_token)
        expected = by_convolution(level, weight, bias, positions, visible, mask_token)
        torch.testing.assert_close(found, expected)
        pull = draw(*found.shape)
        for got, want in zip(*(torch.autograd.grad(x, leaves, pull) for x in (found, expected)), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_hidden_cells_are_not_looked_at(backend: str) -> None:
    """Not a number behind the mask: nothing of it in the tokens nor in any gradient, and no gradient there."""
    level, weight, bias, positions, visible, mask_token = inputs()
    seen = visible.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    spoilt = torch.where(seen, level, float("nan")).requires_grad_()
    weight = rows(weight).requires_grad_()
    with fastmkd.backend(backend):
        out = align_cells(spoilt, weight, bias, positions, 2, visible, mask_token)
        out.backward(draw(*out.shape))
    clean = align_cells(level, weight, bias, positions, 2, visible, mask_token)
    torch.testing.assert_close(out, clean)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert spoilt.grad is not None
    assert not spoilt.grad[~seen.expand_as(level)].any()
    assert spoilt.grad[seen.expand_as(level)].all()


def test_all_visible_with_a_mask_and_without_are_the_same() -> None:
    level, weight, bias, positions, visible, mask_token = inputs()
    args = level, rows(weight), bias, positions, 2
    assert torch.equal(align_cells(*args), align_cells(*args, torch.ones_like(visible), mask_token))


def test_autocast_gives_what_the_convolution_would() -> None:
    """All is cast, the positions too: tokens keep the dtype that they had as three passes."""
    level, weight, bias, positions, visible, mask_token = inputs()
    leaves = [x.requires_grad_() for x in (level, weight, bias, positions, mask_token)]
    with torch.autocast("cpu", torch.bfloat16):
        out = align_cells(level, rows(weight), bias, positions, 2, visible, mask_token)
    assert out.dtype == torch.bfloat16
    expected = by_convolution(level, weight, bias, positions, visible, mask_token)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=5e-2)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.float32] * 5
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for got, want in zip(grads, wanted, strict=True):
        assert (got - want).norm() < 2e-2 * want.norm()


def test_a_sliced_level_and_a_sliced_mask_are_taken() -> None:
    level, weight, bias, positions, visible, mask_token = inputs()
    wide, larger = F.pad(level, (0, 3)), F.pad(visible, (0, 1))
    out = align_cells(wide[..., :-3], rows(weight), bias, positions, 2, larger[..., :-1], mask_token)
    assert torch.equal(out, align_cells(level, rows(weight), bias, positions, 2, visible, mask_token))


def test_a_mask_needs_its_token() -> None:
    level, weight, bias, positions, visible, _ = inputs()
    with pytest.raises(ValueError, match="visible is given but mask_token is None"):
        align_cells(level, rows(weight), bias, positions, 2, visible)


def test_hidden_cells_have_no_gradient_whatever_the_weight_holds():
    """Zero times infinity is not zero: what is hidden is left out, not multiplied away."""
    level, grad = torch.randn(1, 2, 4, 4), torch.randn(1, 4, 3)
    weight = torch.full((3, 8), torch.inf)
    hidden = torch.zeros(1, 4, dtype=torch.bool)
    for backend in ("eager", "auto"):
        with fastmkd.backend(backend):
            d_level, d_weight = align_cells_grad(level * torch.nan, weight, hidden, grad, 2)
        assert torch.equal(d_level, torch.zeros_like(level))
        assert torch.equal(d_weight, torch.zeros_like(weight))
