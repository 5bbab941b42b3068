"""Files that lie, overflow or want to run code: refused with a sentence, or skipped, counted and named."""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fastmkd.methods.strategies import ExternalSaliency
from fastmkd.train import cli
from fastmkd.train.checkpoint import load_checkpoint, save_checkpoint, save_tensors
from fastmkd.train.coco import read_coco
from fastmkd.train.data import load_data
from fastmkd.train.encoder_checkpoint import load_encoder_checkpoint
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.idx import read_idx
from fastmkd.train.loading import Loader
from fastmkd.train.models import load_weights, read_state_dict
from fastmkd.train.recipe import load_recipe
from fastmkd.train.schema import DataRecipe
from fastmkd.train.tasks import task_of

SMALL = {"patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 8, "in_chans": 1, "num_classes": 10}


def outcome(read: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """The sentence with which something is refused, "" if it is not, and what was read."""
    try:
        return "", read(*arguments)
    except UserError as error:
        return str(error), None


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def malicious_files(folder: Path) -> list[Path]:
    """As PyTorch's formats, old and new, and as plain pickles; each would make the folder "taken"."""
    malice = Malice(folder / "taken")
    state = timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict()
    contents = {
        "alone": malice, "beside": {**state, "malice": malice}, "in_model": {"model": state, "args": malice},
        "in_teacher": {"teacher": state, "student": state, "optimizer": {"state": malice}},
    }  # fmt: skip
    files = []
    for name, content in contents.items():
        for suffix in (".pth", ".pt", ".bin", ".ckpt"):
            torch.save(content, folder / f"{name}{suffix}", _use_new_zipfile_serialization=suffix != ".bin")
            files.append(folder / f"{name}{suffix}")
        for suffix in (".pkl", ".safetensors"):
            (folder / f"{name}{suffix}").write_bytes(pickle.dumps(content))
            files.append(folder / f"{name}{suffix}")
    return files


@pytest.fixture
def taken(tmp_path):
    """What must not be there afterwards; the pickles would really make it."""
    yield tmp_path / "taken"
    assert not (tmp_path / "taken").exists()
    pickle.loads(pickle.dumps(Malice(tmp_path / "taken")))
    assert (tmp_path / "taken").exists()


def checkpoint_of(file: Path, folder: Path) -> Path:
    """A checkpoint whose sizes and digests are right, with a file as its weights."""
    checkpoint = save_checkpoint(folder, 1, {"method": {"a": torch.ones(3)}}, {})
    content = file.read_bytes()
    (checkpoint / "method.safetensors").write_bytes(content)
    said = json.loads((checkpoint / "state.json").read_text())
    said["files"]["method.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "state.json").write_text(json.dumps({key: said[key] for key in ("format", "step", "files", "state")}))
    return checkpoint


REFUSED = r"hold more than tensors, and loading them could run code; it was refused|are cut off or damaged"


def test_no_loader_runs_code(tmp_path, taken):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    files = malicious_files(tmp_path)
    assert len(files) == 24
    for file in files:
        for load in (
            read_state_dict,
            lambda path: load_weights(model, path, "teacher"),
            lambda path: load_weights(model, path, "student", classifier=False),
            lambda path: load_encoder_checkpoint(model, path),
        ):
            with pytest.raises(UserError, match=REFUSED):
                load(file)
        with pytest.raises(UserError, match=r"method\.safetensors cannot be read .*use an older one"):
            load_checkpoint(checkpoint_of(file, tmp_path / "checkpoints" / file.name))
        assert not taken.exists(), file


def test_no_part_of_a_run_runs_code(recipes, taken, capsys):
    """Student, teacher, backbone, checkpoint to go on from, saliency, and the commands that open a run again."""
    train(load_recipe("teacher.yaml"))
    files = [recipes / name for name in ("beside.pth", "in_model.bin", "alone.safetensors")]
    assert set(files) < set(malicious_files(recipes))
    for file in files:
        for key in ("student.weights", "student.backbone", "teacher.weights"):
            options = [f"--{key}={file}", "--name=victim"]
            if key.startswith("teacher"):
                options += ["--teacher.recipe=null", "--teacher.name=vit_tiny_patch16_224"]
            with pytest.raises(UserError, match=REFUSED):
                train(load_recipe("student.yaml", options))
        with pytest.raises(ValueError, match=r"refused|damaged"):
            ExternalSaliency("vit_tiny_patch16_224", str(file))
    # Inside a finished run: weights and checkpoints that somebody has exchanged.
    run = recipes / "runs/teacher"
    evil = (recipes / "beside.pth").read_bytes()
    (run / "model.safetensors").write_bytes(evil)
    for file in next((run / "checkpoints").iterdir()).glob("*.safetensors"):
        file.write_bytes(evil)
    for command in (
        ["eval", str(run)], ["export", str(run), "--out=out.safetensors"], ["export", str(run), "--out=out.onnx"],
        ["finetune", str(run)], ["show", str(run)], ["train", "student.yaml"],
    ):  # fmt: skip
        assert cli.main(command) == 2, command
        said = capsys.readouterr().err
        assert re.search(rf"the weights \S*model\.safetensors (?:{REFUSED})", said), command
        assert "Traceback" not in said
        assert not list(recipes.glob("out.*"))
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        train(load_recipe("teacher.yaml"))


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_no_weights_come_in_through_the_arguments_of_a_network(recipes, taken, key):
    """Where timm loads them itself, as it sees fit."""
    file = malicious_files(recipes)[0]
    value = str(file) if key == "checkpoint_path" else {"file": str(file)}
    with pytest.raises(UserError, match=rf"student\.kwargs has {key}.*student\.weights"):
        train(load_recipe("teacher.yaml", changes={f"student.kwargs.{key}": value}))
    changes = {"teacher.recipe": None, "teacher.name": "vit_tiny_patch16_224", f"teacher.kwargs.{key}": value}
    changes["teacher.weights"] = "own.safetensors"
    with pytest.raises(UserError, match=rf"teacher\.kwargs has {key}.*teacher\.weights"):
        train(load_recipe("student.yaml", changes=changes))


def test_changed_weights_are_refused_or_read(tmp_path):
    """Any byte of the header, and random ones; never anything but a sentence."""
    file, draw = tmp_path / "w.safetensors", random.Random(0)
    save_tensors(file, {"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.int64)})
    torch.save({"a": torch.ones(3, 4)}, tmp_path / "w.pth")
    for path in (file, tmp_path / "w.pth"):
        whole = path.read_bytes()
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                content[draw.randrange(min(200, len(content)))] = draw.randrange(256)
            path.write_bytes(content[: draw.choice((len(content), draw.randrange(len(content))))])
            said, state = outcome(read_state_dict, path)
            assert said.endswith(".") or all(isinstance(value, torch.Tensor) for value in state.values())


TAGS = [
    "!!python/object/apply:os.mkdir [taken]", "!!python/object/new:os.mkdir [taken]", "!!python/name:os.mkdir",
    "!!python/module:antigravity", "!!python/object:os.mkdir {}", "!!python/tuple [1]",
]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_makes_plain_values_only(recipes, taken, tag):
    text = (recipes / "teacher.yaml").read_text()
    for broken in (text + f"\nseed: {tag}\n", text + f"\noptim: {{kwargs: {{betas: {tag}}}}}\n", tag):
        (recipes / "evil.yaml").write_text(broken)
        with pytest.raises(UserError, match=r"the recipe evil\.yaml is not right"):
            load_recipe("evil.yaml")
    with pytest.raises(UserError):
        load_recipe("teacher.yaml", [f"--optim.kwargs={{betas: {tag}}}"])


def test_yaml_that_grows_or_never_ends(recipes):
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 40))
    for text in (laughs, merges, "name: &a [*a]\n", "name: " + "[" * 5000, "\0", "a: b: c", "\xff\xfe"):
        (recipes / "evil.yaml").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"the recipe evil\.yaml is not right"):
            load_recipe("evil.yaml")
    (recipes / "shared.yaml").write_text((recipes / "teacher.yaml").read_text() + "\nema: &e {decay: 0.5}\n")
    assert load_recipe("shared.yaml").ema.decay == 0.5


def png(width: int, height: int, *, says: tuple[int, int] | None = None) -> bytes:
    """A black PNG of one bit a pixel, whose header may lie; a big one is made of very few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *(says or (width, height)), 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(kind: str, size: tuple[int, int] = (24, 16)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@functools.cache
def hostile_pictures() -> dict[str, bytes]:
    jpeg, whole = encoded("JPEG"), encoded("PNG")
    tiff = bytearray(encoded("TIFF"))
    return {
        "empty.jpg": b"", "text.jpg": b"no picture at all", "noise.png": random.Random(0).randbytes(3000),
        "program.jpg": b"#!/bin/sh\nmkdir taken\n", "postscript.jpg": encoded("EPS"), "gif.png": encoded("GIF"),
        "page.png": b"<html><body>404</body></html>", "head.jpg": jpeg[:20], "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": whole[: len(whole) // 2], "half.webp": encoded("WEBP")[:100], "half.bmp": encoded("BMP")[:200],
        "header.png": whole[:33], "bomb.png": png(12_000, 10_000), "bigger_bomb.png": png(8, 8, says=(2**31 - 1,) * 2),
        "lying.png": png(8, 8, says=(9_000, 9_000)), "nothing.png": png(8, 8, says=(0, 8)),
        "half.tiff": bytes(tiff[: len(tiff) // 2]), "lying.ppm": b"P6 60000 60000 255\n" + bytes(100),
        "short.ppm": b"P6 900 900 255\n" + bytes(100), "checksum.png": whole[:50] + b"\xff\xff\xff" + whole[53:],
    }  # fmt: skip


def image_folder(root: Path) -> list[str]:
    """Eight pictures for each of two classes, and every hostile one in the second; returns the names of those."""
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(8):
            (root / label / f"good{i}.png").write_bytes(encoded("PNG"))
    (root / "dog" / "png_in_truth.jpg").write_bytes(encoded("PNG"))  # a wrong name alone does no harm
    for name, content in hostile_pictures().items():
        (root / "dog" / name).write_bytes(content)
    (root / "dog" / "folder.png").mkdir()
    (root / "dog" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "dog" / "pipe.png")
    (root / "dog" / "zeros.png").symlink_to("/dev/zero")
    return [
        str(root / "dog" / name) for name in [*hostile_pictures(), "folder.png", "gone.png", "pipe.png", "zeros.png"]
    ]


def read_all(source, workers: int, training: bool) -> tuple[int, dict[str, str]]:
    """Reads every picture once as training or testing does; returns how many came and what was said of the others."""
    recipe = DataRecipe(batch_size=4, workers=workers)
    augment = load_recipe().augment if training else None
    loader = Loader(source.train, recipe, augment, 8, torch.device("cpu"), 0, task_of(source))
    plan = torch.arange(len(source.train)).split(4)
    return sum(len(batch.numbers) for batch in loader.batches(list(plan))), loader.bad


@pytest.mark.parametrize(("workers", "training"), [(0, False), (0, True), (2, False)])
def test_hostile_pictures_are_skipped_counted_and_named(tmp_path, workers, training):
    hostile = image_folder(tmp_path / "set/train")
    for label in ("cat", "dog"):
        (tmp_path / "set/val" / label).mkdir(parents=True)
        (tmp_path / "set/val" / label / "a.png").write_bytes(encoded("PNG"))
    source = load_data(DataRecipe(name="imagefolder", root=str(tmp_path / "set")))
    came, bad = read_all(source, workers, training)
    assert sorted(bad) == sorted(hostile)
    assert came == (len(source.train) if training else 17)  # in training a good one takes the place of a bad one
    assert "expected at most" in bad[str(tmp_path / "set/train/dog/bomb.png")]
    assert not (tmp_path / "taken").exists()


def test_hostile_pictures_with_boxes_and_masks(tmp_path):
    hostile = hostile_pictures()
    names = [*(f"good{i}.png" for i in range(4)), *hostile]
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / name).write_bytes(hostile.get(name, encoded("PNG")))
        content = {
            "images": [{"id": i, "file_name": name, "width": 24, "height": 16} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(len(names))
            ],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    (tmp_path / "train" / "empty.jpg").unlink()  # in the list and not in the folder
    came, bad = read_all(load_data(DataRecipe(name="coco", root=str(tmp_path))), 0, False)
    assert came == 4
    assert sorted(Path(name).name for name in bad) == sorted(hostile)

    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "seg" / kind / part).mkdir(parents=True)
        for name in (name for name in names if Path(name).stem not in ("half", "lying")):
            (tmp_path / "seg/images" / part / name).write_bytes(hostile.get(name, encoded("PNG")))
            mask = io.BytesIO()
            Image.fromarray(np.zeros((16, 24), np.uint8)).save(mask, "PNG")
            (tmp_path / "seg/masks" / part / f"{Path(name).stem}.png").write_bytes(mask.getvalue())
        (tmp_path / "seg/masks" / part / "good3.png").write_bytes(png(12_000, 10_000))  # the mask is the bomb
    (tmp_path / "seg/classes.txt").write_text("a\nb\n")
    came, bad = read_all(load_data(DataRecipe(name="segfolder", root=str(tmp_path / "seg"))), 0, False)
    assert came == 3
    assert str(tmp_path / "seg/images/train/good3.png") in bad


ATOMS = [None, True, -1, 0, 2**70, 10**400, 1e308, float("inf"), float("nan"), "x", "\0", "../x", [], [1], {}]


def places(value, path=()):
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def test_lying_coco_files_are_refused_or_read(tmp_path):
    """Every value of a file in turn becomes every hostile one, and then is missing."""
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 24, "height": 16}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 1, 5, 5], "area": 9.0, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "thing"}],
    }
    file, refused, tried = tmp_path / "train.json", 0, 0
    for path in places(content):
        for atom in [*ATOMS, "missing"]:
            changed = {"whole": copy.deepcopy(content)}
            owner, *keys = [changed["whole"] if path else changed, *(path or ("whole",))]
            for key in keys[:-1]:
                owner = owner[key]
            if atom == "missing":
                del owner[keys[-1]]
            else:
                owner[keys[-1]] = atom
            file.write_text(json.dumps(changed.get("whole")))
            tried += 1
            said, part = outcome(read_coco, file, tmp_path)
            assert said.endswith(".") or part.pictures.target(0)["boxes"].isfinite().all()
            refused += bool(said)
    assert tried > 300
    assert refused > tried / 2
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_coco(file, tmp_path)


def test_lying_idx_files_are_refused(tmp_path):
    whole = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, *range(24)])
    draw = random.Random(0)
    for name, pack in (("images", bytes), ("images.gz", gzip.compress)):
        for place in range(16):
            for value in (0, 1, 127, 128, 255):
                content = pack(whole[:place] + bytes([value]) + whole[place + 1 :])
                if draw.random() < 0.3:
                    content = content[: draw.randrange(len(content))]
                (tmp_path / name).write_bytes(content)
                said, images = outcome(read_idx, tmp_path / name, 3)
                assert said.endswith((".", "?")) or images.shape == (2, 3, 4)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(whole + bytes(50_000_000)))
    with pytest.raises(UserError, match="goes on after the 24 values"):
        read_idx(tmp_path / "bomb.gz", num_dims=3)
