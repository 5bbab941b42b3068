"""In-batch CRD against its formula in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from dpk_networks import cnn, pictures
from torch import nn

from fastmkd.methods import FeatureKD
from fastmkd.methods.baselines import Answers
from fastmkd.methods.crd import BatchCRD

TARGETS = torch.tensor([0, 4, 0, 1])


def answers(channels: int, seed: int) -> Answers:
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, channels, 3, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return Answers(torch.zeros(4, 5), maps)


def by_hand(heads: nn.ModuleDict, student: Answers, teacher: Answers, same: list[list[bool]], tau: float) -> float:
    total = 0.0
    for stage in range(2):
        embedded = []
        for role, maps in (("student", student.maps), ("teacher", teacher.maps)):
            rows = [heads[f"{role}{stage}"](image.flatten(1).mean(1)) for image in maps[stage]]
            embedded.append([row / row.square().sum().sqrt() for row in rows])
        for anchors, others in (embedded, embedded[::-1]):
            for i in range(4):
                score = [math.exp((anchors[i] @ others[j]).item() / tau) for j in range(4)]
                total -= math.log(score[i] / sum(score[j] for j in range(4) if j == i or not same[i][j])) / 4
    return total


@pytest.mark.parametrize("soft", [False, True])
def test_formula_and_gradient(soft):
    base, student, teacher = BatchCRD(width=6, temperature=0.5), answers(3, 0), answers(5, 1)
    torch.manual_seed(0)
    heads = nn.ModuleDict(base.heads(student, teacher)).double()
    targets = torch.full((4, 5), 0.2) if soft else TARGETS
    same = [[not soft and a == b for b in TARGETS.tolist()] for a in TARGETS.tolist()]
    found = base.loss(heads, student, teacher, targets, 4.0, 0)
    assert found.item() == pytest.approx(by_hand(heads, student, teacher, same, 0.5), rel=1e-12)
    inputs = [*student.maps, *heads.parameters()]
    assert torch.autograd.gradcheck(
        lambda *_: base.loss(heads, student, teacher, targets, 4.0, 0), inputs, fast_mode=True
    )


def test_images_of_one_class_have_nothing_to_tell_apart():
    base, student, teacher = BatchCRD(), answers(3, 0), answers(5, 1)
    heads = nn.ModuleDict(base.heads(student, teacher)).double()
    loss = base.loss(heads, student, teacher, torch.zeros(4, dtype=torch.int64), 1.0, 0)
    loss.backward()
    assert loss == 0
    assert all(not x.grad.any() for x in student.maps)  # zeros, not NaN


def test_learns_and_leaves_a_clean_student():
    student, teacher = cnn(0), cnn(1, channels=6)
    keys, images = list(student.state_dict()), pictures()
    method = FeatureKD(student, teacher, "crd-batch", {"last": "last"}, image_size=24).double().train()
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.02)
    values = []
    for _ in range(12):
        out = method(images, TARGETS)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        values.append(out.terms["base"])
    assert values[-1] < 0.7 * values[0]
    assert sorted(method.heads) == ["student0", "teacher0"]
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())
    assert list(method.release().state_dict()) == keys


@pytest.mark.parametrize(("options", "match"), [({"width": 0}, "width is 0"), ({"temperature": 0.0}, "temperature is")])
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        BatchCRD(**options)
