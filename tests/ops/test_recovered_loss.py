"""The recovered loss against the way the paper describes: shuffle, normalise, compare, add contexts, compare again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmkd
from fastmkd.ops import recovered_loss, relation_error
from fastmkd.ops.recovered_loss_grad import recovered_loss_grad


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class ContextBlock(nn.Module):
    """FGD's GCBlock as FGD has it: attention pooling, and an MLP whose result is added to every position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attend = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attend(x).flatten(2).softmax(2)  # (B, 1, HW)
        context = (x.flatten(2) @ weights.mT)[..., None]  # (B, C, 1, 1)
        return x + self.add(context)


def by_shuffle(rows: Tensor, teacher: Tensor, patch: int, blocks: list[ContextBlock]) -> tuple[Tensor, Tensor]:
    """``rows (B, gh * gw, p * p * C)``; Eq. 3 and Eq. 4."""
    grid = teacher.shape[2] // patch, teacher.shape[3] // patch
    channel_major = rows.unflatten(2, (patch * patch, -1)).mT.flatten(2)  # as a pixel shuffle wants it
    student = F.pixel_shuffle(channel_major.mT.unflatten(2, grid), patch)  # (B, C, H, W)
    normal = [F.layer_norm(x.movedim(1, 3), x.shape[1:2]).movedim(3, 1) for x in (student, teacher)]
    relation = (blocks[0](normal[0]) - blocks[1](normal[1])).square().sum() / len(rows)
    return F.mse_loss(*normal) / 2, relation


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_both_terms_and_all_gradients_are_the_papers(patch: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    rows, teacher = draw(2, 6, patch * patch * 8).requires_grad_(), draw(2, 8, 2 * patch, 3 * patch)
    if channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    blocks = nn.ModuleList(ContextBlock(8) for _ in range(2))
    leaves = [rows, *blocks.parameters()]

    recovered = recovered_loss(rows, teacher, patch, torch.cat([block.attend.weight.flatten(1) for block in blocks]))
    contexts = recovered.contexts[..., None, None]
    added = [block.add(c)[:, :, 0, 0] for block, c in zip(blocks, contexts, strict=True)]
    relation = relation_error(recovered, added[0] - added[1], 6 * patch * patch)
    want = by_shuffle(rows, teacher, patch, list(blocks))
    for got, expected in zip((recovered.error, relation), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(
            torch.autograd.grad(got, leaves, retain_graph=True, materialize_grads=True),
            torch.autograd.grad(expected, leaves, retain_graph=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_without_queries_the_context_is_the_mean() -> None:
    rows, teacher = draw(2, 4, 12), draw(2, 3, 4, 4)
    recovered = recovered_loss(rows, teacher, 2)
    normal = F.layer_norm(teacher.flatten(2).mT, (3,))
    torch.testing.assert_close(recovered.contexts[1], normal.mean(1))
    torch.testing.assert_close(recovered.difference, 16 * (recovered.contexts[0] - recovered.contexts[1]))


def test_equal_maps_have_no_error_and_no_gradient() -> None:
    teacher = draw(1, 6, 3, 5)
    rows = teacher.flatten(2).mT.contiguous().requires_grad_()
    recovered = recovered_loss(rows, teacher, 1)
    assert recovered.error == 0
    assert torch.equal(recovered.difference, torch.zeros(1, 6))
    recovered.error.backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() == 0


def test_a_logit_far_above_the_others_takes_all_the_weight() -> None:
    rows, teacher = draw(1, 4, 8), draw(1, 8, 2, 2)
    for scale in (1e3, 1e5):
        recovered = recovered_loss(rows, teacher, 1, draw(2, 8) * scale)
        normal = F.layer_norm(rows, (8,))[0]
        chosen = normal[(normal @ draw(2, 8)[0]).argmax()]
        torch.testing.assert_close(recovered.contexts[0, 0], chosen)


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("taught", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_is_wide_whatever_comes_in(student: torch.dtype, taught: torch.dtype) -> None:
    rows, teacher = draw(1, 4, 32).to(student).requires_grad_(), draw(1, 8, 4, 4).to(taught)
    recovered = recovered_loss(rows, teacher, 2, draw(2, 8).to(student))
    wide = torch.float64 if torch.float64 in (student, taught) else torch.float32
    assert {x.dtype for x in recovered} == {wide}
    recovered.error.backward()
    assert rows.grad is not None
    assert rows.grad.dtype == student


def test_any_strides_are_taken() -> None:
    teacher = draw(4, 2, 4, 6).permute(1, 2, 0, 3)  # (2, 4, 4, 6)
    rows = draw(2, 16, 6).mT
    out, want = (recovered_loss(r, t, 2) for r, t in ((rows, teacher), (rows.contiguous(), teacher.contiguous())))
    assert all(map(torch.equal, out, want))


def test_a_teacher_that_wants_a_gradient_is_refused() -> None:
    rows, teacher = draw(1, 1, 4), draw(1, 4, 1, 1).requires_grad_()
    with pytest.raises(ValueError, match=r"teacher requires a gradient.*teacher.detach\(\)"):
        recovered_loss(rows, teacher, 1)
    with torch.no_grad():
        recovered_loss(rows, teacher, 1)


def test_the_loss_has_second_derivatives() -> None:
    rows, queries = draw(1, 2, 12).double().requires_grad_(), draw(2, 3).double().requires_grad_()
    teacher = draw(1, 3, 2, 4).double()

    def terms(rows: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
        return tuple(recovered_loss(rows, teacher, 2, queries))

    assert torch.autograd.gradgradcheck(terms, (rows, queries))


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_denominators_of_other_logits_overflow_as_exp_does(backend: str) -> None:
    rows, teacher, grads = draw(1, 4, 8), draw(1, 8, 2, 2), (torch.tensor(1.0), draw(1, 8), draw(2, 1, 8))
    for below, finite in ((80.0, True), (95.0, False), (1e4, False), (1e30, False)):
        log_sums = torch.full((2, 1), -below)
        with fastmkd.backend(backend):
            d_queries = recovered_loss_grad(rows, teacher, torch.zeros(2, 8), log_sums, *grads, torch.zeros(2, 1), 1)[1]
        assert d_queries.isfinite().all() == finite, (below, d_queries)
