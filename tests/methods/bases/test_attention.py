"""Attention distillation against the full attention matrices, in float64."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_vits import TARGETS, full_attention, kl, pictures, tiny

from fastmkd import MaskedKD, MaskedViT
from fastmkd.methods.bases import ClassAttention, attention_loss
from fastmkd.methods.bases.layers import ends, spread
from fastmkd.reference import masked_vit_forward, masked_vit_saliency


def by_hand(student, teacher, temperature):
    """KL of lists of maps ``(B, H, n)`` of probabilities."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = ((x.log().sum(1, keepdim=True) / temperature).exp() for x in (student, teacher))
        student, teacher = student / student.sum(-1, keepdim=True), teacher / teacher.sum(-1, keepdim=True)
    return (teacher * (teacher / student).log()).sum() / len(student)


@pytest.mark.parametrize("heads", [(2, 2), (3, 2)])
def test_loss_by_hand(heads):
    s, t = (torch.randn(3, h, 6, dtype=torch.float64, requires_grad=True) for h in heads)
    loss = attention_loss(s, t, 4.0)
    torch.testing.assert_close(loss, by_hand(s.softmax(-1), t.softmax(-1), 4.0))
    loss.backward()
    assert t.grad is None
    assert s.grad.abs().max() > 0
    # A constant added to a head's logits is no change of its attention.
    torch.testing.assert_close(attention_loss(s + torch.randn(3, heads[0], 1).double(), t, 4.0), loss)
    assert attention_loss(t, t, 4.0).abs() < 1e-12


@pytest.mark.parametrize("mask", ["teacher", "student"])
@pytest.mark.parametrize("heads", [2, 4])
def test_whole_step_by_hand(mask, heads):
    student, teacher, images = tiny(0), tiny(1, depth=4, num_heads=heads), pictures()
    base = ClassAttention(0.3, head_temperature=2.0, logit_weight=0.5)
    method = MaskedKD(student, teacher, 0.5, base, weight=0.7, mask=mask).train()
    out = method(images, TARGETS)

    keep = masked_vit_saliency(student, images).topk(8, dim=1).indices.sort(dim=1).values
    kept = {"student": (keep, None), "teacher": (None, keep)}[mask]
    attention = torch.zeros((), dtype=torch.float64)
    for i, j in ((0, 1), (1, 3)):  # each block of two with the one at the same relative depth of four
        s = full_attention(student, images, i, kept[0])[:, :, 0, 1:].softmax(-1)
        t = full_attention(teacher, images, j, kept[1])[:, :, 0, 1:].softmax(-1).detach()
        s = s if mask == "student" else s.gather(2, keep[:, None].expand(-1, s.shape[1], -1))
        t = t if mask == "teacher" else t.gather(2, keep[:, None].expand(-1, t.shape[1], -1))
        attention = attention + by_hand(s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True), 2.0)
    logits = masked_vit_forward(student, images, kept[0])
    kd = kl(logits, masked_vit_forward(teacher, images, kept[1]).detach())
    expected = F.cross_entropy(logits, TARGETS) + 0.7 * (0.5 * kd + 0.3 * attention)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.terms["attention"], attention.detach())
    mine = torch.autograd.grad(out.loss, list(student.parameters()))
    torch.testing.assert_close(mine, torch.autograd.grad(expected, list(student.parameters())))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_attention_alone_still_reaches_the_head_through_the_labels():
    method = MaskedKD(tiny(0), tiny(1), base=ClassAttention(logit_weight=0.0)).train()
    method(pictures(), TARGETS).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_grids_that_differ():
    student, teacher, images = tiny(0), tiny(1, patch_size=4), pictures()
    out = MaskedKD(student, teacher, 0.25, "attention").train()(images, TARGETS)
    keep = MaskedKD(student, teacher, 0.25).strategy  # the same patches are chosen whatever the base
    assert type(keep).__name__ == "Saliency"
    method = MaskedKD(tiny(0), tiny(1, patch_size=4), 1.0, ClassAttention())
    resized = []
    for i in range(2):
        s = full_attention(student, images, i)[:, :, 0, 1:].softmax(-1).unflatten(-1, (4, 4))
        s = F.interpolate(s, (8, 8), mode="bilinear", align_corners=False).flatten(2)
        t = full_attention(teacher, images, i)[:, :, 0, 1:].softmax(-1)
        resized.append(by_hand(s / s.sum(-1, keepdim=True), t, 1.0))
    torch.testing.assert_close(method(images, TARGETS).terms["attention"], sum(resized).detach())
    assert out.loss.isfinite()


def test_layers_of_networks_of_different_depth():
    assert spread(12, 12) == [(i, i) for i in range(12)]
    assert spread(12, 24) == [(i, 2 * i + 1) for i in range(12)]
    assert spread(4, 2) == [(0, 0), (1, 0), (2, 0), (3, 1)]
    for s, t in ((1, 1), (2, 9), (3, 3), (7, 5), (12, 24)):
        pairs = ends(s, t)
        assert pairs[-1] == (s - 1, t - 1)
        assert len(set(pairs)) == len(pairs)
        assert all(0 <= i < s and 0 <= j < t for i, j in pairs)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "match"),
    [
        ({}, {"class_token": False, "global_pool": "avg"}, {}, "attention of the teacher: it has no CLS token"),
        ({}, {}, {"student_layers": [5], "teacher_layers": [0]}, "the student has the blocks 0 to 1"),
    ],
)
def test_refuses_networks(student, teacher, options, match):
    with pytest.raises(ValueError, match=match):
        MaskedKD(tiny(0, **student), tiny(1, **teacher), base=ClassAttention(**options))


def test_refuses_an_attention_it_cannot_read():
    teacher = timm.create_model("vit_relpos_small_patch16_224", num_classes=5, img_size=32, depth=1)
    student = tiny(0)
    student.blocks[1].attn = teacher.blocks[0].attn
    with pytest.raises(ValueError, match="attention of the student: Block has the attention RelPosAttention"):
        ClassAttention().needs(MaskedViT(student), MaskedViT(tiny(1)))


@pytest.mark.parametrize("options", [{"attention_weight": -1.0}, {"head_temperature": 0.0}, {"logit_weight": math.nan}])
def test_refuses_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ClassAttention(**options)


def test_refuses_maps_that_do_not_match():
    with pytest.raises(ValueError, match="same B and n"):
        attention_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
