"""MaskedKD whose images keep as many patches as hold a share of their saliency."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from tiny_vits import TARGETS, kl, pictures, tiny

from fastmkd import MaskedKD
from fastmkd.methods.strategies import Saliency
from fastmkd.ops.select_tokens import resize
from fastmkd.reference import masked_vit_forward, masked_vit_saliency


def teacher_by_hand(teacher, images, scores, mass):
    """The teacher on each image alone, with the best patches one by one until they hold the mass; and how many."""
    logits, counts = [], []
    for image, row in zip(images, scores.double(), strict=True):
        order = row.sort(descending=True, stable=True).indices.tolist()
        k = next(k for k in range(1, len(order) + 1) if row[order[:k]].sum() >= mass * row.sum() * (1 - 1e-12))
        logits.append(masked_vit_forward(teacher, image[None], torch.tensor([order[:k]])))
        counts.append(k)
    return torch.cat(logits), counts


@pytest.mark.parametrize("mass", [0.3, 0.7])
def test_loss_and_gradient_by_hand(mass):
    student, teacher, images = tiny(0), tiny(1, depth=3), pictures()
    method = MaskedKD(student, teacher, keep_mass=mass).train()
    out = method(images, TARGETS)
    scores = masked_vit_saliency(student, images)
    logits, counts = teacher_by_hand(teacher.eval(), images, scores, mass)
    assert len(set(counts)) > 1
    kd = kl(student(images), logits)
    torch.testing.assert_close(out.terms["kd"], kd, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.terms["kept"].item(), sum(counts) / (3 * 16))
    expected = torch.nn.functional.cross_entropy(student(images), TARGETS) + kd
    mine = torch.autograd.grad(out.loss, list(student.parameters()))
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


def test_another_grid_and_a_distilled_teacher():
    student, teacher, images = tiny(0), tiny(1, VisionTransformerDistilled, patch_size=4), pictures()
    out = MaskedKD(student, teacher, keep_mass=0.5)(images, TARGETS)
    scores = resize(masked_vit_saliency(student, images).float().view(3, 4, 4), (8, 8)).flatten(1)
    logits, counts = teacher_by_hand(teacher, images, scores, 0.5)
    torch.testing.assert_close(out.terms["kd"], kl(student(images), logits))
    torch.testing.assert_close(out.terms["kept"].item(), sum(counts) / (3 * 64))


def test_all_of_the_mass_is_the_full_teacher():
    student, teacher, images = tiny(0), tiny(1), pictures()
    out = MaskedKD(student, teacher, keep_mass=1.0)(images, TARGETS)
    torch.testing.assert_close(out.terms["kd"], kl(student(images), teacher(images)))
    assert out.terms["kept"] == 1


def test_without_it_nothing_is_new():
    assert "kept" not in MaskedKD(tiny(0), tiny(1))(pictures(), TARGETS).terms


def test_pictures_show_what_each_image_keeps():
    method = MaskedKD(tiny(0), tiny(1), keep_mass=0.5)
    shown = {panel.title: panel.image for panel in method.pictures(pictures())}["kept patches"]
    kept = method(pictures(), TARGETS).terms["kept"]
    torch.testing.assert_close(shown.mean(), kept.to(shown.dtype))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_mass": 0.0}, "keep_mass is 0.0"),
        ({"keep_mass": 1.5}, "keep_mass is 1.5"),
        ({"keep_mass": 0.5, "mask": "student"}, "masked teacher"),
        ({"keep_mass": 0.5, "base": "manifold"}, "base Manifold compares patches"),
        ({"keep_mass": 0.5, "strategy": Saliency(order="bottom")}, "'bottom' negates"),
    ],
)
def test_what_does_not_go_together_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        MaskedKD(tiny(0), tiny(1), **options)


def test_a_teacher_that_cannot_run_packed_is_named():
    teacher = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=5)
    with pytest.raises(ValueError, match=r"runs packed: Eva .* rotary"):
        MaskedKD(tiny(0), teacher, keep_mass=0.5)


def test_a_student_without_a_class_token_has_no_saliency():
    with pytest.raises(ValueError, match="no CLS token"):
        MaskedKD(tiny(0, class_token=False, global_pool="avg"), tiny(1), keep_ratio=1.0, keep_mass=0.5)
