"""Panels over training: what is kept is what the method showed then, it survives crashes, and it disturbs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmkd.methods import Panel
from fastmkd.train.build import assemble
from fastmkd.train.checkpoint import load_checkpoint
from fastmkd.train.cli import main
from fastmkd.train.engine import Trainer, train
from fastmkd.train.over_training import Snapshot, figure_over_training, read_snapshots
from fastmkd.train.recipe import load_recipe
from fastmkd.train.rundir import RunDir


def panels(run: str) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in Path("runs", run, "panels").iterdir()}


def test_panels_are_what_the_method_showed_at_that_epoch(taught):
    recipe = load_recipe("student.yaml", ["--run.keep=9"])
    train(recipe)
    snapshots = read_snapshots(RunDir(Path("runs/student")))
    assert [snapshot.epoch for snapshot in snapshots] == [0, 1, 2, 3]
    setup = assemble(recipe, train)
    source, method = setup.source, setup.method.eval()
    for snapshot in snapshots:
        if snapshot.epoch:  # four updates an epoch
            folder = Path(f"runs/student/checkpoints/step_{4 * snapshot.epoch:08d}")
            method.load_state_dict(load_checkpoint(folder).tensors["method"])
        image, saliency, kept = snapshot.panels
        assert [panel.title for panel in snapshot.panels] == ["input", "saliency", "kept patches"]
        assert snapshot.targets.tolist() == list(range(8)), "the classes take turns"
        pixels = (255 * image.image).round().to(torch.uint8)
        test_pictures = source.test.images.flatten(1).tolist()
        assert all(picture.tolist() in test_pictures for picture in pixels.flatten(1))
        shown = method.pictures((image.image - source.mean[0]) / source.std[0])
        torch.testing.assert_close(saliency.image, shown[1].image, atol=2e-3, rtol=0)
        assert torch.equal(kept.image, shown[2].image)
        assert kept.image.flatten(1).mean(1).tolist() == [0.5] * 8
    assert not torch.equal(snapshots[0].panels[1].image, snapshots[-1].panels[1].image)


def test_they_change_nothing_and_survive_a_crash(taught, monkeypatch):
    train(load_recipe("student.yaml", ["--name=without", "--run.panels=0"]))
    assert not Path("runs/without/panels").exists()
    train(load_recipe("student.yaml", ["--name=whole"]))
    ours, theirs = (load_file(f"runs/{name}/model.safetensors") for name in ("whole", "without"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    original = Trainer.test

    def test(self):  # right after the checkpoint of the second epoch
        if self.step == 8 and not Path("crashed").exists():
            Path("crashed").touch()
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "test", test)
    recipe = load_recipe("student.yaml", ["--name=again"])
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert sorted(panels("again")) == ["epoch_000000.safetensors", "epoch_000001.safetensors"]
    train(recipe)
    again, whole = panels("again"), panels("whole")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name][key], whole[name][key]) for name in whole for key in whole[name])


def test_the_figure_has_a_row_per_picture_and_panel_and_a_column_per_epoch():
    def snapshot(epoch: int) -> Snapshot:
        saliency = torch.full((2, 4, 4), epoch / 10)
        kept = torch.zeros(2, 4, 4)
        kept[:, :, : epoch // 2] = 1
        pixels = Panel("input", torch.full((2, 1, 4, 4), 0.25), "image")
        shown = [Panel("saliency", saliency, "heat"), Panel("kept patches", kept, "mask")]
        return Snapshot(epoch, [pixels, *shown], torch.tensor([1, 0]))

    figure = figure_over_training([snapshot(epoch) for epoch in (0, 4, 8)], ["cat", "dog"], 5, "run")
    cells = [figure.axes[i : i + 4] for i in range(0, 16, 4)]
    assert [row[0].get_title() for row in cells] == ["dog", "", "cat", ""]
    assert [cell.get_title() for cell in cells[0]] == ["dog", "untrained", "epoch 4", "epoch 8"]
    assert [row[1].get_ylabel() for row in cells] == ["saliency", "kept patches"] * 2
    heat = [float(cell.images[0].get_array().mean()) for cell in cells[2][1:]]
    assert heat == pytest.approx([0, 0.4, 0.8])
    drawn = cells[1][2].images[0].get_array()  # the picture left, grey right
    assert (drawn[:, :2] == 0.25).all()
    assert (drawn[:, 2:] > 0.6).all()


def test_command(taught, capsys):
    assert main(["train", "student.yaml", "--schedule.epochs=1"]) == 0
    assert main(["show", "runs/student", "--over-training", "--count=2"]) == 0
    assert Path("over_training.png").read_bytes().startswith(b"\x89PNG")
    assert main(["show", "student.yaml", "--over-training", "--out=again.svg"]) == 0
    before = Path("over_training.png").read_bytes()
    capsys.readouterr()

    assert main(["show", "runs/teacher", "--over-training"]) == 2
    assert "has no panels: its method shows nothing but the input" in capsys.readouterr().err
    (taught / "runs/student/panels/epoch_000001.safetensors").write_bytes(b"cut")
    assert main(["show", "runs/student", "--over-training"]) == 2
    assert "epoch_000001.safetensors are cut off or damaged" in capsys.readouterr().err
    assert Path("over_training.png").read_bytes() == before
    assert main(["show", "runs", "--over-training"]) == 2
    assert main(["show", "student.yaml", "--over-training", "--name=never"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert main(["train", "student.yaml", "--run.panels=-1"]) == 2
    assert "run.panels is -1" in capsys.readouterr().err
