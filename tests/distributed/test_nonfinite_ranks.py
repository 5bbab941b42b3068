"""One of two processes has a batch with a NaN: both leave out the update, and go on as one."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import torch

# Batch norm, whose running statistics a bad batch spoils before its loss is known.
RECIPE = """
name: cnn
data: {name: digits, batch_size: 8, limit: 64, eval_batch_size: 180}
student: {name: resnet18, kwargs: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}}
optim: {skip_nonfinite: 2, accumulate: 1}
schedule: {epochs: 2, warmup_epochs: 0}
ema: {decay: 0.9}
run: {tensorboard: false, device: cpu, log_every: 1}
"""

# Update 3 has a bad batch on rank 1 only; at update 6 the loss is finite and rank 1's gradient is not.
WORKER = """
import os, sys
import torch
from fastmkd.train.engine import Trainer, train
from fastmkd.train.recipe import load_recipe

rank, states = int(os.environ["RANK"]), []
original, update = Trainer.finished, Trainer._update


def finished(self, batch, step, micro):
    images, targets = original(self, batch, step, micro)
    return (images * float("nan") if (step, rank) == (2, 1) else images), targets


def recorded(self, batches, meter):
    weight = self.parameters[0]
    bad = weight.register_hook(lambda grad: grad * float("inf")) if (self.step, rank) == (5, 1) else None
    update(self, batches, meter)
    if bad is not None:
        bad.remove()
    held = {**self.setup.method.state_dict(), "ema": next(self.ema.module.parameters())}
    states.append((self.skips.count, {key: value.clone() for key, value in held.items()}))


Trainer.finished, Trainer._update = finished, recorded
result = train(load_recipe("cnn.yaml", sys.argv[1:]))
torch.save((result["skipped_updates"], states), f"states.{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_both_leave_out_what_is_bad_on_one(tmp_path: Path) -> None:
    (tmp_path / "cnn.yaml").write_text(RECIPE)
    (tmp_path / "worker.py").write_text(WORKER)
    done = fresh.run_ranks(tmp_path / "worker.py", "--optim.clip_grad=1", folder=tmp_path)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-4000:] + done[1].stderr[-4000:]
    (skipped, ours), (also, theirs) = (torch.load(tmp_path / f"states.{rank}.pt") for rank in range(2))
    assert skipped == also == 2
    assert [count for count, _ in ours] == [count for count, _ in theirs] == [0, 0, 1, 1, 1, 2, 2, 2]
    trained = [key for key in ours[0][1] if key.endswith(("weight", "bias"))]
    for before, (own, other) in enumerate(zip(ours[1:], theirs[1:], strict=True)):
        for key in trained:
            assert torch.equal(own[1][key], other[1][key]), key
        for mine, was in ((own, ours[before]), (other, theirs[before])):
            same = [key for key in was[1] if torch.equal(mine[1][key], was[1][key])]
            if before in (1, 4):
                assert len(same) == len(was[1])  # running statistics and the moving average too
            else:
                assert not set(same) & {*trained[:1], "ema"}
            assert all(value.isfinite().all() for value in mine[1].values())
    assert [path.name for path in sorted((tmp_path / "runs" / "cnn").glob("bad_batch_*"))] == [
        "bad_batch_1.safetensors"
    ]
    said = " ".join(done[0].stdout.split())
    assert "update 3 of 8 is not finite. The batch of update 3 is in runs/cnn/bad_batch_1.safetensors. It was" in said
    assert "update 6 of 8 is not finite. It was left out, number 2 of at most 2." in said
    assert json.loads((tmp_path / "runs" / "cnn" / "result.json").read_text())["skipped_updates"] == 2
