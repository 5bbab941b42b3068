"""What the networks say about pictures: the numbers that are drawn, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmkd.reference import masked_vit_forward, masked_vit_saliency
from fastmkd.train.answers import RIGHT, WRONG, Answers, answers_of, figure_of_answers
from fastmkd.train.build import open_run
from fastmkd.train.cli import main
from fastmkd.train.recipe import load_recipe

MASKED = "teacher, 31% of the patches"


def test_answers_by_hand(taught):
    options = ["--schedule.epochs=1", "--method.init_args.keep_ratio=0.3"]
    assert main(["train", "student.yaml", *options]) == 0
    setup = open_run(load_recipe("student.yaml", options))
    answers = answers_of(setup, 5)
    source, student, teacher = setup.source, setup.student.eval(), setup.teacher.eval()
    assert answers.targets.tolist() == [0, 1, 2, 3, 4]
    images = (answers.images - source.mean[0]) / source.std[0]
    keep = masked_vit_saliency(student, images).topk(5, dim=1).indices  # 5 of 16
    expected = {
        "teacher, all patches": masked_vit_forward(teacher, images),
        MASKED: masked_vit_forward(teacher, images, keep),
        "student": masked_vit_forward(student, images),
    }
    assert list(answers.probabilities) == list(expected)
    for name, logits in expected.items():
        torch.testing.assert_close(answers.probabilities[name], logits.softmax(1), rtol=1e-4, atol=1e-5)
    visible = torch.zeros(5, 16).scatter(1, keep, 1.0).view(5, 4, 4)
    assert torch.equal(answers.kept, visible.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_the_figure_shows_the_three_likeliest_and_which_is_right():
    probabilities = {
        "teacher": torch.tensor([[0.1, 0.6, 0.05, 0.25]]),
        "student": torch.tensor([[0.7, 0.1, 0.15, 0.05]]),
    }
    answers = Answers(torch.rand(1, 3, 4, 4), torch.ones(1, 4, 4), torch.tensor([3]), probabilities)
    figure = figure_of_answers(answers, ["ant", "bee", "cat", "dog"], "run")
    titles = [cell.get_title() for cell in figure.axes]
    assert titles == ["picture", "kept patches", "teacher", "student"]
    assert figure.axes[0].get_ylabel() == "dog"
    drawn = {}
    for cell in figure.axes[2:]:
        labels = [tick.get_text() for tick in cell.get_yticklabels()]
        drawn[cell.get_title()] = [
            (label, round(bar.get_width()), bar.get_hatch()) for label, bar in zip(labels, cell.patches, strict=True)
        ]
    assert drawn["teacher"] == [("bee", 60, "///"), ("dog", 25, ""), ("ant", 10, "///")]
    assert [label for label, _, _ in drawn["student"]] == ["ant", "cat", "bee"]
    colours = [bar.get_facecolor()[:3] for bar in figure.axes[2].patches]
    assert colours == [tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in (WRONG, RIGHT, WRONG)]


@pytest.mark.parametrize(
    ("options", "share"),
    [([], "50%"), (["--method.init_args.keep_mass=0.5"], "%")],
    ids=["half", "by mass"],
)
def test_command(taught, capsys, options, share):
    options = ["--schedule.epochs=1", *options]
    assert main(["train", "student.yaml", *options]) == 0
    assert main(["show", "student.yaml", *options, "--answers", "--count=2"]) == 0
    assert Path("answers.png").read_bytes().startswith(b"\x89PNG")
    assert share in list(answers_of(open_run(load_recipe("student.yaml", options)), 2).probabilities)[1]


def test_mistakes(taught, capsys):
    assert main(["train", "student.yaml", "--schedule.epochs=1", "--method.init_args.keep_ratio=1"]) == 0
    for run, said in (("runs/student", "(MaskedKD) no patch is hidden"), ("runs/teacher", "(Supervised) no patch")):
        assert main(["show", run, "--answers"]) == 2
        assert said in capsys.readouterr().err
    assert main(["show", "student.yaml", "--name=never", "--answers"]) == 2
    assert "has no finished run" in capsys.readouterr().err
    assert main(["show", "runs/student", "--count=0"]) == 2
    assert "--count is 0" in capsys.readouterr().err
    Path("runs/teacher/result.json").unlink()
    assert main(["show", "runs/student"]) == 2
    assert "teacher's run runs/teacher has not finished" in capsys.readouterr().err
