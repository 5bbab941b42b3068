"""DPK and the feature baselines by recipe: trained, resumed to the bit, told the epoch, exported as a bare student."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastmkd.methods.crd import Memory
from fastmkd.train.engine import Trainer, train
from fastmkd.train.errors import UserError
from fastmkd.train.loading import epoch_plan
from fastmkd.train.recipe import load_recipe

DPK = """
name: dpk
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 360}
student: {kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3}}
teacher: {recipe: teacher.yaml}
method:
  class_path: fastmkd.DPK
  init_args: {layers: {blocks.1: blocks.0}, encoder_depth: 1, decoder_depth: 1, width: 8}
schedule: {epochs: 3, warmup_epochs: 0}
run: {tensorboard: false, log_every: 1}
"""


@pytest.fixture
def dpk(taught: Path) -> Path:
    (taught / "dpk.yaml").write_text(DPK)
    return taught


def column(folder: Path, name: str) -> list[float]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [float(value) for _, _, found, value in rows if found == name]


def test_trains_and_leaves_a_bare_student(dpk):
    result = train(load_recipe("dpk.yaml"))
    ratios = column(dpk / "runs/dpk", "train.ratio")
    assert len(ratios) == 12
    assert all(0 <= ratio <= 1 for ratio in ratios)
    student = timm.create_model(
        "vit_tiny_patch16_224", patch_size=2, embed_dim=12, depth=2, num_heads=3, num_classes=10, in_chans=1, img_size=8
    )
    student.load_state_dict(load_file(result["weights"]))


CRD = (
    "--method={class_path: fastmkd.methods.FeatureKD, init_args: {layers: {blocks.1: blocks.0}, base: {class_path: "
    "fastmkd.methods.crd.CRD, init_args: {negatives: 40, width: 8}}}}"
)


@pytest.mark.parametrize("method", [[], [CRD]], ids=["dpk", "crd"])
def test_resume_is_exact(dpk, monkeypatch, method):
    original, crashed = Trainer._update, []

    def update(self, batches, meter):
        if self.recipe.name == "again" and self.step == 6 and not crashed:
            crashed.append(self.step)
            raise RuntimeError("crash")
        original(self, batches, meter)

    options = [*method, "--run.save_every=2"]
    train(load_recipe("dpk.yaml", ["--name=whole", *options]))
    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(RuntimeError, match="crash"):
        train(load_recipe("dpk.yaml", ["--name=again", *options]))
    train(load_recipe("dpk.yaml", ["--name=again", *options]))
    for part in ("model", "checkpoints/step_00000012/method"):
        whole, again = (load_file(dpk / f"runs/{name}/{part}.safetensors") for name in ("whole", "again"))
        assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_the_bank_is_told_the_pictures_numbers(dpk):
    train(load_recipe("dpk.yaml", [CRD, "--schedule.epochs=1", "--data.limit=40", "--augment.mixup=0.8"]))
    saved = load_file(dpk / "runs/dpk/checkpoints/step_00000002/method.safetensors")
    seen = epoch_plan(40, 16, seed=0, epoch=0).flatten()
    untouched = Memory(torch.arange(40), 8, 40, 0.5, 0.07).rows
    assert saved["heads.memory0.rows"].shape == (2, 40, 8)
    changed = (saved["heads.memory0.rows"] != untouched).any(2).all(0)
    assert changed.nonzero()[:, 0].tolist() == seen.sort().values.tolist()


def test_schedule_is_told_the_epoch(dpk):
    train(load_recipe("dpk.yaml", ["--method.init_args.ratio=exponential"]))
    expected = [0.95**epoch for epoch in range(3) for _ in range(4)]
    assert column(dpk / "runs/dpk", "train.ratio") == pytest.approx(expected, rel=1e-4)


def test_the_data_tell_the_image_size(dpk):
    options = ["--student.name=resnet18", "--student.kwargs={channels: [4, 4, 8, 8], layers: [1, 1, 1, 1]}"]
    layers = ["--method.init_args.layers={layer2: blocks.0}", "--data.image_size=16", "--schedule.epochs=1"]
    teacher = ["--teacher.options={data.image_size: 16, name: larger}"]
    assert train(load_recipe("dpk.yaml", options + layers + teacher))["updates"] == 4


def test_a_wrong_layer_is_a_sentence(dpk):
    with pytest.raises(UserError, match=r"method DPK does not fit: student has no module 'blocks\.7'"):
        train(load_recipe("dpk.yaml", ["--method.init_args.layers={blocks.7: blocks.0}"]))


@pytest.mark.parametrize("base", ["kd", "fitnet", "at", "dkd", "reviewkd", "crd", "crd-batch", "align"])
def test_baselines_by_key(dpk, base):
    layers = "layers: {blocks.1: blocks.0}" if base not in ("kd", "dkd") else ""
    method = f"--method={{class_path: fastmkd.methods.FeatureKD, init_args: {{base: {base}, {layers}}}}}"
    train(load_recipe("dpk.yaml", [method, "--schedule.epochs=1", f"--name={base}"]))
    assert len(column(dpk / f"runs/{base}", "train.base")) == 4


def test_chain_of_assistants(dpk, capsys):
    """TAKD (DPK, Table 11): each teacher comes from a recipe that has a teacher of its own."""
    shutil.rmtree(dpk / "runs/teacher")
    (dpk / "assistant.yaml").write_text(DPK.replace("name: dpk", "name: assistant"))
    options = ["--name=last", "--teacher.recipe=assistant.yaml", "--method.init_args.layers={blocks.1: blocks.1}"]
    train(load_recipe("dpk.yaml", [*options, "--schedule.epochs=1"]))
    said = capsys.readouterr().out
    assert said.index("teacher: Supervised") < said.index("assistant: DPK") < said.index("last: DPK")
