"""Tar shards as webdataset writes them: what is read, what is left out by name, and runs that go on in an epoch."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastmkd.train.data import load_data
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe
from fastmkd.train.schema import DataRecipe
from fastmkd.train.shards import open_shards

RECIPE = """
name: shards
data: {name: shards, root: data, image_size: 8, batch_size: 4, eval_batch_size: 16, workers: 0}
student: {kwargs: {patch_size: 4, embed_dim: 12, depth: 1, num_heads: 3, drop_path_rate: 0.2}}
schedule: {epochs: 2, warmup_epochs: 0}
augment: {crop: resized, flip: 0.5}
run: {tensorboard: false, device: cpu, save_every: 2, keep: 9}
"""


def picture(value: int, size: int = 10) -> bytes:
    """A PNG whose colour says its number and whose left half is darker."""
    pixels = np.full((size, size, 3), value, dtype=np.uint8)
    pixels[:, : size // 2] //= 2
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(numbers: range, classes: int = 2) -> list[tuple[str, bytes]]:
    return [
        part
        for n in numbers
        for part in ((f"{n:06}.png", picture(10 * n + 5)), (f"{n:06}.cls", b"%d\n" % (n % classes)))
    ]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures in three shards to train on, 6 in one to test on."""
    for shard in range(3):
        write(tmp_path / f"data/train/shard-{shard:04}.tar", samples(range(8 * shard, 8 * shard + 8)))
    write(tmp_path / "data/val/shard-0000.tar", samples(range(6)))
    (tmp_path / "shards.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pictures_and_classes_are_those_of_the_shards(root):
    source = load_data(DataRecipe(name="shards", root="data"))
    assert (len(source.train), len(source.test), source.classes, source.notes) == (24, 6, ["0", "1"], [])
    assert source.train.labels.tolist() == [0, 1] * 12
    for number in (0, 7, 8, 23):
        assert np.asarray(source.train.load(number))[0, -1].tolist() == [10 * number + 5] * 3
    assert source.train.where(9) == "data/train/shard-0001.tar: 000009.png"
    part = source.train.subset(torch.tensor([20, 3]))
    assert [np.asarray(part.load(i))[0, -1, 0] for i in (0, 1)] == [205, 35]
    (root / "data/classes.txt").write_text("even\nodd\n")
    assert load_data(DataRecipe(name="shards", root="data")).classes == ["even", "odd"]
    (root / "data/classes.txt").write_text("even\n")
    with pytest.raises(UserError, match=r"names 1 classes, but a picture has the class 1"):
        load_data(DataRecipe(name="shards", root="data"))


def test_one_folder_of_shards_is_split(root):
    source = load_data(DataRecipe(name="shards", root="data/train", test_fraction=0.25))
    assert (len(source.train), len(source.test)) == (18, 6)


def test_what_is_broken_is_left_out_by_name(tmp_path):
    good = samples(range(4))
    link = tarfile.TarInfo("000009.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = write(
        tmp_path / "a.tar",
        [
            *good,
            ("000004.png", picture(1)),  # no class
            ("000005.png", picture(1)), ("000005.cls", b"cat"),
            ("000006.png", picture(1)), ("000006.cls", b"1" * 500),
            ("000007.json", b"{}"), ("000007.seg.png", picture(1)),  # other things beside a picture
            ("../../000008.PNG", picture(85)), ("../../000008.cls", b"1"),  # a name is a name: nothing is written
        ],
    )  # fmt: skip
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
    (tmp_path / "b.tar").write_bytes(b"not an archive" * 100)
    cut = write(tmp_path / "c.tar", samples(range(10, 14)))
    cut.write_bytes(cut.read_bytes()[:5000])
    pictures, notes = open_shards(tmp_path)
    names = [place.name for place in pictures.stored]
    assert names[:5] == ["000000.png", "000001.png", "000002.png", "000003.png", "../../000008.PNG"]
    assert set(names[5:]) <= {"000010.png", "000011.png", "000012.png"}
    assert len(notes) == 3
    said = " ".join(notes)
    for expected in ("000005.cls (no number of a class)", "000009.png (no ordinary file)", "the archive is damaged"):
        assert expected in said
    assert "a.tar: 6 left out" in said  # two labels, the link, and three pictures without one
    assert all(np.asarray(pictures.load(i)).shape == (10, 10, 3) for i in range(len(pictures)))


def test_a_broken_picture_is_skipped_counted_and_named(root):
    path = root / "data/train/shard-0001.tar"
    members = samples(range(8, 16))
    members[4] = (members[4][0], members[4][1][:40])
    write(path, members)
    result = train(load_recipe("shards.yaml", ["--schedule.epochs=1"]))
    assert result["bad_pictures"] == ["data/train/shard-0001.tar: 000010.png"]
    assert result["updates"] == 6


def test_pictures_in_shards_are_opened_as_carefully_as_files(tmp_path, monkeypatch):
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "gif")  # no format of photographs, whatever its name says
    members = [("0.png", gif.getvalue()), ("0.cls", b"0"), ("1.png", picture(9, size=40)), ("1.cls", b"1")]
    pictures, _ = open_shards(write(tmp_path / "a.tar", members).parent)
    with pytest.raises(OSError, match="cannot identify"):
        pictures.load(0)
    assert pictures.load(1).size == (40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="40 x 40 pixels; expected at most 1000"):
        pictures.load(1)


def test_a_run_goes_on_in_the_middle_of_an_epoch(root):
    """To the same bits, whoever reads the pictures."""
    train(load_recipe("shards.yaml", ["--name=whole"]))
    whole = load_file("runs/whole/model.safetensors")
    for workers, step in ((0, 4), (2, 8)):  # in the first epoch, and in the second
        name = f"again{workers}"
        middle = f"--run.resume=runs/whole/checkpoints/step_{step:08}"
        train(load_recipe("shards.yaml", [f"--data.workers={workers}", f"--name={name}", middle]))
        again = load_file(f"runs/{name}/model.safetensors")
        assert all(torch.equal(again[key], whole[key]) for key in whole)
        assert json.loads(Path(f"runs/{name}/result.json").read_text())["updates"] == 12


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"has no \*\.tar; expected root/train"),
        ({"a.tar.gz": b""}, r"a\.tar\.gz is compressed"),
        ({"a.tar": b"x" * 600}, "no picture with a class"),
    ],
)
def test_no_pictures_are_one_sentence(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_data(DataRecipe(name="shards", root=str(tmp_path)))
    for root in (None, str(tmp_path / "none")):
        with pytest.raises(UserError, match=r"data\.root is .*expected root/train"):
            load_data(DataRecipe(name="shards", root=root))
