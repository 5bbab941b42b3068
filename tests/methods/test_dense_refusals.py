"""Pyramids that do not fit each other, frozen stages and bad boxes, for MKD, the methods beside it and none at all."""

from __future__ import annotations

import math

import pytest
import torch
from dense_nets import SMALL, Segmenter, batch, detector, stages, teacher_of
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import fastmkd
from fastmkd.nn.detectors import DETECTORS, build_detector

METHODS = {
    "mkd": lambda student, teacher, **options: fastmkd.MKD(student, teacher, mask_ratio=0.3, **SMALL, **options),
    "mgd": lambda student, teacher, **options: fastmkd.DenseKD(student, teacher, base="mgd", **options),
    "fgd": lambda student, teacher, **options: fastmkd.DenseKD(student, teacher, base="fgd", **options),
    "supervised": lambda student, _: fastmkd.Supervised(student),
}
each_method = pytest.mark.parametrize("method", [name for name in METHODS if name != "supervised"])


def with_levels(names, stride=2):
    """A RetinaNet whose pyramid has levels of other names, or of other strides: its stem's is `stride`."""
    torch.manual_seed(0)
    body = stages((4, 4, 8, 8))
    body.conv1.stride = (stride, stride)
    pyramid = BackboneWithFPN(body, names, [4, 8, 8][: len(names)], 8)
    anchors = AnchorGenerator(((16,),) * (len(names) + 1), ((1.0,),) * (len(names) + 1))  # and "pool"
    return RetinaNet(pyramid, 4, min_size=96, max_size=96, anchor_generator=anchors)


@each_method
def test_a_missing_level_is_named(method):
    names = {"layer2": "0", "layer3": "1", "layer4": "2"}
    student, teacher = with_levels({"layer2": "0", "layer3": "1"}), with_levels(names)
    with pytest.raises(ValueError, match=r"has the levels 0, 1, pool but the teacher's .* 0, 1, 2, pool; pair them"):
        METHODS[method](student, teacher)
    pairs = {f"backbone.fpn:{key}": f"backbone.fpn:{key}" for key in ("0", "1")}
    made = METHODS[method](student, teacher, layers=pairs)
    assert [level.stride for level in made.levels] == [8, 16]


@each_method
def test_renamed_levels_are_paired_by_the_user(method):
    student, teacher = (with_levels({f"layer{i}": f"{letter}{i}" for i in (2, 3, 4)}) for letter in "cp")
    with pytest.raises(ValueError, match=r"c2, c3, c4, pool but the teacher's .* p2, p3, p4, pool; pair them"):
        METHODS[method](student, teacher)
    made = METHODS[method](student, teacher, layers={f"backbone.fpn:c{i}": f"backbone.fpn:p{i}" for i in (2, 3, 4)})
    made(*batch()).loss.backward()


@each_method
def test_strides_that_differ_are_refused(method):
    names = {"layer2": "0", "layer3": "1", "layer4": "2"}
    with pytest.raises(ValueError, match=r"'backbone.fpn:0' has 32 x 32 positions but .*64 x 64; pair levels of"):
        METHODS[method](with_levels(names), with_levels(names, stride=1))


@each_method
def test_widths_that_differ_are_adapted(method):
    made = METHODS[method](detector(), teacher_of(out=20))
    assert {(level.student_channels, level.teacher_channels) for level in made.levels} == {(8, 20)}
    out = made(*batch())
    out.loss.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


@each_method
def test_frozen_stages_stay_frozen(method):
    student = detector()
    parts = ("conv1", "bn1", "layer1")
    frozen = [p.requires_grad_(False) for name, p in student.backbone.body.named_parameters() if name.startswith(parts)]
    before = [p.clone() for p in frozen]
    made = METHODS[method](student, teacher_of()).train()
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    made(*batch()).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(frozen, before, strict=True))
    assert made.release() is student
    assert not any(p.requires_grad for p in frozen)


@each_method
def test_frozen_parts_are_named(method):
    """Stages of one of timm's, which stand a level deeper than torchvision's; not what the method froze itself."""
    made = {"image_size": (64, 64), "out_channels": 16}
    narrow = {"backbone_kwargs": {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}}
    nets = [build_detector("retinanet", "timm.resnet18", 3, frozen_stages=n, **made, **narrow) for n in (1, 0)]
    parts = METHODS[method](*nets).frozen_parts
    assert parts == [f"backbone.body.model.{name}" for name in ("conv1", "bn1", "layer1")]
    if method != "fgd":
        assert METHODS[method](Segmenter(), Segmenter(seed=1)).frozen_parts == []  # it has a layer that nothing uses


BAD_TARGETS = [
    (lambda t: t[0]["boxes"][0].copy_(torch.tensor([9.0, 9, 9, 20])), r"\['boxes'\]\[0\] is .*, a box without area"),
    (lambda t: t[0]["boxes"][1].copy_(torch.tensor([40.0, 9, 30, 20])), r"\['boxes'\]\[1\] is .* x0 < x1 and y0 < y1"),
    (lambda t: t[0].update(labels=torch.tensor([1, 4])), r"holds 4, but this detector has the classes \d to 3"),
    (lambda t: t[0].update(labels=torch.tensor([1, -1])), r"holds -1, but this detector has the classes"),
    (lambda t: t[0]["boxes"][1].fill_(math.nan), r"\['boxes'\]\[1\] is .*, no box; expected finite corners"),
    (lambda t: t[0]["boxes"][1, 2].fill_(math.inf), r"\['boxes'\]\[1\] is .*, no box; expected finite corners"),
    (lambda t: t[0].update(boxes=torch.zeros(2, 5)), r"targets\[0\]\['boxes'\] has shape \(2, 5\); expected \(n, 4\)"),
    (lambda t: t.pop(), r"images holds 2 images but targets 1; give one dict an image"),
]
OF_ANOTHER_TYPE = [
    (lambda t: t[1].pop("boxes"), r"targets\[1\] has no tensor 'boxes'; expected 'boxes' \(n, 4\) and 'labels'"),
    (lambda t: t[1].update(labels=[]), r"targets\[1\] has no tensor 'labels'"),
    (lambda t: t[0].update(labels=torch.tensor([1])), r"is torch.int64 of shape \(1,\); expected int64 .* \(2,\)"),
    (lambda t: t[0].update(labels=torch.tensor([1.0, 3])), r"is torch.float32 of shape \(2,\); expected int64"),
    (lambda t: t.append(None), r"targets of a detector must be a list of dicts with 'boxes' and 'labels'"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["fcos", "reppoints", "retinanet", "faster_rcnn"])
def test_bad_boxes_and_labels_of_every_detector(kind):
    teacher = teacher_of(kind)
    for method in ("mkd", "mgd", "supervised"):
        made = METHODS[method](detector(kind), teacher).train()
        for error, cases in ((ValueError, BAD_TARGETS), (TypeError, OF_ANOTHER_TYPE)):
            for change, sentence in cases:
                images, targets = batch()
                change(targets)
                with pytest.raises(error, match=sentence):
                    made(images, targets)
        with pytest.raises(TypeError, match=r"images of a detector must be a list of \(C, H, W\) tensors"):
            made(torch.rand(2, 3, 96, 96), batch()[1])
        with pytest.raises(ValueError, match="images is empty; give a detector at least one image"):
            made([], [])
        made.release()


@pytest.mark.parametrize("kind", DETECTORS)
def test_labels_of_built_detectors_begin_at_1(kind):
    """Those from 0 would train one-stage detectors that are one class off."""
    small = {"backbone_kwargs": {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}, "image_size": (64, 64)}
    more = {"faster_rcnn": {"representation_size": 8}, "reppoints": {"width": 8}}.get(kind, {})
    made = fastmkd.Supervised(build_detector(kind, "timm.resnet18", 3, out_channels=64, **small, **more))
    images, targets = batch()
    assert made(images, targets).loss.isfinite()  # 1 and 3
    for label in (0, 4):
        targets[0]["labels"] = torch.tensor([1, label])
        with pytest.raises(ValueError, match=f"holds {label}, but this detector has the classes 1 to 3"):
            made(images, targets)


def test_torchvision_s_own_one_stage_detectors_may_have_a_class_0():
    images, targets = batch()
    targets[0]["labels"] = torch.tensor([0, 3])
    assert fastmkd.Supervised(detector("retinanet"))(images, targets).loss.isfinite()


BAD_MASKS = [
    (lambda t: t.float(), TypeError, r"targets is torch.float32; expected \(B, H, W\) int64, the class of each pixel"),
    (lambda t: t.tolist(), TypeError, r"targets is list; expected \(B, H, W\) int64"),
    (lambda t: t[:, :63], ValueError, r"targets has shape \(2, 63, 64\); expected \(2, 64, 64\), as the logits"),
    (lambda t: t + 3, ValueError, r"targets holds the label 3; the logits have 0 to 2, and 255 is for pixels that"),
    (lambda t: t - 1, ValueError, r"targets holds the label -1; the logits have 0 to 2"),
]


@pytest.mark.parametrize("method", ["mkd", "mgd", "supervised"])
def test_bad_masks_of_a_segmenter(method):
    made = METHODS[method](Segmenter(), Segmenter(seed=1)).train()
    images, targets = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)
    for change, error, sentence in BAD_MASKS:
        with pytest.raises(error, match=sentence):
            made(images, change(targets))
    made(images, targets).loss.backward()


def test_a_part_that_does_not_get_the_images_cannot_be_masked():
    student = detector()
    with pytest.raises(ValueError, match=r"is 'backbone.body.layer4', which gets maps of 8 channels and not the"):
        fastmkd.MKD(student, teacher_of(), mask_ratio=0.3, backbone="backbone.body.layer4", **SMALL)
    assert type(student.backbone.body["layer4"][0].conv1) is nn.Conv2d
