"""The folder of a run is data: no module that its files name is imported, and nothing in them is taken for granted."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest

from fastmkd.methods.choices import choose
from fastmkd.methods.strategies import MaskStrategy
from fastmkd.train import cli
from fastmkd.train.build import open_run
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe, recipe_from_dict
from fastmkd.train.rundir import RunDir
from fastmkd.train.show import open_recipe

# What a package on the path of Python does when it is imported; its method is a good one.
PACKAGE = """
from pathlib import Path
from fastmkd.methods import Supervised
Path({taken!r}).touch()
class Mine(Supervised):
    pass
"""


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """A file that is made when the package ``othermod`` is imported."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/othermod.py").write_text(PACKAGE.format(taken=str(tmp_path / "taken")))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "othermod", raising=False)
    monkeypatch.delenv("FASTMKD_TRUST", raising=False)
    yield tmp_path / "taken"
    sys.modules.pop("othermod", None)


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """Finished runs of teacher and student that may be changed."""
    shutil.copytree(finished, tmp_path / "copied")
    monkeypatch.chdir(tmp_path / "copied")
    return tmp_path / "copied"


def change(run: Path, path: str, value: object) -> None:
    content = json.loads((run / "recipe.json").read_text())
    owner = content
    *keys, last = path.split("/")
    for key in keys:
        owner = owner[key]
    owner[last] = value
    (run / "recipe.json").write_text(json.dumps(content))


PATH, TEXT = {"class_path": "othermod.Mine"}, "othermod.Mine"
NAMING = {
    "class": {"method": PATH},
    "text": {"method": TEXT},
    "file": {"method": "named.yaml"},
    "data": {"data": TEXT},
    "data_class": {"data": PATH},
    "optim": {"optim": PATH},
    "kwargs": {"student": {"kwargs": {"norm_layer": PATH}}},
    "unknown_keys": {"method": {"class_path": "fastmkd.MaskedKD", "dict_kwargs": {"teacher_device": TEXT}}},
    **{
        f"{argument}_{kind}": {"method": {"class_path": f"fastmkd.{method}", "init_args": {argument: value}}}
        for method, argument in (
            ("DMAE", "generator"), ("DMAE", "student_norm"), ("MaskedKD", "base"), ("MaskedKD", "strategy"),
            ("MaskedKD", "teacher_dtype"), ("MaskedKD", "teacher_device"), ("DPK", "ratio"),
        )
        for kind, value in (("class", PATH), ("text", TEXT), ("file", "named.yaml"))
    },
}  # fmt: skip


@pytest.mark.parametrize("naming", NAMING)
def test_a_stored_recipe_imports_nothing(tmp_path, taken, monkeypatch, naming):
    """Some of these stay texts, as a base or a device of that name would be refused later."""
    monkeypatch.chdir(tmp_path)
    Path("named.yaml").write_text("class_path: othermod.Mine\n")
    said = ""
    try:
        recipe_from_dict(copy.deepcopy(NAMING[naming]))
    except UserError as error:
        said = str(error)
    assert not taken.exists()
    assert "othermod" not in sys.modules
    if naming.endswith("class") or naming in ("text", "file", "data"):
        assert "names othermod" in said
        assert "FASTMKD_TRUST=othermod" in said


def test_a_recipe_of_the_user_may_import(tmp_path, taken):
    """So the file would be made if anything above were imported."""
    (tmp_path / "own.yaml").write_text("method: othermod.Mine\n")
    assert load_recipe(tmp_path / "own.yaml").method.class_path == "othermod.Mine"
    assert taken.exists()
    assert recipe_from_dict({"method": dict(PATH)}).method.class_path == "othermod.Mine"  # now it is in use anyway


def test_a_package_can_be_trusted(taken, monkeypatch):
    monkeypatch.setenv("FASTMKD_TRUST", "another, othermod")
    assert recipe_from_dict({"method": dict(PATH)}).method.class_path == "othermod.Mine"
    assert taken.exists()


@pytest.mark.parametrize(
    "command",
    [["eval"], ["show", "--out=a.png"], ["cka"], ["suggest-keep"], ["show", "--accuracy-against-kept", "--out=a.png"]],
)
def test_commands_on_a_folder_import_nothing(copied, taken, capsys, command):
    run = copied / "runs/whole"
    change(run, "recipe/method", {"class_path": "othermod.Mine", "init_args": {}})
    assert cli.main([command[0], str(run), *command[1:]]) == 2
    said = capsys.readouterr().err
    assert "names othermod.Mine, which is no part of fastmkd" in said
    assert "Traceback" not in said
    assert not taken.exists()


@pytest.mark.parametrize("way", ["file", "options", "base"])
def test_the_recipe_of_a_teacher_imports_nothing(copied, taken, way):
    """Which a folder names by its path, and may bring along."""
    run = copied / "runs/whole"
    text = (copied / "teacher.yaml").read_text()
    base = "{class_path: fastmkd.MaskedKD, init_args: {base: {class_path: othermod.Mine}}}"
    added = {"file": "method: othermod.Mine\n", "options": "", "base": f"method: {base}\n"}[way]
    (copied / "brought.yaml").write_text(text + added)
    change(run, "recipe/teacher/recipe", str(copied / "brought.yaml"))
    if way == "options":
        change(run, "recipe/teacher/options", {"method": "othermod.Mine"})
    with pytest.raises(UserError, match="names othermod"):
        open_run(open_recipe(str(run)))
    assert not taken.exists()


def test_own_methods_can_be_opened_again(copied, taken, monkeypatch, capsys):
    """With the recipe, or with the package named; training goes on with the recipe anyway."""
    text = (copied / "teacher.yaml").read_text() + "method: othermod.Mine\n"
    (copied / "own.yaml").write_text(text)
    assert cli.main(["train", "own.yaml", "--name=own"]) == 0
    sys.modules.pop("othermod")
    commands = [["eval", "runs/own"], ["show", "runs/own", "--out=a.png"]]
    for command in commands:
        assert cli.main(command) == 2
        assert "FASTMKD_TRUST=othermod" in capsys.readouterr().err
    assert "othermod" not in sys.modules
    monkeypatch.setenv("FASTMKD_TRUST", "othermod")
    assert [cli.main(command) for command in commands] == [0, 0]
    sys.modules.pop("othermod")
    monkeypatch.delenv("FASTMKD_TRUST")
    assert cli.main(["show", "own.yaml", "--name=own", "--out=b.png"]) == 0
    assert cli.main(["train", "own.yaml", "--name=own"]) == 0


def test_a_class_path_makes_objects_of_its_kind_alone(tmp_path):
    """A function, or another class, would be called with arguments from a file before it is refused."""
    folder = tmp_path / "made"
    value = {"class_path": "fastmkd.train.checkpoint.save_tensors", "init_args": {"path": folder, "tensors": {}}}
    with pytest.raises(TypeError, match=r"save_tensors', which is no class of MaskStrategy"):
        choose("strategy", value, MaskStrategy, {})
    assert not folder.exists()


def test_a_description_with_other_keys_or_types_is_damaged(finished, tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    file, whole = run.path / "recipe.json", json.loads((finished / "runs/whole/recipe.json").read_text())
    file.write_text(json.dumps(whole))
    assert run.description() == whole
    paths = ["identity", "recipe", "student", "data", *(f"recipe/{key}" for key in ("name", "seed", "data", "method"))]
    paths += [f"student/{key}" for key in ("name", "kwargs")] + [
        f"data/{key}" for key in ("classes", "mean", "channels")
    ]
    for path in paths:
        for value in (None, True, [[]], "missing", ["x", 1]):
            file.write_text(json.dumps(whole))
            change(run.path, path, value)
            if value == "missing":
                text = file.read_text().replace(f'"{path.rpartition("/")[2]}": "missing"', '"other": 1')
                file.write_text(text)
            with pytest.raises(UserError, match=rf"recipe\.json is damaged: {path.replace('/', '.')} is "):
                run.description()
    for text in ("{}", "[]", "null", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UserError, match=r"recipe\.json is damaged"):
            run.claim({"seed": 1}, {})
        for command in ("eval", "export", "show", "cka", "finetune"):
            more = ["--out=w.safetensors"] if command == "export" else []
            assert cli.main([command, str(run.path), *more]) == 2
            said = capsys.readouterr().err
            assert "recipe.json is damaged" in said, command
            assert "Traceback" not in said
