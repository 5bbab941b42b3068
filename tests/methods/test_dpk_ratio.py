"""The teacher's share: what each rule says, small and ragged batches, ranks, and how masks are drawn from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmkd
from fastmkd.methods.dpk_ratio import CkaGap, CosineGap, ExponentialDecay, FixedRatio, LinearDecay
from fastmkd.methods.dpk_stage import draw_from_teacher


def maps(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 4, 4, generator=g, dtype=torch.float64)
    return x, x[:, :2] + torch.randn(count, 2, 4, 4, generator=g, dtype=torch.float64)


def gap(x: Tensor, y: Tensor) -> Tensor:
    return (1 - fastmkd.cka_matrix([x], [y])[0, 0]).clamp(0, 1).float()


def test_cka_of_the_batch():
    x, y = maps(8)
    share = CkaGap()(x, y, 0)
    assert 0 < share < 1
    torch.testing.assert_close(share, gap(x, y))
    torch.testing.assert_close(CkaGap()(x.to(memory_format=torch.channels_last), y, 0), share)


def test_negative_cka_and_nan_count_as_the_whole_gap():
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1, 1)
    y = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1)
    assert fastmkd.cka_matrix([x], [y])[0, 0] < 0
    assert CkaGap()(x, y, 0) == 1
    assert CkaGap()(torch.ones(4, 1, 2, 2), y, 0) == 1  # a dead layer
    assert CkaGap()(torch.full((4, 1, 2, 2), float("nan")), y, 0) == 1


def test_cosine():
    x, y = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3)
    cosines = [(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(CosineGap()(x, y, 0), (1 - sum(cosines) / 5).clamp(0, 1))
    assert CosineGap()(x, -x, 0) == 1


def test_fewer_than_four_images_join_the_last_ones():
    rule = CkaGap().train()
    x, y = maps(9)
    assert rule(x[:1], y[:1], 0) == 1
    assert rule(x[1:2], y[1:2], 0) == 1
    assert rule(x[2:3], y[2:3], 0) == 1
    torch.testing.assert_close(rule(x[3:4], y[3:4], 0), gap(x[:4], y[:4]))
    torch.testing.assert_close(rule(x[4:5], y[4:5], 0), gap(x[1:5], y[1:5]))
    rule = CkaGap().train()
    assert rule(x[:3], y[:3], 0) == 1
    torch.testing.assert_close(rule(x[3:6], y[3:6], 0), gap(x[:6], y[:6]))
    torch.testing.assert_close(rule(x[6:9], y[6:9], 0), gap(x[3:9], y[3:9]))
    kept = rule.last.clone()
    assert torch.equal(rule(x[:3, :, :2], y[:3, :, :2], 0), kept)  # other maps cannot be joined


def test_joined_batches_may_lie_in_another_order_in_memory():
    x, y = maps(4)
    last = [one.to(memory_format=torch.channels_last) for one in (x, y)]
    for first, second in (((x, y), last), (last, (x, y)), ((x, last[1]), (last[0], y))):
        rule = CkaGap().train()
        assert rule(first[0][:2], first[1][:2], 0) == 1
        torch.testing.assert_close(rule(second[0][2:], second[1][2:], 0), gap(x, y))


def test_maps_of_other_shapes_are_not_joined():
    x, y = maps(4)
    x, y = x[:, :, :2], y[:, :, :2]  # 2 x 4: a detector's picture that lies, and one that stands
    rule = CkaGap().train()
    assert rule(x[:2], y[:2], 0) == 1
    assert rule(x[2:].mT, y[2:].mT, 0) == 1
    assert len(rule._recent) == 1


def test_ragged_last_batch_keeps_the_last_share():
    rule = CkaGap().train()
    x, y = maps(24)
    first = rule(x[:8], y[:8], 0)
    for count in (5, 2):
        assert torch.equal(rule(x[8 : 8 + count], y[8 : 8 + count], 0), first)
    second = rule(x[16:], y[16:], 0)
    torch.testing.assert_close(second, gap(x[16:], y[16:]))
    assert second != first


def test_a_run_that_goes_on_with_smaller_batches_is_measured_again():
    x, y = maps(24)
    rule, resumed = CkaGap().train(), CkaGap().train()
    rule(x[:4], y[:4], 0)
    first = rule(x[:12], y[:12], 0)
    resumed.load_state_dict(rule.state_dict())
    for one in (rule, resumed):
        assert torch.equal(one(x[12:18], y[12:18], 0), first)
        torch.testing.assert_close(one(x[18:], y[18:], 0), gap(x[18:], y[18:]))
        torch.testing.assert_close(one(x[6:12], y[6:12], 0), gap(x[6:12], y[6:12]))


def test_a_run_that_goes_on_with_fewer_than_four_images_keeps_the_share_until_there_are_four():
    rule = CkaGap().train()
    x, y = maps(12)
    first = rule(x[:8], y[:8], 0)
    for i in range(8, 11):
        assert torch.equal(rule(x[i : i + 1], y[i : i + 1], 0), first)
    torch.testing.assert_close(rule(x[11:], y[11:], 0), gap(x[8:], y[8:]))


def test_eval_mode_remembers_nothing():
    rule = CkaGap().train()
    x, y = maps(16)
    first = rule(x[:8], y[:8], 0)
    rule.eval()
    rule(x, y, 0)
    rule(x[:2], y[:2], 0)
    assert torch.equal(rule.last, first)
    assert rule.largest == 8


def test_the_state_goes_on_with_the_same_bits():
    x, y = maps(16)
    rule, other = CkaGap().train(), CkaGap().train()
    rule(x[:8], y[:8], 0)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other(x[8:13], y[8:13], 0), rule(x[8:13], y[8:13], 0))


def test_schedules():
    x = torch.zeros(1)
    assert [round(float(ExponentialDecay()(x, x, e)), 6) for e in range(3)] == [1.0, 0.95, 0.9025]
    assert [round(float(LinearDecay()(x, x, e)), 6) for e in range(3)] == [1.0, 0.05, 0.0]
    for rule in (ExponentialDecay(), LinearDecay(), ExponentialDecay(0.5), ExponentialDecay(factor=0.0)):
        assert rule(x, x, -1) == rule(x, x, 0) == rule.start
    assert float(FixedRatio(0.15)(x, x, 7)) == pytest.approx(0.15)
    for make in (lambda: ExponentialDecay(factor=1.5), lambda: LinearDecay(start=-1), lambda: LinearDecay(1, -1)):
        with pytest.raises(ValueError, match="expected a"):
            make()


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.375, 0.5, 0.75, 1.0])
def test_as_many_tokens_as_the_share_says(kind, share):
    taken = draw_from_teacher(kind, 5, (4, 5), torch.tensor(share))
    assert taken.shape == (5, 20)
    assert taken.sum(1).tolist() == [round(share * 20)] * 5


def test_grid_takes_three_of_each_four():
    taken = draw_from_teacher("grid", 3, (6, 6), torch.tensor(0.75)).view(3, 3, 2, 3, 2)
    assert (taken.sum((2, 4)) == 3).all()


def test_block_is_connected():
    (block,) = draw_from_teacher("block", 1, (8, 8), torch.tensor(0.3)).view(1, 8, 8)
    rows, columns = block.any(1).nonzero()[:, 0], block.any(0).nonzero()[:, 0]
    assert rows.max() - rows.min() + 1 == len(rows)
    assert columns.max() - columns.min() + 1 == len(columns)
    assert len(rows) * len(columns) <= 19 + max(len(rows), len(columns))
