"""Tiny recipes for the training layer: seconds on one thread."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fresh
import pytest
import torch

# importlib mode finds no modules beside the tests (paper_rows, drawn_boxes).
sys.path.insert(0, str(Path(__file__).parent))

TINY = "{patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}"

TEACHER = f"""
name: teacher
data: {{name: digits, batch_size: 16, limit: 64, eval_batch_size: 360}}
student: {{kwargs: {TINY}}}
schedule: {{epochs: 1, warmup_epochs: 0}}
run: {{tensorboard: false}}
"""

# Everything at once that could break an exact resume: dropout, drop path, mixup, erasing, shifts, accumulation, EMA.
STUDENT = """
name: student
seed: 5
data: {name: digits, batch_size: 8, limit: 64, eval_batch_size: 360}
student:
  kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3, drop_path_rate: 0.2, proj_drop_rate: 0.1}
teacher: {recipe: teacher.yaml}
method: {class_path: fastmkd.MaskedKD, init_args: {keep_ratio: 0.5}}
optim: {accumulate: 2, clip_grad: 1.0, layer_decay: 0.8}
schedule: {epochs: 3, warmup_epochs: 0.5}
augment: {crop: pad, pad: 1, flip: 0.5, mixup: 0.8, cutmix: 1.0, random_erasing: 0.5, label_smoothing: 0.1}
ema: {decay: 0.9}
run: {tensorboard: false, log_every: 3}
"""


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices lose more to thread hand-over than they gain, most of all on a busy machine."""
    with single_thread():
        yield


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with teacher.yaml and student.yaml; runs go to ``runs`` in it."""
    (tmp_path / "teacher.yaml").write_text(TEACHER)
    (tmp_path / "student.yaml").write_text(STUDENT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both have been trained, to ``runs/teacher`` and ``runs/whole``; nobody may write there."""
    from fastmkd.train.engine import train
    from fastmkd.train.recipe import load_recipe

    path = tmp_path_factory.mktemp("finished")
    (path / "teacher.yaml").write_text(TEACHER)
    (path / "student.yaml").write_text(STUDENT)
    with single_thread(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        train(load_recipe("student.yaml", ["--name=whole"], {"run.save_every": 2}))
    return path


@pytest.fixture
def taught(recipes: Path, finished: Path) -> Path:
    """`recipes` with the finished run of the teacher, for tests that are about the student."""
    shutil.copytree(finished / "runs/teacher", recipes / "runs/teacher")
    return recipes


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``fastmkd ARGUMENTS`` in a process of its own, in the test's folder."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return fresh.run("fastmkd.train.cli", *arguments, folder=tmp_path, **environment)

    return run


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from fastmkd.train.cli import main

def kill():
    while len(list(Path("runs/killed/checkpoints").glob("step_*"))) < 2:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
main(["train", *sys.argv[1:], "--name=killed", "--run.save_every=1"])
"""


@pytest.fixture
def killed(tmp_path: Path) -> Callable[..., None]:
    """Trains a recipe with these options, as run ``killed``, until SIGKILL comes soon after the second checkpoint."""

    def run(*arguments: str) -> None:
        script = tmp_path / "killed.py"
        script.write_text(KILLED)
        done = fresh.run(script, *arguments, folder=tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "runs/killed/result.json").exists(), "it ended before it could be killed"

    return run
