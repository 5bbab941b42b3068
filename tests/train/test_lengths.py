"""What a method is told of the training's length is what the schedule says, and one that says otherwise is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastmkd.methods import DistillMethod
from fastmkd.train.build import assemble
from fastmkd.train.cli import main
from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import identity, load_recipe, recipe_from_dict

RECIPES = Path(__file__).parents[2] / "recipes"
MOCO = """
name: moco
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 360}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3}}
method: {class_path: fastmkd.methods.MoCoV3, init_args: {hidden: 16, out_features: 8}}
schedule: {epochs: 2, warmup_epochs: 0}
run: {tensorboard: false, panels: 0}
"""
TAUGHT = ["--teacher={recipe: teacher.yaml}", "--method.init_args.teacher_layer=1"]


@pytest.fixture
def moco(recipes: Path) -> Path:
    (recipes / "moco.yaml").write_text(MOCO)
    return recipes


def lengths(*options: str, name: str = "mkd_cnn_fashion_mnist") -> tuple[object, object]:
    arguments = load_recipe(RECIPES / f"{name}.yaml", options).method.init_args
    return arguments["epochs"], arguments["last_epochs"]


def test_epochs_left_out_are_the_schedules():
    assert lengths() == (8, 2)
    assert lengths("--schedule.epochs=200") == (200, 2)
    assert lengths("--schedule.epochs=200", "--method.epochs=200") == (200, 2)
    assert lengths("--method.last_epochs=1", "--schedule.epochs=2") == (2, 1)


def test_so_are_the_last_epochs_where_they_have_a_rate_of_their_own():
    name = "mkd_resnet18_imagenet"
    assert lengths("--schedule.epochs=200", name=name) == (200, 2)
    assert lengths("--schedule.last_epochs=5", name=name) == (100, 5)
    assert type(lengths(name=name)[1]) is int
    assert lengths("--schedule.last_epochs=5", "--schedule.last_lr=null", name=name) == (100, 2)


def test_null_that_was_given_stays_null():
    assert lengths("--method.epochs=null", "--schedule.epochs=1") == (None, 2)
    assert lengths("--method.epochs=null", "--schedule.last_epochs=7", name="mkd_resnet18_imagenet")[0] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method.epochs=100"], r"method\.epochs is 100, but schedule\.epochs is 8; leave method\.epochs out"),
        (
            ["--schedule.last_lr=0.1", "--schedule.last_epochs=3"],
            r"method\.last_epochs is 2, but schedule\.last_lr is for the last 3 epochs",
        ),
        (["--schedule.epochs=2"], r"schedule\.epochs is 2, and the last 2 epochs .* leaves none before them"),
    ],
)
def test_a_recipe_that_says_otherwise_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        load_recipe(RECIPES / "mkd_cnn_fashion_mnist.yaml", options)


@pytest.mark.parametrize("path", sorted((RECIPES / "evidence").glob("mkd*/student.yaml")), ids=lambda p: p.parent.name)
def test_the_studies_recipes_still_say_it_themselves(path):
    """Their records hold every key of the recipe."""
    assert load_recipe(path).method.init_args["epochs"] == load_recipe(path).schedule.epochs


def test_updates_left_out_are_those_of_the_run(moco, monkeypatch):
    seen = []
    update = Trainer._update

    def watched(self, *args):
        seen.append(float(self.setup.method.current_momentum()))
        update(self, *args)

    monkeypatch.setattr(Trainer, "_update", watched)
    assert train(load_recipe("moco.yaml"))["updates"] == 8
    assert seen[0] == pytest.approx(0.99)
    assert seen == sorted(seen)
    assert 0.999 < seen[-1] < 1  # a run of 4,680 would be at 0.99
    seen.clear()
    train(load_recipe("moco.yaml", ["--method.total_updates=8", "--name=said"]))
    assert len(set(seen)) == 8
    seen.clear()
    train(load_recipe("moco.yaml", ["--method.total_updates=null", "--name=constant"]))
    assert len(set(seen)) == 1


def test_another_number_is_refused_before_the_teacher_is_trained(moco, monkeypatch):
    def begin(recipe):
        raise AssertionError("the teacher's training has begun")

    recipe = load_recipe("moco.yaml", [*TAUGHT, "--method.total_updates=9"])
    with pytest.raises(UserError, match=r"method\.total_updates is 9, but the run has 8 updates, in 2 epochs; leave"):
        assemble(recipe, begin)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of torchrun
    with pytest.raises(UserError, match="but the run has 4 updates"):
        assemble(recipe, begin)


def test_another_number_is_refused_without_a_teacher_too(moco):
    with pytest.raises(UserError, match=r"method\.total_updates is 9, but the run has 8 updates"):
        train(load_recipe("moco.yaml", ["--method.total_updates=9"]))


def test_left_out_is_not_null_to_a_run(moco, capsys):
    """A run that went with a constant momentum is not gone on with by a recipe that leaves the number to the run."""
    left_out, null = load_recipe("moco.yaml"), load_recipe("moco.yaml", ["--method.total_updates=null"])
    assert identity(left_out) != identity(null)
    again = recipe_from_dict(json.loads(json.dumps(dataclasses.asdict(left_out), default=str)))
    assert identity(again) == identity(left_out)
    train(left_out)
    assert train(left_out)["updates"] == 8
    assert main(["eval", "runs/moco"]) == 0
    with pytest.raises(UserError, match="total_updates is 'as the run' there and None here"):
        train(null)


def test_a_method_of_ones_own_says_which_arguments_these_are(monkeypatch):
    assert DistillMethod.lengths == {}
    from fastmkd import Supervised

    monkeypatch.setattr(Supervised, "lengths", {"linear_probe": "epochs"})
    assert load_recipe(options=["--schedule.epochs=7"]).method.init_args["linear_probe"] == 7
