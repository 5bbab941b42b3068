"""MKD between classifiers by the shipped recipes, shortened: masked in the features of the last two stages."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from fastmkd import MKD
from fastmkd.train.build import assemble, refuse_to_train
from fastmkd.train.cli import main
from fastmkd.train.engine import train
from fastmkd.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
NARROW = {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8]}
SHORT = {
    "data.name": "digits", "data.limit": 32, "data.batch_size": 8, "data.eval_batch_size": 360, "run.panels": 0,
    "run.tensorboard": False, "run.log_every": 1, "schedule.epochs": 2, "student.kwargs": NARROW,
}  # fmt: skip


def recipe(**changes):
    method = {f"method.init_args.{name}": 1 for name in ("last_epochs", "decoder_depth")}
    whole = {**SHORT, "teacher.options": {**SHORT, "schedule.epochs": 1}, **method}
    return load_recipe(RECIPES / "mkd_cnn_fashion_mnist.yaml", changes={**whole, **changes})


def test_it_trains_is_tested_and_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(recipe())
    assert (result["updates"], result["images"]) == (8, 359)
    logged = Path("runs/mkd_cnn_fashion_mnist/metrics.csv").read_text().splitlines()
    assert [sum(f"train.{name}" in line for line in logged) for name in ("ce", "feat", "global")] == [8, 4, 4]
    assert main(["show", "runs/mkd_cnn_fashion_mnist", "--count", "2", "--out", "sheet.png"]) == 0
    assert Path("sheet.png").stat().st_size > 5000


def test_what_is_masked_and_compared(tmp_path, monkeypatch):
    """Both levels are those of the last stages, zero where hidden; the hidden cells are 16 pixels."""
    monkeypatch.chdir(tmp_path)
    from_file = {"recipe": None, "options": {}, "weights": "teacher.safetensors"}
    options = {"teacher": {**from_file, "name": "resnet34", "kwargs": NARROW}}
    torch.manual_seed(0)
    teacher = timm.create_model("resnet34", num_classes=10, in_chans=1, **NARROW)
    save_file(teacher.state_dict(), "teacher.safetensors")
    method = assemble(recipe(**options), refuse_to_train).method
    assert isinstance(method, MKD)
    assert [(level.name, level.stride) for level in method.levels] == [("layer3", 16), ("layer4", 32)]
    images = torch.rand(3, 1, 64, 64)
    with method._backbone.masking(method.draw) as sight:
        seen = method.watch_student(images, None, sight)
    assert sight.visible is not None
    assert sight.visible.shape == (3, 4, 4)
    assert sight.visible.flatten(1).sum(1).tolist() == [12] * 3
    hidden = ~sight.visible[:, None].expand_as(seen.levels.maps["layer3"])
    assert not seen.levels.maps["layer3"][hidden].any()
    assert seen.levels.maps["layer3"][~hidden].any()


def test_the_papers_recipe_is_complete():
    loaded = load_recipe(RECIPES / "mkd_resnet18_imagenet.yaml")
    assert (loaded.student.name, loaded.teacher.name) == ("resnet18", "resnet34")
    assert loaded.method.init_args["epochs"] == loaded.schedule.epochs
    assert loaded.method.init_args["layers"] == {"layer3": "layer3", "layer4": "layer4"}
    with torch.device("meta"):
        nets = [timm.create_model(part.name) for part in (loaded.student, loaded.teacher)]
    assert all(hasattr(net, "layer3") for net in nets)
