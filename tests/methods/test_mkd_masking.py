"""The masked encoder of MKD on networks of every build: what it hides, and what size its maps have."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from dense_nets import SMALL, stages
from torch import nn

import fastmkd
from fastmkd.methods.mkd_masking import MaskedBackbone, coarser
from fastmkd.nn.detectors import build_detector
from fastmkd.reference.dense import dense_twin, upsampled


def run_masked(part, images, visible, patch, **options):
    backbone = MaskedBackbone(part, patch, 32, **options)
    with backbone.masking(lambda *_: (visible, int(visible.sum()))) as sight:
        return part(images), sight


@pytest.mark.parametrize("patch", [8, 16])
def test_cells_smaller_than_the_last_stride(patch):
    """The map is packed anew before the stage in which a cell would be less than a position."""
    torch.manual_seed(0)
    net, images = stages((4, 4, 8, 8)).double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    visible = torch.rand(2, 64 // patch, 96 // patch) > 0.3
    whole = copy.deepcopy(net)
    out, _ = run_masked(net, images, visible, patch)
    x, last = images, {8: "layer2", 16: "layer3"}[patch]
    fine = nn.Sequential(*list(whole.children())[: [n for n, _ in whole.named_children()].index(last) + 1])
    x = dense_twin(fine)(x, visible) * upsampled(visible, (64 // patch, 96 // patch))[:, None]
    cell = patch
    for name in ("layer3", "layer4")[(patch == 16) :]:
        mask = coarser(visible, 2 * cell // patch)
        x = dense_twin(whole.get_submodule(name))(x, mask) * mask[:, None]
        cell *= 2
    torch.testing.assert_close(out, x)


def test_coarser_takes_the_first_cell_and_leaves_something():
    visible = torch.zeros(2, 4, 4, dtype=torch.bool)
    visible[0, 2, 0] = visible[1, 1, 1] = True
    assert coarser(visible, 2).flatten(1).tolist() == [[False, False, True, False], [True, False, False, False]]


def test_an_ordinary_convolution_sees_black_cells():
    torch.manual_seed(0)
    net, images, visible = (
        stages((4, 4, 8, 8)).eval(),
        torch.randn(1, 3, 64, 64),
        torch.tensor([[[True, False], [True, True]]]),
    )
    out, _ = run_masked(net, images, visible, 32, masked_conv=False)
    assert type(net.conv1) is nn.Conv2d
    assert torch.equal(out, net(images * upsampled(visible, (64, 64))[:, None]))


def test_no_padding_leaks_into_the_size():
    net = stages((4, 4, 8, 8)).eval()
    images, visible = torch.randn(1, 3, 72, 40), torch.tensor([[[True, True], [True, False], [True, True]]])
    out, sight = run_masked(net, images, visible, 32)
    assert sight.padded == (96, 64)
    assert out.shape == net(images).shape == (1, 8, 3, 2)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050"])
def test_small_cells_stay_small_until_a_block_is_too_coarse_for_them(name):
    """A network that returns a list, as EfficientNetFeatures, is no block: its maps up to stride 16 know such cells."""
    torch.manual_seed(0)
    body = build_detector("retinanet", f"timm.{name}", num_classes=3, image_size=(64, 96)).backbone.body.eval()
    images, visible = torch.randn(2, 3, 64, 96, requires_grad=True), torch.rand(2, 4, 6) > 0.4
    with MaskedBackbone(body, 16, 32).masking(lambda *_: (visible, int(visible.sum()))):
        eighth, sixteenth, last = body(images).values()
    assert [x.shape[2] for x in (eighth, sixteenth, last)] == [8, 4, 2]
    assert torch.equal(sixteenth.abs().sum(1) > 0, visible)
    (eighth * torch.randn_like(eighth)).sum().backward()
    assert torch.equal(images.grad.abs().sum(1) > 0, upsampled(visible, (64, 96)))


def classifiers(name, **small):
    """A student and a teacher of timm's, and five classes."""
    torch.manual_seed(0)
    return [timm.create_model(name, num_classes=5, **small) for _ in range(2)]


SWIN = {"img_size": 96, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 3}
RESNET = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 12)}


def sizes_with_and_without(method, images):
    """``(h, w)`` of each level of the student, masked and as it is without a mask."""
    with method._backbone.masking(method.draw) as sight:
        masked = method.watch_student(images, None, sight).levels.maps
    assert sight.visible is not None
    plain = method.watch_student(images, None).levels.maps
    return [{name: tuple(x.shape) for name, x in maps.items()} for maps in (masked, plain)]


@pytest.mark.parametrize(("patch", "side"), [(32, 96), (64, 80)])
def test_a_swin_classifier(patch, side):
    """Its maps are (B, h, w, C) with more channels than the image has pixels, and are cut where cells stick out."""
    nets = classifiers("swin_tiny_patch4_window7_224", **SWIN | {"strict_img_size": False})
    method = fastmkd.MKD(*nets, mask_ratio=0.3, mask_patch=patch, image_size=96, **SMALL)
    assert [(level.name, level.stride, level.student_channels) for level in method.levels] == [("layers.3", 32, 128)]
    drawn, draw = [], method.draw
    method.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    images = torch.randn(2, 3, side, side, requires_grad=True)
    masked, plain = sizes_with_and_without(method, images)
    assert masked == plain == {"layers.3": (2, 128, 3, 3)}
    method(images, torch.tensor([1, 2])).loss.backward()
    visible = drawn[-1][0]
    seen = upsampled(visible, [patch * cells for cells in visible.shape[1:]])[:, :side, :side]
    assert torch.equal(images.grad.abs().sum(1) > 0, seen)
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "small", "size", "expected"),
    [
        ("convnext_atto", CONVNEXT, (60, 92), {"stages.1": (2, 8, 7, 11), "stages.3": (2, 12, 1, 2)}),
        ("convnext_atto", CONVNEXT, (36, 64), {"stages.1": (2, 8, 4, 8), "stages.3": (2, 12, 1, 2)}),
        ("resnet18", RESNET, (60, 92), {"layer2": (2, 4, 8, 12), "layer4": (2, 8, 2, 3)}),
    ],
)
@pytest.mark.parametrize("masked_conv", [True, False])
def test_maps_have_the_size_that_they_have_without_a_mask(name, small, size, expected, masked_conv):
    """ConvNeXt's strided layers round down, others up."""
    layers = {level: level for level in expected}
    nets = classifiers(name, **small)
    method = fastmkd.MKD(*nets, mask_ratio=0.4, layers=layers, image_size=64, masked_conv=masked_conv, **SMALL)
    images = torch.randn(2, 3, *size)
    assert sizes_with_and_without(method, images) == [expected, expected]
    taught = method.ask_teacher(images).maps
    assert {level: tuple(x.shape) for level, x in taught.items()} == expected
    method(images, torch.tensor([1, 2])).loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())


def test_outputs_that_hold_several_maps_are_cut_one_by_one():
    """Of a list in the part, of a mapping that the part returns; the copy runs once a size and module, not a batch."""
    body = build_detector("retinanet", "timm.convnext_atto", num_classes=3, image_size=(64, 64)).backbone.body
    backbone, images = MaskedBackbone(body, 32, 32), torch.randn(2, 3, 44, 60)
    lists, visible = [], torch.tensor([[[True, False], [True, True]]]).expand(2, -1, -1)
    plain = [x.shape for x in body(images).values()]
    body.model.register_forward_hook(lambda _m, _a, out: lists.append(out))
    runs = []
    backbone._shapes._copy.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):
        with backbone.masking(lambda *_: (visible, 6)) as sight:
            out = body(images)
            inside = sight.dense(lists[-1], "model")
        assert [x.shape for x in out.values()] == [x.shape for x in inside] == plain
        assert [tuple(shape[2:]) for shape in plain] == [(5, 7), (2, 3), (1, 1)]
    assert len(runs) == 2


class Stubborn(torch.nn.Module):
    """Takes images of 64 x 64 pixels only, and cannot be copied where it holds a generator."""

    def __init__(self, held):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.held = held

    def forward(self, images):
        if images.shape[2] != 64:
            raise KeyError("64 or nothing")
        return self.layer(images)


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (None, r"images of 60 x 64 pixels are padded to 64 x 64 .* does not take images of 60 x 64 .*64 or nothing"),
        ((x for x in "a"), r"images of 60 x 64 .* cannot be copied \(cannot pickle 'generator' object\)"),
    ],
)
def test_sizes_that_cannot_be_known_are_refused(held, sentence):
    network = Stubborn(held)
    backbone, visible = MaskedBackbone(network, 32, 2), torch.tensor([[[True, False], [True, True]]])
    for height in (64, 60):
        with backbone.masking(lambda *_: (visible, 3)):
            if height == 64:
                assert network(torch.randn(1, 3, 64, 64)).shape == (1, 4, 32, 32)
                continue
            with pytest.raises(ValueError, match=sentence):
                network(torch.randn(1, 3, 60, 64))


def test_a_level_inside_a_swin_body_is_channels_last():
    small = {"num_classes": 3, "image_size": (96, 96), "out_channels": 8, "backbone_kwargs": SWIN}
    nets = [build_detector("retinanet", "timm.swin_tiny_patch4_window7_224", **small) for _ in range(2)]
    method = fastmkd.MKD(*nets, layers={"backbone.body.model.layers_2": "backbone.body.model.layers_2"}, **SMALL)
    assert [(level.stride, level.student_channels) for level in method.levels] == [(16, 64)]
