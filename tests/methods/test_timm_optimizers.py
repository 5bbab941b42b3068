"""timm's optimizer factory groups a method's parameters as it groups those of the student alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
from timm.optim import create_optimizer_v2
from torch import nn

import fastmkd


def vit(**kwargs) -> nn.Module:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_distilled_patch16_224", **{**shape, **kwargs})


def cait() -> nn.Module:
    return timm.create_model("cait_xxs24_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=5)


STUDENTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], fastmkd.methods.DistillMethod]]] = {
    "MaskedKD of a ViT": (vit, lambda student: fastmkd.MaskedKD(student, vit(), base="manifold")),
    "MaskedKD of a CaiT": (cait, lambda student: fastmkd.MaskedKD(student, vit())),
    "DMAE": (vit, lambda student: fastmkd.DMAE(student, vit(), decoder_depth=1, decoder_width=16)),
    "FeatureKD of a ResNet": (
        resnet,
        lambda student: fastmkd.methods.FeatureKD(student, resnet(), base="fitnet", layers={"layer3": "layer3"}),
    ),
}


def settings(model: nn.Module, **how: float) -> dict[str, tuple[float, float]]:
    """Weight decay and factor on the learning rate of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, **how).param_groups
    return {
        names[id(parameter)]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("how", [{}, {"layer_decay": 0.5}], ids=["weight decay", "layer decay"])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_method_is_grouped_as_its_student(name, how):
    make, wrap = STUDENTS[name]
    alone = settings(make(), **how)
    method = wrap(make())
    found = settings(method, **how)
    of_student = {name.removeprefix("student."): x for name, x in found.items() if name.startswith("student.")}
    assert of_student == {name: alone[name] for name in of_student}
    assert of_student.keys() == {name for name, p in method.student.named_parameters() if p.requires_grad}
    heads = {name: x for name, x in found.items() if not name.startswith("student.")}
    assert all(scale == 1.0 for _, scale in heads.values())
    assert heads.keys() == {name for name, p in method.named_parameters() if p.requires_grad and name not in of_student
                            and not name.startswith("student.")}  # fmt: skip
    if how:
        assert len({scale for _, scale in of_student.values()}) > 3
    elif make is not resnet:
        assert of_student["pos_embed"] == of_student["cls_token"] == (0.0, 1.0)


def test_a_student_that_says_nothing():
    """timm then counts layers by itself, as it does without a method."""
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    method = fastmkd.methods.Supervised(student)
    assert method.no_weight_decay() == set()
    assert not hasattr(method, "group_matcher")
    assert settings(method)["student.0.weight"] == (0.05, 1.0)
