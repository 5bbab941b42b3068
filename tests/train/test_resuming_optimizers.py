"""A run that goes on from another recipe's checkpoint takes up its moments, and moves as its own recipe says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from fastmkd.train.engine import Trainer, train
from fastmkd.train.recipe import load_recipe


def groups_of_first_update(monkeypatch, *options: str) -> list[dict[str, object]]:
    """Keys of the optimizer's groups behind the first update of a run from runs/first's last checkpoint."""
    seen: list[list[dict[str, object]]] = []
    update = Trainer._update

    def watched(self, *args):
        update(self, *args)
        groups = self.optimizer.param_groups
        seen.append([copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in groups])

    checkpoint = sorted(Path("runs/first/checkpoints").iterdir())[-1]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", watched)
        train(load_recipe("teacher.yaml", ["--schedule.epochs=2", f"--run.resume={checkpoint}", *options]))
    assert len(seen) == 4  # the second epoch alone
    return seen[0]


def test_what_the_recipe_says_wins_over_the_checkpoint(recipes, monkeypatch):
    train(load_recipe("teacher.yaml", ["--name=first", "--optim.layer_decay=0.5"]))
    changed = ["--optim.weight_decay=0.5", "--optim.lr=0.002", "--optim.layer_decay=0.25"]
    adam = ["--optim.kwargs={betas: [0.5, 0.6], eps: 1.0e-4}"]
    found = groups_of_first_update(monkeypatch, *changed, *adam)
    assert {group["weight_decay"] for group in found} == {0.0, 0.5}
    assert {group["betas"] for group in found} == {(0.5, 0.6)}
    assert {group["eps"] for group in found} == {1e-4}
    assert {group["initial_lr"] for group in found} == {0.002}
    assert {group["lr_scale"] for group in found} == {1.0, 0.25, 0.0625}


@pytest.mark.parametrize(
    ("name", "kwargs", "changed"),
    [
        ("sgd", "{momentum: 0.5}", "{momentum: 0.25}"),
        ("lamb", "{betas: [0.5, 0.5]}", "{betas: [0.5, 0.25]}"),  # counts its steps in its groups
        ("muon", "{momentum: 0.5}", "{momentum: 0.25}"),
    ],
)
def test_of_any_optimizer_and_its_own_count_goes_on(recipes, monkeypatch, name, kwargs, changed):
    train(load_recipe("teacher.yaml", ["--name=first", f"--optim.name={name}", f"--optim.kwargs={kwargs}"]))
    same = groups_of_first_update(monkeypatch, f"--optim.name={name}", f"--optim.kwargs={kwargs}", "--name=same")
    other = groups_of_first_update(monkeypatch, f"--optim.name={name}", f"--optim.kwargs={changed}", "--name=other")
    key = changed[1:].partition(":")[0]
    assert {str(group[key]) for group in same} != {str(group[key]) for group in other}
    for mine, theirs in zip(same, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert {k: v for k, v in mine.items() if k != key} == {k: v for k, v in theirs.items() if k != key}
    if name == "lamb":
        assert {int(group["step"]) for group in other} == {5}
