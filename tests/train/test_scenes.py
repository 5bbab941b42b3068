"""The made set: the truth is the truth of the pixels, a seed means the same bytes, and the parts share nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmkd.train.cli import main
from fastmkd.train.coco_rle import decode_mask, encode_mask
from fastmkd.train.data import load_data
from fastmkd.train.errors import UserError
from fastmkd.train.scenes import STYLES, _Canvas, _Stamp, make_scene
from fastmkd.train.scenes_command import ScenesRecipe, draw_scenes, write_scenes
from fastmkd.train.schema import DataRecipe

DIGITS = ScenesRecipe(source="digits", images=16, val_images=4, size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "hard"
    write_scenes(out, DIGITS)
    return out


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def annotations_of(content: dict, image: dict) -> list[dict]:
    return [one for one in content["annotations"] if one["image_id"] == image["id"]]


def test_a_seed_means_the_same_bytes(folder, tmp_path):
    write_scenes(tmp_path / "again", DIGITS)
    first, again = digest(folder), digest(tmp_path / "again")
    assert first == again
    assert len(first) == 2 * (16 + 4) + 2
    write_scenes(tmp_path / "other", ScenesRecipe(source="digits", images=16, val_images=4, size=64, seed=1))
    other = digest(tmp_path / "other")
    assert other.keys() == first.keys()
    assert not {name for name in first if name.endswith(".png") and "masks" not in name and first[name] == other[name]}


def test_pixels_are_the_same_on_every_machine():
    source = load_data(DataRecipe(name="digits")).train
    scenes = [make_scene(source, STYLES[split], 64, 0, "train", 4) for split in ("easy", "hard")]
    digests = [hashlib.sha256(scene.image.tobytes() + scene.classes.tobytes()).hexdigest()[:12] for scene in scenes]
    assert digests == ["2b21a906b910", "59002383f24f"]


def test_a_larger_set_begins_with_the_smaller(folder, tmp_path):
    write_scenes(tmp_path / "few", ScenesRecipe(source="digits", images=3, val_images=2, size=64))
    few, many = digest(tmp_path / "few"), digest(folder)
    assert all(many[name] == value for name, value in few.items() if name.endswith(".png"))


def test_annotations_describe_the_pixels(folder):
    for part in ("train", "val"):
        content = json.loads((folder / f"{part}.json").read_text())
        assert [category["id"] for category in content["categories"]] == list(range(1, 11))
        assert len({one["id"] for one in content["annotations"]}) == len(content["annotations"])
        for image in content["images"]:
            with Image.open(folder / part / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.mode == "RGB"
            classes = np.asarray(Image.open(folder / f"{part}_masks" / image["file_name"]))
            built = np.zeros_like(classes)
            for one in annotations_of(content, image):
                mask = decode_mask(one["segmentation"])
                assert mask.shape == classes.shape
                assert not built[mask].any()  # each pixel shows one thing
                built[mask] = one["category_id"]
                rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
                x, y, w, h = one["bbox"]
                assert (x, y, x + w, y + h) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                assert one["area"] == mask.sum() >= 1
            assert np.array_equal(built, classes)


def test_hard_pictures_have_what_is_hard(folder):
    content = json.loads((folder / "train.json").read_text())
    by_image = [annotations_of(content, image) for image in content["images"]]
    assert sum(not found for found in by_image) == 1  # of 16
    crowds = [one for one in content["annotations"] if one["iscrowd"]]
    assert len(crowds) >= 2
    assert all(len(one["sources"]) > 3 for one in crowds)
    assert max(map(len, by_image)) >= 7
    sides = [max(one["bbox"][2:]) for one in content["annotations"] if not one["iscrowd"]]
    assert min(sides) <= 10
    assert max(sides) >= 25  # of 64 pixels
    boxes = [[one["bbox"] for one in found if not one["iscrowd"]] for found in by_image]
    assert sum(overlap(a, b) for found in boxes for a in found for b in found if a is not b) > 10
    assert len({(image["width"], image["height"]) for image in content["images"]}) > 3


def overlap(a: list[int], b: list[int]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def test_easy_pictures_are_easy(tmp_path):
    write_scenes(tmp_path / "easy", ScenesRecipe(source="digits", images=16, val_images=1, size=64, split="easy"))
    content = json.loads((tmp_path / "easy" / "train.json").read_text())
    counts = [len(annotations_of(content, image)) for image in content["images"]]
    assert counts[15] == 0
    assert set(counts[:15]) <= {1, 2, 3}
    for image in content["images"]:
        found = annotations_of(content, image)
        assert not any(overlap(a["bbox"], b["bbox"]) for a in found for b in found if a is not b)
        assert all(not one["iscrowd"] and max(one["bbox"][2:]) >= 12 for one in found)
        pixels = np.asarray(Image.open(tmp_path / "easy" / "train" / image["file_name"]))
        masks = [decode_mask(one["segmentation"]) for one in found]
        far = ~np.any([np.zeros(pixels.shape[:2], bool), *masks], axis=0)
        far &= ~np.roll(~far, 1, 0) & ~np.roll(~far, -1, 0) & ~np.roll(~far, 1, 1) & ~np.roll(~far, -1, 1)
        colours, counts_of = np.unique(pixels[far], axis=0, return_counts=True)
        assert counts_of.max() > 0.9 * far.sum()  # one ground, but for soft edges
        assert len(colours)


def test_a_thing_that_would_hide_too_much_of_another_is_not_pasted():
    canvas = _Canvas(np.zeros((20, 20, 3), np.uint8))
    stamp = _Stamp(np.full((10, 10, 3), 200, np.uint8), np.full((10, 10), 255, np.uint8))
    assert canvas.paste(stamp, 0, 0, 1)
    canvas.facts.append((5, (0,), False))
    before = canvas.image.copy()
    assert not canvas.paste(stamp, 0, 2, 2)  # would leave 20 of 100 pixels
    assert not canvas.paste(stamp, 0, 2, 0)  # so would clutter
    assert not canvas.paste(stamp, 18, 0, 2)  # would itself show only 20
    assert np.array_equal(canvas.image, before)
    assert canvas.paste(stamp, 0, 3, 2)
    canvas.facts.append((6, (1,), False))
    first, second = canvas.scene().objects
    assert (first.box, second.box) == ((0, 0, 3, 10), (3, 0, 10, 10))
    assert (first.mask.sum(), second.mask.sum()) == (30, 100)
    assert canvas.scene().classes[0, [0, 3, 13]].tolist() == [5, 6, 0]


def test_train_and_val_share_no_source_picture(folder):
    source = load_data(DataRecipe(name="digits"))
    seen: dict[str, set[bytes]] = {}
    for part, pictures in (("train", source.train), ("val", source.test)):
        content = json.loads((folder / f"{part}.json").read_text())
        used = {(index, one["category_id"]) for one in content["annotations"] for index in one["sources"]}
        assert len(used) > 15
        assert all(pictures.labels[index] + 1 == category for index, category in used)
        seen[part] = {pictures.images[index].numpy().tobytes() for index, _ in used}
    assert not seen["train"] & seen["val"]


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.arange(12).reshape(3, 4) % 5 < 2])
def test_rle_round_trip(mask):
    rle = encode_mask(mask)
    assert sum(rle["counts"]) == 12
    assert np.array_equal(decode_mask(rle), mask)


def test_rle_that_lies_is_refused():
    with pytest.raises(ValueError, match="add up to 5"):
        decode_mask({"size": [2, 2], "counts": [2, 3]})


def test_pycocotools_reads_the_masks_alike(folder):
    coco = pytest.importorskip("pycocotools.coco").COCO(str(folder / "train.json"))
    for one in list(coco.anns.values())[:40]:
        assert np.array_equal(coco.annToMask(one).astype(bool), decode_mask(one["segmentation"]))


def test_command_writes_a_set_and_a_sheet(tmp_path, capsys):
    arguments = ["scenes", str(tmp_path / "made"), "--source=digits", "--images=4", "--size=48", "--split=easy"]
    assert main([*arguments, "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "4 training and 1 validation" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 52 - 4, 100)
    assert main(arguments) == 2
    assert "exists; remove it" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "made")
    assert main([*arguments, "--images=0"]) == 2
    assert "--images is 0; expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_what_was_left_by_an_interrupted_command_is_replaced(tmp_path):
    part = tmp_path / "made.part" / "train"
    part.mkdir(parents=True)
    (part / "old.png").touch()
    shown = write_scenes(tmp_path / "made", ScenesRecipe(source="digits", images=2, size=32))
    assert sorted(path.name for path in (tmp_path / "made" / "train").iterdir()) == ["000001.png", "000002.png"]
    assert len(shown["train"]) == 2
    assert not (tmp_path / "made.part").exists()
    draw_scenes(shown["train"], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size < 50_000


def test_a_source_that_is_missing_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        write_scenes(tmp_path / "made", ScenesRecipe(root=str(tmp_path), images=1))
    assert not (tmp_path / "made").exists()
