"""FSDP2 with a detector under MKD on two processes: what DDP does, to rounding, each process holding its part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn_boxes import draw_boxes
from safetensors.torch import load_file, save_file

from fastmkd.nn.detectors import build_detector

pytestmark = pytest.mark.long

KWARGS = {
    "backbone": "timm.resnet18", "backbone_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "out_channels": 16, "anchor_sizes": [8, 16, 32, 64, 128], "image_size": [64, 64],
}  # fmt: skip
# Plain SGD: the bias of a block's keys has no gradient but rounding, which AdamW would make into whole steps.
RECIPE = f"""
name: boxes
data: {{name: coco, root: set, batch_size: 2, eval_batch_size: 4, image_size: 64, workers: 0}}
student: {{name: detector.retinanet, kwargs: {json.dumps(KWARGS)}}}
teacher: {{name: detector.retinanet, kwargs: {json.dumps({**KWARGS, "num_classes": 2})}, weights: teacher.safetensors}}
method:
  class_path: fastmkd.MKD
  init_args: {{mask_ratio: 0.25, mask_patch: 16, sam: 16, decoder_depth: 1, decoder_width: 16, decoder_heads: 2,
    epochs: 2, last_epochs: 1}}
optim: {{name: sgd, lr: 0.01, clip_grad: 1.0}}
schedule: {{epochs: 2, warmup_epochs: 0.5}}
run: {{tensorboard: false, device: cpu, log_every: 1, keep: 9, save_every: 1}}
"""

WORKER = """
import json, os
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from fastmkd.train.engine import Trainer, train
from fastmkd.train.recipe import load_recipe

torch.set_num_threads(1)
run_all = Trainer.run_all


def record(self, interrupts):
    result = run_all(self, interrupts)
    mine = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in self.parameters)
    facts = {"mine": mine, "whole": sum(p.numel() for p in self.parameters)}
    Path(f"{self.recipe.name}.{os.environ['RANK']}.json").write_text(json.dumps(facts))
    return result


Trainer.run_all = record
for name, wrap in (("ddp", None), ("one", "NO_WRAP"), ("blocks", "TRANSFORMER_BASED_WRAP")):
    for key in [key for key in os.environ if "FSDP" in key]:
        del os.environ[key]
    if wrap is not None:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY=wrap)
    train(load_recipe("boxes.yaml", [f"--name={name}"]))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fsdp")
    draw_boxes(path / "set", train=8, val=4)
    torch.manual_seed(3)
    save_file(build_detector("retinanet", **KWARGS, num_classes=2).state_dict(), path / "teacher.safetensors")
    (path / "boxes.yaml").write_text(RECIPE)
    (path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"],
        cwd=path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return path


@pytest.mark.parametrize("run", ["one", "blocks"])
def test_it_trains_as_ddp_does(folder, run):
    """With the teacher in the first epoch and without it in the second; heads and momentum included."""
    names = [f"checkpoints/step_{step:08d}/method.safetensors" for step in (1, 2, 4)]
    for name in (*names, "model.safetensors", "heads.safetensors"):
        ours, theirs = load_file(folder / "runs" / run / name), load_file(folder / "runs/ddp" / name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    results = [json.loads((folder / "runs" / name / "result.json").read_text()) for name in (run, "ddp")]
    assert results[0]["map"] == pytest.approx(results[1]["map"], abs=1e-6)
    assert "train.feat" in (folder / "runs" / run / "metrics.csv").read_text()


@pytest.mark.parametrize("run", ["one", "blocks"])
def test_each_process_holds_its_part(folder, run):
    facts = [json.loads((folder / f"{run}.{rank}.json").read_text()) for rank in range(2)]
    assert sum(fact["mine"] for fact in facts) == facts[0]["whole"]
    assert max(fact["mine"] for fact in facts) < 0.7 * facts[0]["whole"]
