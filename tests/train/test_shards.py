"""Tar shards as webdataset writes them: what is read, what is left out by name, and runs that go on in an epoch."""

from __future__ import annotations

import io
import json
import signal
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
    with pytest.raises(UserError, match=r"names 1 classes, but .*shard-0000\.tar: 000001\.png has the class 1"):
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
    for expected in (
        "000005.cls (no number of a class from 0 to 999999)",
        "000009.png (no ordinary file)",
        "the archive is damaged",
    ):
        assert expected in said
    assert "a.tar: 6 left out" in said  # two labels, the link, and three pictures without one
    assert all(np.asarray(pictures.load(i)).shape == (10, 10, 3) for i in range(len(pictures)))


@pytest.fixture
def at_most_ten_seconds():
    """What reads for longer than that reads forever; the error passes any `except Exception`."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it is still reading"))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """As a tar file has it; a size that octal digits cannot say is in base 256."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def blocks(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def records(**values: object) -> bytes:
    """PAX records."""
    said = b""
    for key, value in values.items():
        text = f" {key.replace('_', '.')}={value}\n".encode()
        said += next(b"%d%s" % (n, text) for n in range(len(text), 99999) if len(b"%d%s" % (n, text)) == n)
    return said


def pax(kind: bytes = tarfile.XHDTYPE, **values: object) -> bytes:
    return header("pax", len(records(**values)), kind) + blocks(records(**values))


def sample(number: int) -> bytes:
    """A whole picture and its class."""
    return b"".join(
        header(name, len(content)) + blocks(content) for name, content in samples(range(number, number + 1))
    )


def sparse_that_goes_on() -> bytes:
    """The last of its headers says that one more follows."""
    buffer = bytearray(header("000001.png", 0, tarfile.GNUTYPE_SPARSE))
    buffer[482] = 1
    buffer[148:156] = b"        "
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    return bytes(buffer)


SIZES = (-1, -511, -512, -513, -1024, -(2**40), -(2**62))
LYING = {
    **{f"header{size}": header("000001.png", size) for size in SIZES},
    **{f"label{size}": header("000001.cls", size) for size in SIZES},
    **{f"other{size}": header("000001.json", size) for size in SIZES},
    **{f"long_name{size}": header("x", size, tarfile.GNUTYPE_LONGNAME) for size in SIZES},
    **{f"pax{size}": header("x", size, tarfile.XHDTYPE) for size in SIZES},
    **{f"sparse{size}": header("000001.png", size, tarfile.GNUTYPE_SPARSE) for size in SIZES},
    **{f"pax_says{size}": pax(size=size) + header("000001.png", 512) + bytes(512) for size in SIZES},
    **{f"global_says{size}": pax(tarfile.XGLTYPE, size=size) + header("000001.png", 0) for size in SIZES},
    **{f"sparse_says{size}": pax(tarfile.XGLTYPE, GNU_sparse_size=size) + header("000001.png", 0) for size in SIZES},
    "long_name_of_much": header("x", 2**30, tarfile.GNUTYPE_LONGNAME),
    "pax_of_much": header("x", 2**30, tarfile.XHDTYPE),
    "keys_in_keys": header("x", 2**20, tarfile.XHDTYPE) + blocks(b"2 " * (2**19 - 1) + b"x="),
    "pax_after_pax": 3000 * pax(a="b"),
    "sparse_that_goes_on": sparse_that_goes_on(),
    "checksum": b"x" + header("000001.png", 3)[1:] + blocks(b"abc"),
    "huge": header("000001.png", 2**60),
}


@pytest.mark.parametrize("lie", LYING)
def test_archives_that_lie_about_sizes(tmp_path, at_most_ten_seconds, lie):
    """What stands before the lie is read, no more than that, and the shard is named."""
    (tmp_path / "a.tar").write_bytes(sample(0) + LYING[lie])
    pictures, notes = open_shards(tmp_path)
    assert [place.name for place in pictures.stored] == ["000000.png"]
    assert all(0 <= place.size < 1000 for place in pictures.stored)
    assert np.asarray(pictures.load(0)).shape == (10, 10, 3)
    (said,) = notes
    assert "a.tar: " in said
    assert "the archive is damaged" in said or "000001.png (says it has" in said or "000001.png (no ordinary" in said


def test_a_lie_in_the_middle_is_named_with_what_follows(tmp_path):
    """Also a header whose checksum is wrong, where `tarfile` would say that the archive ends."""
    broken = b"x" + header("000001.png", 3)[1:] + blocks(b"abc")
    (tmp_path / "a.tar").write_bytes(sample(0) + broken + sample(2) + bytes(1024))
    pictures, notes = open_shards(tmp_path)
    assert [place.name for place in pictures.stored] == ["000000.png"]
    assert "what follows (the archive is damaged: bad checksum)" in notes[0]
    (tmp_path / "a.tar").write_bytes(sample(0) + sample(2))  # without the two empty blocks at the end
    assert len(open_shards(tmp_path)[0]) == 2
    assert open_shards(tmp_path)[1] == []


def test_long_names_and_names_in_no_encoding(tmp_path):
    members = [(f"{'d' * 120}/{n:06}{'x' * 90}.{end}", content) for n in range(3) for end, content in
               (("png", picture(n)), ("cls", b"0"))]  # fmt: skip
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        pictures, notes = open_shards(tmp_path)
        assert [place.name for place in pictures.stored] == [name for name, _ in members[::2]]
        assert notes == []
    with tarfile.open(tmp_path / "a.tar", "a", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\xff.png"))
    (note,) = open_shards(tmp_path)[1]
    assert "\\xff.png (no class beside it)" in note


@pytest.mark.parametrize("label", [b"1000000", b"2000000000", b"9" * 19, b"9" * 20, b"-1", b"1.0", "\u0663".encode()])
def test_labels_no_class_can_have(tmp_path, label):
    write(tmp_path / "a.tar", [*samples(range(4)), ("000004.png", picture(1)), ("000004.cls", label)])
    source = load_data(DataRecipe(name="shards", root=str(tmp_path), test_fraction=0.5))
    assert source.classes == ["0", "1"]
    assert "000004.cls (no number of a class from 0 to 999999)" in source.notes[0]


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
