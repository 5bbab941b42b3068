"""Files in the layouts of public checkpoints: the encoder goes into timm's ViT, the rest is named or refused."""

from __future__ import annotations

import argparse
import itertools

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from fastmkd.train.checkpoint import save_tensors
from fastmkd.train.encoder_checkpoint import load_encoder_checkpoint
from fastmkd.train.errors import UserError
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


def encoder(positions: int = PATCHES + 1) -> dict[str, tuple[int, ...]]:
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, positions, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 2, 2), "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        shapes |= block(f"blocks.{i}", WIDTH)
    return shapes | {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}


def public_file(decoder: int = 8, heads: bool = False) -> dict[str, Tensor]:
    """Keys and shapes as models_mae.py writes them; `heads` adds those of the DMAE code."""
    shapes = encoder()
    shapes |= {"mask_token": (1, 1, decoder), "decoder_pos_embed": (1, PATCHES + 1, decoder)}
    shapes |= {"decoder_embed.weight": (decoder, WIDTH), "decoder_embed.bias": (decoder,)}
    shapes |= block("decoder_blocks.0", decoder)
    shapes |= {"decoder_norm.weight": (decoder,), "decoder_norm.bias": (decoder,)}
    shapes |= {"decoder_pred.weight": (12, decoder), "decoder_pred.bias": (12,)}
    if heads:
        shapes |= {"aligned_feature_projection_heads.0.fc1.weight": (16, WIDTH)}
    return random(shapes)


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def perceptron(name: str, widths: list[int]) -> dict[str, tuple[int, ...]]:
    """moco/builder.py: linear layers without bias, each with batch norm, without affine in the last."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        shapes[f"{name}.{3 * i}.weight"] = (b, a)
        last = i == len(widths) - 2
        parts = ("running_mean", "running_var") if last else ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{name}.{3 * i + 1}.{part}": (b,) for part in parts}
        shapes[f"{name}.{3 * i + 1}.num_batches_tracked"] = ()
    return shapes


def moco_v3_file() -> dict[str, Tensor]:
    """What main_moco.py keeps under ``state_dict``: a DDP module of two encoders and a predictor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("base_encoder", "momentum_encoder"):
        network = encoder() | perceptron("head", [WIDTH, 16, 16, 8])
        shapes |= {f"module.{name}.{key}": shape for key, shape in network.items()}
    return random(shapes | perceptron("module.predictor", [8, 16, 8]))


def dino_file(batch_norm: bool) -> dict[str, dict[str, Tensor]]:
    """Of main_dino.py's checkpoint student and teacher; DDP wraps the teacher too if the heads have batch norm."""
    head = {"mlp.0.weight": (16, WIDTH), "mlp.0.bias": (16,), "mlp.2.weight": (8, 16), "mlp.2.bias": (8,),
            "last_layer.weight_g": (32, 1), "last_layer.weight_v": (32, 8)}  # fmt: skip
    network = {f"backbone.{key}": shape for key, shape in encoder().items()}
    network |= {f"head.{key}": shape for key, shape in head.items()}
    wrap = {"student": "module.", "teacher": "module." if batch_norm else ""}
    return {role: random({prefix + key: shape for key, shape in network.items()}) for role, prefix in wrap.items()}


def dinov2_file(side: int = 4, registers: int = 0, gated: bool = False) -> dict[str, Tensor]:
    """dinov2_*_pretrain.pth: the bare backbone, with scaled layers and a mask token; `gated` as the giant's MLP."""
    shapes = encoder(1 + side * side) | {"mask_token": (1, WIDTH)}
    shapes |= {f"blocks.{i}.{layer}.gamma": (WIDTH,) for i in range(DEPTH) for layer in ("ls1", "ls2")}
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    if gated:
        shapes = {key: shape for key, shape in shapes.items() if ".mlp." not in key}
        for i in range(DEPTH):
            name, hidden = f"blocks.{i}.mlp", 4 * WIDTH
            shapes |= {f"{name}.w12.weight": (2 * hidden, WIDTH), f"{name}.w12.bias": (2 * hidden,)}
            shapes |= {f"{name}.w3.weight": (WIDTH, hidden), f"{name}.w3.bias": (WIDTH,)}
    return random(shapes)


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
    report = load_encoder_checkpoint(model, path)
    left = [key for key in state if key.startswith(("decoder_", "mask_token", "aligned"))]
    assert sorted(report.left_out) == sorted(left)
    assert report.untouched == ["head.weight", "head.bias"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("head.") else state[key]), key


def test_a_model_that_averages_leaves_the_norm_out(tmp_path):
    torch.save({"model": public_file()}, tmp_path / "mae.pth")
    report = load_encoder_checkpoint(vit(global_pool="avg", num_classes=3), tmp_path / "mae.pth")
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
        load_encoder_checkpoint(model, tmp_path / "mae.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Code:
    def __reduce__(self):
        return print, ("ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": public_file(), "args": Code()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="could run code; it was refused"):
        load_encoder_checkpoint(vit(), tmp_path / "bad.pth")
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


def assert_loaded(model, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_moco_v3(tmp_path):
    """The base encoder, as its linear evaluation takes it."""
    state = moco_v3_file()
    rest = {"epoch": 300, "arch": "vit_base", "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "scaler": {}}
    torch.save({"state_dict": state, **rest}, tmp_path / "vit-b-300ep.pth.tar")
    model, base = vit(), "module.base_encoder."
    report = load_encoder_checkpoint(model, tmp_path / "vit-b-300ep.pth.tar")
    assert_loaded(model, {key.removeprefix(base): value for key, value in state.items() if key.startswith(base)})
    beside = (f"{base}head.", "module.momentum_encoder.", "module.predictor.")
    assert report.left_out == [key for key in state if key.startswith(beside)]
    assert (report.untouched, report.resized) == ([], "")


@pytest.mark.parametrize("batch_norm", [False, True])
def test_dino(tmp_path, batch_norm):
    """The teacher, as its evaluations take it."""
    networks = dino_file(batch_norm)
    rest = {"optimizer": {}, "epoch": 100, "args": argparse.Namespace(arch="vit_small", local_crops_scale=(0.05, 0.4)),
            "dino_loss": {"center": torch.zeros(1, 32)}, "fp16_scaler": {"scale": 2.0}}  # fmt: skip
    torch.save({**networks, **rest}, tmp_path / "dino.pth")
    model, prefix = vit(), "module.backbone." if batch_norm else "backbone."
    report = load_encoder_checkpoint(model, tmp_path / "dino.pth")
    assert_loaded(model, {key.removeprefix(prefix): value for key, value in networks["teacher"].items()})
    every = [f"{role}.{key}" for role in ("teacher", "student") for key in networks[role]]
    assert report.left_out == [key for key in every if not key.startswith(f"teacher.{prefix}")]


def test_dino_and_dinov2_alone_need_nothing(tmp_path):
    state = random(encoder())
    torch.save(state, tmp_path / "dino_deitsmall16_pretrain.pth")
    model = vit()
    assert load_encoder_checkpoint(model, tmp_path / "dino_deitsmall16_pretrain.pth") == ([], [], "")
    assert_loaded(model, state)


@pytest.mark.parametrize("side", [4, 7])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["plain", "teacher"])
def test_dinov2(tmp_path, side, registers, gated, kind):
    """What timm makes of such a file is what comes out; positions may be of a larger grid."""
    state = dinov2_file(side, registers, gated)
    saved, beside = state, ["mask_token"]
    if kind == "teacher":  # of its training: blocks in chunks, heads beside
        chunked = {key.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): value
                   for key, value in state.items()}  # fmt: skip
        heads = {"dino_head.last_layer.weight_v": torch.zeros(2), "ibot_head.mlp.0.weight": torch.zeros(2)}
        saved = {"teacher": {**{f"backbone.{key}": value for key, value in chunked.items()}, **heads}}
        beside = ["teacher.backbone.mask_token", *(f"teacher.{key}" for key in heads)]
    torch.save(saved, tmp_path / "dinov2.pth")
    options = {"init_values": 1e-5, "reg_tokens": registers, "no_embed_class": registers > 0}
    model = vit(**options, **({"mlp_layer": SwiGLUPacked, "mlp_ratio": 8} if gated else {}))
    report = load_encoder_checkpoint(model, tmp_path / "dinov2.pth")
    assert_loaded(model, checkpoint_filter_fn(dict(state), model))
    assert report.resized == ("" if side == 4 else "pos_embed from 7 x 7 to 4 x 4 patches")
    assert report.left_out == beside
    if registers == 0:
        return
    # By hand: DINOv2 adds positions to class token and patches, and puts the registers between them.
    images = torch.randn(2, 3, 8, 8)
    patches = model.patch_embed(images)
    positions = checkpoint_filter_fn(dict(state), model)["pos_embed"]
    cls = state["cls_token"] + state["pos_embed"][:, :1]
    expected = torch.cat([cls.expand(2, -1, -1), state["register_tokens"].expand(2, -1, -1), patches + positions], 1)
    torch.testing.assert_close(model._pos_embed(patches), expected)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"pos_embed": torch.zeros(1, 12, WIDTH)}, {}, "1 of another shape: pos_embed"),  # 11 patches are no square
        ({"pos_embed": torch.zeros(1, 50, 24)}, {}, "1 of another shape: pos_embed"),
        ({"pos_embed": torch.zeros(1, 1, WIDTH)}, {}, "1 of another shape: pos_embed"),
        ({}, {"init_values": None}, r"4 foreign: blocks\.0\.ls1\.gamma"),
        ({"register_tokens": torch.zeros(1, 4, WIDTH)}, {}, "1 foreign: reg_token"),
        ({}, {"reg_tokens": 4}, "1 missing: reg_token"),
        ({"dino_head.weight": torch.zeros(2)}, {}, r"1 foreign: dino_head\.weight"),
    ],
)
def test_dinov2_files_that_do_not_fit(tmp_path, change, options, said):
    torch.save({**dinov2_file(), **change}, tmp_path / "dinov2.pth")
    with pytest.raises(UserError, match=said):
        load_encoder_checkpoint(vit(**{"init_values": 1e-5, **options}), tmp_path / "dinov2.pth")


def test_foreign_keys_beside_the_networks(tmp_path):
    torch.save({"state_dict": {**moco_v3_file(), "module.queue": torch.zeros(2)}}, tmp_path / "moco.pth")
    with pytest.raises(UserError, match="1 foreign: queue"):
        load_encoder_checkpoint(vit(), tmp_path / "moco.pth")
    networks = dino_file(batch_norm=False)
    networks["teacher"]["fc.weight"] = torch.zeros(2)
    torch.save(networks, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"1 foreign: teacher\.fc\.weight"):
        load_encoder_checkpoint(vit(), tmp_path / "dino.pth")


def test_the_heads_of_moco_v3s_small_vit(tmp_path):
    """Twelve, where everybody else's has six; no shape in the file tells."""
    small = {"patch_size": 16, "img_size": 16, "embed_dim": 384, "depth": 1, "num_classes": 0}
    made = {heads: timm.create_model("vit_small_patch16_224", num_heads=heads, **small) for heads in (6, 12)}
    state = {f"module.base_encoder.{key}": value for key, value in made[12].state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "vit-s.pth.tar")
    load_encoder_checkpoint(made[12], tmp_path / "vit-s.pth.tar")
    with pytest.raises(UserError, match=r"the model has 6 heads .* 12; make it with num_heads: 12"):
        load_encoder_checkpoint(made[6], tmp_path / "vit-s.pth.tar")


@pytest.mark.parametrize("layout", ["moco", "dino"])
def test_hostile_checkpoints_of_other_layouts_are_refused(tmp_path, capsys, layout):
    networks = {"state_dict": moco_v3_file()} if layout == "moco" else dino_file(batch_norm=False)
    torch.save({**networks, "optimizer": Code()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="could run code; it was refused"):
        load_encoder_checkpoint(vit(), tmp_path / "bad.pth")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["moco", "dino", "dinov2"])
def test_other_layouts_by_recipe(tmp_path, layout):
    saved = {"moco": lambda: {"state_dict": moco_v3_file()}, "dino": lambda: dino_file(batch_norm=False),
             "dinov2": lambda: dinov2_file(side=7)}[layout]()  # fmt: skip
    path, kwargs = str(tmp_path / "public.pth"), {**SMALL, "init_values": 1e-5 if layout == "dinov2" else None}
    torch.save(saved, path)
    teacher = TeacherRecipe(name="vit_tiny_patch16_224", weights=path)
    with pytest.warns(UserWarning, match="the teacher did not take") as told:
        build_model(teacher, {**kwargs, "num_classes": 0}, "teacher")
    fitted = any("fitted: pos_embed from 7 x 7 to 4 x 4 patches" in str(warning.message) for warning in told)
    assert fitted is (layout == "dinov2")
    with pytest.warns(UserWarning, match="the student did not take"):
        student = build_model(ModelRecipe(backbone=path), {**kwargs, "num_classes": 7}, "student")
    assert student.head.out_features == 7
