"""Accuracy studies: resumable runs, honest tables, and a page that says what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastmkd.bench import evidence
from fastmkd.bench.environment import REPOSITORY
from fastmkd.bench.evidence import load, main, render
from fastmkd.bench.evidence_tables import tables
from fastmkd.bench.study import Ask, Study
from fastmkd.train.errors import UserError

STUDIES, RESULTS = REPOSITORY / "recipes" / "evidence", REPOSITORY / "bench" / "results" / "evidence"
PAGE = REPOSITORY / "docs" / "evidence.md"

TINY = "{name: vit_tiny_patch16_224, kwargs: {patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}}"
RECIPE = f"""
data: {{name: digits, batch_size: 16, limit: 64, eval_batch_size: 360}}
student: {TINY}
schedule: {{epochs: 1, warmup_epochs: 0}}
run: {{log_every: 2}}
"""
STUDY = """
recipe: student.yaml
teachers: {teacher: teacher.yaml}
seeds: [3, 4]
against: full
settings:
  alone: {method: Supervised, teacher: null}
  full: {method.init_args.keep_ratio: 1.0}
  half, random: {method.init_args.strategy: random}
asked:
  - {setting: full, over: alone, least: -100}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    folder = tmp_path / "studies" / "tiny"
    folder.mkdir(parents=True)
    (folder / "teacher.yaml").write_text(f"name: tiny_teacher{RECIPE}")
    (folder / "student.yaml").write_text(
        f"name: student{RECIPE}teacher: {{recipe: teacher.yaml}}\nmethod: {{class_path: fastmkd.MaskedKD}}\n"
    )
    (folder / "study.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return Study.read(folder)


def test_trains_records_and_goes_on_where_it_stopped(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("# Evidence\n<!-- begin: tiny -->\n<!-- end: tiny -->\n")
    arguments = ["--results", "results", "--studies", "studies", "--page", str(page)]
    assert main(["studies/tiny", *arguments]) == 0
    records = load(tmp_path / "results" / "tiny.jsonl")
    order = [(record["setting"], record["seed"]) for record in records]
    assert order[0] == ("teacher", 0)
    assert order[1:] == [(setting, seed) for seed in (3, 4) for setting in study.settings]
    assert [record["teacher_top1"] is None for record in records] == [True] + 2 * [True, False, False]
    assert all(record["curve"]["test.top1"][-1] == [4, float(f"{record['top1']:.4g}")] for record in records)
    assert "| full | " in page.read_text()
    assert "7 runs; " in capsys.readouterr().out
    assert main([*arguments, "--check"]) == 0

    trained: list[str] = []
    monkeypatch.setattr(evidence, "train", lambda recipe: trained.append(recipe.name) or real(recipe))
    kept = [record for record in records if (record["setting"], record["seed"]) != ("full", 4)]
    (tmp_path / "results" / "tiny.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert main([*arguments, "--check"]) == 1
    assert main(["studies/tiny", *arguments]) == 0
    assert set(trained) == {"tiny-full-4", "tiny_teacher"}  # the teacher is asked for and found
    assert len(load(tmp_path / "results" / "tiny.jsonl")) == 7

    recipe = tmp_path / "studies" / "tiny" / "student.yaml"
    recipe.write_text(recipe.read_text() + "optim: {lr: 0.5}\n")
    with pytest.raises(UserError, match=r"'alone', seed 3, from another recipe: optim.lr is 0.001 there and 0.5 here"):
        evidence.run(study, tmp_path / "results" / "tiny.jsonl", tmp_path / "runs")


real = evidence.train


def record(setting: str, seed: int, top1: float, **changes: Any) -> dict[str, Any]:
    env = {
        "date": "2026-01-01T00:00:00",
        "commit": "abcdef0123456",
        "dirty": False,
        "torch": "2.12.0",
        "device": "A CPU",
    }
    return {"setting": setting, "seed": seed, "top1": top1, "teacher_top1": None, "env": env, **changes}


def test_tables_pair_seeds_and_say_what_is_not_shown(study: Study) -> None:
    rows = [record("teacher", 0, 90.0)]
    for seed, base in ((3, 80.0), (4, 84.0)):  # seeds differ by more than settings
        rows.append(record("alone", seed, base))
        rows.append(record("full", seed, base + 1 + 0.1 * seed, teacher_top1=90.0))
        rows.append(record("half, random", seed, base - 1, teacher_top1=70.0 + seed))
    study.asked.append(Ask("half, random", over="full", least=-0.2))
    study.asked.append(Ask("full", over="alone", least=1.34))
    text = tables(study, rows)
    assert "| full over alone: at least -100.0 | +1.35 ± 0.05 | shown |" in text
    assert "| half, random over full: at least -0.2 | -2.35 ± 0.05 | **not shown** |" in text
    assert "| full over alone: at least +1.3 | +1.35 ± 0.05 | shown, within the error |" in text
    assert "| teacher | 90.00 |  |  |  |  |" in text
    assert "| alone | 82.00 ± 2.83 | 80.00 | 84.00 | -1.35 ± 0.07 |  |" in text
    assert "| full | 83.35 ± 2.90 | 81.30 | 85.40 |  | 90.00 ± 0.00 |" in text
    assert "7 runs; 2026-01-01, commit abcdef0123, torch 2.12.0, A CPU." in text
    assert "3 of 7 runs, **not finished**" in tables(study, rows[:3])


def test_a_study_that_is_wrong_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no study.yaml"):
        Study.read(tmp_path)
    path = study.folder / "study.yaml"
    path.write_text(STUDY.replace("over: alone", "over: nothing"))
    with pytest.raises(UserError, match="compares nothing; known are alone, full"):
        Study.read(study.folder)
    path.write_text(STUDY + "colour: red\n")
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
        Study.read(study.folder)


def test_other_records_do_not_empty_the_committed_page(capsys: pytest.CaptureFixture[str]) -> None:
    before = PAGE.read_bytes()
    with pytest.raises(SystemExit):
        main(["--results", "elsewhere"])
    assert "pass --page" in capsys.readouterr().err
    assert PAGE.read_bytes() == before


def test_committed_page_is_made_from_the_committed_records() -> None:
    page = PAGE.read_text()
    assert render(page, RESULTS, STUDIES) == page, "run python -m fastmkd.bench.evidence"
    for path in RESULTS.iterdir():
        name = path.stem if path.suffix == ".jsonl" else path.name
        assert f"<!-- begin: {name} -->" in page


@pytest.mark.parametrize("folder", sorted(STUDIES.iterdir()), ids=lambda folder: folder.name)
def test_committed_records_come_from_the_committed_recipes(folder: Path, tmp_path: Path) -> None:
    study = Study.read(folder)
    runs = {(one.setting, one.then, one.recipe.seed): one for one in study.runs(tmp_path)}
    for found in load(RESULTS / f"{folder.name}.jsonl"):  # maybe not of all runs yet; the page says so
        assert not runs[found["setting"], found.get("then"), found["seed"]].changes(found)
