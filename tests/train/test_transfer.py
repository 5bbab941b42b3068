"""Linear probe of a finished run's student on other pictures (DPK, Table 16), by recipe keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fastmkd.methods import Supervised
from fastmkd.train.cli import main
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe

RESNET = "{channels: [4, 4, 8, 8], layers: [1, 1, 1, 1]}"
SOURCE = f"""
name: source
data: {{name: digits, image_size: 16, batch_size: 16, limit: 64, eval_batch_size: 360}}
student: {{name: resnet18, kwargs: {RESNET}}}
schedule: {{epochs: 2, warmup_epochs: 0}}
run: {{tensorboard: false}}
"""
METHOD = ["--method=Supervised", "--method.init_args.linear_probe=true"]
PROBE = ["--name=probe", *METHOD, "--student.backbone=runs/source/model.safetensors"]


@pytest.fixture
def source(recipes: Path) -> dict[str, torch.Tensor]:
    """The weights of a small ResNet, trained a little; source.yaml lies in the current folder."""
    (recipes / "source.yaml").write_text(SOURCE)
    return load_file(train(load_recipe("source.yaml"))["weights"])


def test_the_classifier_alone_changes(source):
    result = train(load_recipe("source.yaml", PROBE))
    probed = load_file(result["weights"])
    changed = [name for name, value in source.items() if not torch.equal(value, probed[name])]
    assert changed == ["fc.bias", "fc.weight"]  # running statistics stay too


def test_from_an_exported_file_to_other_classes(source, capsys):
    assert main(["export", "runs/source", "--out=student.safetensors"]) == 0
    options = [*PROBE[:-1], "--student.backbone=student.safetensors", "--student.kwargs.num_classes=12"]
    probed = load_file(train(load_recipe("source.yaml", options))["weights"])
    assert probed["fc.weight"].shape == (12, 8)
    assert torch.equal(probed["layer4.0.conv2.weight"], source["layer4.0.conv2.weight"])
    assert main(["eval", "runs/probe"]) == 0
    assert "top-1" in capsys.readouterr().out


def test_another_backbone_in_the_same_place_is_another_run(source):
    train(load_recipe("source.yaml", PROBE))
    train(load_recipe("source.yaml", ["--name=other", "--seed=3"]))
    Path("runs/other/model.safetensors").replace("runs/source/model.safetensors")
    with pytest.raises(UserError, match=r"student\.backbone is '.*' there and '.*' here"):
        train(load_recipe("source.yaml", PROBE))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--student.backbone=nowhere.safetensors", "nowhere.safetensors do not exist"),
        ("--student.weights=runs/source/model.safetensors", "student has weights and backbone"),
        ("--student.kwargs.channels=[4,4,8,16]", r"do not fit the student. Keys .* of another shape: layer4"),
    ],
)
def test_mistakes(source, option, said):
    with pytest.raises(UserError, match=said):
        train(load_recipe("source.yaml", [*PROBE, option]))


def test_a_network_must_have_a_classifier():
    with pytest.raises(ValueError, match="no classifier to train"):
        Supervised(timm.create_model("resnet18", num_classes=0), linear_probe=True)
    with pytest.raises(ValueError, match=r"get_classifier\(\), as timm's; Sequential has none"):
        Supervised(nn.Sequential(nn.Linear(2, 2)), linear_probe=True)
