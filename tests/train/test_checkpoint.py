"""Checkpoints: complete or not there, and never silently wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastmkd.train import checkpoint as module
from fastmkd.train.checkpoint import (
    atomic_write,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_tensors,
)
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import identity
from fastmkd.train.rundir import RunDir
from fastmkd.train.schema import DataRecipe, Recipe

WEIGHTS = {"method": {"a": torch.arange(100.0), "b": torch.ones(3, 2).t()}, "optimizer": {"m": torch.zeros(5)}}


def test_round_trip_and_keep(tmp_path):
    for step in (3, 20, 100):
        save_checkpoint(tmp_path, step, WEIGHTS, {"lr": 0.1, "none": None}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000100"]
    found, problems = newest_checkpoint(tmp_path)
    assert not problems
    assert found is not None
    assert (found.step, found.state) == (100, {"lr": 0.1, "none": None})
    for file, tensors in WEIGHTS.items():
        for name, value in tensors.items():
            assert torch.equal(found.tensors[file][name], value)
    assert newest_checkpoint(tmp_path / "none") == (None, [])


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("file", "harm"),
    [(f"{name}.safetensors", harm) for name in WEIGHTS for harm in (cut, change, remove)]
    + [("state.json", cut), ("state.json", remove)],
)
def test_damage_is_said_and_the_older_one_is_taken(tmp_path, file, harm):
    save_checkpoint(tmp_path, 1, WEIGHTS, {})
    newest = save_checkpoint(tmp_path, 2, WEIGHTS, {})
    harm(newest / file)
    with pytest.raises(UserError, match=r"damaged|is not a checkpoint"):
        load_checkpoint(newest)
    found, problems = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(problems) == 1
    assert str(newest) in problems[0]
    harm(tmp_path / "step_00000001" / "method.safetensors")
    with pytest.raises(UserError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)


def test_other_format_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, WEIGHTS, {})
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)


def test_a_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, WEIGHTS, {})
    calls = []

    def fails_at_the_second_file(path, tensors, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr(module, "_write_tensors", fails_at_the_second_file)
    with pytest.raises(UserError, match="No space"):
        save_checkpoint(tmp_path, 2, WEIGHTS, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    # A killed process cannot clean up: what it left is never taken for a checkpoint, and goes with the next save.
    (tmp_path / ".step_00000002.dead.part").mkdir()
    assert newest_checkpoint(tmp_path)[0].step == 1
    save_checkpoint(tmp_path, 3, WEIGHTS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def fails(part):
        part.write_bytes(b"half")
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        atomic_write(path, fails)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_tied_weights_can_be_saved(tmp_path):
    shared = torch.ones(4)
    save_tensors(tmp_path / "a.safetensors", {"x": shared, "y": shared[1:]})
    assert (tmp_path / "a.safetensors").is_file()


def described(batch_size=8, recipe=None):
    """What a run says of itself in its folder."""
    recipe = recipe or Recipe(data=DataRecipe(batch_size=batch_size))
    data = {"name": "digits", "classes": ["0", "1"], "channels": 1, "image_size": 8, "mean": [0.5], "std": [0.5]}
    content = {"recipe": dataclasses.asdict(recipe), "student": {"name": "vit", "kwargs": {}}, "data": data}
    return json.loads(json.dumps(content))  # JSON has no tuples


def test_run_folder_of_another_recipe_is_refused(tmp_path):
    run = RunDir(tmp_path / "run")
    run.claim({"seed": 1, "optim.lr": 0.1}, described())
    run.claim({"seed": 1, "optim.lr": 0.1}, described())
    with pytest.raises(UserError, match=r"another recipe: optim.lr is 0.1 there and 0.2 here"):
        run.claim({"seed": 1, "optim.lr": 0.2}, {})
    (run.path / "recipe.json").write_text('{"identity": {"se')
    with pytest.raises(UserError, match=r"recipe\.json is damaged"):
        run.claim({"seed": 1}, {})


def test_a_run_that_has_not_finished_may_split_its_updates_otherwise(tmp_path):
    run, old, new = RunDir(tmp_path), {"seed": 1, "data.batch_size": 8}, {"seed": 1, "data.batch_size": 16}
    run.claim(old, described(8))
    run.claim(new, described(16))
    assert run.description() == {"identity": old, **described(8)}  # until a checkpoint has been taken up
    with pytest.raises(UserError, match=r"another recipe: seed is 1 there and 2 here\. "):
        run.claim({**new, "seed": 2}, {})
    assert run.restate(old, {}) == ""
    assert run.restate(new, described(16)) == "data.batch_size is 8 there and 16 here"
    assert run.description() == {"identity": new, **described(16)}
    run.weights.touch()
    run.finish({"top1": 50.0})
    run.claim(new, {})
    with pytest.raises(UserError, match=r"data\.batch_size is 16 there and 8 here"):
        run.claim(old, {})


def test_a_run_older_than_a_key_has_its_default(tmp_path):
    recipe = Recipe(seed=1)
    run, known = RunDir(tmp_path / "run"), identity(recipe)
    before = {key: value for key, value in known.items() if key != "augment.mix_prob"}
    run.claim(before, described(recipe=recipe))
    run.claim(known, {})
    with pytest.raises(UserError, match=r"augment\.mix_prob is 1\.0 there and 0\.5 here"):
        run.claim({**known, "augment.mix_prob": 0.5}, {})


def test_run_folder_in_use_is_refused(tmp_path):
    run = RunDir(tmp_path)
    with run.lock(), pytest.raises(UserError, match=r"process \d+ on .* trains in"):
        run.lock()
    run.lock().close()
