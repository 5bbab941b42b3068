"""Which checkpoint a run goes on from, what happens to the others, and that no test of an epoch is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmkd.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, set_aside
from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe

WEIGHTS = {"method": {"a": torch.arange(9.0)}, "optimizer": {"m": torch.zeros(5)}}


class CrashError(Exception):
    pass


@pytest.fixture
def until(monkeypatch) -> Callable[..., None]:
    """Trains run ``run`` with these options, 4 updates an epoch, until it crashes after so many updates."""
    update = Trainer._update

    def go(step: int, *options: str) -> None:
        def mortal(self, batches, meter):
            if self.step == step:
                raise CrashError
            update(self, batches, meter)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_update", mortal)
            with pytest.raises(CrashError):
                train(recipe(*options))

    return go


def recipe(*options: str):
    return load_recipe("teacher.yaml", ["--name=run", "--schedule.epochs=3", "--run.save_every=1", *options])


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def spoil(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def test_a_damaged_checkpoint_takes_no_place(recipes, until, capsys):
    """It is out of the way at once, so that after two more saves there are two whole ones to go on from."""
    folder = recipes / "runs/run/checkpoints"
    until(5)
    assert visible(folder) == ["step_00000004", "step_00000005"]
    spoil(folder / "step_00000005")
    capsys.readouterr()
    until(7, "--run.log_every=9")
    said = " ".join(capsys.readouterr().out.split())
    assert "step_00000005 is damaged" in said
    assert "were moved to runs/run/checkpoints/aside_00000005" in said
    assert visible(folder) == ["aside_00000005", "step_00000006", "step_00000007"]
    spoil(folder / "step_00000007")
    capsys.readouterr()
    train(recipe())
    assert "going on at update 6" in capsys.readouterr().out
    assert {"aside_00000005", "aside_00000007"} < set(visible(folder))


def test_a_named_checkpoint_is_gone_on_from_once(recipes, until, capsys):
    """The same command again goes on with what came of it, as ``torchrun --max-restarts`` needs."""
    folder = recipes / "runs/run/checkpoints"
    until(11, "--run.keep=20")
    for name in visible(folder):  # thinned out by hand
        if name not in ("step_00000002", "step_00000008", "step_00000010"):
            shutil.rmtree(folder / name)
    named = f"--run.resume={folder / 'step_00000002'}"
    until(4, named)
    kept = ["aside_00000008", "aside_00000010", "step_00000003", "step_00000004"]
    assert visible(folder) == kept  # the named one has gone with run.keep
    capsys.readouterr()
    until(6, named)
    assert "going on at update 4" in capsys.readouterr().out
    until(7)
    assert "going on at update 6" in capsys.readouterr().out
    until(8, named)
    assert "going on at update 7" in capsys.readouterr().out
    # What was left is not lost: naming it goes back to it, once.
    back = f"--run.resume={folder / 'aside_00000008'}"
    until(10, back)
    said = capsys.readouterr().out
    assert "going on at update 8" in said
    assert visible(folder) == [
        "aside_00000007", "aside_00000008", "aside_00000008.2", "aside_00000010", "step_00000009", "step_00000010",
    ]  # fmt: skip
    train(recipe(back))
    assert "going on at update 10" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_sets_all_own_ones_aside(recipes, until, capsys):
    until(3, "--name=other")
    until(6)
    folder, other = recipes / "runs/run/checkpoints", recipes / "runs/other/checkpoints"
    named = f"--run.resume={other / 'step_00000003'}"
    until(4, named)
    assert visible(folder) == ["aside_00000005", "aside_00000006", "step_00000004"]
    assert visible(other) == ["step_00000002", "step_00000003"]
    spoil(folder / "step_00000004")  # nothing of its own is left: from the named one again
    capsys.readouterr()
    until(5, named)
    said = " ".join(capsys.readouterr().out.split())
    assert "going on at update 3" in said
    assert "step_00000004 is damaged" in said
    shutil.rmtree(other / "step_00000003")
    shutil.copytree(other / "step_00000002", other / "step_00000003")  # another checkpoint under the same name
    until(3, named)
    assert "going on at update 2" in capsys.readouterr().out


def test_those_set_aside_never_take_each_others_names(tmp_path):
    for _ in range(3):
        for step in (1, 5):
            save_checkpoint(tmp_path, step, WEIGHTS, {})
        moved = set_aside(tmp_path, tmp_path / "step_00000001")
        assert len(moved) == 1
        assert load_checkpoint(moved[0]).step == 5
    assert visible(tmp_path) == ["aside_00000005", "aside_00000005.2", "aside_00000005.3", "step_00000001"]
    assert newest_checkpoint(tmp_path)[0].step == 1


def test_a_good_one_whose_place_was_being_taken_outlives_its_damaged_successor(tmp_path):
    save_checkpoint(tmp_path, 5, WEIGHTS, {"good": True})
    (tmp_path / "step_00000005").rename(tmp_path / ".step_00000005.old")  # as a killed save leaves it
    shutil.copytree(tmp_path / ".step_00000005.old", tmp_path / "step_00000005")
    spoil(tmp_path / "step_00000005")
    found, _ = newest_checkpoint(tmp_path)
    set_aside(tmp_path, found.path)
    save_checkpoint(tmp_path, 6, WEIGHTS, {})
    assert visible(tmp_path) == ["aside_00000005", "step_00000005", "step_00000006"]
    assert load_checkpoint(tmp_path / "step_00000005").state == {"good": True}


def test_a_folder_that_may_not_be_written_to_is_a_sentence(tmp_path, monkeypatch):
    for step in (1, 5):
        save_checkpoint(tmp_path, step, WEIGHTS, {})

    def denied(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", denied)
    with pytest.raises(UserError, match=r"cannot write .*aside_00000005: Permission denied"):
        set_aside(tmp_path, tmp_path / "step_00000001")


@pytest.mark.parametrize("crash_at", [4, 8, 12])
def test_a_run_that_dies_in_a_test_makes_it_again(taught, finished, monkeypatch, crash_at):
    """The checkpoint of an epoch is written before its test; 12 is the end of the last epoch."""
    original, crashed = Trainer.test, []

    def test(self):
        if self.step == crash_at and not crashed:
            crashed.append(self.step)
            raise CrashError
        return original(self)

    monkeypatch.setattr(Trainer, "test", test)
    again = load_recipe("student.yaml", ["--name=again"], {"run.save_every": 2})
    with pytest.raises(CrashError):
        train(again)
    train(again)
    runs = finished / "runs/whole", Path("runs/again")
    ours, theirs = ([row for row in (run / "metrics.csv").read_text().splitlines() if ",test." in row] for run in runs)
    assert ours == theirs
    assert {row.split(",")[0] for row in ours} == {"4", "8", "12"}
    ours, theirs = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_test_that_is_recorded_is_not_made_again(taught, monkeypatch):
    """Nor is one that run.eval_every leaves out."""
    original, update, tests = Trainer.test, Trainer._update, []

    def mortal(self, batches, meter):
        if self.step in (4, 8) and self.step not in tests:
            tests.append(self.step)
            raise CrashError
        update(self, batches, meter)

    def test(self):
        tests.append(f"test {self.step}")
        return original(self)

    monkeypatch.setattr(Trainer, "_update", mortal)
    monkeypatch.setattr(Trainer, "test", test)
    again = load_recipe("student.yaml", ["--name=again", "--run.eval_every=2"])
    for _ in range(2):
        with pytest.raises(CrashError):
            train(again)
    train(again)
    assert tests == [4, "test 8", 8, "test 12"]
