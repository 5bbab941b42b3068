"""What DMAE does not take, each with a sentence that says what to do; and the numbers of the paper's rules."""

from __future__ import annotations

import pytest
import timm
import torch
from tiny_vits import pictures, tiny

import fastmkd
from fastmkd.methods.alignment import pair_layers, projection_head
from fastmkd.nn.spectrogram import SpectrogramTransformer

DECODER = {"decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0; expected a share"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0; expected a share"),
        ({"mask_ratio": float("nan")}, "mask_ratio is nan"),
        ({"mask_ratio": 0.01}, "leaves no hidden patch of the 16 in a 4 x 4 grid; at least one of each"),
        ({"mask_ratio": 0.99}, "leaves no visible patch of the 16"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
        ({"decoder_width": 18}, "decoder_width is 18; expected a multiple of 4"),
        ({"decoder_heads": 3}, "decoder_width is 16; expected .* of decoder_heads, 3"),
        ({"head": "mlp4"}, "head is 'mlp4'; expected 'linear' or 'mlp2' or 'mlp3'"),
        ({"loss": "l3"}, "loss is 'l3'"),
        ({"student_positions": "none"}, "student_positions is 'none'"),
        ({"student_layer": 0}, "student_layer is 0; the student has 2 blocks, which count from 1 to 2"),
        ({"student_layer": 3}, "student_layer is 3; the student has 2 blocks"),
        ({"teacher_layer": 4}, "teacher_layer is 4; the teacher has 3 blocks"),
        ({"student_layer": [1, 2], "teacher_layer": 3}, "student_layer names 2 layers and teacher_layer 1"),
        ({"student_layer": []}, "student_layer is empty"),
        ({"student_layer": [2, 1, 2], "teacher_layer": [3, 3, 3]}, "name the pair 2 and 3 twice; .* raise alpha"),
        ({"student_layer": [1, 1]}, "name the pair 1 and 2 twice"),
        ({"teacher_dtype": torch.int8}, "teacher_dtype is torch.int8"),
    ],
)
def test_options(options, said):
    student = tiny(0)
    with pytest.raises(ValueError, match=said):
        fastmkd.DMAE(student, tiny(1, depth=3), **{**DECODER, **options})
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("layer", ["2", 2.0, True, [1.5]])
def test_layers_are_whole_numbers(layer):
    with pytest.raises(TypeError, match=r"student_layer is .*; expected a whole number, or several"):
        fastmkd.DMAE(tiny(0), tiny(1), student_layer=layer, **DECODER)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ({}, {"patch_size": 4}, "student has patches of 8 x 8 pixels and teacher of 4 x 4.*patch_size=4"),
        ({}, {"img_size": 48}, "student takes images of 32 x 32 pixels and teacher of 48 x 48"),
        ({}, {"in_chans": 1}, "student takes 3 channels and teacher 1"),
        ({"patch_drop_rate": 0.5}, {}, "student drops patches in training"),
    ],
)
def test_pairs(student, teacher, said):
    with pytest.raises(ValueError, match=said):
        fastmkd.DMAE(tiny(0, **student), tiny(1, **teacher), **DECODER)


def test_students_that_cannot():
    audio = SpectrogramTransformer(img_size=(32, 48), patch_size=16, stride=10, embed_dim=12, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="patches of 16 x 16 pixels every 10 x 10"):
        fastmkd.DMAE(audio, **DECODER)
    with pytest.raises(TypeError, match="student is not a ViT"):
        fastmkd.DMAE(timm.create_model("resnet18"), tiny(1), **DECODER)
    with pytest.raises(TypeError, match="teacher is not a ViT"):
        fastmkd.DMAE(tiny(0), timm.create_model("resnet18"), **DECODER)
    same = tiny(0)
    with pytest.raises(ValueError, match=r"share \d+ parameters"):
        fastmkd.DMAE(same, same, **DECODER)
    with pytest.raises(ValueError, match="no position embedding"):
        fastmkd.DMAE(tiny(0, pos_embed="none"), student_positions="sincos", **DECODER)


@pytest.mark.parametrize("name", ["student_layer", "teacher_layer"])
def test_layers_without_a_teacher(name):
    with pytest.raises(ValueError, match=f"{name} is 1 but there is no teacher"):
        fastmkd.DMAE(tiny(0), None, **{name: 1}, **DECODER)


def test_images():
    method = fastmkd.DMAE(tiny(0, dynamic_img_size=True), tiny(1), **DECODER).double()
    with pytest.raises(ValueError, match=r"give the student 5 x 5 patches and the teacher 4 x 4"):
        method(pictures(40))
    alone = fastmkd.DMAE(tiny(0, dynamic_img_size=True, dynamic_img_pad=True), **DECODER).double()
    with pytest.raises(ValueError, match="33 x 33 pixels, which patches of 8 x 8 do not tile"):
        alone(pictures(33))
    with pytest.raises(ValueError, match="leaves no visible patch of the 1 "):
        alone(pictures(8))
    with pytest.raises(ValueError, match="images is 40 x 40 pixels but the model takes 32 x 32"):
        fastmkd.DMAE(tiny(0), **DECODER).double()(pictures(40))
    with pytest.raises(TypeError, match="expected floating point"):
        fastmkd.DMAE(tiny(0), **DECODER)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_a_dynamic_teacher_goes_with_any_size():
    method = fastmkd.DMAE(tiny(0), tiny(1, img_size=48, dynamic_img_size=True), **DECODER).double()
    assert method(pictures()).loss.isfinite()


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        ((None, None, 12, 24), [(9, 18)]),  # ViT-B from ViT-L
        ((None, None, 12, 12), [(9, 9)]),
        ((None, None, 12, 32), [(9, 24)]),
        ((None, None, 1, 2), [(1, 2)]),
        ((9, None, 12, 24), [(9, 18)]),
        ((6, [24], 12, 24), [(6, 24)]),  # Table 2
        (([6, 12], None, 12, 24), [(6, 12), (12, 24)]),  # Table 1, last row
        ((1, None, 24, 2), [(1, 1)]),
    ],
)
def test_layers_of_the_paper(arguments, pairs):
    assert pair_layers(*arguments) == pairs


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp2", 2), ("mlp3", 3)])
def test_heads(kind, layers):
    head = projection_head(kind, 6, 10)
    found = [part for part in head if isinstance(part, torch.nn.Linear)]
    assert [(f.in_features, f.out_features) for f in found] == [(6, 10), *[(10, 10)] * (layers - 1)]
    assert len(head) == 2 * layers - 1


def test_visible_patches_of_the_paper():
    """TEN visible patches at 95 % and FOUR at 98 % (Fig. 2), for 14 x 14 of them."""
    from fastmkd.methods.mae_parts import count_hidden

    assert [196 - count_hidden(ratio, (14, 14)) for ratio in (0.75, 0.9, 0.95, 0.98, 0.99)] == [49, 20, 10, 4, 2]
