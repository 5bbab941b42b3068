"""Mistakes are found before the teacher is trained, and looking for them changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fastmkd.train import build
from fastmkd.train.build import assemble
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe
from fastmkd.train.rundir import RunDir


class TrainedError(Exception):
    """The teacher's training has begun."""


def begin(recipe):
    raise TrainedError(recipe.name)


DPK = "--method={{class_path: fastmkd.DPK, init_args: {{layers: {{{}: blocks.0}}, {}}}}}".format
SMALL = "encoder_depth: 1, decoder_depth: 1, width: 8"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--student.name=deit_tinny", "student.name is 'deit_tinny'"),
        ("--student.kwargs.num_heads=5", "cannot make the student"),
        ("--student.weights=nowhere.safetensors", "do not exist"),
        ("--method.init_args.base=logits", "method MaskedKD does not fit"),
        (DPK("blocks.99", SMALL), r"student has no module 'blocks\.99'"),
        ("--method=Supervised", "Supervised has no teacher"),
        ("--optim.name=adamx", "optim.name 'adamx'"),
        ("--optim.accumulate=20", "one update takes 160 pictures"),
        ("--teacher.options={student.name: deit_tinny}", "teacher.name is 'deit_tinny'"),
        ("--teacher.options={student.name: detector.retinanet}", "a network for detection"),
    ],
)
def test_mistakes_come_before_the_teachers_training(recipes, option, said):
    with pytest.raises(UserError, match=said):
        assemble(load_recipe("student.yaml", [option]), begin)


def test_what_fits_begins_the_teachers_training(recipes):
    for option in ("--seed=1", DPK("blocks.1", SMALL)):
        with pytest.raises(TrainedError, match="teacher"):
            assemble(load_recipe("student.yaml", [option]), begin)


def test_each_link_of_a_chain_is_tried_first(recipes):
    text = Path("student.yaml").read_text()
    Path("assistant.yaml").write_text(text.replace("name: student", "name: assistant"))
    Path("last.yaml").write_text(text.replace("teacher.yaml", "assistant.yaml").replace("name: student", "name: last"))
    with pytest.raises(TrainedError, match="assistant"):
        assemble(load_recipe("last.yaml"), begin)
    with pytest.raises(UserError, match="method MaskedKD does not fit"):
        assemble(load_recipe("last.yaml", ["--teacher.options={method.init_args.base: logits}"]), begin)
    with pytest.raises(UserError, match=r"teacher\.name is 'deit_tinny'"):
        assemble(load_recipe("last.yaml", ["--teacher.options={teacher.options: {student.name: deit_tinny}}"]), begin)
    Path("assistant.yaml").write_text(
        text.replace("teacher.yaml", "last.yaml").replace("name: student", "name: circle")
    )
    with pytest.raises(UserError, match="last <- circle <- last wait for each other"):
        assemble(load_recipe("last.yaml"), begin)


def test_the_folder_of_another_recipe_is_refused_before_the_teachers_training(recipes):
    setup = assemble(load_recipe("student.yaml"), train)
    RunDir(setup.recipe.run_dir).claim(setup.identity, setup.description)
    shutil.rmtree("runs/teacher")
    Path("last.yaml").write_text(
        Path("student.yaml").read_text().replace("teacher.yaml", "student.yaml").replace("name: student", "name: last")
    )
    for path, options in (("student.yaml", ["--seed=3"]), ("last.yaml", ["--teacher.options={seed: 3}"])):
        with pytest.raises(UserError, match=r"student belongs to a run of another recipe: seed is 5 there and 3 here"):
            assemble(load_recipe(path, options), begin)
        with pytest.raises(TrainedError, match="teacher" if path == "student.yaml" else "student"):
            assemble(load_recipe(path), begin)


def test_a_file_of_the_run_to_come_is_waited_for(recipes):
    same = ["--student.kwargs={patch_size: 2, embed_dim: 12, depth: 1, num_heads: 3}"]
    recipe = load_recipe("student.yaml", [*same, "--student.backbone=runs/teacher/model.safetensors"])
    with pytest.raises(TrainedError):
        assemble(recipe, begin)
    setup = assemble(recipe, train)
    assert torch.equal(setup.student.norm.weight, setup.teacher.norm.weight)


def test_nothing_is_tried_for_a_trained_teacher_and_the_first_weights_are_the_same(recipes, monkeypatch):
    option = DPK("blocks.1", SMALL)
    first = assemble(load_recipe("student.yaml", [option]), train).method.state_dict()
    monkeypatch.setattr(build, "build_optimizer", begin)
    again = assemble(load_recipe("student.yaml", [option]), train).method.state_dict()
    assert first.keys() == again.keys()
    assert any(name.startswith("heads.") for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)
