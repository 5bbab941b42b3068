"""What the methods beside MKD show: the panels against what networks and heads gave."""

from __future__ import annotations

import pytest
import torch
from dense_nets import Segmenter, batch, detector, teacher_of

import fastmkd
from fastmkd.methods.dense_bases import DPKFGD, FGD, MGD
from fastmkd.methods.dense_pictures import distance, enlarge, stretch
from fastmkd.methods.fgd import attention_weights

FIRST, LAST = ["input", "teacher features", "student features"], ["distance to teacher"]
OWN = {
    "fitnet": ["adapted features"],
    "cwd": ["adapted features"],
    "mgd": ["masked features", "generated features"],
    "fgd": ["adapted features", "teacher's attention", "foreground"],
    "dpk": ["hybrid features", "teacher's attention", "foreground"],
}
SMALL_DPK = DPKFGD(encoder_depth=1, decoder_depth=1, width=16)


def make(base):
    torch.manual_seed(0)
    return fastmkd.DenseKD(detector(), teacher_of(), base=base)


@pytest.mark.parametrize("base", OWN)
def test_panels_of_every_base(base):
    method, (images, targets) = make(SMALL_DPK if base == "dpk" else base), batch()
    method.train()
    panels = method.pictures(images, targets=targets)
    assert [panel.title for panel in panels] == FIRST + OWN[base] + LAST
    torch.testing.assert_close(panels[0].image[0, :, :96, :80], images[0], rtol=1e-4, atol=1e-5)
    for panel in panels[1:]:
        assert panel.image.shape == (2, 96, 96)
        assert panel.kind == ("mask" if panel.title == "foreground" else "heat")
        assert panel.image.min() == 0 or panel.kind == "mask"
        assert panel.image.max() == 1
    without = [panel.title for panel in method.pictures(images, level="backbone.fpn:1")]
    assert without == FIRST + [title for title in OWN[base] if title != "foreground"] + LAST
    assert all(module.training for module in (method, method.student.backbone, method.heads))


def test_maps_are_those_of_the_loss():
    method, (images, _) = make(MGD(mask_ratio=0.0)), batch()
    shown = {panel.title: panel.image for panel in method.pictures(images)}
    method.eval()
    with torch.no_grad():
        batched = method.student.transform(images)[0].tensors
        student, teacher = (network.backbone(batched)["0"] for network in (method.student, method.teacher))
        adapted = method.heads["adapt"][0](student)
        generated = method.heads["generate"][0](adapted)
    maps = {"teacher features": teacher, "student features": student, "masked features": adapted,
            "generated features": generated}  # fmt: skip
    for title, expected in maps.items():
        torch.testing.assert_close(shown[title], enlarge(stretch(expected.abs().mean(1)), (96, 96)))
    far = stretch(distance(generated, teacher))
    torch.testing.assert_close(shown["distance to teacher"], enlarge(far, (96, 96)))
    half = make(MGD(mask_ratio=0.5)).pictures(images)[3].image[:, ::8, ::8]
    assert 0.35 < (half == 0).float().mean() < 0.65  # 2 x 144 draws: five deviations


def test_foreground_and_attention_of_fgd():
    method, (images, targets) = make(FGD()), batch()
    # The box in pixels of the batch: the transform makes this image half as large again.
    large = [torch.rand(3, 64, 64)]
    panels = {p.title: p.image for p in method.pictures(large, targets=[targets[0] | {"boxes": BOX, "labels": LABEL}])}
    expected = torch.zeros(96, 96)
    expected[24:48, 48:72] = 1
    assert torch.equal(panels["foreground"][0], expected)
    _, empty = method.pictures(images, targets=targets)[5].image
    assert not empty.any()  # an image without boxes
    with torch.no_grad():
        teacher = method.teacher.backbone(method.student.transform(large)[0].tensors)["0"]
    attention = enlarge(stretch(attention_weights(teacher)[0][:, 0]), (96, 96))
    torch.testing.assert_close(panels["teacher's attention"], attention, rtol=1e-4, atol=1e-5)


BOX, LABEL = torch.tensor([[32.0, 16, 48, 32]]), torch.tensor([1])


def test_a_look_leaves_no_trace():
    method, (images, targets) = make(SMALL_DPK), batch()
    method(*batch())
    before = {name: value.clone() for name, value in method.state_dict().items()}
    recent = [len(rule._recent) for rule in method.heads["imitation"].rules]
    method.pictures(images, targets=targets)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert [len(rule._recent) for rule in method.heads["imitation"].rules] == recent == [1] * 5


def test_segmenters_and_wrong_arguments():
    method = fastmkd.DenseKD(Segmenter(), Segmenter(seed=1), base="cwd")  # equal widths: nothing is adapted
    images = torch.rand(2, 3, 64, 64)
    panels = method.pictures(images, targets=torch.zeros(2, 64, 64))
    assert [panel.title for panel in panels] == FIRST + LAST
    assert torch.equal(panels[0].image, images)
    with pytest.raises(ValueError, match=r"level is 'p3'; this method has encoder:-1"):
        method.pictures(images, level="p3")
    method, (images, targets) = make("fgd"), batch()
    with pytest.raises(ValueError, match="images holds 2 images but targets 1; give one dict an image"):
        method.pictures(images, targets=targets[:1])
