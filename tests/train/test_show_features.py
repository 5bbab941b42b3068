"""``fastmkd show --features``: MKD's pictures of detectors and segmenters, and those of the methods beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastmkd.train import show_features as show_module
from fastmkd.train.build import assemble, open_run
from fastmkd.train.cli import main
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.models import build_model
from fastmkd.train.recipe import load_recipe
from fastmkd.train.scenes_command import ScenesRecipe, write_scenes
from fastmkd.train.schema import ModelRecipe
from fastmkd.train.show_features import show_features

NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
STUDENTS = {
    "detection": ("detector.retinanet", {"backbone": "timm.resnet18", "backbone_kwargs": NARROW, "out_channels": 16}),
    "segmentation": ("segmenter.pspnet", {"encoder": "tu-resnet18", "psp_out_channels": 16, **NARROW}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "made"  # its canvases have several sizes
    write_scenes(folder, ScenesRecipe(source="digits", images=8, val_images=4, size=64))
    return folder


@pytest.fixture
def recipe(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(task: str, *options: str):
        name, kwargs = STUDENTS[task]
        torch.manual_seed(9)
        classes = 11 if task == "segmentation" else 10
        teacher = build_model(ModelRecipe(name), {**kwargs, "num_classes": classes}, "teacher")
        save_file(teacher.state_dict(), "teacher.safetensors")
        Path("mkd.yaml").write_text(
            f"""
name: mkd
data: {{name: scenes, task: {task}, root: {made}, batch_size: 4, eval_batch_size: 4, image_size: 64, workers: 0}}
student: {{name: {name}, kwargs: {json.dumps(kwargs)}}}
teacher: {{name: {name}, kwargs: {json.dumps(kwargs)}, weights: teacher.safetensors}}
method:
  class_path: fastmkd.MKD
  init_args: {{mask_ratio: 0.25, mask_patch: 16, sam: 16, decoder_depth: 1, decoder_width: 16, decoder_heads: 2,
    epochs: null}}
optim: {{lr: 0.01}}
schedule: {{epochs: 1, warmup_epochs: 0}}
run: {{tensorboard: false}}
"""
        )
        return load_recipe("mkd.yaml", options)

    return write


@pytest.mark.parametrize(("task", "ema"), [("detection", False), ("segmentation", True)])
def test_features_by_the_trained_decoders(recipe, task, ema, capsys):
    given = recipe(task, "--ema={decay: 0.5}") if ema else recipe(task)
    train(given)
    (checkpoint,) = Path("runs/mkd/checkpoints").iterdir()
    state = load_file(checkpoint / "method.safetensors")
    heads = open_run(given).method.heads.state_dict()
    assert heads
    assert all(torch.equal(value, state[f"heads.{name}"]) for name, value in heads.items())
    assert main(["show", "runs/mkd", "--features", "--count", "3", "--out", "features.png"]) == 0
    with Image.open("features.png") as sheet:
        assert sheet.size[1] > sheet.size[0]  # seven rows, three columns
    assert main(["show", "runs/mkd", "--features", "--level=p9", "--out", "features.png"]) == 2
    assert "level is 'p9'; this method has" in capsys.readouterr().err


def test_features_of_a_method_beside_mkd(recipe, monkeypatch):
    setup = assemble(recipe("detection", "--method=fastmkd.DenseKD", "--method.init_args.base=fgd"), train)
    assert setup.method.levels[0].size == (8, 16)  # at stride 8, of the 64 x 128 pixels that a picture has at most
    drawn = []
    monkeypatch.setattr(show_module, "draw_panel", lambda cell, panel, index, inputs: drawn.append(panel))
    show_features(setup, "features.png", count=2)
    titles = ["input", "teacher features", "student features", "teacher's attention", "foreground",
              "distance to teacher"]  # fmt: skip
    assert [panel.title for panel in drawn] == 2 * titles
    assert 0 < drawn[4].image.mean() < 1  # the true boxes of the picture
    assert Path("features.png").stat().st_size


def test_who_has_none_says_so(recipe):
    setup = assemble(recipe("detection", "--method=Supervised", "--teacher=null"), train)
    with pytest.raises(UserError, match="Supervised has no features to show; a run of"):
        show_features(setup, "features.png")
