"""Under bf16 autocast convolutions are in bfloat16, boxes are not: at pixel 1300 its step is 8 pixels."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from fastmkd.nn.detectors import DETECTORS, build_detector

SIZE = (128, 1344)
SMALL = {
    "backbone": "timm.resnet18",
    "backbone_kwargs": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
    "num_classes": 2,
    "image_size": SIZE,
    "out_channels": 64,
}
# What of each detector says scores, and what says boxes.
SCORES = {
    "retinanet": ["head.classification_head.cls_logits"],
    "fcos": ["head.classification_head.cls_logits", "head.regression_head.bbox_ctrness"],
    "faster_rcnn": ["rpn.head.cls_logits", "roi_heads.box_predictor.cls_score"],
    "reppoints": ["head.class_out.1"],
}
BOXES = {
    "retinanet": ["head.regression_head.bbox_reg"],
    "fcos": ["head.regression_head.bbox_reg"],
    "faster_rcnn": ["rpn.head.bbox_pred", "roi_heads.box_predictor.bbox_pred"],
    "reppoints": ["head.guess.2", "head.point_out.1"],
}


class Said(nn.Module):
    """In a layer's place: numbers that bfloat16 can hold, whatever comes in, in the layer's dtype."""

    def __init__(self, layer: nn.Module, name: str, scale: float) -> None:
        super().__init__()
        self.layer, self.name, self.scale = layer, name, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name} {tuple(out.shape)}".encode()))
        said = self.scale * torch.randn(out.shape, generator=generator)
        return said.bfloat16().to(out.dtype) + 0 * out  # all parameters stay in the graph


def detector(name: str) -> nn.Module:
    """One whose heads say what they would have learnt to say, and say it exactly in either precision."""
    torch.manual_seed(0)
    more = {"representation_size": 32} if name == "faster_rcnn" else {"width": 32} if name == "reppoints" else {}
    model = build_detector(name, **SMALL, **more)
    for layers, scale in ((SCORES[name], 3.0), (BOXES[name], 1.0)):
        for path in layers:
            owner, _, last = path.rpartition(".")
            model.get_submodule(owner)._modules[last] = Said(model.get_submodule(path), path, scale)
    return copy.deepcopy(model)  # as an EMA is made


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_of_the_same_regression_are_where_float32_has_them(name, image):
    model = detector(name).eval()
    seen = []
    model.backbone.fpn.register_forward_hook(lambda _m, _a, levels: seen.append(levels["0"].dtype))
    with torch.no_grad():
        (true,) = model([image])
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = model([image])
    assert seen == [torch.float32, torch.bfloat16]
    assert found["boxes"].dtype == torch.float32
    assert len(true["boxes"]) == len(found["boxes"]) > 20
    inside = ((true["boxes"][:, 2:] - true["boxes"][:, :2]) > 0.5).all(1)  # not cut to nothing at the image's edge
    assert inside.sum() > 20
    assert box_iou(true["boxes"][inside], found["boxes"][inside]).diagonal().min() > 0.999
    assert torch.equal(true["labels"], found["labels"])
    far = found["boxes"][inside, 2]
    far = far[(far > 1100) & (far < SIZE[1])]
    assert len(far) > 2
    assert (far != far.bfloat16()).float().mean() > 0.5  # which has an eighth of the pixels there and no fractions


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_of_the_same_answers_are_those_of_float32(name, image):
    model = detector(name).train()
    boxes = [[1101.3, 40.7, 1187.9, 121.2], [1250.4, 50.6, 1339.1, 127.8], [513.1, 10.3, 590.2, 99.7]]
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor([1, 2, 1])}
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)  # two stages draw proposals
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model([image], [target]))
    sum(losses[1].values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for key, value in losses[1].items():
        torch.testing.assert_close(
            value, losses[0][key], rtol=1e-5, atol=1e-6, msg=lambda told, key=key: f"{key}: {told}"
        )


@pytest.mark.parametrize("name", ["retinanet", "fcos", "faster_rcnn"])
def test_anchors_in_the_last_column_are_apart(name):
    model = build_detector(name, **SMALL)
    make = model.rpn.anchor_generator if name == "faster_rcnn" else model.anchor_generator
    stride = 4 if name == "faster_rcnn" else 8
    sizes = [(-(-SIZE[0] // s), SIZE[1] // s) for s in (stride, 2 * stride, 4 * stride, 8 * stride, 16 * stride)]
    found = {
        dtype: make(ImageList(torch.zeros(1, 3, *SIZE), [SIZE]), [torch.zeros(1, 1, *s, dtype=dtype) for s in sizes])
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    assert torch.equal(found[torch.bfloat16][0], found[torch.float32][0])
    assert found[torch.float64][0].dtype == torch.float64


@pytest.mark.parametrize("name", DETECTORS)
def test_nothing_is_added_to_the_weights_and_doubles_stay_doubles(name, image):
    model = detector(name).double().eval()
    assert not any("precision" in key or "anchor" in key for key in model.state_dict())
    with torch.no_grad():
        (found,) = model([image.double()])
    assert found["boxes"].dtype == torch.float64


def test_regions_are_read_from_maps_in_half_precision_without_autocast():
    """A network that is in float16 as a whole; boxes in float32 would not be taken there."""
    pool = build_detector("faster_rcnn", **SMALL, representation_size=32).roi_heads.box_roi_pool
    maps = {str(i): torch.rand(1, 64, SIZE[0] // s, SIZE[1] // s).half() for i, s in enumerate((4, 8, 16, 32))}
    assert pool(maps, [torch.tensor([[10.0, 10, 60, 60]])], [SIZE]).dtype == torch.float16
