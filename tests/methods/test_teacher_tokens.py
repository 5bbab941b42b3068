"""MaskedKD with a teacher that merges its tokens in the place of being masked (MaskedKD, Fig. 3)."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_vits import TARGETS, kl, pictures, tiny

from fastmkd import MaskedKD, MaskedViT
from fastmkd.nn import MergedViT


@pytest.mark.parametrize("wrap", [lambda model: model, MaskedViT])
def test_loss_and_gradient_by_hand(wrap):
    student, teacher, images = tiny(0), tiny(1, depth=6), pictures()
    method = MaskedKD(student, wrap(teacher), 0.6, temperature=2.0, weight=0.7, teacher_tokens="merge").train()
    out = method(images, TARGETS)
    logits = MergedViT(teacher, keep_ratio=0.6)(images).detach()
    assert not torch.allclose(logits, teacher(images), atol=1e-3)
    expected = F.cross_entropy(student(images), TARGETS) + 0.7 * 4 * kl(student(images) / 2, logits / 2)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    mine = torch.autograd.grad(out.loss, list(student.parameters()))
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    assert list(method.state_dict()) == ["student." + key for key in student.state_dict()]


def test_all_of_the_cost_is_the_full_teacher():
    student, teacher, images = tiny(0), tiny(1), pictures()
    out = MaskedKD(student, teacher, 1.0, teacher_tokens="merge")(images, TARGETS)
    torch.testing.assert_close(out.terms["kd"], kl(student(images), teacher(images)))


def test_a_larger_teacher_and_a_student_without_a_class_token():
    student, teacher = tiny(0, class_token=False, global_pool="avg"), tiny(1, depth=6, img_size=48)
    method = MaskedKD(student, teacher, 0.6, teacher_tokens="merge")
    assert method(pictures(), TARGETS).loss.isfinite()
    assert not method.hides_patches


def test_it_shows_all_patches_copies_and_pickles():
    method = MaskedKD(tiny(0), tiny(1, depth=6), 0.6, teacher_tokens="merge")
    assert {panel.title: panel.image for panel in method.pictures(pictures())}["kept patches"].min() == 1
    again = pickle.loads(pickle.dumps(copy.deepcopy(method)))
    torch.testing.assert_close(again(pictures(), TARGETS).loss, method(pictures(), TARGETS).loss)


def test_a_teacher_that_is_not_finite_skips_the_batch():
    teacher = tiny(1, depth=6)
    with torch.no_grad():
        teacher.blocks[0].attn.qkv.weight[0, 0] = float("nan")
    out = MaskedKD(tiny(0), teacher, 0.6, teacher_tokens="merge")(pictures(), TARGETS)
    assert out.loss == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"teacher_tokens": "drop"}, "teacher_tokens is 'drop'"),
        ({"mask": "student"}, "mask='student' the student"),
        ({"keep_mass": 0.5}, "masks none"),
        ({"base": "manifold"}, "base Manifold compares patches"),
        ({"base": "attention"}, "base ClassAttention compares patches"),
        ({"keep_ratio": 0.01}, "keep_ratio is 0.01, but a block merges half"),
    ],
)
def test_what_does_not_go_together_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        MaskedKD(tiny(0), tiny(1, depth=6), **{"teacher_tokens": "merge", **options})


def test_a_teacher_that_cannot_merge_is_named():
    teacher = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=5)
    with pytest.raises(ValueError, match="a teacher that can: Eva turns"):
        MaskedKD(tiny(0), teacher, teacher_tokens="merge")
