"""fastmkd finetune and probe: from a finished run to a network for labels, with MAE's defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fastmkd.train.build import open_run, trained_student
from fastmkd.train.cli import main
from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.finetune import DEFAULTS, tuning_recipe
from fastmkd.train.recipe import flatten, load_recipe, recipe_from_dict
from fastmkd.train.rundir import RunDir
from fastmkd.train.schema import Recipe

PAGE = Path(__file__).parents[2] / "docs/finetune.md"
SHORT = ["--schedule.epochs=2", "--schedule.warmup_epochs=0", "--run.tensorboard=false"]
TINY = [
    "--student.name=vit_tiny_patch16_224",
    "--student.kwargs={patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}",
]
CNN = """
name: cnn
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 360}
student: {name: resnet18, kwargs: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}}
schedule: {epochs: 1, warmup_epochs: 0}
run: {tensorboard: false}
"""
DINO = """
name: dino
seed: 4
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 360, image_size: 16}
student: {kwargs: {patch_size: 4, embed_dim: 12, depth: 1, num_heads: 3, dynamic_img_size: true, num_classes: 12}}
method:
  class_path: fastmkd.methods.MaskedDINO
  init_args: {out_features: 16, hidden: 16, bottleneck: 8, local_crops: 2}
schedule: {epochs: 1, warmup_epochs: 0}
augment: {crop: pad, pad: 1, mixup: 0.3, random_erasing: 0.5}
run: {tensorboard: false}
"""


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path("runs") / run / "model.safetensors")


def assert_tests_as_it_was_saved(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The file alone, with timm's names, gives the scores of training."""
    result = json.loads(Path(run, "result.json").read_text())
    capsys.readouterr()
    assert main(["eval", run]) == 0
    said = capsys.readouterr().out
    assert f"top-1 {result['top1']:.2f} %" in said
    assert float(re.search(r"loss (\S+)", said)[1]) == pytest.approx(result["loss"], abs=2e-4)


def test_a_run_is_fine_tuned(taught, capsys):
    train(load_recipe("teacher.yaml"))
    before = weights("teacher")
    assert main(["finetune", "runs/teacher", *SHORT]) == 0
    assert "teacher-finetune: Supervised on digits, 64 training" in capsys.readouterr().out
    after = weights("teacher-finetune")
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before if name != "norm.bias")
    recipe = recipe_from_dict(json.loads(Path("runs/teacher-finetune/recipe.json").read_text())["recipe"])
    assert recipe.student.kwargs["drop_path_rate"] == 0.1
    assert recipe.optim.layer_decay == 0.75
    assert_tests_as_it_was_saved("runs/teacher-finetune", capsys)
    assert main(["finetune", "runs/teacher", *SHORT]) == 0
    assert "finished before" in capsys.readouterr().out
    assert main(["finetune", "runs/teacher", *SHORT, "--data.label_fraction=0.5"]) == 2
    assert "data.label_fraction is None there and 0.5 here" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["teacher", "cnn"])
def test_a_run_is_probed(recipes, capsys, recipe):
    """Batch norm helps the classifier to learn, and is a part of it in the file."""
    Path("cnn.yaml").write_text(CNN)
    train(load_recipe(f"{recipe}.yaml"))
    before = weights(recipe)
    assert main(["probe", f"runs/{recipe}", *SHORT]) == 0
    after = weights(f"{recipe}-probe")
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert changed in (["head.bias", "head.weight"], ["fc.bias", "fc.weight"])
    assert_tests_as_it_was_saved(f"runs/{recipe}-probe", capsys)
    setup = open_run(tuning_recipe("probe", f"runs/{recipe}", SHORT))  # has its batch norm again, which does nothing
    images = torch.randn(3, 1, 8, 8)
    bare, _ = trained_student(RunDir(Path(f"runs/{recipe}-probe")))
    torch.testing.assert_close(setup.student.eval()(images), bare(images))
    assert main(["export", f"runs/{recipe}-probe", "--out=bare.safetensors"]) == 0


def test_a_pre_training_run_whose_classifier_was_never_trained(recipes):
    Path("dino.yaml").write_text(DINO)
    train(load_recipe("dino.yaml"))
    recipe = tuning_recipe("finetune", "runs/dino/", [*SHORT, "--ema.decay=0.9"])
    assert (recipe.name, recipe.run_dir, recipe.seed) == ("dino-finetune", Path("runs/dino-finetune"), 4)
    assert recipe.data == load_recipe("dino.yaml").data
    assert "num_classes" not in recipe.student.kwargs
    assert recipe.student.kwargs["dynamic_img_size"] is True
    assert (recipe.augment.crop, recipe.augment.pad) == ("pad", 1)
    assert (recipe.augment.mixup, recipe.augment.random_erasing) == (0.8, 0)  # of the task, not of the run
    train(recipe)
    assert weights("dino-finetune")["head.weight"].shape == (10, 12)
    probed = train(tuning_recipe("probe", "runs/dino", [*SHORT, "--data.label_fraction=0.5"]))
    assert probed["updates"] == 2 * (30 // 16)


def test_weights_without_a_run(recipes):
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, in_chans=1, img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=3
    )
    save_file(network.state_dict(), "encoder.safetensors")  # as a pre-training leaves it: no classifier at all
    options = [*SHORT, *TINY, "--data.batch_size=64", "--data.limit=128"]
    assert main(["probe", "encoder.safetensors", *options]) == 0
    probed = weights("encoder-probe")
    assert all(torch.equal(value, probed[name]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match=r"does not fit the student.*missing: blocks\.1"):
        train(tuning_recipe("finetune", "encoder.safetensors", [*options, "--student.kwargs.depth=2"]))


@pytest.mark.parametrize("command", ["finetune", "probe"])
def test_an_interrupted_run_goes_on_exactly(recipes, monkeypatch, command):
    """With a moving average, drop path, mixed pictures and running statistics of both kinds."""
    Path("cnn.yaml").write_text(CNN)
    train(load_recipe("cnn.yaml"))
    options = [*SHORT, "--ema.decay=0.9", "--run.save_every=3", "--student.kwargs.drop_path_rate=0.2"]
    train(tuning_recipe(command, "runs/cnn", [*options, "--name=whole"]))
    original, crashed = Trainer._update, []

    def update(self, batches, meter):
        if self.recipe.name == "again" and self.step == 5 and not crashed:
            crashed.append(self.step)
            raise RuntimeError
        original(self, batches, meter)

    monkeypatch.setattr(Trainer, "_update", update)
    recipe = tuning_recipe(command, "runs/cnn", [*options, "--name=again"])
    with pytest.raises(RuntimeError):
        train(recipe)
    train(recipe)
    for file in ("model", "checkpoints/step_00000008/ema", "checkpoints/step_00000008/method"):
        whole, again = (load_file(f"runs/{name}/{file}.safetensors") for name in ("whole", "again"))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    raw = load_file("runs/whole/checkpoints/step_00000008/method.safetensors")
    average = load_file("runs/whole/checkpoints/step_00000008/ema.safetensors")
    moved = [name for name in average if not torch.equal(average[name], raw[f"student.{name}"])]
    assert any(name.endswith("running_var") for name in moved)
    assert not any(name.endswith("num_batches_tracked") for name in moved)


@pytest.mark.parametrize("command", ["finetune", "probe"])
def test_the_page_tells_the_defaults(command):
    """Each default stands in the table, in the command's column."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if "|" in line]
    column = {"finetune": 1, "probe": 2}[command]
    table = {row[0]: row[column].split(" ")[0] for row in rows if len(row) == 4}
    defaults = flatten(DEFAULTS[command])
    defaults.pop("method.class_path")
    for key, value in defaults.items():
        said = table[f"`{key}`"]
        assert said == str(value).lower() or float(said) == value, key


def test_a_file_of_keys_wins_over_the_defaults_and_options_over_both(taught):
    train(load_recipe("teacher.yaml"))
    Path("mine.yaml").write_text("optim: {lr: 0.5, layer_decay: 0.6}\nschedule: {warmup_epochs: 1}\n")
    recipe = tuning_recipe("finetune", "runs/teacher", ["--config=mine.yaml", "--optim.lr=0.25"])
    assert (recipe.optim.lr, recipe.optim.layer_decay, recipe.schedule.warmup_epochs) == (0.25, 0.6, 1)
    assert (recipe.optim.lr_images, recipe.schedule.epochs, recipe.data.limit) == (256, 100, 64)
    probe = tuning_recipe("probe", "runs/teacher", ["--method.init_args.batch_norm=false", "--optim.name=lars"])
    assert probe.method.init_args == {"linear_probe": True, "batch_norm": False}
    assert "drop_path_rate" not in probe.student.kwargs
    assert tuning_recipe("finetune", "runs/teacher", ["--student.kwargs.drop_path_rate=0"]).student.kwargs == {
        "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 3, "drop_path_rate": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("command", "usual", "short"), [("finetune", 5.0, 0.2), ("probe", 10.0, 4 / 9)])
def test_the_default_warm_up_gives_way_to_a_short_training(command, usual, short):
    """And only then: runs that had the usual one keep it."""

    def warmup(*options: str) -> float:
        return tuning_recipe(command, Recipe(), list(options)).schedule.warmup_epochs

    assert warmup() == warmup("--schedule.epochs=10") == usual
    assert warmup("--schedule.epochs=4") == pytest.approx(short)
    assert warmup("--schedule.epochs=4", "--schedule.warmup_epochs=3") == 3
    with pytest.raises(UserError, match=r"schedule\.warmup_epochs is 5.0; expected a number from 0 to 4"):
        warmup("--schedule.epochs=4", "--schedule.warmup_epochs=5")


MISTAKES = [
    (["--seed=1"], "the run must come before --seed=1"),
    (["runs/nothing"], "runs/nothing does not exist"),
    (["teacher.yaml"], "teacher.yaml is a recipe; train it"),
    (["."], "is not the folder of a run"),
    (["runs/begun"], "runs/begun has not finished"),
    (["runs/teacher/model.safetensors"], "student.name is not given"),
    (["runs/teacher", "--schedule.epochs=3", "--schedule.warmup_epochs=4"], "schedule.warmup_epochs is 4.0"),
    (["runs/teacher", "--schedule.epoch=3"], "did you mean --schedule.epochs?"),
    (["runs/teacher", "--data.label_fraction=0"], "data.label_fraction is 0.0; expected"),
    (["runs/teacher", "--data.label_fraction=1.5"], "data.label_fraction is 1.5; expected"),
    (["runs/teacher", "--data.limit=5", "--data.label_fraction=0.5"], "takes 1 of the 5 training pictures"),
    (["runs/teacher", "--data.label_fraction=0.2"], "one update takes 16 pictures"),
    (["runs/teacher", "--student.kwargs.embed_dim=24"], "do not fit the student"),
    (["runs/teacher", "--optim.lrr=1"], "optim.lrr"),
]


@pytest.mark.parametrize("command", ["finetune", "probe"])
def test_mistakes_are_one_sentence(taught, capsys, command):
    train(load_recipe("teacher.yaml"))
    Path("runs/begun").mkdir()
    Path("runs/begun/recipe.json").write_text(Path("runs/teacher/recipe.json").read_text())
    for arguments, said in MISTAKES:
        capsys.readouterr()
        assert main([command, *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1, error


def test_help_shows_the_defaults(capsys):
    assert main(["probe", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: fastmkd probe RUN|WEIGHTS" in said
    assert re.search(r"--optim\.name[^)]*default:\s+sgd\)", said)
    assert main(["finetune"]) == 2
