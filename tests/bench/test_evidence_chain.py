"""Studies whose settings pre-train: what follows starts there, goes on where it was killed, and has its own tables."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastmkd.bench import evidence
from fastmkd.bench.evidence import load, main
from fastmkd.bench.evidence_tables import tables
from fastmkd.bench.study import Study
from fastmkd.train.engine import Trainer
from fastmkd.train.errors import UserError

RECIPE = """
data: {name: digits, batch_size: 16, limit: 64, eval_batch_size: 360}
student: {name: vit_tiny_patch16_224, kwargs: {patch_size: 2, embed_dim: 12, depth: 2, num_heads: 3}}
method: {class_path: fastmkd.DMAE, init_args: {decoder_depth: 1, decoder_width: 12, decoder_heads: 3}}
schedule: {epochs: 1, warmup_epochs: 0}
run: {log_every: 2}
"""
STUDY = """
recipe: student.yaml
teachers: {teacher: teacher.yaml}
seeds: [3]
against: MAE
settings:
  nothing: null
  MAE: {teacher: null}
  DMAE, top: {method.init_args.student_layer: 2, method.init_args.teacher_layer: 2}
then:
  fine-tuned: {command: finetune, changes: &short {schedule.epochs: 2, schedule.warmup_epochs: 0}}
  probed: {command: probe, changes: *short, of: [teacher, MAE]}
  half of the labels: {command: finetune, changes: {<<: *short, data.label_fraction: 0.5}, of: ["DMAE, top"]}
asked:
  - {setting: "DMAE, top", over: MAE, then: fine-tuned, least: -100}
"""
SEED = [
    ("nothing", "fine-tuned"),
    ("MAE", None),
    ("MAE", "fine-tuned"),
    ("MAE", "probed"),
    ("DMAE, top", None),
    ("DMAE, top", "fine-tuned"),
    ("DMAE, top", "half of the labels"),
]
ORDER = [("teacher", None, 0), ("teacher", "fine-tuned", 0), ("teacher", "probed", 0), *((*run, 3) for run in SEED)]
ARGUMENTS = ["studies/tiny", "--results=results", "--studies=studies", "--page=evidence.md", "--runs=runs"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a study that has not begun."""
    monkeypatch.chdir(tmp_path)
    return begin(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a study has been trained to its end."""
    home = tmp_path_factory.mktemp("finished")
    begin(home)
    with pytest.MonkeyPatch.context() as context:
        context.chdir(home)
        assert main(ARGUMENTS) == 0
    return home


def begin(home: Path) -> Path:
    folder = home / "studies" / "tiny"
    folder.mkdir(parents=True)
    (folder / "teacher.yaml").write_text(f"name: tiny_teacher{RECIPE}")
    (folder / "student.yaml").write_text(f"name: student{RECIPE}teacher: {{recipe: teacher.yaml}}\n")
    (folder / "study.yaml").write_text(STUDY)
    (home / "evidence.md").write_text("# Evidence\n<!-- begin: tiny -->\n<!-- end: tiny -->\n")
    return folder


def keys(records: list[dict[str, Any]]) -> list[tuple[str, str | None, int]]:
    return [(record["setting"], record.get("then"), record["seed"]) for record in records]


def numbers(records: list[dict[str, Any]]) -> list[Any]:
    return [{key: record.get(key) for key in ("top1", "loss", "mae", "align", "curve")} for record in records]


def test_killed_anywhere_a_study_ends_as_if_it_had_not_been(
    folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, killed = Trainer._update, set()
    first, second = "tiny-mae-3", "tiny-dmae_top-fine_tuned-3"

    def update(self: Trainer, *rest: Any) -> None:
        here = (self.recipe.name, self.step)
        if here in {(first, 2), (second, 5)} - killed:  # before any checkpoint, and after one
            killed.add(here)
            raise RuntimeError
        original(self, *rest)

    monkeypatch.setattr(Trainer, "_update", update)
    arguments = [*ARGUMENTS, "--runs=elsewhere"]
    for run in (first, second):
        with pytest.raises(RuntimeError):
            main(arguments)
        assert not Path("elsewhere", run, "result.json").exists()
    path = Path("results/tiny.jsonl")
    assert keys(load(path)) == ORDER[: ORDER.index(("DMAE, top", "fine-tuned", 3))]
    assert main(arguments) == 0
    again, whole = load(path), load(finished / path)
    assert keys(again) == ORDER
    assert numbers(again) == numbers(whole)
    assert [record["recipe"] for record in again] == [record["recipe"] for record in whole]  # which name no folder
    assert Path("evidence.md").read_text() == (finished / "evidence.md").read_text()
    assert main([*arguments[1:], "--check"]) == 0


def test_second_halves_start_from_what_was_learnt(folder: Path) -> None:
    runs = {(one.setting, one.then, one.recipe.seed): one for one in Study.read(folder).runs(Path("runs"))}
    assert list(runs) == ORDER
    tuned, probed = runs["MAE", "fine-tuned", 3], runs["MAE", "probed", 3]
    assert tuned.first == runs["MAE", None, 3].recipe
    assert tuned.recipe.student.backbone == "runs/tiny-mae-3/model.safetensors"
    assert tuned.recipe.student.kwargs.items() >= tuned.first.student.kwargs.items()
    assert (tuned.recipe.data, tuned.recipe.teacher) == (tuned.first.data, None)
    assert (tuned.recipe.optim.layer_decay, tuned.recipe.schedule.epochs) == (0.75, 2)
    assert probed.recipe.method.init_args == {"linear_probe": True, "batch_norm": True}
    assert runs["DMAE, top", "half of the labels", 3].recipe.data.label_fraction == 0.5
    nothing = runs["nothing", "fine-tuned", 3]
    assert nothing.first is None
    assert nothing.identities()["recipe"] == {
        **tuned.identities()["recipe"],
        "student.backbone": None,
        "name": "tiny-nothing-fine_tuned-3",
    }


def test_another_pre_training_is_another_study(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what follows, too, whose own recipe is as it was; a lost folder of a pre-training is made again."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = Path("results/tiny.jsonl")
    records = load(path)
    lost = next(record for record in records if keys([record]) == [("MAE", "probed", 3)])
    path.write_text("".join(json.dumps(record) + "\n" for record in records if record is not lost))
    for run in ("tiny-mae-3", "tiny-mae-probed-3"):
        shutil.rmtree(Path("runs", run))
    assert main(ARGUMENTS) == 0
    assert keys(load(path)) == [*(key for key in keys(records) if key != ("MAE", "probed", 3)), ("MAE", "probed", 3)]
    assert numbers(load(path)[-1:]) == numbers([lost])

    folder = Path("studies/tiny")
    (folder / "study.yaml").write_text(STUDY.replace("MAE: {teacher: null}", "MAE: {teacher: null, optim.lr: 0.5}"))
    with pytest.raises(UserError, match=r"a record of 'MAE', seed 3, from another recipe: optim.lr is 0.001 there"):
        evidence.run(Study.read(folder), path, Path("runs"))
    path.write_text(json.dumps(lost) + "\n")
    with pytest.raises(UserError, match=r"a record of 'MAE', probed, seed 3, from another recipe: optim.lr is 0.001"):
        evidence.run(Study.read(folder), path, Path("runs"))


def record(setting: str, then: str | None, seed: int, **scores: float) -> dict[str, Any]:
    env = {"date": "2026-01-01", "commit": "abc", "dirty": False, "torch": "2.12.0", "device": "A CPU"}
    return {"setting": setting, "then": then, "seed": seed, "teacher_top1": None, "env": env, **scores}


def test_each_second_half_has_a_table(folder: Path) -> None:
    rows = [record("teacher", None, 0, loss=0.5), record("teacher", "probed", 0, top1=90.0)]
    for seed in (3, 4):
        rows.append(record("MAE", None, seed, loss=0.7))
        rows.append(record("MAE", "probed", seed, top1=60.0 + seed))
        rows.append(record("MAE", "fine-tuned", seed, top1=70.0 + seed))
        rows.append(record("DMAE, top", "fine-tuned", seed, top1=72.0 + seed))
    text = tables(dataclasses.replace(Study.read(folder), seeds=[3, 4]), rows)
    assert "10 of 17 runs, **not finished**" in text
    assert "| fine-tuned: DMAE, top over MAE: at least -100.0 | +2.00 ± 0.00 | shown |" in text
    tuned, probed = text.split("| fine-tuned | test top-1 |")[1].split("| probed | test top-1 |")
    assert "| DMAE, top | 75.50 ± 0.71 | 75.00 | 76.00 | +2.00 ± 0.00 |" in tuned
    assert "teacher" not in tuned
    assert "| teacher | 90.00 |  |  |  |" in probed
    assert "| MAE | 63.50 ± 0.71 | 63.00 | 64.00 |  |" in probed
    assert "half of the labels" not in text
    assert "setting" not in text


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("command: probe", "command: guess", "has a second half by the command guess; known are finetune, probe"),
        ("of: [teacher, MAE]", "of: [MAE, MEA]", "goes on from MEA; known are teacher, nothing, MAE"),
        ("then: fine-tuned", "then: tuned", "asks what is so after tuned; known are fine-tuned, probed"),
        ("then: fine-tuned, ", "", "asks what is so after None; known are fine-tuned"),
        ("over: MAE", "beneath: MAE", "unexpected keyword argument 'beneath'"),
        ("command: probe, ", "", "missing 1 required positional argument: 'command'"),
        ("finetune, changes: &short", "finetune, of: [MAE], changes: &short", "trains nothing for nothing: null"),
    ],
)
def test_a_study_that_is_wrong_is_refused(folder: Path, old: str, new: str, reason: str) -> None:
    assert STUDY.count(old) == 1
    (folder / "study.yaml").write_text(STUDY.replace(old, new))
    with pytest.raises(UserError, match=reason):
        Study.read(folder)
