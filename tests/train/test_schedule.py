"""The learning rate of every update: timm's cosine to the bit, steps, and a rate of its own for the last epochs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from torch import nn

from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.optim import Schedule
from fastmkd.train.recipe import load_recipe
from fastmkd.train.schema import ScheduleRecipe

RECIPES = Path(__file__).parents[2] / "recipes"


def rates(recipe: ScheduleRecipe, lr: float, per_epoch: int, scale: float | None = None) -> list[float]:
    """What an optimizer is told before each update."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=lr)
    if scale is not None:
        optimizer.param_groups[0]["lr_scale"] = scale
    schedule, found = Schedule(recipe, optimizer, per_epoch), []
    for update in range(recipe.epochs * per_epoch):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("warmup", [0, 0.3, 2])
def test_the_cosine_is_timms_to_the_bit(warmup):
    """Runs that began with timm's scheduler go on with the same rates."""
    recipe, per_epoch = ScheduleRecipe(epochs=7, warmup_epochs=warmup, warmup_lr=1e-6, min_lr=1e-5), 13
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.3)
    count = round(warmup * per_epoch)
    theirs = CosineLRScheduler(
        optimizer, 7 * per_epoch - count, lr_min=1e-5, warmup_t=count, warmup_lr_init=1e-6, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
    expected = []
    for update in range(7 * per_epoch):
        theirs.step_update(update)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(recipe, 0.3, per_epoch) == expected


def test_no_rate_is_above_the_one_that_was_asked_for():
    """Both defaults may be: they are made for training, and a rate of 1e-7 is one for a last touch."""
    found = rates(ScheduleRecipe(epochs=4, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5), 1e-7, 5)
    assert found == [1e-7] * 20
    found = rates(ScheduleRecipe(epochs=4, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5), 5e-6, 5)
    assert found[0] == 1e-6
    assert found[5:] == pytest.approx([5e-6] * 15)


def test_steps_by_hand():
    recipe = ScheduleRecipe(epochs=4, warmup_epochs=0.5, warmup_lr=0.2, milestones=[1, 2.5], gamma=0.5)
    assert rates(recipe, 1.0, 4) == pytest.approx([0.2, 0.6, 1, 1, *[0.5] * 6, *[0.25] * 6], abs=1e-15)
    assert rates(recipe, 1.0, 4, scale=0.5)[:5] == pytest.approx([0.1, 0.3, 0.5, 0.5, 0.25], abs=1e-15)


def test_the_cosine_ends_where_the_last_epochs_begin():
    whole = rates(ScheduleRecipe(epochs=3, warmup_epochs=1), 1.0, 10)
    found = rates(ScheduleRecipe(epochs=5, warmup_epochs=1, last_lr=0.125, last_epochs=2), 1.0, 10)
    assert found == [*whole, *[0.125] * 20]


@pytest.mark.parametrize(
    ("name", "lr", "expected"),
    [
        ("mkd_retinanet_resnet18_coco", 0.01, {0: 0.01, 15: 0.01, 16: 1e-3, 20: 1e-3, 21: 1e-4, 22: 1e-3, 23: 1e-3}),
        ("retinanet_resnet101_coco", 0.01, {0: 0.01, 15: 0.01, 16: 1e-3, 20: 1e-3, 21: 1e-4, 23: 1e-4}),
        ("dpk_resnet18_imagenet", 0.1, {0: 0.1, 24: 0.1, 25: 0.05, 50: 0.025, 75: 0.0125, 99: 0.0125}),
    ],
)
def test_the_papers_schedules(name, lr, expected):
    """At the end of each epoch, behind the warm-up."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.optim.lr == lr
    found = rates(recipe.schedule, lr, 100)
    for epoch, rate in expected.items():
        assert found[100 * epoch + 99] == pytest.approx(rate, rel=1e-12), epoch
    if recipe.schedule.last_lr is not None:
        assert recipe.method.init_args["last_epochs"] == recipe.schedule.last_epochs


STEPS = [
    "--name=whole", "--schedule.epochs=3", "--schedule.milestones=[1]", "--schedule.gamma=0.5",
    "--schedule.last_lr=0.01", "--schedule.last_epochs=1", "--optim.lr=0.04", "--optim.name=sgd",
    "--run.save_every=1", "--run.log_every=1",
]  # fmt: skip


def logged(name: str) -> dict[int, float]:
    with Path(f"runs/{name}/metrics.csv").open() as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["name"] == "lr"}


def test_a_run_follows_it_and_goes_on_with_it(recipes, monkeypatch):
    """Four updates an epoch; the run stops before the seventh, in the epoch between both steps."""
    train(load_recipe("teacher.yaml", STEPS))
    assert list(logged("whole").values()) == [0.04] * 4 + [0.02] * 4 + [0.01] * 4
    original = Trainer._update

    def stop(self, batches, meter):
        if self.step == 6:
            raise KeyboardInterrupt
        original(self, batches, meter)

    again = load_recipe("teacher.yaml", [*STEPS, "--name=again"])
    monkeypatch.setattr(Trainer, "_update", stop)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.setattr(Trainer, "_update", original)
    train(again)
    assert logged("again") == logged("whole")
    ours, theirs = (load_file(f"runs/{name}/model.safetensors") for name in ("again", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--schedule.milestones=[16, 12]"], r"milestones is \[16.0, 12.0\]; expected epochs in rising order"),
        (["--schedule.milestones=[16, 20]"], r"expected epochs in rising order, above 0 and below 20"),
        (["--schedule.milestones=[0, 3]"], "above 0"),
        (["--schedule.gamma=2", "--schedule.milestones=[3]"], "schedule.gamma is 2.0; expected a number from 0 to 1"),
        (["--schedule.last_lr=-1"], "schedule.last_lr is -1"),
        (["--schedule.last_lr=0.1", "--schedule.last_epochs=21"], "last_epochs is 21.0; .* at most 20"),
        (["--schedule.last_lr=0.1", "--schedule.last_epochs=0"], "last_epochs is 0"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(UserError, match=said):
        load_recipe(options=options)
