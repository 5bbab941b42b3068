"""Detectors: every family trains and finds, on backbones of torchvision and timm, with the face that others rely on."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from fastmkd.nn import convert_cnn, pack, random_mask
from fastmkd.nn.detectors import DETECTORS, build_body, build_detector, frozen_parts

SMALL = {
    "backbone": "timm.resnet18",
    "backbone_kwargs": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "num_classes": 2,
    "image_size": (64, 96),
    "out_channels": 64,
}


def small(name: str, **more) -> nn.Module:
    if name == "faster_rcnn":
        more.setdefault("representation_size", 32)
    return build_detector(name, **{**SMALL, **more})


def targets(*counts: int) -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[4.0, 6, 40, 44], [20, 10, 50, 30]])
    return [{"boxes": boxes[:n], "labels": torch.tensor([2, 1])[:n]} for n in counts]


@pytest.mark.parametrize("name", DETECTORS)
def test_it_trains_and_finds_in_pictures_of_any_size_with_or_without_boxes(name):
    torch.manual_seed(0)
    model = small(name)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 41)]
    losses = model(images, targets(2, 0))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [key for key, p in model.named_parameters() if p.grad is None] == []  # as DDP wants it
    assert all(loss.isfinite() for loss in model(images, targets(0, 0)).values())
    found = model.eval()(images)
    assert all(set(one) == {"boxes", "labels", "scores"} for one in found)
    assert all(one["labels"].lt(3).all() for one in found)
    for image, one in zip(images, found, strict=True):
        assert (one["boxes"][:, 2] <= image.shape[2]).all()


@pytest.mark.parametrize("name", DETECTORS)
def test_the_face(name):
    model = small(name, image_size=([64, 48], 96)).eval()
    batch, _ = model.transform([torch.rand(3, 50, 70)])
    assert batch.tensors.shape == (1, 3, 64, 96)  # tests take the last shorter side, 48, and pad to multiples of 32
    maps = model.backbone.body(batch.tensors)
    levels = model.backbone.fpn(maps)
    assert isinstance(maps, OrderedDict)
    assert isinstance(levels, OrderedDict)
    strides = [64 // x.shape[-2] for x in maps.values()]
    assert strides == ([4, 8, 16, 32] if name == "faster_rcnn" else [8, 16, 32])
    assert len(levels) == 5
    assert {x.shape[1] for x in levels.values()} == {64}
    for one, other in zip(model.backbone(batch.tensors).values(), levels.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "kwargs", "channels"),
    [
        ("resnet18", {}, [64, 128, 256, 512]),
        ("resnext50_32x4d", {}, [256, 512, 1024, 2048]),
        ("mobilenet_v2", {}, [24, 32, 96, 320]),
        ("mobilenetv2_050", {}, [16, 16, 48, 160]),
        ("convnext_atto", {}, [40, 80, 160, 320]),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, [96, 192, 384, 768]),
    ],
)
def test_bodies_of_torchvision_and_timm(name, kwargs, channels):
    body, said = build_body(name, 4, **kwargs)
    with torch.no_grad():
        maps = body.eval()(torch.rand(1, 3, 64, 64))
    assert said == channels
    assert [tuple(x.shape) for x in maps.values()] == [(1, c, 16 >> i, 16 >> i) for i, c in enumerate(channels)]


def test_weights_of_torchvisions_own_detector_fit():
    own = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    model = build_detector("retinanet", "resnet50", 2)
    model.load_state_dict(own.state_dict())
    images = [torch.rand(3, 64, 64)]
    small_size = {"min_size": (64,), "max_size": 64}
    for network in (own, model):
        vars(network.transform).update(small_size)
        network.eval()
    with torch.no_grad():
        expected, found = own(images)[0], model(images)[0]
    assert torch.equal(expected["boxes"], found["boxes"])
    assert torch.equal(expected["scores"], found["scores"])


@pytest.mark.parametrize(("name", "stem"), [("resnet18", ["conv1", "bn1", "layer1"]), ("mobilenet_v2", ["0", "1"])])
def test_frozen_stages_do_not_learn_and_keep_their_statistics(name, stem):
    body, _ = build_body(name, 3, frozen_stages=1)
    frozen = frozen_parts(body)
    assert frozen[: len(stem)] == stem
    before = {key: value.clone() for key, value in body.state_dict().items()}
    body.train()
    sum(x.sum() for x in body(torch.rand(2, 3, 64, 64)).values()).backward()
    with torch.no_grad():
        for p in body.parameters():
            if p.grad is not None:
                p -= 0.1
    changed = {key.partition(".")[0] for key, value in body.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not changed & {part.partition(".")[0] for part in frozen}


def test_frozen_stages_of_timm_and_norms_in_eval_mode():
    body, _ = build_body("timm.resnet18", 3, frozen_stages=2, norm_eval=True, **SMALL["backbone_kwargs"])
    assert [part.removeprefix("model.") for part in frozen_parts(body)] == ["conv1", "bn1", "layer1", "layer2"]
    body.train()
    assert not any(m.training for m in body.modules() if isinstance(m, nn.BatchNorm2d))
    assert body.model.layer3.training
    assert not body.model.layer1.training


def test_a_body_takes_the_weights_of_its_classifier():
    for name, own in (("resnet18", {}), ("timm.convnext_atto", {}), ("mobilenet_v2", {})):
        import timm

        make = timm.create_model if name.startswith("timm.") else torchvision.models.get_model
        whole = make(name.removeprefix("timm.")).state_dict()
        body, _ = build_body(name, **own)
        weights = body.from_classifier(whole)
        assert body.state_dict().keys() <= weights.keys()
        body.load_state_dict({key: weights[key] for key in body.state_dict()})


def test_a_body_can_be_masked():
    """Hidden cells are zeros in every map of a converted body, as the method that masks a backbone needs it."""
    for name in ("timm.resnet18", "resnet18"):
        kwargs = SMALL["backbone_kwargs"] if name.startswith("timm.") else {}
        body = convert_cnn(build_body(name, **kwargs)[0])
        visible = random_mask(2, (2, 2), 0.5)
        maps = body(pack(torch.rand(2, 3, 64, 64), visible))
        for x in maps.values():
            dense = x.to_dense()
            hidden = ~visible.repeat_interleave(dense.shape[-1] // 2, 1).repeat_interleave(dense.shape[-1] // 2, 2)
            assert (dense * hidden[:, None]).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "yolo"}, "no detector 'yolo'; known are retinanet, fcos, faster_rcnn"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"backbone": "resnet19"}, "backbone is 'resnet19', which neither .* Near it are resnet101"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {}}, "maps at strides"),
        ({"image_size": (64,)}, "image_size is"),
        ({"image_size": 64}, r"image_size is 64; expected \(shorter, longer\)"),
        ({"image_size": (64, 32)}, "at most as long"),
        ({"anchor_sizes": [8, 16]}, "expected 5 numbers"),
        ({"frozen_stages": 5}, "frozen_stages is 5; expected 0 to 4"),
        ({"name": "fcos", "out_channels": 32}, "out_channels is 32; FCOS"),
        (
            {"backbone": "mobilenetv3_small_050", "backbone_kwargs": {}, "frozen_stages": 1},
            "timm does not take mobilenetv3_small_050 apart",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        build_detector(**{"name": "retinanet", **SMALL, **change})
