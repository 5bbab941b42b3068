"""Accuracy against patches kept: the numbers that are drawn, and runs that cannot be compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from fastmkd.reference import masked_vit_forward, masked_vit_saliency
from fastmkd.train.build import open_run
from fastmkd.train.cli import main
from fastmkd.train.keep_curve import Curve, Point, figure_of_curve
from fastmkd.train.recipe import load_recipe

SHORT = ["--schedule.epochs=1", "--run.panels=0", "--run.log_every=100"]


def trained(name: str, *options: str, recipe: str = "student.yaml") -> str:
    assert main(["train", recipe, f"--name={name}", *SHORT, *options]) == 0
    return f"runs/{name}"


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def test_numbers_by_hand(taught, capsys):
    runs = [trained(f"k{k}", f"--method.init_args.keep_ratio={k}") for k in (0.25, 0.5, 1.0)]
    runs.append(trained("random", "--method.init_args.strategy=random"))
    student = Path("student.yaml").read_text().splitlines()
    lines = [line for line in student if not line.startswith(("teacher:", "method:"))]
    Path("alone.yaml").write_text("\n".join(lines))
    runs.append(trained("alone", recipe="alone.yaml"))
    older = Path(runs[0], "recipe.json")  # than a key of the data
    content = json.loads(older.read_text())
    del content["identity"]["data.subset_seed"], content["recipe"]["data"]["subset_seed"]
    older.write_text(json.dumps(content))
    assert main(["show", *runs, "--accuracy-against-kept", "--out=curve.png"]) == 0
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    with Path("curve.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    results = {run: json.loads(Path(run, "result.json").read_text())["top1"] for run in runs}
    for run in runs[:4]:
        assert float(rows[Path(run).name]["student top-1"]) == results[run]
    assert float(rows["without a teacher"]["student top-1"]) == results["runs/alone"]
    assert [float(rows[name]["kept"]) for name in ("k0.25", "k0.5", "k1.0", "random")] == [0.25, 0.5, 1.0, 0.5]
    assert (rows["k1.0"]["teacher top-1"], rows["random"]["series"]) == ("", "random")

    setup = open_run(load_recipe("student.yaml", ["--name=k0.25", *SHORT, "--method.init_args.keep_ratio=0.25"]))
    source, teacher = setup.source, setup.teacher
    images, labels = (source.test.images / 255 - source.mean[0]) / source.std[0], source.test.labels
    keep = masked_vit_saliency(setup.student.eval(), images).topk(4, dim=1).indices
    assert float(rows["teacher"]["teacher top-1"]) == pytest.approx(top1(masked_vit_forward(teacher, images), labels))
    masked = top1(masked_vit_forward(teacher, images, keep), labels)
    assert float(rows["k0.25"]["teacher top-1"]) == pytest.approx(masked, abs=0.3)  # one of 359, for a tie of rounding

    assert main(["show", runs[1], "--accuracy-against-kept", "--pictures=40"]) == 0
    assert Path("accuracy_against_kept.png").is_file()
    capsys.readouterr()


def test_the_figure_joins_a_series_and_spans_its_seeds():
    points = [
        Point("a0", "saliency", 0.5, 70.0, 60.0),
        Point("a1", "saliency", 0.5, 74.0, 64.0),
        Point("b", "saliency", 1.0, 80.0, None),
        Point("c", "random", 0.5, 65.0, 50.0),
    ]
    axes = figure_of_curve(Curve(points, 90.0, [66.0, 68.0], 100), "validation").axes[0]
    assert axes.get_ylabel() == "validation top-1, %"
    drawn = {
        container.get_label(): list(zip(*(list(values) for values in container[0].get_data()), strict=True))
        for container in axes.containers
    }
    assert drawn == {
        "student: random": [(50, 65)],
        "masked teacher: random": [(50, 50)],
        "student: saliency": [(50, 72), (100, 80)],
        "masked teacher: saliency": [(50, 62)],
    }
    (bars,) = next(c for c in axes.containers if c.get_label() == "student: saliency")[2]
    assert bars.get_segments()[0][:, 1].tolist() == [70, 74]
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[90, 90], [67, 67]]


DIFFERENT = {
    "were trained on different data: data.limit is 64 there and 48 here": ["--data.limit=48"],
    "have different students": ["--student.kwargs.depth=1"],
    "learnt from different teachers": ["--teacher.options={seed: 3, name: other}"],
    "runs of MaskedKD, and runs without a teacher": ["--method.class_path=fastmkd.methods.FeatureKD"],
}


def test_runs_that_cannot_be_compared(taught, capsys):
    one = trained("one")
    for number, (said, options) in enumerate(DIFFERENT.items()):
        other = trained(f"other{number}", *options)
        capsys.readouterr()
        assert main(["show", one, other, "--accuracy-against-kept"]) == 2
        assert said in capsys.readouterr().err
    assert not Path("accuracy_against_kept.png").exists()


def test_mistakes(recipes, capsys):
    assert main(["train", "teacher.yaml"]) == 0
    for said, arguments in {
        "none of these runs has a teacher": ["runs/teacher", "--accuracy-against-kept"],
        "has no finished run": ["student.yaml", "--accuracy-against-kept"],
        "--pictures is 0": ["runs/teacher", "--accuracy-against-kept", "--pictures=0"],
        "only --accuracy-against-kept draws several": ["runs/teacher", "runs/teacher"],
    }.items():
        assert main(["show", *arguments]) == 2
        assert said in capsys.readouterr().err
