"""The loop: it learns, it stops with a sentence, and an interrupted run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmkd import MaskedKD, MaskedViT, Supervised
from fastmkd.train import engine
from fastmkd.train.build import assemble
from fastmkd.train.cost_command import recipe_models
from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.interrupt import RunInterrupted
from fastmkd.train.recipe import load_recipe


def weights(run: str, folder: Path = Path()) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / run / "model.safetensors")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def test_maskedkd_trains_its_teacher_first_and_reuses_it(recipes, capsys):
    result = train(load_recipe("student.yaml"))
    said = capsys.readouterr().out
    assert said.index("teacher: Supervised") < said.index("student: MaskedKD")
    assert {"top1", "top5", "images_per_second"} <= result.keys()
    assert result["updates"] == 12
    assert Path(result["weights"]).is_file()
    table = (recipes / "runs/student/metrics.csv").read_text()
    assert all(name in table for name in ("train.ce", "train.kd", "test.top1", "images_per_second", "lr"))
    train(load_recipe("student.yaml", ["--seed=9", "--name=other"]))
    said = capsys.readouterr().out
    assert "teacher: finished before" in said
    assert train(load_recipe("student.yaml")) == result  # a finished run is returned, not trained again


def test_patches_by_saliency_mass(taught):
    train(load_recipe("student.yaml", ["--method.init_args.keep_mass=0.8", "--schedule.epochs=1", "--run.log_every=1"]))
    rows = [line.split(",") for line in (taught / "runs/student/metrics.csv").read_text().splitlines()]
    kept = [float(value) for _, _, name, value in rows if name == "train.kept"]
    assert len(kept) == 4
    assert all(0 < share < 1 for share in kept)


def test_a_teacher_of_a_larger_size_comes_from_its_recipe(recipes):
    options = ["--teacher.options={data.image_size: 16}", "--schedule.epochs=1"]
    setup = assemble(load_recipe("student.yaml", options), train)
    assert setup.teacher.patch_embed.img_size == (16, 16)
    assert setup.student.patch_embed.img_size == (8, 8)
    assert recipe_models(load_recipe("student.yaml", options))["teacher"].patch_embed.img_size == (16, 16)
    assert train(load_recipe("student.yaml", options))["updates"] == 4


def test_a_wrapped_student_is_refused(taught):
    """Its parameters have other names than its state_dict, which PyTorch's checkpoints compare."""
    setup = assemble(load_recipe("student.yaml"), train)
    vit = MaskedViT(setup.method.release())
    with pytest.raises(UserError, match=r"the student is a MaskedViT.* pass its \.model"):
        dataclasses.replace(setup, student=vit, method=MaskedKD(vit, setup.teacher))
    assert dataclasses.replace(setup, method=MaskedKD(vit.model, setup.teacher)).student is vit.model


def test_it_learns(recipes):
    options = [
        "--data.limit=1438", "--data.batch_size=32", "--schedule.epochs=12", "--run.eval_every=12", "--optim.lr=4e-3",
        "--student.kwargs.embed_dim=24", "--data.image_size=16", "--student.kwargs.patch_size=4",
    ]  # fmt: skip
    result = train(load_recipe("teacher.yaml", options))
    assert result["top1"] > 60  # chance is 10


def test_the_method_is_told_where_it_is_before_each_update(recipes, monkeypatch):
    told = []
    monkeypatch.setattr(Supervised, "set_epoch", lambda self, epoch: told.append(epoch))
    result = train(load_recipe("teacher.yaml", ["--schedule.epochs=2"]))
    each = result["updates"] // 2
    assert told == [update / each for update in range(result["updates"])]
    assert told[each] == 1.0


class CrashError(Exception):
    pass


@pytest.mark.parametrize("crash_at", [2, 6, 7, 11])
def test_resume_is_exact(taught, finished, monkeypatch, crash_at):
    """Crashes in the middle of epochs and right after one; checkpoints every 2 updates, 4 updates an epoch."""
    original, crashed = Trainer._update, []

    def update(self, batches, meter):
        if self.recipe.name == "again" and self.step == crash_at and not crashed:
            crashed.append(self.step)
            raise CrashError
        original(self, batches, meter)

    monkeypatch.setattr(Trainer, "_update", update)
    recipe = load_recipe("student.yaml", ["--name=again"], {"run.save_every": 2})
    with pytest.raises(CrashError):
        train(recipe)
    torch.rand(7)  # whatever happens to global generators in between
    train(recipe)
    assert_same_bits(weights("whole", finished), weights("again"))
    # The name takes part in nothing else, so the logged numbers agree too.
    runs = finished / "runs/whole", Path("runs/again")
    rows = [(run / "metrics.csv").read_text().splitlines() for run in runs]
    tests = [[row for row in table if ",test." in row] for table in rows]
    assert tests[0] == tests[1]


def test_resume_after_sigkill(taught, finished, killed):
    """A process that is killed without warning, wherever it is, is gone on with."""
    killed("student.yaml")
    train(load_recipe("student.yaml", ["--name=killed", "--run.save_every=1000"]))
    assert_same_bits(weights("whole", finished), weights("killed"))


def test_interrupt_saves_and_goes_on(taught, finished, monkeypatch):
    original = Trainer._update

    def update(self, batches, meter):
        original(self, batches, meter)
        if self.recipe.name == "stopped" and self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = load_recipe("student.yaml", ["--name=stopped"])
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(RunInterrupted, match="stopped at update 6 of 12"):
            train(recipe)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (taught / "runs/stopped/checkpoints/step_00000006").is_dir()
    train(recipe)
    assert_same_bits(weights("whole", finished), weights("stopped"))


def test_damaged_newest_checkpoint_is_said_and_the_older_one_used(taught, finished, monkeypatch, capsys):
    train(load_recipe("student.yaml", ["--name=again"]))
    again = taught / "runs/again"
    (again / "result.json").unlink()
    newest = sorted((again / "checkpoints").iterdir())[-1]
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    train(load_recipe("student.yaml", ["--name=again"]))
    said = capsys.readouterr().out
    assert "warning: the checkpoint" in said
    assert "going on at update 8" in said
    assert_same_bits(weights("whole", finished), weights("again"))


def test_other_seed_in_the_same_folder_is_refused_and_changes_nothing(recipes):
    train(load_recipe("teacher.yaml"))
    before = (recipes / "runs/teacher/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        train(load_recipe("teacher.yaml", ["--seed=1"]))
    assert (recipes / "runs/teacher/model.safetensors").read_bytes() == before
    (recipes / "runs/teacher/result.json").unlink()
    with pytest.raises(UserError, match=r"run\.resume is never"):
        train(load_recipe("teacher.yaml", ["--run.resume=never"]))


def test_other_teacher_weights_are_another_run(taught):
    train(load_recipe("student.yaml"))
    train(load_recipe("teacher.yaml", ["--seed=3", "--name=teacher3"]))
    with pytest.raises(UserError, match=r"teacher\.weights"):
        train(load_recipe("student.yaml", ["--teacher.weights=runs/teacher3/model.safetensors"]))


def test_diverging_run_stops_and_saves_no_broken_state(recipes):
    with pytest.raises((UserError, ValueError), match="not finite"):
        train(load_recipe("teacher.yaml", ["--optim.lr=1e30", "--optim.name=sgd", "--schedule.epochs=3"]))
    assert not list((recipes / "runs/teacher/checkpoints").glob("step_*"))
    assert not (recipes / "runs/teacher/model.safetensors").exists()


def test_teacher_of_other_classes_and_without_weights(recipes):
    kwargs = "{patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}"
    text = f"data: {{name: digits}}\nstudent: {{kwargs: {kwargs}}}\nmethod: MaskedKD\n"
    (recipes / "bare.yaml").write_text(f"{text}teacher: {{name: vit_tiny_patch16_224, kwargs: {kwargs}}}")
    with pytest.raises(UserError, match="has no weights"):
        train(load_recipe("bare.yaml"))
    train(load_recipe("teacher.yaml", ["--student.kwargs.num_classes=12"]))
    with pytest.raises(UserError, match="classes"):
        train(load_recipe("student.yaml", ["--teacher.options={student.kwargs.num_classes: 12}"]))


def test_checkpoint_of_another_batch_size_is_refused(recipes):
    train(load_recipe("teacher.yaml"))
    checkpoint = next((recipes / "runs/teacher/checkpoints").iterdir())
    with pytest.raises(UserError, match="16 images per update and this run has 8"):
        train(load_recipe("teacher.yaml", ["--name=t2", "--data.batch_size=8", f"--run.resume={checkpoint}"]))


def test_bf16_and_tensorboard(recipes):
    result = train(load_recipe("teacher.yaml", ["--run.precision=bf16", "--run.tensorboard=true"]))
    assert result["top1"] >= 0
    assert list((recipes / "runs/teacher/tensorboard").iterdir())
    assert next(iter(weights("teacher").values())).dtype == torch.float32


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_fp16_without_a_gpu_is_refused_before_anything_is_trained(recipes, monkeypatch, of):
    """Accelerate would train in float32 and the run's folder would say fp16."""
    key = "--run.precision=fp16" if of == "student" else "--teacher.options={run.precision: fp16}"
    options = ["--run.device=cpu", key]
    with pytest.raises(UserError, match=f"run.precision is fp16 and {of} is to be trained on the CPU.*; take bf16"):
        train(load_recipe("student.yaml", options))
    assert not Path("runs").exists()
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UserError, match="on the CPU"):
        train(load_recipe("teacher.yaml", ["--run.precision=fp16"]))


def test_a_run_that_finished_in_fp16_is_good_without_a_gpu(taught):
    file = Path("runs/teacher/recipe.json")
    content = json.loads(file.read_text())
    content["identity"]["run.precision"] = "fp16"  # as if it had been trained on one
    file.write_text(json.dumps(content))
    result = train(load_recipe("teacher.yaml", ["--run.device=cpu", "--run.precision=fp16"]))
    assert result["name"] == "teacher"


def test_pipelined_by_recipe(taught):
    """Parts of a batch of 8, two batches to an update, mixed labels; the last weights differ by rounding alone."""
    options = ["--student.kwargs.drop_path_rate=0", "--student.kwargs.proj_drop_rate=0", "--schedule.epochs=1"]
    train(load_recipe("student.yaml", ["--name=whole", *options]))
    train(load_recipe("student.yaml", ["--name=parts", "--method.init_args.micro_batches=3", *options]))
    whole, parts = (load_file(taught / f"runs/{name}/model.safetensors") for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_the_result_names_bad_pictures(recipes):
    import numpy as np
    from PIL import Image

    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = recipes / "set" / part / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(np.full((16, 16, 3), 30 * i, np.uint8)).save(folder / f"{i}.png")
    (recipes / "set/train/a/3.png").write_bytes(b"broken")
    options = [
        "--data.name=imagefolder", "--data.root=set", "--data.image_size=8", "--data.batch_size=4", "--data.workers=0",
        "--name=folder", "--augment.crop=resized",
    ]  # fmt: skip
    result = train(load_recipe("teacher.yaml", options))
    assert result["bad_pictures"] == ["set/train/a/3.png"]
    assert json.loads((recipes / "runs/folder/result.json").read_text())["bad_pictures"] == ["set/train/a/3.png"]


def test_result_is_written_after_the_weights(recipes, monkeypatch):
    def full(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_tensors", full)
        with pytest.raises(OSError, match="disk full"):
            train(load_recipe("teacher.yaml"))
    assert not (recipes / "runs/teacher/result.json").exists()
    assert train(load_recipe("teacher.yaml"))["updates"] == 4


@pytest.mark.long
def test_two_processes(recipes):
    """DDP over gloo: same test scores on both, all pictures tested once, and the run can be gone on with."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617", "-m"]
    argv += ["fastmkd.train.cli", "train", "student.yaml", "--run.device=cpu", "--name=ddp"]
    done = subprocess.run(
        argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((recipes / "runs/ddp/result.json").read_text())
    assert result["images"] == 359
    assert result["updates"] == 6  # 32 images an update instead of 16
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("ddp: MaskedKD") == 1
