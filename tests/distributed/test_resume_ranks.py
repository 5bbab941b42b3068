"""Two processes go on from the same checkpoint, or both say why not; nothing that one of them knew is forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastmkd.train.loading import epoch_plan

RECIPE = """
name: whole
data: {name: digits, batch_size: 8, limit: 64, eval_batch_size: 180}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3, drop_path_rate: 0.2}}
method: Supervised
schedule: {epochs: 2, warmup_epochs: 0}
run: {tensorboard: false, device: cpu, save_every: 2, keep: 9, panels: 0}
"""

# Folders called NAME.RANK are those of one process alone, as on computers that share no file system.
WORKER = """
import json, os, shutil, sys
from pathlib import Path
import torch
from fastmkd.train.engine import Trainer, train
from fastmkd.train.recipe import load_recipe

torch.set_num_threads(1)
rank, crash_at, update = os.environ["RANK"], [None], Trainer._update


class CrashError(Exception):
    pass


def mortal(self, batches, meter):
    if self.step == crash_at[0]:
        crash_at[0] = None
        raise CrashError
    update(self, batches, meter)


def attempt(case, *options, crash=None):
    crash_at[0] = crash
    try:
        said = train(load_recipe("run.yaml", list(options)))
    except (ValueError, CrashError) as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{case}.{rank}.json").write_text(json.dumps(said))


def own(case, source="runs/crashed"):
    shutil.copytree(source, f"{case}.{rank}")
    return Path(f"{case}.{rank}/checkpoints/step_00000004")


Trainer._update = mortal
attempt("whole")
attempt("crashed", "--name=crashed", crash=5)
attempt("other_recipe", "--name=crashed", "--seed=3")
attempt("apart", f"--run.dir=apart.{rank}")
newest = own("stale")
if rank == "1":
    shutil.rmtree(newest)
attempt("stale", "--name=crashed", f"--run.dir=stale.{rank}")
newest = own("damaged")
if rank == "1":
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
attempt("damaged", "--name=crashed", f"--run.dir=damaged.{rank}")
newest = own("exchanged")
if rank == "1":
    shutil.rmtree(newest)
    shutil.copytree("runs/whole/checkpoints/step_00000006", newest)
attempt("exchanged", "--name=crashed", f"--run.dir=exchanged.{rank}")
own("done", "runs/whole")
if rank == "1":
    Path("done.1/result.json").unlink()
attempt("done", f"--run.dir=done.{rank}")
attempt("resumed", "--name=crashed")
plain = "--student.kwargs.drop_path_rate=0"
attempt("plain", "--name=plain", plain)
attempt("halved_crashed", "--name=halved", plain, crash=5)
pictures = ["--data.name=imagefolder", "--data.root=set", "--data.image_size=8", "--data.batch_size=4",
            "--data.workers=0", "--schedule.epochs=1", "--run.save_every=1", "--name=pictures"]
attempt("pictures_crashed", *pictures, crash=2)
attempt("pictures", *pictures)
torch.distributed.destroy_process_group()
"""

TRAINING = 24  # pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have lived through all cases."""
    path = tmp_path_factory.mktemp("ranks")
    (path / "run.yaml").write_text(RECIPE)
    (path / "worker.py").write_text(WORKER)
    for part, count in (("train", TRAINING), ("val", 4)):
        for number in range(count):
            file = path / "set" / part / f"{number % 2}" / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)).save(file)
    bad(path).write_bytes(b"broken")
    done = fresh.run_ranks(path / "worker.py", folder=path, timeout=900)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-4000:] + done[1].stderr[-4000:]
    return path


def bad(path: Path) -> Path:
    """A picture that rank 1 reads in its first batch of the only epoch, and nobody later."""
    number = int(epoch_plan(TRAINING, 4, seed=0, epoch=0, rank=1, world=2)[0, 0])
    return sorted((path / "set/train").glob("*/*.png"))[number]


def said(folder: Path, case: str) -> list[str]:
    return [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("apart", "apart.1 is not the folder that process 0 sees"),
        ("done", "done.1 is not the folder that process 0 sees"),
        ("stale", "goes on from stale.0/checkpoints/step_00000004. stale.1/checkpoints/step_00000004 is not a"),
        ("damaged", "the checkpoint damaged.1/checkpoints/step_00000004 is damaged: optimizer.safetensors has"),
        ("exchanged", "exchanged.1/checkpoints/step_00000004 is another checkpoint than process 0 goes on from"),
    ],
)
def test_what_one_process_alone_sees_is_refused_by_both(folder: Path, case: str, sentence: str) -> None:
    ours, theirs = said(folder, case)
    assert ours == theirs
    assert ours.startswith("UserError: process 1 of 2: ")
    assert sentence in ours
    assert "must be a folder that all processes see" in ours
    if case not in ("apart", "done"):  # nothing was begun
        steps = sorted(path.name for path in (folder / f"{case}.0/checkpoints").iterdir())
        assert steps == ["step_00000002", "step_00000004"]


def test_what_the_main_process_alone_finds_is_said_by_both(folder: Path) -> None:
    for one in said(folder, "other_recipe"):
        assert one.startswith("UserError: runs/crashed belongs to a run of another recipe: seed is 0 there and 3 here")


def test_they_go_on_with_the_same_bits(folder: Path) -> None:
    assert said(folder, "crashed") == ["CrashError: "] * 2
    assert all(isinstance(result, dict) for result in said(folder, "resumed"))
    for file in ("model.safetensors", "checkpoints/step_00000008/optimizer.safetensors"):
        ours, theirs = (load_file(folder / "runs" / run / file) for run in ("crashed", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file


def test_one_process_goes_on_with_the_updates_of_two(folder: Path) -> None:
    assert said(folder, "halved_crashed") == ["CrashError: "] * 2
    argv = ["train", "run.yaml", "--name=halved", "--student.kwargs.drop_path_rate=0"]
    alone = fresh.run("fastmkd.train.cli", *argv, folder=folder)
    assert alone.returncode == 2
    assert "was made with 16 images per update and this run has 8" in alone.stderr
    run = folder / "runs/halved"
    assert json.loads((run / "recipe.json").read_text())["identity"]["data.batch_size"] == 8
    done = fresh.run("fastmkd.train.cli", *argv, "--data.batch_size=16", folder=folder)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "going on at update 4" in words
    assert "from update 4 on, updates are split otherwise than before: data.batch_size is 8 there and 16 here." in words
    assert json.loads((run / "recipe.json").read_text())["identity"]["data.batch_size"] == 16
    # Nothing random takes part and no layer looks at a batch, so what is left of the difference is rounding.
    ours, theirs = (load_file(folder / "runs" / name / "model.safetensors") for name in ("halved", "plain"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)


def test_a_picture_that_another_process_could_not_read_is_remembered(folder: Path) -> None:
    assert said(folder, "pictures_crashed") == ["CrashError: "] * 2
    for result in said(folder, "pictures"):
        assert result["bad_pictures"] == [str(bad(folder).relative_to(folder))]
