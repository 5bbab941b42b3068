"""Files in the layout of the public MAE and DMAE: the encoder goes into timm's ViT, the rest is named or refused."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch
from torch import Tensor

from fastmkd.train.checkpoint import save_tensors
from fastmkd.train.errors import UserError
from fastmkd.train.mae_checkpoint import load_mae_checkpoint
from fastmkd.train.models import build_model, load_weights
from fastmkd.train.schema import ModelRecipe, TeacherRecipe

WIDTH, DEPTH, PATCHES = 12, 2, 16
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}


def block(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {"norm1": None, "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": None,
              "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}  # fmt: skip
    found = {}
    for name, shape in shapes.items():
        found[f"{prefix}.{name}.weight"] = shape or (width,)
        found[f"{prefix}.{name}.bias"] = shape[:1] if shape else (width,)
    return found


def public_file(decoder: int = 8, heads: bool = False) -> dict[str, Tensor]:
    """Keys and shapes as models_mae.py writes them; `heads` adds those of the DMAE code."""
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, PATCHES + 1, WIDTH), "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, PATCHES + 1, decoder), "patch_embed.proj.weight": (WIDTH, 3, 2, 2),
        "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        shapes |= block(f"blocks.{i}", WIDTH)
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"decoder_embed.weight": (decoder, WIDTH), "decoder_embed.bias": (decoder,)}
    shapes |= block("decoder_blocks.0", decoder)
    shapes |= {"decoder_norm.weight": (decoder,), "decoder_norm.bias": (decoder,)}
    shapes |= {"decoder_pred.weight": (12, decoder), "decoder_pred.bias": (12,)}
    if heads:
        shapes |= {"aligned_feature_projection_heads.0.fc1.weight": (16, WIDTH)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0, **options})


@pytest.mark.parametrize("kind", ["model", "bare", "safetensors", "training"])
@pytest.mark.parametrize("heads", [False, True])
def test_the_encoder_is_loaded_and_the_rest_named(tmp_path, kind, heads):
    state, path = public_file(heads=heads), tmp_path / "mae.pth"
    if kind == "safetensors":
        path = tmp_path / "mae.safetensors"
        save_tensors(path, state)
    elif kind == "training":  # as util/misc.py saves it, with the arguments of the run
        arguments = argparse.Namespace(lr=1e-3, model="mae_vit", resume="")
        torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": arguments}, path)
    else:
        torch.save({"model": state} if kind == "model" else state, path)
    model = vit(num_classes=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_mae_checkpoint(model, path)
    left = [key for key in state if key.startswith(("decoder_", "mask_token", "aligned"))]
    assert sorted(report.left_out) == sorted(left)
    assert report.untouched == ["head.weight", "head.bias"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("head.") else state[key]), key


def test_a_model_that_averages_leaves_the_norm_out(tmp_path):
    torch.save({"model": public_file()}, tmp_path / "mae.pth")
    report = load_mae_checkpoint(vit(global_pool="avg", num_classes=3), tmp_path / "mae.pth")
    assert {"norm.weight", "norm.bias"} <= set(report.left_out)
    assert report.untouched == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"momentum_encoder.weight": torch.zeros(1)}, "1 foreign: momentum_encoder.weight"),
        ({"blocks.2.norm1.weight": torch.zeros(WIDTH)}, r"1 foreign: blocks\.2\.norm1\.weight"),
        ({"pos_embed": torch.zeros(1, 5, WIDTH)}, r"1 of another shape: pos_embed \(1, 5, 12\) for \(1, 17, 12\)"),
        ({"norm.bias": None}, r"1 missing: norm\.bias"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(tmp_path, change, said):
    state = {**public_file(), **change}
    torch.save({"model": {key: value for key, value in state.items() if value is not None}}, tmp_path / "mae.pth")
    model = vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        load_mae_checkpoint(model, tmp_path / "mae.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Code:
    def __reduce__(self):
        return print, ("ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": public_file(), "args": Code()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="could run code; it was refused"):
        load_mae_checkpoint(vit(), tmp_path / "bad.pth")
    assert "ran" not in capsys.readouterr().out


def test_by_recipe(tmp_path):
    path = str(tmp_path / "mae.pth")
    state = public_file()
    torch.save({"model": state}, path)
    kwargs = {**SMALL, "num_classes": 0}
    with pytest.warns(UserWarning, match="the teacher did not take mask_token, decoder_pos_embed"):
        teacher = build_model(TeacherRecipe(name="vit_tiny_patch16_224", weights=path), kwargs, "teacher")
    assert torch.equal(teacher.norm.weight, state["norm.weight"])
    with pytest.warns(UserWarning, match="the student did not take"):
        student = build_model(ModelRecipe(backbone=path), {**kwargs, "num_classes": 7}, "student")
    assert torch.equal(student.blocks[1].mlp.fc2.bias, state["blocks.1.mlp.fc2.bias"])
    assert student.head.out_features == 7
    with pytest.raises(UserError, match=r"the teacher.*2 missing: head\.weight, head\.bias.*num_classes: 0"):
        load_weights(vit(num_classes=7), path, "teacher")
