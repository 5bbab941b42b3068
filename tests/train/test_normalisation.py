"""A teacher, and weights that timm has downloaded, see pictures with the mean and deviation they were trained with."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fastmkd.train.build import assemble
from fastmkd.train.data import load_data
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.normalisation import Norm
from fastmkd.train.recipe import load_recipe

OTHER = "--teacher.options={data.mean: [0.9], data.std: [0.1]}"
FEATURES = ["--method=fastmkd.methods.FeatureKD"]
HALF = "vit_small_patch16_224.augreg_in21k_ft_in1k"  # mean and std 0.5


class TrainedError(Exception):
    """The teacher's training has begun."""


def begin(recipe):
    raise TrainedError


@pytest.fixture
def folder(recipes, monkeypatch):
    """Pictures in folders; what timm would download are random weights."""
    rng, create = np.random.default_rng(0), timm.create_model
    for part in ("train", "val"):
        for name in "ab":
            (recipes / "pictures" / part / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(recipes / f"pictures/{part}/{name}/{i}.png")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))
    return [
        "--data={name: imagefolder, root: pictures, image_size: 32, workers: 0, batch_size: 2}",
        "--student.kwargs={depth: 1, embed_dim: 12, num_heads: 3}",
        f"--teacher={{name: {HALF}, kwargs: {{depth: 1, img_size: 32}}, pretrained: true}}",
    ]


DEEPER = "--teacher.options={data.mean: [0.9], data.std: [0.1], student.kwargs.depth: 2}"


@pytest.mark.parametrize("options", [[], ["--method=fastmkd.DMAE", "--ema=null", DEEPER]], ids=["MaskedKD", "DMAE"])
def test_a_teachers_run_says_how_it_sees_pictures(recipes, options):
    torch.manual_seed(0)
    setup = assemble(load_recipe("student.yaml", [OTHER, *options]), train)
    pixels = torch.rand(2, 1, 8, 8)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (setup.source.mean, setup.source.std))
    given = setup.method._teacher_input((pixels - mean) / std)
    torch.testing.assert_close(given, (pixels - 0.9) / 0.1)
    alike = ["--data.mean=[0.9]", "--data.std=[0.1]"]
    same = assemble(load_recipe("student.yaml", [OTHER, *options, *alike]), train)
    assert torch.equal(same.method._teacher_input(pixels), pixels)


def test_norms_of_the_recipe_win(recipes):
    norms = ["--method.student_norm=[[0.5], [0.5]]", "--method.teacher_norm=[[0.5], [0.5]]"]
    setup = assemble(load_recipe("student.yaml", [OTHER, *norms]), train)
    pixels = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(setup.method._teacher_input(pixels), pixels)


def test_a_method_that_cannot_is_refused_before_the_teacher_is_trained(recipes):
    said = r"the teacher was trained on pictures with mean \[0\.9\] and std \[0\.1\], and this recipe has mean .*; "
    for when in (begin, train):
        with pytest.raises(UserError, match=said + "FeatureKD gives both networks the same pictures"):
            assemble(load_recipe("student.yaml", [OTHER, *FEATURES]), when)
    with pytest.raises(TrainedError):
        assemble(load_recipe("student.yaml", FEATURES), begin)
    train(load_recipe("teacher.yaml", ["--data.mean=[0.9]", "--data.std=[0.1]"]))
    with pytest.raises(UserError, match=said):
        assemble(load_recipe("student.yaml", [OTHER, *FEATURES]), train)


def test_a_downloaded_teacher_is_shown_its_own(folder):
    setup = assemble(load_recipe(options=[*folder, "--method=MaskedKD"]), begin)
    assert Norm(**{k: setup.teacher.pretrained_cfg[k] for k in ("mean", "std")}).fits(Norm((0.5,) * 3, (0.5,) * 3))
    assert setup.source.notes == []
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (setup.source.mean, setup.source.std))
    torch.testing.assert_close(setup.method._teacher_input((pixels - mean) / std), 2 * pixels - 1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "role"),
    [(FEATURES, "teacher"), (["--teacher=null", "--method=Supervised", "--student.pretrained=true"], "student")],
)
def test_downloaded_weights_that_see_other_pictures_are_said(folder, options, role):
    named = [f"--student.name={HALF}"] if role == "student" else []
    setup = assemble(load_recipe(options=[*folder, *named, *options]), begin)
    assert setup.source.notes == [
        f"the pretrained weights of the {role} {HALF} were trained on pictures with mean [0.5, 0.5, 0.5] and std "
        "[0.5, 0.5, 0.5], and get pictures with mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]; data.mean "
        "and data.std say otherwise."
    ]
    fit = ["--data.mean=[0.5, 0.5, 0.5]", "--data.std=[0.5, 0.5, 0.5]"]
    assert assemble(load_recipe(options=[*folder, *named, *options, *fit]), begin).source.notes == []


def test_grey_pictures_are_not_compared_with_coloured_ones():
    source = load_data(load_recipe().data)
    assert Norm(source.mean, source.std).fits(Norm((0.5,) * 3, (0.5,) * 3))
