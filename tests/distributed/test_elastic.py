"""A rank is killed in the middle of an epoch; torchrun starts both again and the run ends as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmkd.train.accelerator import make_accelerator
from fastmkd.train.schema import Recipe, RunRecipe

TEACHER = """
name: teacher
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 360}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}}
schedule: {epochs: 1, warmup_epochs: 0}
run: {tensorboard: false, device: cpu}
"""

STUDENT = """
name: student
data: {name: digits, batch_size: 8, limit: 64, eval_batch_size: 360}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3, drop_path_rate: 0.2}}
teacher: {recipe: teacher.yaml}
method: {class_path: fastmkd.MaskedKD, init_args: {keep_ratio: 0.5}}
augment: {crop: pad, pad: 1, mixup: 0.8}
schedule: {epochs: 3, warmup_epochs: 0.5}
ema: {decay: 0.9}
run: {tensorboard: false, device: cpu, log_every: 1, save_every: 3, keep: 9}
"""

# Rank 1 dies once, after update 7 of 12, in the middle of an epoch and an update after the last checkpoint.
WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from fastmkd.train.engine import Trainer, train
from fastmkd.train.recipe import load_recipe

torch.set_num_threads(1)
update = Trainer._update


def mortal(self, batches, meter):
    update(self, batches, meter)
    died = Path(f"died.{sys.argv[1]}")
    if self.step == 7 and self.recipe.name == "killed" and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)


Trainer._update = mortal
train(load_recipe("student.yaml", [f"--name={sys.argv[1]}"]))
torch.distributed.destroy_process_group()
"""


# Without it torchrun's restarted processes find in its store the addresses of those that died, and wait for them.
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.mark.long
def test_a_killed_rank_is_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    for name, text in {"teacher.yaml": TEACHER, "student.yaml": STUDENT, "worker.py": WORKER}.items():
        (tmp_path / name).write_text(text)
    said = {}
    for name in ("whole", "killed"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*launch, "--max-restarts=1", f"--log-dir={tmp_path}", "worker.py", name],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **NEW_STORE},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        said[name] = done.stdout
        assert "its restarts may fail" not in done.stdout
    assert (tmp_path / "died.killed").exists()
    assert "going on at update 6" in said["killed"]
    assert "going on" not in said["whole"]
    for file in ("model.safetensors", "checkpoints/step_00000012/optimizer.safetensors"):
        ours, theirs = (load_file(tmp_path / "runs" / name / file) for name in ("killed", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file


@pytest.mark.parametrize(("restarts", "old"), [("0", "True"), ("3", "False"), ("3", "True")])
def test_a_run_says_when_its_restarts_may_fail(monkeypatch, capsys, restarts: str, old: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", old)
    make_accelerator(Recipe(run=RunRecipe(device="cpu")))
    said = capsys.readouterr().out
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said) == ((restarts, old) == ("3", "True"))
    assert ("its restarts may fail" in said) == bool(said)
