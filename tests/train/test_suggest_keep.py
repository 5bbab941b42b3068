"""``fastmkd suggest-keep``: drift against the plain forward passes, the search, and the command on a real run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmkd.reference import masked_vit_forward, masked_vit_saliency
from fastmkd.train import suggest_keep
from fastmkd.train.build import assemble
from fastmkd.train.cli import main
from fastmkd.train.engine import train
from fastmkd.train.recipe import load_recipe
from fastmkd.train.suggest_keep import Drift, DriftMeter, Tolerance, choose_guide, pictures, search


def drift_of(agreement):
    return lambda k: Drift(k, agreement(k), 0.0, 0.0, 0.0)


@settings(deadline=None)
@given(st.integers(1, 600), st.data())
def test_search_finds_the_step_of_a_monotone_drift(patches, data):
    needed = data.draw(st.integers(1, patches))
    asked = []

    def meter(k):
        asked.append(k)
        return Drift(k, float(k >= needed), 0.0, 0.0, 0.0)

    keep, measured = search(meter, patches, Tolerance(0.9))
    assert keep == needed
    assert [drift.keep for drift in measured] == sorted(set(asked), reverse=True)
    assert len(asked) == len(set(asked)) <= 10 + math.ceil(math.log2(max(2, patches / 10 + 1))) + 1


def test_search_distrusts_a_small_k_below_a_failing_one():
    bumpy = drift_of(lambda k: 0.0 if 55 <= k <= 65 else 1.0)
    keep, _ = search(bumpy, 100, Tolerance(0.5))
    assert keep == 66


def test_tolerance_has_two_sides():
    drift = Drift(5, 0.9, 0.0, 0.3, 0.0)
    assert Tolerance(0.9, 0.3).allows(drift)
    assert not Tolerance(0.91, 0.3).allows(drift)
    assert not Tolerance(0.9, 0.29).allows(drift)


def test_drift_by_hand(taught):
    setup = assemble(load_recipe("student.yaml"), train)
    assert choose_guide(setup, "auto") == "saliency of the teacher itself"
    images = pictures(setup, 48, torch.device("cpu"))
    meter = DriftMeter(setup.method, images)
    assert (meter.patches, meter.pictures) == (16, 48)
    everything, teacher = torch.cat(images), setup.teacher
    full = masked_vit_forward(teacher, everything)
    keep = masked_vit_saliency(teacher, everything).topk(5, dim=1).indices
    masked = masked_vit_forward(teacher, everything, keep)
    drift = meter(5)
    same = (full.argmax(1) == masked.argmax(1)).double()
    p, q = full.double().softmax(1), masked.double().softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    assert drift.agreement == pytest.approx(same.mean().item())
    assert drift.kl == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert drift.kl_error == pytest.approx(divergence.std().item() / 48**0.5, rel=1e-4)
    assert meter(16) == Drift(16, 1.0, 0.0, 0.0, 0.0)


def test_pictures_are_the_training_pictures_without_augmentation(taught):
    setup = assemble(load_recipe("student.yaml"), train)
    batch = torch.cat(pictures(setup, 30, torch.device("cpu")))
    assert torch.equal(batch, torch.cat(pictures(setup, 30, torch.device("cpu"))))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (setup.source.mean, setup.source.std))
    known = {row.numpy().tobytes() for row in setup.source.train.images}
    plain = ((batch * std + mean) * 255).round().to(torch.uint8)
    assert len(batch) == 30
    assert all(row.numpy().tobytes() in known for row in plain)


def test_command_on_a_recipe_and_on_a_run(taught, capsys):
    assert main(["suggest-keep", "student.yaml", "--schedule.epochs=1", "--pictures=40", "--agreement=0.8"]) == 0
    said = capsys.readouterr().out
    assert "patches ranked by: saliency of the teacher itself" in said
    result = json.loads(Path("suggest-keep.json").read_text())
    assert result["keep_ratio"] == result["keep"] / 16
    inside = [row["agreement"] >= 0.8 for row in result["measured"] if row["keep"] >= result["keep"]]
    assert all(inside)
    assert (
        result["keep"] == 1 or {row["keep"]: row for row in result["measured"]}[result["keep"] - 1]["agreement"] < 0.8
    )
    costs = [row["multiply_adds"] for row in result["measured"]]
    assert costs == sorted(costs, reverse=True)

    assert main(["train", "student.yaml", "--schedule.epochs=1"]) == 0
    assert main(["suggest-keep", "runs/student", "--pictures=40", "--kl=0.5", "--out=again.json"]) == 0
    assert "saliency of the trained student" in capsys.readouterr().out
    assert json.loads(Path("again.json").read_text())["tolerance"] == {"agreement": 0.95, "kl": 0.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["teacher.yaml"], "this method is Supervised"),
        (["student.yaml", "--guide=student"], "has no finished run"),
        (["student.yaml", "--agreement=1.5"], "--agreement is 1.5"),
        (["student.yaml", "--kl=-1"], "--kl is -1.0"),
        (["student.yaml", "--pictures=1"], "--pictures is 1"),
        (["student.yaml", "--method.init_args.mask=student"], "masks the student"),
        (["student.yaml", "--method.init_args={keep_ratio: 1, teacher_tokens: merge}"], "hides no patch"),
        (["student.yaml", "--picture=20"], "--picture"),
        (["."], "no recipe.json"),
    ],
)
def test_mistakes_come_before_the_teachers_training(recipes, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(suggest_keep, "assemble", lambda *_: pytest.fail("it went on"))
    assert main(["suggest-keep", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_untrained_teacher_is_trained_first_and_the_help_says_so(recipes, capsys):
    with pytest.raises(SystemExit):
        main(["suggest-keep", "--help"])
    assert "A teacher that has no finished run is trained first." in " ".join(capsys.readouterr().out.split())
    assert main(["suggest-keep", "student.yaml", "--pictures=4"]) == 0
    assert (recipes / "runs/teacher/result.json").is_file()


def test_bases_and_strategies_are_recipe_keys(taught, capsys):
    base = "{class_path: fastmkd.methods.bases.Manifold, init_args: {samples: 32}}"
    text = Path("student.yaml").read_text().replace("name: student", "name: manifold")
    text = text.replace("{keep_ratio: 0.5}", f"{{keep_ratio: 0.5, base: {base}, strategy: middle}}")
    Path("manifold.yaml").write_text(text)
    recipe = load_recipe("manifold.yaml")
    assert recipe.method.init_args["base"]["init_args"]["samples"] == 32
    method = assemble(recipe, train).method
    assert (method.base.samples, method.strategy.layer) == (32, "middle")
    assert main(["train", "manifold.yaml", "--schedule.epochs=1", "--schedule.warmup_epochs=0"]) == 0
    assert "train.manifold_patch" in Path("runs/manifold/metrics.csv").read_text()
    assert main(["suggest-keep", "runs/manifold", "--pictures=16"]) == 0
    assert main(["suggest-keep", "student.yaml", "--pictures=16", "--method.init_args.strategy=random"]) == 0
    assert "strategy Random" in capsys.readouterr().out
    assert main(["train", "student.yaml", "--method.init_args.base.class_path=fastmkd.methods.bases.Nothing"]) == 2
    assert main(["train", "manifold.yaml", "--method.init_args.strategy=best", "--run.dir=other"]) == 2
    assert "available are 'saliency'" in capsys.readouterr().err


def test_dino_trains_from_a_recipe(recipes, capsys):
    Path("dino.yaml").write_text(
        """
name: dino
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 360, image_size: 16}
student: {kwargs: {patch_size: 4, embed_dim: 12, depth: 1, num_heads: 3, dynamic_img_size: true}}
method:
  class_path: fastmkd.methods.MaskedDINO
  init_args: {out_features: 16, hidden: 16, bottleneck: 8, local_crops: 2}
schedule: {epochs: 1, warmup_epochs: 0}
run: {tensorboard: false}
"""
    )
    assert main(["train", "dino.yaml"]) == 0
    assert main(["show", "runs/dino", "--count=2", "--out=dino.png"]) == 0
    assert Path("dino.png").stat().st_size > 1000
