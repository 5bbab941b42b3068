"""Studies on a set that they make: its options belong to the record, and tables say mAP or mIoU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmkd.bench import evidence
from fastmkd.bench.environment import REPOSITORY
from fastmkd.bench.evidence import load, main
from fastmkd.bench.evidence_tables import tables
from fastmkd.bench.study import Study
from fastmkd.nn import MaskedConv2d
from fastmkd.train.build import assemble, refuse_to_train
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.loading import Loader, epoch_plan
from fastmkd.train.scenes_command import ScenesRecipe, write_scenes
from fastmkd.train.tasks import task_of

USUAL = {"FGD": 1.0, "DPK-FGD": 1.0, "CWD": 50.0}  # weights, which must not be those that the recipe has for MKD
BODY = "{layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"
RECIPE = f"""
data: {{name: scenes, task: detection, image_size: 32, batch_size: 4, workers: 0}}
student: {{name: detector.retinanet, kwargs: {{backbone: timm.resnet18, backbone_kwargs: {BODY}, out_channels: 8}}}}
schedule: {{epochs: 1, warmup_epochs: 0}}
run: {{panels: 0}}
"""
MKD = """
teacher: {recipe: teacher.yaml}
method:
  class_path: fastmkd.MKD
  init_args: {mask_ratio: 0.25, mask_patch: 16, sam: 16, decoder_depth: 1, decoder_width: 8, decoder_heads: 2,
    epochs: null}
"""
STUDY = """
recipe: student.yaml
teachers: {teacher: teacher.yaml}
scenes: {source: digits, images: 4, val_images: 2, size: 32, split: easy}
seeds: [3, 4]
against: alone
settings:
  alone: {method: Supervised, teacher: null}
  MKD: {}
asked:
  - {setting: MKD, over: alone, least: -100}
"""


def test_the_set_is_made_and_belongs_to_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "studies" / "tiny"
    folder.mkdir(parents=True)
    (folder / "teacher.yaml").write_text(f"name: tiny_teacher{RECIPE}")
    (folder / "student.yaml").write_text(f"name: student{RECIPE}{MKD}")
    (folder / "study.yaml").write_text(STUDY)
    Path("page.md").write_text("# Evidence\n<!-- begin: tiny -->\n<!-- end: tiny -->\n")
    arguments = ["studies/tiny", "--results=results", "--studies=studies", "--page=page.md", "--runs=runs"]

    for _ in range(2):  # what is there is neither made nor trained again
        assert main([*arguments, "--seeds", "3"]) == 0
        records = load(Path("results/tiny.jsonl"))
        assert [(record["setting"], record["seed"]) for record in records] == [("teacher", 0), ("alone", 3), ("MKD", 3)]
    assert Path("runs/scenes-digits-4-2-32-easy-0/train.json").is_file()
    page = Path("page.md").read_text()
    assert "3 of 5 runs, **not finished**" in page
    assert "| setting | test mAP | seed 3 | seed 4 | against alone |" in page
    assert "| MKD over alone: at least -100.0 |" in page

    (folder / "study.yaml").write_text(STUDY.replace("size: 32", "size: 48"))
    with pytest.raises(UserError, match=r"'teacher', seed 0, from another recipe: size is 32 there and 48 here"):
        evidence.run(Study.read(folder), Path("results/tiny.jsonl"), Path("runs"))
    (folder / "study.yaml").write_text(STUDY.replace("images: 4", "images: 0"))
    with pytest.raises(UserError, match=r"study.yaml is not a study: --images is 0; expected at least 1"):
        Study.read(folder)


@pytest.mark.parametrize(
    ("name", "metric", "told"), [("mkd_scenes", "map", "mAP"), ("mkd_scenes_segmentation", "miou", "mIoU")]
)
def test_every_setting_of_the_committed_studies_trains(name: str, metric: str, told: str, tmp_path: Path) -> None:
    made = ScenesRecipe(source="digits", images=16, val_images=1, size=64, split="easy")
    study = dataclasses.replace(Study.read(REPOSITORY / "recipes" / "evidence" / name), scenes=made, seeds=[0])
    write_scenes(study.made_set(tmp_path), made)
    teacher, *students = (one.recipe for one in study.runs(tmp_path))
    teacher.schedule = dataclasses.replace(teacher.schedule, epochs=1, warmup_epochs=0)
    assert metric in train(teacher)

    terms, converted = {}, set()
    for setting, recipe in zip(study.settings, students, strict=True):
        setup = assemble(recipe, refuse_to_train)
        if setting.startswith("MKD"):
            assert setup.method.epochs == recipe.schedule.epochs
        elif setting in USUAL:
            assert setup.method.weight == USUAL[setting]
        source, task = setup.source, task_of(setup.source)
        loader = Loader(source.train, recipe.data, recipe.augment, 64, torch.device("cpu"), 0, task)
        batch = next(loader.batches(epoch_plan(16, 4, seed=0, epoch=0)))
        loss, found, _ = setup.method(*task.finisher(source)(batch.images, batch.targets))
        loss.backward()
        terms[setting] = sorted(found.keys() & {"base", "feat", "global"})
        if any(isinstance(layer, MaskedConv2d) for layer in setup.student.modules()):
            converted.add(setting)
    mkd = {setting for setting in study.settings if setting.startswith("MKD") or setting == "student alone, inheriting"}
    assert converted == mkd - {"MKD without masked convolution"}
    of_mkd = ["feat", "global"] if metric == "map" else ["feat"]
    untaught = {"student alone", "student alone, inheriting", "MKD's masks without its losses"}
    assert {setting for setting, found in terms.items() if not found} == untaught & terms.keys()
    taught = {setting: found for setting, found in terms.items() if setting not in untaught}
    assert taught == {setting: of_mkd if setting in mkd else ["base"] for setting in taught}

    env = {"date": "2026-01-01", "commit": "abc", "dirty": False, "torch": "2.12.0", "device": "A CPU"}
    rows: list[dict[str, Any]] = [
        {"setting": setting, "seed": 0, metric: 30.0 + i, "teacher_top1": None, "env": env}
        for i, setting in enumerate(study.settings)
    ]
    text = tables(study, rows)
    assert f"| setting | test {told} | seed 0 | against student alone |" in text
    assert text.count("at least") == len(study.asked)
