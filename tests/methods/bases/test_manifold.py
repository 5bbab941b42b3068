"""Manifold distillation against loops over images and patches, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vits import TARGETS, kl, pictures, tiny

from fastmkd import MaskedKD
from fastmkd.methods.bases import Manifold, manifold_loss
from fastmkd.reference import masked_vit_forward, masked_vit_intermediates, masked_vit_saliency


def by_loops(student, teacher):
    """Mean over images of the relations within, and mean over positions of the relations across images."""

    def relation(rows):
        return torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in rows]) for a in rows])

    within = [(relation(s) - relation(t)).square().mean() for s, t in zip(student, teacher, strict=True)]
    across = [(relation(student[:, j]) - relation(teacher[:, j])).square().mean() for j in range(student.shape[1])]
    everything = (relation(student.flatten(0, 1)) - relation(teacher.flatten(0, 1))).square().mean()
    return sum(within) / len(within), sum(across) / len(across), everything


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_loss_by_loops(batch, patches, width_s, width_t, seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, patches, width_s, generator=generator, dtype=torch.float64)
    teacher = torch.randn(batch, patches, width_t, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(manifold_loss(student, teacher), by_loops(student, teacher))


def test_random_patches_are_drawn_from_the_batch_without_repeats():
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    s, t = F.normalize(student, dim=-1).flatten(0, 1), F.normalize(teacher, dim=-1).flatten(0, 1)
    differences = (s @ s.mT - t @ t.mT).square()
    for seed in range(5):
        torch.manual_seed(seed)
        drawn = torch.randperm(8)[:3]
        torch.manual_seed(seed)
        torch.testing.assert_close(manifold_loss(student, teacher, 3)[2], differences[drawn][:, drawn].mean())


@pytest.mark.parametrize("mask", ["teacher", "student"])
def test_whole_step_by_hand(mask):
    student, teacher, images = tiny(0), tiny(1, depth=3, embed_dim=32), pictures()
    base = Manifold(2.0, 0.5, 0.25, samples=1000, student_layers=[0, 1], teacher_layers=[0, 2])
    method = MaskedKD(student, teacher, 0.5, base, weight=0.7, temperature=1.0, mask=mask).train()
    out = method(images, TARGETS)

    keep = masked_vit_saliency(student, images).topk(8, dim=1).indices.sort(dim=1).values
    kept = {"student": (keep, None), "teacher": (None, keep)}[mask]
    logits, answers = masked_vit_forward(student, images, kept[0]), masked_vit_forward(teacher, images, kept[1])
    ours, theirs = (
        masked_vit_intermediates(student, images, kept[0]),
        masked_vit_intermediates(teacher, images, kept[1]),
    )
    layers = []
    for i, j in ((0, 0), (1, 2)):
        s, t = ours[i][:, 1:], theirs[j][:, 1:]
        rows = keep[:, :, None]
        s = s if mask == "student" else s.gather(1, rows.expand(-1, -1, 24))
        t = t if mask == "teacher" else t.gather(1, rows.expand(-1, -1, 32))
        layers.append(by_loops(s, t.detach()))
    patch, sample, rand = (sum(parts) / 2 for parts in zip(*layers, strict=True))
    kd = kl(logits, answers.detach())
    expected = F.cross_entropy(logits, TARGETS) + 0.7 * (kd + 2.0 * patch + 0.5 * sample + 0.25 * rand)
    torch.testing.assert_close(out.loss, expected)
    assert sorted(out.terms) == ["ce", "kd", "manifold_patch", "manifold_random", "manifold_sample"]
    torch.testing.assert_close(out.terms["manifold_patch"], patch.detach())
    mine = torch.autograd.grad(out.loss, list(student.parameters()))
    torch.testing.assert_close(mine, torch.autograd.grad(expected, list(student.parameters())))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_networks_that_cut_the_image_differently():
    method = MaskedKD(tiny(0), tiny(1, patch_size=4), 0.25, "manifold").train()
    out = method(pictures(), TARGETS)
    out.loss.backward()
    assert out.loss.isfinite()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_equal_networks_without_a_mask_have_nothing_to_learn():
    student = tiny(0)
    teacher = tiny(0)
    terms = MaskedKD(student, teacher, 1.0, "manifold")(pictures(), TARGETS).terms
    assert all(abs(float(value)) < 1e-12 for name, value in terms.items() if name != "ce")


def test_half_precision_features_are_widened():
    with torch.autocast("cpu", torch.bfloat16):
        losses = manifold_loss(torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16())
    assert {loss.dtype for loss in losses} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"patch_weight": -1.0}, "patch_weight is -1.0"),
        ({"samples": 0}, "samples is 0"),
        ({"student_layers": [0]}, "teacher_layers None"),
        ({"student_layers": [0], "teacher_layers": [0, 1]}, "as many of one as"),
        ({"student_layers": [], "teacher_layers": []}, "as many of one as"),
    ],
)
def test_refuses_options(options, match):
    with pytest.raises(ValueError, match=match):
        Manifold(**options)


def test_refuses_layers_that_are_not_there():
    base = Manifold(student_layers=[0, 2], teacher_layers=[0, 1])
    with pytest.raises(ValueError, match=r"student_layers is \[0, 2\]; the student has the blocks 0 to 1"):
        MaskedKD(tiny(0), tiny(1), base=base)
    with pytest.raises(ValueError, match="same B and n"):
        manifold_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3))
