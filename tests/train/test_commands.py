"""The command line: a few real processes, the rest by calling `main`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastmkd.methods import Panel
from fastmkd.train.cli import COMMANDS, main
from fastmkd.train.sheet import draw_sheet


def test_train_then_export_eval_show_cost(recipes, capsys):
    assert main(["train", "student.yaml", "--schedule.epochs=1"]) == 0
    assert "test top-1" in capsys.readouterr().out
    assert main(["train", "runs/student"]) == 2
    assert "runs/student is the folder of a run; give the recipe that made it" in capsys.readouterr().err
    assert main(["eval", "runs/student"]) == 0
    assert "on 359 pictures" in capsys.readouterr().out

    assert main(["export", "runs/student", "--out", "bare.safetensors"]) == 0
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=8, patch_size=2, embed_dim=12, depth=2, num_heads=3
    )
    model.load_state_dict(load_file("bare.safetensors"))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    with safe_open("bare.safetensors", "pt") as file:
        assert '"patch_size": 2' in file.metadata()["kwargs"]

    assert main(["show", "runs/student", "--out", "sheet.png", "--count", "3"]) == 0
    with Image.open("sheet.png") as picture:
        assert picture.size[0] > 300
    assert main(["show", "student.yaml", "--schedule.epochs=1", "--out", "sheet.pdf"]) == 0
    assert Path("sheet.pdf").read_bytes().startswith(b"%PDF")

    capsys.readouterr()
    assert main(["cost", "student.yaml"]) == 0
    said = capsys.readouterr().out
    assert "teacher" in said
    assert "8 of 16" in said
    assert main(["cost", "student.yaml", "--schedule.epochs=1"]) == 0
    of_recipe = capsys.readouterr().out
    assert main(["cost", "runs/student"]) == 0
    assert capsys.readouterr().out == of_recipe
    assert main(["cost", "student.yaml", "--method.init_args.keep_ratio=0.3"]) == 0
    assert "5 of 16" in capsys.readouterr().out  # the recipe's own share
    assert (
        main(["cost", "deit_small_patch16_224", "--image_size=384", "--keep", "0.5", "--pictures=1000", "--epochs=1"])
        == 0
    )
    assert "7.1 T" in capsys.readouterr().out


def test_onnx_export_computes_what_the_model_does(taught):
    onnxruntime = pytest.importorskip("onnxruntime")
    main(["train", "teacher.yaml"])
    assert main(["export", "runs/teacher", "--out", "bare.onnx"]) == 0
    assert main(["export", "runs/teacher", "--out", "bare.safetensors"]) == 0
    with safe_open("bare.safetensors", "pt") as file:
        described = file.metadata()
    model = timm.create_model(described["model"], **json.loads(described["kwargs"])).eval()
    model.load_state_dict(load_file("bare.safetensors"))
    images = torch.randn(3, 1, 8, 8)  # another batch size than the one it was traced with
    (logits,) = onnxruntime.InferenceSession("bare.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_export_names_the_packages_it_lacks(taught, capsys, monkeypatch):
    main(["train", "teacher.yaml"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["export", "runs/teacher", "--out", "bare.onnx"]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
    assert not Path("bare.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "known are train"),
        (["train", "none.yaml"], "does not exist"),
        (["train", "--seed=1"], "must come before"),
        (["train", "teacher.yaml", "--optim.lrr=1"], "optim.lrr"),
        (["train", "teacher.yaml", "--student.name=vit_nano"], "timm does not know"),
        (["eval", "runs"], "no recipe.json"),
        (["export", "runs", "--out", "x.safetensors"], "no recipe.json"),
        (["show", "teacher.yaml"], "has no finished run"),
        (["show", "runs/nope"], "runs/nope is neither the folder of a run nor a recipe (YAML)."),
        (["show", "nope.yaml"], "the recipe nope.yaml does not exist"),
        (["suggest-keep", "runs/nope"], "runs/nope is neither the folder of a run nor a recipe (YAML)."),
        (["train", "."], ". is a folder; give a recipe (YAML)."),
        (["cost", "runs/nope"], "or names of timm's models; runs/nope is none of these."),
        (["cost", "."], "no recipe.json"),
        (["export", "runs/x"], "required: --out (file to write, such as student.safetensors or student.onnx)."),
        (["eval", "runs/x", "--weight=y"], "--weight is not known; did you mean --weights?"),
        (["cka", "runs/x", "--layers=blocks.0"], "layers is blocks.0; it takes a list, such as [blocks.0] or null"),
        (["scenes", "x", "--image=3"], "--image is not known; did you mean --images?"),
        (["cost", "resnet18"], "counts ViTs only"),
        (["cost", "deit_tiny_patch16_224", "--keep=2"], "--keep has 2.0"),
        (["cost", "deit_tiny_patch16_224", "--epochs=0"], "--epochs is 0"),
        (["cost", "deit_tiny_patch16_224", "--optim.lr=1"], "--optim.lr=1 is an option of a recipe"),
        (["env", "now"], "no arguments"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(recipes, capsys, arguments, said):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_debug_shows_where(recipes, monkeypatch):
    monkeypatch.setenv("FASTMKD_DEBUG", "1")
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", "none.yaml"])


def test_missing_extra_says_what_to_install(recipes, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["train", "teacher.yaml"]) == 2
    assert 'pip install -e ".[train]" in the repository' in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    assert "--optim.lr" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(capsys, name):
    try:
        code = main([name, "--help"])
    except SystemExit as left:  # argparse's way
        code = left.code
    assert code == 0
    assert f"usage: fastmkd {name}" in capsys.readouterr().out


def test_processes(command, recipes):
    shown = command("env")
    assert shown.returncode == 0, shown.stderr
    assert "torch" in shown.stdout
    wrong = subprocess.run(  # a new process, as a user starts it
        [sys.executable, "-m", "fastmkd.train.cli", "train", "none.yaml"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert command("train", "none.yaml", FASTMKD_DEBUG="1").stderr.count("Traceback") == 1
    done = command("train", "teacher.yaml")
    assert done.returncode == 0, done.stderr
    assert "update 4/4" in done.stdout


def test_sheet_of_any_panels(tmp_path):
    image = torch.rand(2, 3, 8, 8)
    panels = [
        Panel("input", image, "image"),
        Panel("heat", torch.rand(2, 8, 8), "heat"),
        Panel("mask", (torch.rand(2, 8, 8) > 0.5).float(), "mask"),
    ]
    draw_sheet(panels, ["a", "b"], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg"):
        draw_sheet(panels, ["a", "b"], tmp_path / "sheet.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
