"""G2SD's second stage: the class head learns the labels, the distillation head the teacher's decisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from tiny_vits import TARGETS, pictures, tiny

from fastmkd import MaskedKD
from fastmkd.reference import masked_vit_forward, masked_vit_saliency


def test_whole_step_by_hand():
    student, teacher, images = tiny(0, VisionTransformerDistilled), tiny(1), pictures()
    assert not student.distilled_training
    method = MaskedKD(student, teacher, 0.5, "g2sd", weight=0.5, ce_weight=0.5).train()
    out = method(images, TARGETS)
    keep = masked_vit_saliency(student, images).topk(8, dim=1).indices
    class_logits, distillation_logits = masked_vit_forward(student, images)
    decision = masked_vit_forward(teacher, images, keep).argmax(1)
    expected = (F.cross_entropy(class_logits, TARGETS) + F.cross_entropy(distillation_logits, decision)) / 2
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.student_output, (class_logits + distillation_logits) / 2)
    mine = torch.autograd.grad(out.loss, list(student.parameters()))
    torch.testing.assert_close(mine, torch.autograd.grad(expected, list(student.parameters())))


@pytest.mark.parametrize("before", [False, True])
def test_the_student_comes_back_as_it_was(before):
    student = tiny(0, VisionTransformerDistilled)
    student.set_distilled_training(before)
    method = MaskedKD(student, tiny(1), base="g2sd")
    assert student.distilled_training
    assert method.release().distilled_training is before


def test_evaluation_uses_the_mean_of_both_heads():
    student = tiny(0, VisionTransformerDistilled)
    method = MaskedKD(student, tiny(1), base="g2sd").eval()
    out = method(pictures(), TARGETS)
    torch.testing.assert_close(out.student_output, student(pictures()))
    assert torch.isfinite(out.loss)


def test_refuses_a_student_without_a_distillation_token():
    student, teacher = tiny(0), tiny(1)
    with pytest.raises(ValueError, match="without a distillation token, which base 'g2sd' trains"):
        MaskedKD(student, teacher, base="g2sd")
    assert all(p.requires_grad for p in teacher.parameters())
