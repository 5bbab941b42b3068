"""Segmentation by recipe: the one engine trains, goes on, tests, exports and shows segmenters, on the made set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmkd.nn.segmenters import build_segmenter
from fastmkd.train.cli import main
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe
from fastmkd.train.scenes_command import ScenesRecipe, write_scenes

TINY = {"encoder": "tu-resnet18", "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "psp_out_channels": 16}
RECIPE = f"""
name: masks
seed: 2
data: {{name: scenes, task: segmentation, root: ../made, batch_size: 4, eval_batch_size: 3, image_size: 48, workers: 0}}
student: {{name: segmenter.pspnet, kwargs: {json.dumps(TINY)}}}
method: Supervised
optim: {{lr: 0.01, accumulate: 2}}
schedule: {{epochs: 2, warmup_epochs: 0.5}}
augment: {{crop: resized, scale: [0.5, 1.0], flip: 0.5}}
ema: {{decay: 0.5}}
run: {{tensorboard: false, log_every: 2}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_scenes(folder / "made", ScenesRecipe(source="digits", images=16, val_images=5, size=64))
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    own = made / request.node.name.partition("[")[0]
    own.mkdir(exist_ok=True)
    (own / "masks.yaml").write_text(RECIPE)
    monkeypatch.chdir(own)
    return own


def test_a_run_and_what_is_done_with_it(folder, capsys):
    result = train(load_recipe("masks.yaml"))
    assert (result["updates"], result["images"]) == (4, 5)
    assert 0 < result["miou"] <= result["pixel_accuracy"] <= 100
    assert "test mIoU" in capsys.readouterr().out
    description = json.loads(Path("runs/masks/recipe.json").read_text())
    assert description["data"]["classes"][:2] == ["background", "0"]

    assert main(["eval", "runs/masks"]) == 0
    said = capsys.readouterr().out
    assert f"mIoU {result['miou']:.2f} %" in said
    assert "on 5 pictures" in said

    assert main(["export", "runs/masks", "--out", "bare.safetensors"]) == 0
    with safe_open("bare.safetensors", "pt") as file:
        kwargs = json.loads(file.metadata()["kwargs"])
    model = build_segmenter("pspnet", **kwargs)
    model.load_state_dict(load_file("bare.safetensors"))

    assert main(["show", "runs/masks", "--count", "3", "--out", "sheet.png"]) == 0
    with Image.open("sheet.png") as sheet:
        assert sheet.size[0] > 600


def test_a_run_that_stopped_ends_with_the_same_bits(folder):
    half = load_recipe("masks.yaml", ["--run.dir=parts", "--run.save_every=1"])
    whole = train(half)
    before = load_file("parts/model.safetensors")
    newest = sorted(Path("parts/checkpoints").iterdir())
    assert len(newest) == 2
    Path("parts/result.json").unlink()
    Path("parts/model.safetensors").unlink()
    for file in newest[-1].iterdir():
        file.unlink()
    newest[-1].rmdir()
    again = train(half)
    assert (again["miou"], again["updates"]) == (whole["miou"], whole["updates"])
    after = load_file("parts/model.safetensors")
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_it_learns(folder):
    options = [
        "--schedule.epochs=12",
        "--run.eval_every=12",
        "--augment.crop=none",
        "--ema=null",
        "--optim.accumulate=1",
    ]
    result = train(load_recipe("masks.yaml", options))
    assert result["pixel_accuracy"] > 60


def test_the_same_set_serves_detectors(folder):
    body = "{layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"
    kwargs = f"{{backbone: timm.resnet18, backbone_kwargs: {body}, out_channels: 32, width: 32}}"
    Path("boxes.yaml").write_text(
        f"""
name: boxes
data: {{name: scenes, task: detection, root: ../made, batch_size: 4, eval_batch_size: 5, image_size: 64, workers: 0}}
student: {{name: detector.reppoints, kwargs: {kwargs}}}
schedule: {{epochs: 1, warmup_epochs: 0}}
run: {{tensorboard: false}}
"""
    )
    result = train(load_recipe("boxes.yaml"))
    assert (result["updates"], result["images"]) == (4, 5)
    assert 0 <= result["map"] <= 100


def test_an_encoder_starts_from_a_classifier(folder):
    import timm

    torch.manual_seed(0)
    teacher = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 16, 16], num_classes=7)
    save_file(teacher.state_dict(), "classifier.safetensors")
    recipe = load_recipe("masks.yaml", ["--student.backbone=classifier.safetensors", "--optim.lr=1e-9", "--ema=null"])
    train(recipe)
    own = load_file("runs/masks/model.safetensors")
    torch.testing.assert_close(own["encoder.model.conv1.weight"], teacher.conv1.weight.detach(), atol=1e-4, rtol=0)
    changed = {name: value for name, value in teacher.state_dict().items() if "layer1" not in name}
    save_file(changed, "classifier.safetensors")
    recipe.run.dir = "other"
    with pytest.raises(UserError, match=r"do not fit the student's encoder. Keys \d+ missing: model\.layer1"):
        train(recipe)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--student.name=vit_tiny_patch16_224"], "expected a name such as segmenter.pspnet"),
        (["--student.name=segmenter.unet3"], "'unet3' is not known; expected one of pspnet"),
        (["--augment.mixup=0.5"], "augment.mixup is set, which segmentation does not have"),
        (["--data.task=null"], r"data.task is None; the pictures of scenes are for detection or segmentation"),
        (["--data.label_fraction=0.5"], "data.label_fraction is for classifiers"),
    ],
)
def test_what_does_not_fit_is_refused(folder, options, said):
    with pytest.raises(UserError, match=said):
        train(load_recipe("masks.yaml", options))
