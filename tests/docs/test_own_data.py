"""What the README says about a recipe's keys, own pictures and an own teacher is so."""

from __future__ import annotations

import contextlib
import re
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fastmkd.train.build import assemble, refuse_to_train
from fastmkd.train.cli import main
from fastmkd.train.recipe import load_recipe
from fastmkd.train.schema import MethodRecipe, Recipe

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text().split())


def keys(kind: type, before: str = "") -> list[str]:
    """All keys of a recipe with dots, but for those of the method, which each has its own."""
    found = []
    for item in fields(kind):
        hint = typing.get_type_hints(kind)[item.name]
        inner = next((part for part in (hint, *typing.get_args(hint)) if is_dataclass(part)), None)
        if inner is None:
            found.append(before + item.name)
        elif inner is not MethodRecipe:
            found += keys(inner, f"{before}{item.name}.")
    return found


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with contextlib.suppress(SystemExit):
        main(["train", *arguments])
    return capsys.readouterr().out


def test_the_help_names_every_key(capsys):
    recipe = str(ROOT / "recipes" / "maskedkd_digits.yaml")
    assert "`fastmkd train --help`" in README
    assert "`fastmkd train RECIPE.yaml --teacher.help`, `--method.help=MaskedKD`" in README
    whole, teacher = helped(capsys, "--help"), helped(capsys, recipe, "--teacher.help")
    names = keys(Recipe)
    assert "optim.lr" in names
    for name in names:
        if not name.startswith("ema."):
            assert f"--{name} " in (teacher if name.startswith("teacher.") else whole), name
    assert "--method.keep_ratio" in helped(capsys, recipe, "--method.help=MaskedKD")


@pytest.mark.parametrize("layout", ["FOLDER/{part}/CLASS/PICTURE", "FOLDER/CLASS/PICTURE"])
def test_own_pictures_and_an_own_teacher(tmp_path, layout):
    options = re.search(r"`(--data\.name=\S+ --data\.root=FOLDER)` with `(\S+)` and `(\S+)`, or `(\S+)`", README)
    assert options is not None
    assert options.groups()[1:] == (
        "FOLDER/train/CLASS/PICTURE", "FOLDER/val/CLASS/PICTURE", "FOLDER/CLASS/PICTURE",
    )  # fmt: skip
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            for number in range(3):
                name = layout.format(part=part).replace("CLASS", kind).replace("PICTURE", f"{number}.png")
                path = tmp_path / name.replace("FOLDER", "pictures")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (40 * number, 9, 200)).save(path)
    network = timm.create_model("deit_tiny_patch16_224", num_classes=2, img_size=32)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")

    line = re.search(r"`(teacher: \{name: TIMM_NAME, weights: FILE.safetensors\})`", README)
    assert line is not None
    own = line[1].replace("TIMM_NAME", "deit_tiny_patch16_224").replace("FILE", str(tmp_path / "teacher"))
    text = (ROOT / "recipes" / "maskedkd_digits.yaml").read_text()
    recipe = tmp_path / "own.yaml"
    recipe.write_text(re.sub("^teacher:.*$", own, text, flags=re.MULTILINE))

    given = options[1].replace("FOLDER", str(tmp_path / "pictures")).split()
    setup = assemble(load_recipe(recipe, [*given, "--data.image_size=32"]), refuse_to_train)
    assert setup.source.classes == ["cat", "dog"]
    assert setup.teacher is not None
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in setup.teacher.state_dict().items())
