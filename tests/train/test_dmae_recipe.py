"""MAE and DMAE by recipe: judged by their loss, resumed to the bit, shown with the decoder, exported as a bare ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastmkd.train.cli import main
from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe

MAE = """
name: mae
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 100}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3}}
method:
  class_path: fastmkd.DMAE
  init_args: {decoder_depth: 1, decoder_width: 8, decoder_heads: 2}
optim: {kwargs: {betas: [0.9, 0.95]}}
schedule: {epochs: 2, warmup_epochs: 0}
augment: {crop: pad, pad: 1}
run: {tensorboard: false, log_every: 1}
"""
DMAE = MAE.replace("name: mae\n", "name: dmae\n").replace(
    "method:", "teacher: {recipe: mae.yaml, options: {student.kwargs.depth: 3, schedule.epochs: 1}}\nmethod:"
)
TUNED = ["--schedule.epochs=1", "--schedule.warmup_epochs=0", "--run.tensorboard=false"]
SHAPE = {"patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3, "in_chans": 1, "img_size": 8}


@pytest.fixture
def dmae(recipes: Path) -> Path:
    (recipes / "mae.yaml").write_text(MAE)
    (recipes / "dmae.yaml").write_text(DMAE)
    return recipes


def column(folder: Path, name: str) -> list[float]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [float(value) for _, _, found, value in rows if found == name]


def test_train_eval_show_export(dmae, capsys):
    assert main(["train", "dmae.yaml"]) == 0
    said = capsys.readouterr().out
    assert said.index("mae: DMAE") < said.index("dmae: DMAE")
    assert "test loss" in said
    assert "top-1" not in said
    run = dmae / "runs/dmae"
    assert len(column(run, "train.mae")) == len(column(run, "train.align")) == 8
    tested = column(run, "test.loss")
    assert len(tested) == 2
    assert tested[1] == pytest.approx(column(run, "test.mae")[1] + column(run, "test.align")[1], rel=1e-6)

    assert main(["train", "dmae.yaml"]) == 0
    assert f"finished before, in runs/dmae (loss {tested[1]:.4f})" in capsys.readouterr().out.replace("\n", "")
    assert main(["eval", "runs/dmae"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"loss {tested[1]:.4f}  mae ")
    assert "on 359 pictures" in said
    assert "top-1" not in said
    assert main(["eval", "runs/mae"]) == 0
    assert "align" not in capsys.readouterr().out

    assert main(["show", "runs/dmae", "--out", "sheet.png", "--count", "3"]) == 0
    assert main(["show", "runs/dmae", "--over-training", "--out", "over.png"]) == 0
    assert (dmae / "over.png").stat().st_size > 10_000

    assert main(["export", "runs/dmae", "--out", "bare.safetensors"]) == 0
    student = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE)
    student.load_state_dict(load_file("bare.safetensors"))
    heads = load_file(run / "heads.safetensors")
    assert "decoder.mask_token" in heads
    assert "project.0.2.weight" in heads

    short = [
        "--schedule.epochs=1",
        "--schedule.warmup_epochs=0",
        "--data.label_fraction=0.5",
        "--run.tensorboard=false",
    ]
    for command, options in (("finetune", ["--ema.decay=0.9"]), ("probe", [])):
        assert main([command, "runs/dmae", *short, *options]) == 0
        assert "top-1" in capsys.readouterr().out


def test_other_weights_are_evaluated(dmae, capsys):
    main(["train", "mae.yaml"])
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE).state_dict(), "fresh.pth")
    capsys.readouterr()
    main(["eval", "runs/mae"])
    main(["eval", "runs/mae", "--weights", "fresh.pth"])
    losses = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert len(set(losses)) == 2


def test_the_loss_that_is_shown_is_that_of_the_pictures(dmae):
    """Once more by hand, on batches of the plan, with the masks of the seed."""
    from fastmkd.train.augment import Finisher
    from fastmkd.train.build import open_run
    from fastmkd.train.seeds import seed_all

    recipe = load_recipe("mae.yaml")
    result = train(recipe)
    setup = open_run(recipe)
    test, total = setup.source.test, 0.0
    finish = Finisher(setup.source.mean, setup.source.std, 10)
    for number, index in enumerate(torch.arange(len(test.labels)).split(100)):
        seed_all(recipe.seed, "test", number, 0)
        out = setup.method.eval()(finish(test.images[index], test.labels[index])[0])
        total += out.loss.item() * len(index)
    assert result["loss"] == pytest.approx(total / 359, rel=1e-5)
    assert result["images"] == 359


def test_resume_is_exact(dmae, monkeypatch):
    original, crashed = Trainer._update, []

    def update(self, batches, meter):
        if self.recipe.name == "again" and self.step == 6 and not crashed:
            crashed.append(self.step)
            raise RuntimeError("crash")
        original(self, batches, meter)

    whole = train(load_recipe("dmae.yaml", ["--name=whole", "--run.save_every=2"]))
    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(RuntimeError, match="crash"):
        train(load_recipe("dmae.yaml", ["--name=again", "--run.save_every=2"]))
    again = train(load_recipe("dmae.yaml", ["--name=again", "--run.save_every=2"]))
    for file in ("model", "heads"):
        states = [load_file(dmae / f"runs/{name}/{file}.safetensors") for name in ("whole", "again")]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert whole["loss"] == again["loss"]


def test_a_pretrained_backbone_is_fine_tuned(dmae):
    train(load_recipe("mae.yaml"))
    options = [
        "--name=tuned",
        "--method=Supervised",
        "--student.backbone=runs/mae/model.safetensors",
        "--ema.decay=0.9",
    ]
    assert "top1" in train(load_recipe("teacher.yaml", [*options, "--student.kwargs.depth=2"]))


def test_moving_averages_are_for_fine_tuning(dmae):
    with pytest.raises(UserError, match="ema averages a student for its tests, and DMAE"):
        train(load_recipe("mae.yaml", ["--ema.decay=0.9"]))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--method.init_args.mask_ratio=0.001", "leaves no hidden patch of the 16"),
        ("--method.init_args.teacher_layer=4", "the teacher has 3 blocks"),
        ("--student.kwargs.patch_size=4", r"patch_size=2"),
        ("--method.init_args.head=mlp9", "mlp9"),
    ],
)
def test_mistakes_are_a_sentence(dmae, option, said):
    with pytest.raises(UserError, match=said):
        train(load_recipe("dmae.yaml", [option]))


def test_several_layers_and_options_by_key(dmae):
    keys = {"student_layer": "[1, 2]", "head": "linear", "loss": "l2", "normalize": "true", "normalize_target": "true"}
    options = [f"--method.init_args.{key}={value}" for key, value in keys.items()]
    train(load_recipe("dmae.yaml", [*options, "--schedule.epochs=1"]))
    assert len(column(dmae / "runs/dmae", "train.align.2")) == 4


def test_the_batch_that_broke_the_loss_is_kept(dmae, monkeypatch):
    seen, original = [], Trainer.finished

    def finished(self, batch, step, micro):
        images, targets = original(self, batch, step, micro)
        if step == 5:
            seen.append(images.clone())
            images[0, 0, 0, 0] = torch.nan
        return images, targets

    monkeypatch.setattr(Trainer, "finished", finished)
    options = ["--run.log_every=100", "--method.init_args.mask_ratio=0.94"]
    with pytest.raises(UserError, match=r"not finite .*The batch of update 6 is in runs/mae/bad_batch_0\.safetensors"):
        train(load_recipe("mae.yaml", options))
    kept = load_file(dmae / "runs/mae/bad_batch_0.safetensors")
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])  # made again, shifts included
    assert kept["images"].isnan().sum() == 1
    assert torch.equal(kept["images"].nan_to_num(seen[0][0, 0, 0, 0].item()), seen[0])
    assert kept["targets"].shape == (16,)


@pytest.mark.parametrize(("name", "term"), [("dmae_dino_fashion_mnist", "dino"), ("dmae_moco_fashion_mnist", "moco")])
def test_on_dino_and_moco_v3(dmae, capsys, name, term):
    """The shipped recipes (DMAE, Section 4.8), on few pictures that are always there: with and without alignment."""
    short = {"data.name": "digits", "data.image_size": 28, "data.batch_size": 16, "data.limit": 32,
             "data.test_fraction": 0.02, "schedule.epochs": 1, "schedule.warmup_epochs": 0,
             "run.tensorboard": False, "run.panels": 0}  # fmt: skip
    path = Path(__file__).parents[2] / f"recipes/{name}.yaml"
    options = {**load_recipe(path).teacher.options, **short, "student.kwargs.depth": 4}
    changes = {**short, "method.init_args.hidden": 16}
    result = train(load_recipe(path, changes={**changes, "teacher.options": options}))
    assert {"loss", term, "align"} <= result.keys()
    assert len(column(dmae / f"runs/{name}", "train.align")) == 1  # logged at the end of the epoch
    assert result["loss"] == pytest.approx(result[term] + result["align"], rel=1e-5)
    alone = train(load_recipe(path, changes={**changes, "name": "alone", "teacher": None}))
    assert "align" not in alone
    bare = load_file(dmae / f"runs/{name}/model.safetensors")
    assert bare.keys() == load_file(dmae / "runs/alone/model.safetensors").keys()
    assert main(["eval", f"runs/{name}"]) == 0
    assert f" {term} " in capsys.readouterr().out
    assert main(["probe", f"runs/{name}", *TUNED]) == 0


SHIPPED = ["mae_digits", "mae_fashion_mnist", "dmae_digits", "dmae_fashion_mnist", "dmae_vit_base_imagenet"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_recipes(dmae, name):
    path = Path(__file__).parents[2] / f"recipes/{name}.yaml"
    recipe = load_recipe(path)
    assert recipe.name == name
    assert (recipe.teacher is None) is name.startswith("mae")
    if name == "dmae_digits":
        short = {"data.limit": 64, "schedule.epochs": 1, "schedule.warmup_epochs": 0, "run.tensorboard": False}
        teacher = {**recipe.teacher.options, **short}
        result = train(load_recipe(path, changes={**short, "teacher.options": teacher}))
        assert {"loss", "mae", "align"} <= result.keys()
        assert (dmae / "runs/mae_teacher_digits/heads.safetensors").is_file()
