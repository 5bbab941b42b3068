"""Detection by recipe: the one engine trains, stops, goes on, tests, exports and shows detectors."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest
import torch
from drawn_boxes import change, draw_boxes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmkd import Supervised
from fastmkd.nn.detectors import build_detector
from fastmkd.train.build import assemble, teacher_recipe
from fastmkd.train.commands import evaluate
from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.export import main as export
from fastmkd.train.recipe import load_recipe
from fastmkd.train.scenes_command import ScenesRecipe, write_scenes
from fastmkd.train.show import main as show

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = (
    "{backbone: timm.resnet18, backbone_kwargs: {layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}, "
    "out_channels: 16, anchor_sizes: [8, 16, 32, 64, 128]}"
)
# Everything that could break an exact resume: flips, several sizes, accumulation, EMA, and pictures without boxes.
RECIPE = f"""
name: boxes
seed: 2
data: {{name: coco, root: set, batch_size: 2, eval_batch_size: 4, image_size: 64, workers: 0}}
student: {{name: detector.retinanet, kwargs: {TINY}}}
method: Supervised
optim: {{name: sgd, lr: 0.02, clip_grad: 1.0, accumulate: 2, kwargs: {{momentum: 0.9}}}}
schedule: {{epochs: 2, warmup_epochs: 0.5}}
augment: {{flip: 0.5}}
ema: {{decay: 0.9}}
run: {{tensorboard: false, log_every: 2}}
"""
MULTI = "--student.kwargs.image_size=[[48, 64], 96]"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw_boxes(tmp_path / "set")
    (tmp_path / "boxes.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the uninterrupted run in which each picture draws one of two sizes."""
    path = tmp_path_factory.mktemp("whole")
    draw_boxes(path / "set")
    (path / "boxes.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        train(load_recipe("boxes.yaml", [MULTI]))
        return weights("boxes")


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"runs/{name}/model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_every_family_trains_by_recipe(folder, name):
    more = {"fcos": ["--student.kwargs.out_channels=64"], "faster_rcnn": ["--student.kwargs.representation_size=32"]}
    options = [f"--student.name=detector.{name}", *more[name], "--schedule.epochs=1"]
    if name == "faster_rcnn":
        options.append("--student.kwargs.anchor_sizes=[8, 16, 32, 64, 128]")
    result = train(load_recipe("boxes.yaml", options))
    assert (result["updates"], result["images"]) == (2, 5)
    assert 0 <= result["map"] <= result["map50"] <= 100


def test_a_run_and_what_is_done_with_it(folder, capsys):
    result = train(load_recipe("boxes.yaml"))
    said = capsys.readouterr().out
    assert "boxes: Supervised on coco, 10 training and 5 test pictures" in said
    assert "test mAP" in said
    table = Path("runs/boxes/metrics.csv").read_text()
    assert all(name in table for name in ("train.classification", "train.bbox_regression", "test.map", "test.map50"))
    assert train(load_recipe("boxes.yaml")) == result

    assert evaluate(["runs/boxes"]) == 0
    again = capsys.readouterr().out
    assert f"mAP {result['map']:.2f} %" in again
    assert "on 5 pictures" in again

    assert export(["runs/boxes", "--out", "bare.safetensors"]) == 0
    with safe_open("bare.safetensors", "pt") as file:
        metadata = file.metadata()
    model = build_detector(metadata["model"].removeprefix("detector."), **json.loads(metadata["kwargs"]))
    model.load_state_dict(load_file("bare.safetensors"))
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 107)
    with pytest.raises(UserError, match="a detector is not exported to ONNX"):
        export(["runs/boxes", "--out", "bare.onnx"])

    assert show(["runs/boxes", "--out", "boxes.png", "--count", "3", "--score", "0.01"]) == 0
    assert Path("boxes.png").stat().st_size > 5000
    with pytest.raises(UserError, match=r"no snapshots|no panels"):
        show(["runs/boxes", "--over-training"])


def test_it_learns(folder):
    """Rectangles of two colours, tested on the pictures that were seen."""
    for part in ("val.json", "val"):
        Path("set", part).rename(Path("set", f"old_{part}"))
    Path("set/val.json").write_text(Path("set/train.json").read_text())
    Path("set/val").symlink_to("train")
    options = ["--schedule.epochs=20", "--optim.name=adamw", "--optim.lr=1e-2", "--ema=null", "--run.eval_every=20"]
    options += ["--optim.kwargs={}", "--optim.accumulate=1", "--student.kwargs.out_channels=32"]
    result = train(load_recipe("boxes.yaml", options))
    assert result["map50"] > 5  # an untrained one has less than 1


class CrashError(Exception):
    pass


def crash_once(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    original, crashed = Trainer._update, []

    def update(self, batches, meter):
        if self.recipe.name == name and self.step == step and not crashed:
            crashed.append(self.step)
            raise CrashError
        original(self, batches, meter)

    monkeypatch.setattr(Trainer, "_update", update)


@pytest.mark.parametrize("crash_at", [1, 3])
def test_resume_is_exact(folder, whole, monkeypatch, crash_at):
    """Crashes in the middle of both epochs, two updates each."""
    crash_once(monkeypatch, "again", crash_at)
    recipe = load_recipe("boxes.yaml", ["--name=again", MULTI, "--run.save_every=1"])
    with pytest.raises(CrashError):
        train(recipe)
    torch.rand(7)
    train(recipe)
    assert_same(whole, weights("again"))


def test_mkd_by_the_recipes_of_the_made_set(tmp_path, monkeypatch):
    """The shipped recipes, shortened: the teacher is trained first, MKD goes on exactly, the bare student comes out."""
    monkeypatch.chdir(tmp_path)
    write_scenes("scenes", ScenesRecipe(source="digits", images=4, val_images=2, size=64, split="easy"))
    short = {
        "data.root": "scenes", "data.image_size": 64, "data.batch_size": 2, "data.workers": 0, "run.tensorboard": False,
        "student.kwargs.backbone_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
        "student.kwargs.out_channels": 16, "schedule.epochs": 2, "schedule.warmup_epochs": 0.5,
        "run.save_every": 1,
    }  # fmt: skip
    teacher = {**short, "schedule.epochs": 1}
    method = {"teacher.options": teacher, "method.init_args.last_epochs": 1}
    path = RECIPES / "mkd_scenes.yaml"
    train(load_recipe(path, changes={**short, **method, "name": "whole"}))
    crash_once(monkeypatch, "again", step=3)
    recipe = load_recipe(path, changes={**short, **method, "name": "again"})
    with pytest.raises(CrashError):
        train(recipe)
    result = train(recipe)
    assert_same(weights("whole"), weights("again"))
    assert (result["images"], result["updates"]) == (2, 4)
    logged = Path("runs/whole/metrics.csv").read_text()
    assert all(f"train.{name}" in logged for name in ("feat", "classification", "bbox_regression"))
    assert evaluate(["runs/whole"]) == 0  # the network of the recipe takes the weights: nothing of the method is left


def test_the_papers_recipes_are_complete():
    """Student and teacher of one form, so that the neck and head can be inherited."""
    recipe = load_recipe(RECIPES / "mkd_retinanet_resnet18_coco.yaml")
    teacher = teacher_recipe(recipe)
    assert (recipe.student.name, teacher.student.name) == ("detector.retinanet", "detector.retinanet")
    assert recipe.method.init_args["epochs"] == recipe.schedule.epochs == teacher.schedule.epochs == 24
    with torch.device("meta"):  # names and shapes are asked for
        models = [
            build_detector("retinanet", **{**part.student.kwargs, "num_classes": 80}) for part in (recipe, teacher)
        ]
    assert [sorted(model.head.state_dict()) for model in models].count(sorted(models[0].head.state_dict())) == 2
    assert not models[0].backbone.body.layer1[0].conv1.weight.requires_grad


def test_resume_after_sigkill(folder, whole, killed):
    killed("boxes.yaml", MULTI)
    train(load_recipe("boxes.yaml", ["--name=killed", MULTI, "--run.save_every=1000"]))
    assert_same(whole, weights("killed"))


def test_two_processes(folder, capsys):
    """DDP over gloo: pictures without boxes on one of them, each picture tested once, the same scores everywhere."""
    arguments = ["train", "boxes.yaml", "--run.device=cpu", "--name=ddp", "--optim.accumulate=1"]
    ranks = fresh.run_ranks("fastmkd.train.cli", *arguments, folder=folder, timeout=500)
    assert [done.returncode for done in ranks] == [0, 0], [done.stderr[-3000:] for done in ranks]
    result = json.loads((folder / "runs/ddp/result.json").read_text())
    assert (result["images"], result["updates"]) == (5, 4)
    assert evaluate(["runs/ddp"]) == 0
    assert f"mAP {result['map']:.2f} %" in capsys.readouterr().out  # one process says the same
    assert [done.stdout.count("ddp: Supervised") for done in ranks] == [1, 0]


def test_bf16(folder):
    assert train(load_recipe("boxes.yaml", ["--run.precision=bf16", "--schedule.epochs=1"]))["images"] == 5
    assert {value.dtype for value in weights("boxes").values()} == {torch.float32, torch.int64}


def test_what_was_left_out_and_frozen_is_said(folder, capsys):
    change(folder / "set/train.json", annotations=lambda boxes: boxes[0].update(bbox=[3, 3, 0, 0]))
    (folder / "set/train/3.png").write_bytes(b"broken")
    result = train(load_recipe("boxes.yaml", ["--student.kwargs.frozen_stages=1", "--schedule.epochs=1"]))
    said = " ".join(capsys.readouterr().out.split())
    assert "1 boxes have no area inside their picture and were left out, annotation ids 1." in said
    assert "frozen in the student: backbone.body.model.conv1, backbone.body.model.bn1" in said
    assert result["bad_pictures"] == ["set/train/3.png"]


def test_a_batch_that_diverges_is_kept(folder):
    with pytest.raises(UserError, match=r"not finite.*The batch of update \d is in"):
        train(load_recipe("boxes.yaml", ["--optim.lr=1e30", "--optim.clip_grad=null", "--schedule.epochs=4"]))
    (file,) = Path("runs/boxes").glob("bad_batch_*.safetensors")
    batch = load_file(file)
    assert {"images.0", "images.1", "targets.0.boxes", "targets.1.labels", "targets.1.image_id"} <= batch.keys()


def test_a_backbone_from_a_file(folder):
    from timm import create_model

    torch.manual_seed(5)
    classifier = create_model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 16, 16])
    save_file(classifier.state_dict(), "classifier.safetensors")
    setup = assemble(load_recipe("boxes.yaml", ["--student.backbone=classifier.safetensors"]), train)
    own = setup.student.backbone.body.model.layer2[0].conv1.weight
    assert torch.equal(own, classifier.layer2[0].conv1.weight)
    del classifier.layer4
    save_file(classifier.state_dict(), "cut.safetensors")
    recipe = load_recipe("boxes.yaml", ["--student.backbone=cut.safetensors"])
    with pytest.raises(UserError, match=r"do not fit the student's backbone. Keys .* missing: .*layer4"):
        assemble(recipe, train)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--student.name=resnet18", "--student.kwargs={}"],
            r"student\.name is resnet18, a network for classification",
        ),
        (["--student.name=segmenter.pspnet"], "segmenter.pspnet, a network for segmentation, .* detector.retinanet"),
        (["--data.name=digits"], r"detector\.retinanet, a network for detection.*for classification"),
        (["--method=DMAE"], "method DMAE is for classification, but data coco is for detection"),
        (["--augment.mixup=0.5", "--augment.crop=pad"], r"augment\.crop, augment\.mixup is set.*has augment\.flip"),
        (["--student.name=detector.yolo"], "there is no detector 'yolo'"),
        (["--student.kwargs.backbone=resnet19"], "cannot make the student detector.retinanet .* 'resnet19'"),
        (["--student.kwargs.windows=3"], "cannot make the student .*windows"),
        (["--data.root=nowhere"], "data.root is nowhere, which is not a folder"),
    ],
)
def test_what_does_not_fit_is_refused(folder, options, said):
    with pytest.raises(UserError, match=said):
        assemble(load_recipe("boxes.yaml", options), train)


def test_a_detector_that_does_not_return_losses():
    method = Supervised(torch.nn.Identity())
    method.student.forward = lambda images, targets: [{}]
    with pytest.raises(ValueError, match="returned a list, as a detector does in eval mode"):
        method([torch.zeros(3, 8, 8)], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}])
