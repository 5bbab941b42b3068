"""DPK's options: priors, transforms and targets of its ablations, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from dpk_networks import SMALL, TARGETS, cnn, make, pictures
from tiny_vits import tiny
from torch import nn

import fastmkd
from fastmkd.methods.dpk_ratio import FixedRatio


@pytest.mark.parametrize("prior", ["zero", "learnable"])
def test_priors_without_the_teacher(prior):
    method = make(prior=prior, ratio=0.5).train()
    stage = method.heads["last"]
    method(pictures(), TARGETS).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert not any("teacher" in name for name, _ in stage.named_parameters())
    taken = torch.ones(2, 36, dtype=torch.bool)
    maps = [torch.randn(2, c, 6, 6, dtype=torch.float64) for c in (8, 12)]
    hybrid = (0 if prior == "zero" else stage.mask_token) + stage.position
    decoded = stage.output(stage.decode(hybrid[None], (6, 6)))[0].T.view(12, 6, 6)
    torch.testing.assert_close(stage(*maps, taken)[1], decoded)


@pytest.mark.parametrize("transform", ["mlp-decoder", "conv", "1x1"])
def test_other_transforms_train(transform):
    method = make(transform=transform, ratio=0.5).train()
    method(pictures(), TARGETS).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_convolutions_by_hand():
    method = make(transform="conv", encoder_depth=2, decoder_depth=1).eval()
    stage = method.heads["last"]
    student, teacher = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 12, 6, 6, dtype=torch.float64)
    taken = torch.rand(2, 36) < 0.5

    def run(layers, x, count):
        for conv, norm in zip(layers[::3], layers[1::3], strict=True):
            x = norm(conv(x)).relu()
            count -= 1
        assert count == 0
        return x

    encoded = (run(stage.encode_student.layers, stage.lift_student(student), 2),
               run(stage.encode_teacher.layers, stage.lift_teacher(teacher), 2))  # fmt: skip
    hybrid = run(stage.decode.layers, torch.where(taken.view(2, 1, 6, 6), encoded[1], encoded[0]), 1)
    expected = torch.einsum("oc,bchw->bohw", stage.output.weight, hybrid) + stage.output.bias[:, None, None]
    torch.testing.assert_close(stage(student, teacher, taken), expected)


def test_mlp_decoder_by_hand():
    stage = make(transform="mlp-decoder", decoder_depth=2).heads["last"]
    student, teacher = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 12, 6, 6, dtype=torch.float64)
    taken = torch.rand(2, 36) < 0.5

    def encoded(features, lift, mlp):
        tokens = lift(features).flatten(2).mT + stage.position
        return mlp.fc2(nn.functional.gelu(mlp.fc1(tokens)))

    own = encoded(student, stage.lift_student, stage.encode_student.mlp)
    other = encoded(teacher, stage.lift_teacher, stage.encode_teacher.mlp)
    x = stage.decode.embed(torch.where(taken[:, :, None], other, own) + stage.position)
    for block in stage.decode.blocks.blocks:
        x = block(x)
    expected = stage.output(stage.decode.blocks.norm(x)).mT.unflatten(2, (6, 6))
    assert len(stage.decode.blocks.blocks) == 2
    torch.testing.assert_close(stage(student, teacher, taken), expected)


def test_one_by_one_is_two_pointwise_convolutions():
    method = make(transform="1x1")
    stage = method.heads["last"]
    student, teacher = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 12, 6, 6, dtype=torch.float64)
    taken = torch.rand(2, 36) < 0.5
    where = taken.view(2, 1, 6, 6)
    mixed = torch.where(where, stage.lift_teacher(teacher), stage.lift_student(student))
    expected = torch.einsum("oc,bchw->bohw", stage.output.weight, mixed) + stage.output.bias[:, None, None]
    torch.testing.assert_close(stage(student, teacher, taken), expected)


def test_non_masked_target():
    from fastmkd.methods.dpk import feature_error

    hybrid, target = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    seen = torch.rand(3, 1, 4, 4) < 0.4
    chosen = seen.expand_as(hybrid)
    torch.testing.assert_close(feature_error(hybrid, target, seen), (hybrid - target)[chosen].square().mean())
    assert feature_error(hybrid, target, torch.zeros_like(seen)) == 0
    everything = make(target="non-masked", ratio=1.0)(pictures(), TARGETS)
    assert everything.terms["feat"] == 0
    some = make(target="non-masked", ratio=0.5, patch_size=2)(pictures(), TARGETS)
    assert some.terms["feat"] > 0


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": -1}, ValueError, "alpha is -1"),
        ({"beta": math.inf}, ValueError, "beta is inf"),
        ({"temperature": 0}, ValueError, "temperature is 0"),
        ({"ratio": 1.5}, ValueError, "ratio is 1.5"),
        ({"ratio": math.nan}, ValueError, "ratio is nan"),
        ({"ratio": "dynamic"}, ValueError, "ratio is 'dynamic'; available are 'cka', 'cosine'"),
        ({"ratio": True}, TypeError, "ratio is a bool; expected a RatioRule"),
        ({"ratio": "cosine"}, ValueError, "8 channels and the teacher's 12"),
        ({"encoder_depth": -1}, ValueError, "encoder_depth is -1"),
        ({"decoder_depth": 1.5}, ValueError, "decoder_depth is 1.5"),
        ({"width": 0}, ValueError, "width is 0"),
        ({"width": 131}, ValueError, "width is 131; expected less than 128 or a multiple"),
        ({"patch_size": 0}, ValueError, "patch_size of last is 0; the map has 6 x 6"),
        ({"patch_size": 7}, ValueError, "patch_size of last is 7"),
        ({"patch_size": {"stem": 2}}, ValueError, "patch_size names 'stem'"),
        ({"mask": "stripes"}, ValueError, "mask is 'stripes'"),
        ({"prior": "noise"}, ValueError, "prior is 'noise'"),
        ({"transform": "mlp"}, ValueError, "transform is 'mlp'; available are 'encoder-decoder'"),
        ({"target": "masked"}, ValueError, "target is 'masked'"),
        ({"teacher_dtype": torch.int8}, ValueError, "teacher_dtype is torch.int8"),
        ({"image_size": 0}, ValueError, "image_size is 0"),
        ({"image_size": (1, 2, 3)}, ValueError, "image_size is"),
        ({"layers": {}}, ValueError, "layers is empty"),
        ({"layers": ["last"]}, TypeError, r"layers is \['last'\]"),
        ({"layers": {"lost": "last"}}, ValueError, "student has no module 'lost'; .* last"),
        ({"layers": {"last": "las*"}}, ValueError, "teacher has no module 'las"),
        ({"layers": {"head": "last"}}, ValueError, "the layer 'head' returns shape"),
        ({"teacher_classes": 6}, ValueError, "student has 5 classes and teacher 6"),
    ],
)
def test_refuses(options, error, match):
    options = {"layers": {"last": "last"}, **SMALL, **options}
    student, teacher = cnn(0), cnn(1, 6, options.pop("teacher_classes", 5))
    with pytest.raises(error, match=match):
        fastmkd.DPK(student, teacher, **options)
    assert all(p.requires_grad for net in (student, teacher) for p in net.parameters())
    assert student.training
    assert teacher.training


def test_refuses_images_and_networks():
    with pytest.raises(ValueError, match="student has no convolution"):
        fastmkd.DPK(nn.Sequential(nn.Flatten(), nn.Linear(3, 5)), cnn(1), {"1": "last"})
    with pytest.raises(ValueError, match="student does not take an image of 20 x 20 pixels"):
        make({"blocks.1": "blocks.1"}, tiny(0, img_size=24), tiny(1, img_size=24), image_size=20)
    with pytest.raises(ValueError, match=r"targets has shape \(3,\)"):
        make()(pictures(), TARGETS[:3])
    with pytest.raises(ValueError, match=r"^images holds no image; its shape is \(0, 3, "):
        make()(pictures()[:0], TARGETS[:0])
    twice = cnn(0)
    twice.last = nn.Sequential(twice.stem[2], twice.last)
    with pytest.raises(ValueError, match=r"'stem\.2' runs more than once"):
        fastmkd.DPK(twice, cnn(1), {"stem.2": "last"}, **SMALL)
    assert isinstance(make(ratio=0.5).rules["last"], FixedRatio)
