"""The imitation term of FGD and its DPK form against plain loops, on maps as a feature pyramid has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmkd.methods.fgd import FGDImitation, attention_weights, box_masks, imitation_loss

IMAGE = (100, 168)  # pads to levels of 13 x 21, 7 x 11 and 4 x 6 cells
SIZES = [(13, 21), (7, 11), (4, 6)]
BOXES = [
    torch.tensor([[0.0, 0.0, 60.0, 40.0], [30.0, 20.0, 50.0, 36.0]]),
    torch.tensor([[100.0, 50.0, 168.0, 100.0]]),
    torch.zeros(0, 4),
]
SMALL = {"encoder_depth": 1, "decoder_depth": 1, "width": 16}


def pyramid(channels: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, channels, *size, generator=g, dtype=torch.float64) for size in SIZES]


def loss_by_hand(prediction: Tensor, teacher: Tensor, wf: float, wb: float) -> float:
    """Eq. 8, cell by cell."""
    images, channels, h, w = teacher.shape
    total = 0.0
    for b in range(images):
        t = teacher[b].abs()
        spatial = [[math.exp(t[:, i, j].mean() / 0.5) for j in range(w)] for i in range(h)]
        channel = [math.exp(t[c].mean() / 0.5) for c in range(channels)]
        sum_s, sum_c = sum(map(sum, spatial)), sum(channel)
        shares = {}
        for x0, y0, x1, y1 in BOXES[b].tolist():
            cells = [
                (i, j)
                for i in range(h)
                for j in range(w)
                if math.floor(y0 * h / IMAGE[0]) <= i < y1 * h / IMAGE[0]
                and math.floor(x0 * w / IMAGE[1]) <= j < x1 * w / IMAGE[1]
            ]
            for cell in cells:
                shares[cell] = max(shares.get(cell, 0.0), 1 / len(cells))
        free = h * w - len(shares)
        for i in range(h):
            for j in range(w):
                cell = wf * shares[i, j] if (i, j) in shares else wb / free
                for c in range(channels):
                    attention = h * w * spatial[i][j] / sum_s * channels * channel[c] / sum_c
                    total += cell * attention * (prediction[b, c, i, j] - teacher[b, c, i, j]).item() ** 2
    return total / images


def test_imitation_by_hand():
    student, teacher = pyramid(4, 0), pyramid(4, 1)
    term = FGDImitation(4, 4, SIZES, hybrid=False, foreground_weight=3.0, background_weight=0.7)
    expected = sum(loss_by_hand(s, t, 3.0, 0.7) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(term(student, teacher, BOXES, IMAGE).item(), expected, rtol=1e-6, atol=0)


def test_masks():
    foreground, background = box_masks(BOXES, IMAGE, (13, 21))
    assert not ((foreground > 0) & (background > 0)).any()
    assert ((foreground > 0) | (background > 0)).all()
    torch.testing.assert_close(background.sum((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(foreground[1].sum(), torch.tensor(1.0))
    assert foreground[2].sum() == 0
    small, large = foreground[0, 0, 3, 4], foreground[0, 0, 0, 0]
    assert small > large > 0
    everything = box_masks([torch.tensor([[0.0, 0.0, 168.0, 100.0]])], IMAGE, (4, 6))
    assert everything[1].sum() == 0
    assert everything[0].isfinite().all()
    (point,), _ = box_masks([torch.tensor([[8.0, 8.0, 8.0, 8.0]])], (16, 16), (2, 2))
    assert point[0].tolist() == [[0, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"boxes\[0\] has shape \(4,\)"):
        box_masks([torch.zeros(4)], IMAGE, (2, 2))


def test_attention_is_one_on_average():
    spatial, channel = attention_weights(torch.randn(2, 5, 6, 7, dtype=torch.float64))
    torch.testing.assert_close(spatial.mean((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(channel.mean((1, 2, 3)), torch.ones(2, dtype=torch.float64))


def test_hybrid_features_take_the_student_s_place():
    student, teacher = pyramid(4, 0), pyramid(6, 1)
    term = FGDImitation(4, 6, SIZES, ratio=0.4, **SMALL).double()
    assert [stage.patch_size for stage in term.levels] == [3, 2, 1]
    made = []
    for stage in term.levels:
        stage.register_forward_hook(lambda _m, _a, out: made.append(out))
    found = term(student, teacher, BOXES, IMAGE)
    expected = 0
    for hybrid, t, size in zip(made, teacher, SIZES, strict=True):
        expected = expected + imitation_loss(hybrid, t, *box_masks(BOXES, IMAGE, size), 2e-3, 5e-4)
        assert hybrid.shape == t.shape
    torch.testing.assert_close(found, expected)


def test_gradients():
    student, teacher = pyramid(4, 0), [x.requires_grad_() for x in pyramid(6, 1)]
    for x in student:
        x.requires_grad_()
    for hybrid in (True, False):
        term = FGDImitation(4, 6, SIZES, hybrid=hybrid, ratio=0.5, **SMALL).double().train()
        term(student, teacher, BOXES, IMAGE).backward()
        assert all(x.grad.abs().sum() > 0 for x in student)
        assert all(x.grad is None for x in teacher)
        assert all(p.grad is not None for p in term.parameters())


def test_refuses():
    with pytest.raises(ValueError, match="foreground_weight is -1"):
        FGDImitation(4, 4, SIZES, foreground_weight=-1)
    with pytest.raises(ValueError, match="temperature is 0"):
        FGDImitation(4, 4, SIZES, temperature=0)
    with pytest.raises(ValueError, match="map_sizes is empty"):
        FGDImitation(4, 4, [])
    term = FGDImitation(4, 4, SIZES, hybrid=False)
    with pytest.raises(ValueError, match="student has 2 levels"):
        term(pyramid(4, 0)[:2], pyramid(4, 1), BOXES, IMAGE)
    with pytest.raises(ValueError, match="boxes holds 2 images"):
        term(pyramid(4, 0), pyramid(4, 1), BOXES[:2], IMAGE)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu():
    term = FGDImitation(4, 6, SIZES, **SMALL).cuda().train()
    student, teacher = ([x.float().cuda() for x in pyramid(c, c)] for c in (4, 6))
    boxes = [b.cuda() for b in BOXES]
    term(student, teacher, boxes, IMAGE).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = term(student, teacher, boxes, IMAGE)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
