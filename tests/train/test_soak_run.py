"""Whole runs that last: epochs with reading processes, checkpoints, tests and logs leave nothing open or behind."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import numpy as np
import pytest
from PIL import Image

MOST_GROWTH = 6 * 2**20  # of the memory of the process, and of its readers together, which an allocator cuts up

RECIPE = """
name: soak
data: {name: imagefolder, root: pictures, image_size: 32, batch_size: 8, eval_batch_size: 4, workers: 2}
student: {kwargs: {patch_size: 8, embed_dim: 12, depth: 1, num_heads: 3}}
method: {class_path: fastmkd.MaskedKD, init_args: {keep_ratio: 0.5}}
teacher:
  name: vit_tiny_patch16_224
  kwargs: {patch_size: 8, embed_dim: 12, depth: 1, num_heads: 3}
  weights: teacher.safetensors
augment: {crop: resized, mixup: 0.8}
optim: {skip_nonfinite: 1}
schedule: {warmup_epochs: 0}
ema: {decay: 0.9}
run: {device: cpu, log_every: 1, save_every: 1, panels: 4}
"""

# `Trainer.test` ends an epoch; what is held then goes into the next. Reading processes start by importing this file.
WORKER = """
import gc, json, multiprocessing, os, sys, threading, time
from pathlib import Path
import torch
from timm.models.vision_transformer import VisionTransformer
from safetensors.torch import save_file
from fastmkd.train.engine import Trainer, train
from fastmkd.train.recipe import load_recipe

PAGE = os.sysconf("SC_PAGE_SIZE")
after_runs, after_epochs = [], []
tested = Trainer.test


def held():
    gc.collect()
    children = [child.pid for child in multiprocessing.active_children()]
    family = [Path("/proc", str(pid)) for pid in (os.getpid(), *children)]
    pages = [int((one / "statm").read_text().split()[1]) for one in family]
    return {
        "memory": pages[0] * PAGE,
        "memory of readers": sum(pages[1:]) * PAGE,
        "children": len(children),
        "threads": sum(len(os.listdir(one / "task")) for one in family),
        "files": sum(len(os.listdir(one / "fd")) for one in family),
        "shared": sum("/dev/shm" in line for one in family for line in (one / "maps").read_text().splitlines()),
        "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
    }


def when_quiet():
    "Threads that feed the readers' queues end a moment after they were told to."
    deadline = time.monotonic() + 20
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    return held()


def test(self):
    scores = tested(self)
    after_epochs.append(held())
    return scores


def main(runs, epochs):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 2}
    save_file(VisionTransformer(**size).state_dict(), "teacher.safetensors")
    Trainer.test = test
    for number in range(runs):
        train(load_recipe("soak.yaml", [f"--name=short{number}", "--schedule.epochs=2"]))
        after_runs.append(when_quiet())
    after_epochs.clear()
    train(load_recipe("soak.yaml", [f"--schedule.epochs={epochs}"]))
    after_runs.append(when_quiet())
    Path("held.json").write_text(json.dumps({"runs": after_runs, "epochs": after_epochs}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
"""


def soak(folder: Path, runs: int, epochs: int) -> dict[str, list[dict[str, int]]]:
    """What was held after each of some short runs in one process, and after each epoch of a long one."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 3)):
        for kind in ("cat", "dog"):
            room = folder / "pictures" / part / kind
            room.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(room / f"{number}.png")
        (folder / "pictures" / part / "cat/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")  # named anew in each epoch
    (folder / "soak.yaml").write_text(RECIPE)
    (folder / "worker.py").write_text(WORKER)
    done = fresh.run(folder / "worker.py", str(runs), str(epochs), folder=folder, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((folder / "runs/soak/result.json").read_text())
    assert (result["epochs"], len(result["bad_pictures"])) == (epochs, 2)
    assert len(list((folder / "runs/soak/checkpoints").iterdir())) == 2
    return json.loads((folder / "held.json").read_text())


def assert_flat(rows: list[dict[str, int]], warm_up: int) -> None:
    before, after = rows[warm_up], rows[-1]
    for name in ("memory", "memory of readers"):
        assert after[name] - before[name] < MOST_GROWTH, (name, [row[name] for row in rows])
    for name in ("children", "threads", "files", "shared", "tensors"):
        assert after[name] <= before[name], (name, [row[name] for row in rows])


def check(held: dict[str, list[dict[str, int]]], warm_up: int) -> None:
    readers = 2 * 2
    assert all(row["children"] >= readers for row in held["epochs"])  # they were counted, and not started anew
    assert_flat(held["epochs"], warm_up)
    assert_flat(held["runs"], 1)
    assert held["runs"][-1]["children"] <= held["epochs"][-1]["children"] - readers


def test_epochs_and_runs_leave_nothing_behind(tmp_path):
    check(soak(tmp_path, runs=2, epochs=8), warm_up=3)


@pytest.mark.long
def test_hundreds_of_epochs_and_runs_leave_nothing_behind(tmp_path):
    held = soak(tmp_path, runs=20, epochs=400)
    print(*(held["epochs"][epoch] for epoch in (50, -1)), held["runs"][1], held["runs"][-1], sep="\n")
    check(held, warm_up=50)
