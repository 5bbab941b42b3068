"""Networks in other precisions than each other's: what is compared, and the layers between, follow without autocast."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dpk_networks import TARGETS, cnn, pictures

import fastmkd
from fastmkd.methods import FeatureKD
from fastmkd.methods.baselines import Baseline
from fastmkd.methods.crd import CRD
from fastmkd.methods.dpk_ratio import FixedRatio

LAYERS = {"stem": "stem", "last": "last"}
LABELS = torch.tensor([0, 4, 2, 1, 3])
BASES = ["kd", "fitnet", "at", "dkd", "reviewkd", CRD(negatives=4), "crd-batch", "align"]


def heads_of(name: str | Baseline, student: torch.nn.Module, teacher: torch.nn.Module, **options) -> torch.nn.Module:
    torch.manual_seed(2)
    if name == "dpk":
        small = {"encoder_depth": 1, "decoder_depth": 1, "width": 64, "ratio": FixedRatio(0.5)}
        return fastmkd.DPK(student, teacher, LAYERS, image_size=24, **small, **options).train()
    labels = LABELS if isinstance(name, CRD) else None
    return FeatureKD(student, teacher, name, LAYERS, image_size=24, train_labels=labels, **options).train()


@pytest.mark.parametrize("base", [*BASES, "dpk"], ids=lambda base: base if isinstance(base, str) else "crd")
@pytest.mark.parametrize("case", ["teacher_dtype", "half teacher", "half student", "double student"])
def test_any_pair_of_precisions(base, case):
    student, teacher = cnn(0).float(), cnn(1, channels=6).float()
    right = heads_of(base, copy.deepcopy(student), copy.deepcopy(teacher))
    dtype = {"half student": torch.bfloat16, "double student": torch.float64}.get(case, torch.float32)
    teacher = teacher.bfloat16() if case == "half teacher" else teacher
    options = {"teacher_dtype": torch.bfloat16} if case == "teacher_dtype" else {}
    method = heads_of(base, student.to(dtype), teacher, **options)
    losses = []
    for each in (right, method):
        images = pictures().to(next(each.student.parameters()).dtype)
        numbers = {"numbers": torch.arange(4)} if isinstance(base, CRD) else {}
        torch.manual_seed(3)
        out = each(images, TARGETS, **numbers)
        out.loss.backward()
        assert all(p.grad is not None for p in each.student.parameters())
        losses.append(out.loss.item())
    assert math.isclose(losses[1], losses[0], rel_tol=0.02 if case == "double student" else 0.15)


def test_the_bank_stays_wide():
    method = heads_of(CRD(negatives=4), cnn(0).bfloat16(), cnn(1, channels=6).float())
    assert method.heads["student0"].weight.dtype == torch.bfloat16
    assert method.heads["memory0"].rows.dtype == torch.float32
