"""Networks and weights: what does not fit is listed, what could run code is refused."""

from __future__ import annotations

import itertools
import os
import pickle

import pytest
import timm
import torch
from torch import nn

from fastmkd.methods import MaskedKD, Supervised
from fastmkd.train.checkpoint import save_tensors
from fastmkd.train.data import load_data
from fastmkd.train.errors import UserError
from fastmkd.train.models import build_model, load_weights, method_arguments, model_kwargs, read_state_dict
from fastmkd.train.optim import Schedule, build_optimizer
from fastmkd.train.schema import DataRecipe, ModelRecipe, OptimRecipe, ScheduleRecipe

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 10}


def small(**changes) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **changes})


def test_the_data_fills_in_what_the_recipe_does_not_say():
    source = load_data(DataRecipe(name="digits"))
    assert model_kwargs(ModelRecipe(), source) == {"num_classes": 10, "in_chans": 1, "img_size": 8}
    assert model_kwargs(ModelRecipe("resnet18"), source) == {"num_classes": 10, "in_chans": 1}
    assert model_kwargs(ModelRecipe(kwargs={"num_classes": 3}), source)["num_classes"] == 3


def test_unknown_names_and_arguments():
    with pytest.raises(UserError, match=r"student\.name is 'vit_nano'.*Near it are vit"):
        build_model(ModelRecipe("vit_nano"), {}, "student")
    with pytest.raises(UserError, match="colour"):
        build_model(ModelRecipe(), {"colour": 3}, "teacher")
    with pytest.raises(UserError, match="cannot make the teacher"):
        build_model(ModelRecipe(), {**SMALL, "num_heads": 5}, "teacher")


def test_networks_for_cifar():
    source = load_data(DataRecipe(name="digits"))
    with pytest.raises(UserError, match=r"cifar\.vgg8 takes colour pictures, and these have 1 channel"):
        model_kwargs(ModelRecipe("cifar.vgg8"), source)
    source.channels = 3
    recipe = ModelRecipe("cifar.wrn_16_2")
    model = build_model(recipe, model_kwargs(recipe, source), "student")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(UserError, match=r"has no weights to download"):
        build_model(ModelRecipe("cifar.vgg8", pretrained=True), {}, "teacher")
    with pytest.raises(UserError, match=r"'cifar\.vgg7', .*Near it are .*cifar\.vgg8"):
        build_model(ModelRecipe("cifar.vgg7"), {}, "student")
    with pytest.raises(UserError, match=r"cannot make the student cifar\.vgg8 .*depth"):
        build_model(ModelRecipe("cifar.vgg8"), {"depth": 3}, "student")


def test_weights_round_trip_in_both_formats(tmp_path):
    model = small()
    save_tensors(tmp_path / "w.safetensors", model.state_dict())
    torch.save(model.state_dict(), tmp_path / "w.pth")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "nested.pth")
    for name in ("w.safetensors", "w.pth", "nested.pth"):
        other = build_model(ModelRecipe(weights=str(tmp_path / name)), SMALL, "student")
        for key, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)


def test_every_kind_of_misfit_is_listed_at_once(tmp_path):
    state = small(num_classes=7).state_dict()
    del state["pos_embed"]
    state["decoder.weight"] = torch.zeros(1)
    save_tensors(tmp_path / "w.safetensors", state)
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "w.safetensors", "teacher")
    for part in (
        "teacher",
        "1 missing: pos_embed",
        "1 not in the model: decoder.weight",
        "head.weight (7, 12) for (10, 12)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_backbone_alone_gets_a_new_classifier(tmp_path):
    backbone = small(num_classes=0)
    save_tensors(tmp_path / "w.safetensors", backbone.state_dict())
    student = build_model(ModelRecipe(backbone=str(tmp_path / "w.safetensors")), SMALL, "student")
    assert all(torch.equal(student.state_dict()[key], value) for key, value in backbone.state_dict().items())
    assert student.head.weight.shape == (10, 12)
    with pytest.raises(UserError, match=r"2 missing: head\.weight, head\.bias"):
        build_model(ModelRecipe(weights=str(tmp_path / "w.safetensors")), SMALL, "student")


def test_long_lists_of_keys_are_cut(tmp_path):
    save_tensors(tmp_path / "w.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(UserError, match=r"missing: .* and \d+ more"):
        load_weights(small(), tmp_path / "w.safetensors", "student")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_hostile_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.pth", {"model": Hostile()}), ("b.pt", Hostile())):
        torch.save(content, name)
        with pytest.raises(UserError, match="could run code"):
            read_state_dict(name)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"refused|damaged"):
        read_state_dict("raw.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_cut_off_files_are_said_to_be(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(small().state_dict(), path)
    else:
        save_tensors(path, small().state_dict())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cut off or damaged"):
        read_state_dict(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cut off or damaged"):
        read_state_dict(path)
    with pytest.raises(UserError, match="do not exist"):
        read_state_dict(tmp_path / "none.pth")


PLAIN = {
    "page": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
    "json": b'{"message": "Not Found"}',
    "text": b"hello world\n",
    "zeros": bytes(1000),
    "bytes": bytes(range(256)) * 4,
    "gzip": b"\x1f\x8b\x08\x00" + bytes(100),
    "pickle": b"\x80\x02garbage",
    "numbers": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_files_that_are_no_weights_are_not_said_to_be_malicious(tmp_path, kind):
    """A user who has saved the page of an error should not be told to convert it where it can be trusted."""
    for name in ("w.pth", "w.bin"):
        (tmp_path / name).write_bytes(PLAIN[kind])
        with pytest.raises(UserError, match=r"are cut off or damaged, or no weights that torch\.save wrote .*again\.$"):
            read_state_dict(tmp_path / name)


def test_a_pickle_of_something_else(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a dict of tensors"):
        read_state_dict(tmp_path / "list.pth")


def test_methods_get_the_networks_they_ask_for():
    student, teacher = small(), small()
    assert method_arguments(Supervised, student, None) == {"student": student}
    assert method_arguments(MaskedKD, student, teacher) == {"student": student, "teacher": teacher}
    with pytest.raises(UserError, match="Supervised has no teacher"):
        method_arguments(Supervised, student, teacher)
    with pytest.raises(UserError, match="MaskedKD needs a teacher"):
        method_arguments(MaskedKD, student, None)


def test_layer_decay_and_weight_decay_groups():
    student, heads = small(), nn.ModuleDict({"mlp": nn.Linear(2, 2)})
    recipe = OptimRecipe(lr=0.1, weight_decay=0.3, layer_decay=0.5)
    optimizer = build_optimizer(recipe, student, heads, images_per_update=8)
    scale = {id(p): g.get("lr_scale", 1.0) for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(scale) == len(list(student.parameters())) + 2
    assert scale[id(student.head.weight)] == scale[id(heads["mlp"].weight)] == 1.0
    assert scale[id(student.blocks[1].mlp.fc1.weight)] == 0.5
    assert scale[id(student.blocks[0].mlp.fc1.weight)] == 0.25
    assert scale[id(student.patch_embed.proj.weight)] == 0.125
    assert decay[id(student.head.weight)] == 0.3
    assert decay[id(student.head.bias)] == decay[id(student.pos_embed)] == decay[id(student.cls_token)] == 0.0


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("vit_tiny_patch16_224", ["cls_token", "pos_embed", "patch_embed.proj.weight"]),
        ("deit_tiny_distilled_patch16_224", ["cls_token", "dist_token", "pos_embed"]),
        ("deit3_small_patch16_224", ["cls_token", "pos_embed"]),
        ("beit_base_patch16_224", ["cls_token", "patch_embed.proj.weight"]),
        ("eva02_tiny_patch14_224", ["cls_token", "pos_embed"]),
        ("cait_xxs24_224", ["cls_token", "pos_embed"]),
    ],
)
def test_rates_fall_from_the_head_down_in_every_family(name, stem):
    """The stem learns at decay^(depth + 1), block i at decay^(depth - i), the head at the full rate, as in MAE."""
    with torch.device("meta"):
        student = timm.create_model(name, depth=4, num_classes=10)
    optimizer = build_optimizer(OptimRecipe(lr=1.0, layer_decay=0.5), student, nn.ModuleDict(), 8)
    Schedule(ScheduleRecipe(epochs=4, warmup_epochs=1, warmup_lr=0.0), optimizer, 10).step_update(10)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(student.named_parameters())
    assert len(rate) == len(parameters)
    assert {rate[id(parameters[key])] for key in stem} == {0.5**5}
    for i, block in enumerate(student.blocks):
        assert {rate[id(p)] for p in block.parameters()} == {0.5 ** (4 - i)}
    assert {rate[id(p)] for key, p in parameters.items() if key.startswith("head")} == {1.0}


def test_frozen_parameters_are_left_out_and_nothing_is_an_error():
    student = small()
    student.head.requires_grad_(False)
    optimizer = build_optimizer(OptimRecipe(), student, nn.ModuleDict(), 8)
    assert id(student.head.weight) not in {id(p) for g in optimizer.param_groups for p in g["params"]}
    with pytest.raises(UserError, match="no parameter to train"):
        build_optimizer(OptimRecipe(), small().requires_grad_(False), nn.ModuleDict(), 8)
    with pytest.raises(UserError, match=r"optim\.name 'sdg'"):
        build_optimizer(OptimRecipe(name="sdg"), small(), nn.ModuleDict(), 8)
    with pytest.raises(UserError, match="momentumm"):
        build_optimizer(OptimRecipe(kwargs={"momentumm": 0.9}), small(), nn.ModuleDict(), 8)


def test_schedule_rises_then_falls_per_update():
    optimizer = build_optimizer(OptimRecipe(lr=1.0), nn.Linear(2, 2), nn.ModuleDict(), 8)
    schedule = Schedule(ScheduleRecipe(epochs=4, warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.1), optimizer, 10)
    rates = []
    for update in range(40):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert rates[5 + 35 // 2] == pytest.approx(0.55, abs=0.03)
    assert 0.1 <= rates[-1] < 0.11
