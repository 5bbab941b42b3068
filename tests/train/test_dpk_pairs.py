"""The pairs of networks in DPK's tables and figures, by recipe keys: tiny versions are built and take a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fastmkd.train.build import assemble
from fastmkd.train.recipe import load_recipe

RESNET = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
VIT = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
CAIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "depth_token_only": 1}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
CONVNEXT = {"dims": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}

# Where it is from: student, its arguments, teacher, its arguments, layers. Data are 32 x 32 pixels.
PAIRS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, str]]] = {
    "table_2": ("resnet18", RESNET, "resnet34", RESNET, {"layer4": "layer4"}),
    "table_3": ("mobilenetv2_035", {}, "resnet50", RESNET, {"blocks.6": "layer4"}),
    "table_12": ("resnet18", RESNET, "efficientnet_b0", {}, {"layer4": "blocks.6"}),
    "tables_13_14_cait": ("deit_tiny_patch16_224", VIT, "cait_s24_224", CAIT, {"blocks.1": "blocks.1"}),
    "table_14_vit": ("deit_tiny_patch16_224", VIT, "deit_small_patch16_224", VIT, {"blocks.1": "blocks.1"}),
    "tables_13_14_swin": (
        "swin_tiny_patch4_window7_224", SWIN, "swin_small_patch4_window7_224", {**SWIN, "embed_dim": 16},
        {"layers.1": "layers.1"},
    ),
    "figure_4_convnext": ("convnext_tiny", CONVNEXT, "convnext_small", CONVNEXT, {"stages.3": "stages.3"}),
    "figure_4_resnet": ("resnet18", RESNET, "convnext_tiny", CONVNEXT, {"layer4": "stages.3"}),
}  # fmt: skip
SMALL = {"encoder_depth": 1, "decoder_depth": 1, "width": 8}
METHODS = {
    "fastmkd.DPK": [SMALL],
    "fastmkd.methods.FeatureKD": [{"base": base} for base in ("fitnet", "at", "reviewkd", "crd", "crd-batch", "align")],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_builds_and_takes_a_step(pair, tmp_path):
    import timm

    student, own, teacher, other, layers = PAIRS[pair]
    needs = {"img_size": 32} if "patch" in teacher or "cait" in teacher else {}
    weights = tmp_path / "teacher.safetensors"
    made = timm.create_model(teacher, num_classes=10, in_chans=1, **other, **needs)
    save_file(made.state_dict(), weights)
    for class_path, variants in METHODS.items():
        for options in variants:
            recipe = {
                "data": {"name": "digits", "image_size": 32},
                "student": {"name": student, "kwargs": own},
                "teacher": {"name": teacher, "kwargs": other, "weights": str(weights)},
                "method": {"class_path": class_path, "init_args": {"layers": layers, **options}},
            }
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe))
            setup = assemble(load_recipe(path), train=pytest.fail)
            keys = list(setup.student.state_dict())
            method = setup.method.train()
            told = {"numbers": torch.tensor([5, 700, 3, 2])} if method.needs_image_numbers else {}
            out = method(torch.randn(4, 1, 32, 32), torch.tensor([0, 3, 1, 9]), **told)
            out.loss.backward()
            assert out.loss.isfinite()
            assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
            assert list(method.release().state_dict()) == keys
