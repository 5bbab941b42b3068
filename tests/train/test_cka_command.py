"""``fastmkd cka`` on tiny runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fastmkd.train.cli import main


def table(path: str) -> list[list[str]]:
    with Path(path).open() as file:
        return list(csv.reader(file))


def test_student_against_teacher_with_curves(taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "student.yaml", "--run.keep=10"]) == 0
    options = ["--training=true", "--limit=100", "--batch_size=32", "--other_layers=[blocks.0]"]
    assert main(["cka", "runs/student", *options, "--layers=[blocks.*]"]) == 0
    said = capsys.readouterr().out
    names = ["batches.csv", "batches.png", "cka.csv", "cka.png", "training.csv", "training_cka.png"]
    assert f"wrote {', '.join(names)}, training_ratio.png" in said
    header, *rows = table("runs/student/cka/cka.csv")
    assert header == ["layer", "blocks.0"]
    assert [row[0] for row in rows] == ["blocks.0", "blocks.1"]
    assert all(-0.5 < float(row[1]) <= 1 for row in rows)
    header, *rows = table("runs/student/cka/batches.csv")
    assert header == ["batch", "blocks.1 - blocks.0"]
    assert len(rows) == 4  # 32 + 32 + 32 + 4
    header, *rows = table("runs/student/cka/training.csv")
    assert header == ["step", "blocks.1 - blocks.0"]
    assert len(rows) == 3  # epochs
    end = table("runs/student/cka/cka.csv")[2][1]
    assert float(rows[-1][1]) == pytest.approx(float(end), abs=1e-6), "the last checkpoint is the trained student"

    options = ["--format=svg", "--limit=64", "--out", "two"]
    assert main(["cka", "runs/student", "runs/teacher", *options, "--cosine=true"]) == 0
    written = [f"{name}.{kind}" for name in ("batches", "cka", "cosine") for kind in ("csv", "svg")]
    assert sorted(path.name for path in Path("two").iterdir()) == written
    header, *rows = table("two/cosine.csv")
    assert header == ["batch", "blocks.1 - blocks.0"]
    assert len(rows) == 2
    assert main(["cka", "runs/student", "runs/student", *options, "--cosine=true"]) == 0
    assert [float(value) for _, value in table("two/cosine.csv")[1:]] == pytest.approx([1.0, 1.0]), "itself"
    assert main(["cka", "runs/student", "--limit=64", "--pair=[blocks.7,blocks.0]"]) == 2
    assert "'blocks.7', which is not among" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs"], "no recipe.json"),
        (["runs/teacher", "--batch_size=3"], "at least 4 images"),
        (["runs/teacher", "--format=bmp"], "png, svg or pdf"),
        (["runs/teacher"], "has no teacher"),
        (["runs/teacher", "runs/teacher", "--layers=[blocks.9]"], "no module 'blocks.9'"),
    ],
)
def test_mistakes(taught: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    main(["train", "teacher.yaml"])
    assert main(["cka", *arguments]) == 2
    assert said in capsys.readouterr().err
