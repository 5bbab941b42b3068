"""Grey pictures of more than eight bits: as dark as they are, or named as unreadable; never all white."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmkd.train.data import load_data
from fastmkd.train.loading import Loader, eval_plan
from fastmkd.train.pictures import as_rgb, open_picture
from fastmkd.train.schema import DataRecipe

GREY = np.arange(256, dtype=np.uint8).reshape(8, 32)
DEEP = (GREY.astype(np.uint16) << 8) + 77  # what the lower bits are does not count


def stored(pixels: np.ndarray, kind: str) -> io.BytesIO:
    """A file in memory."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    file.seek(0)
    return file


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<i4")])
def test_sixteen_bits_keep_their_upper_eight(kind, dtype):
    with open_picture(stored(DEEP.astype(dtype), kind)) as picture:
        assert picture.mode.startswith("I")
        found = np.asarray(as_rgb(picture))
    assert found.shape == (8, 32, 3)
    assert (found == GREY[:, :, None]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_unreadable(dtype):
    said = "32 bits, of which nobody knows which is white"
    with open_picture(stored(GREY.astype(dtype), "TIFF")) as picture, pytest.raises(ValueError, match=said):
        as_rgb(picture)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_as_pillow_reads_them(mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)).convert(mode)
    assert (np.asarray(as_rgb(picture)) == np.asarray(picture.convert("RGB"))).all()


def test_a_deep_picture_that_is_cut_off_is_no_picture():
    content = stored(np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16), "PNG").getvalue()
    half = io.BytesIO(content[: len(content) // 2])
    with open_picture(half) as picture, pytest.raises(OSError, match="truncated"):
        as_rgb(picture)


def write_set(name: str, root: Path) -> None:
    """A set of one picture per part, its pixels 16 bits deep, and beside it one of 32-bit numbers."""
    for part in ("train", "val"):
        folder = {"coco": root / part, "segfolder": root / "images" / part, "imagefolder": root / part / "a"}[name]
        folder.mkdir(parents=True)
        for number, pixels in enumerate((DEEP, GREY.astype(np.float32))):
            (folder / f"{number}.tif").write_bytes(stored(pixels, "TIFF").getvalue())
            if name == "segfolder":
                (root / "masks" / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(GREY * 0).save(root / f"masks/{part}/{number}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.tif", "width": 32, "height": 8} for i in range(2)],
            "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(2)],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (root / f"{part}.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("a\nb\n")


@pytest.mark.parametrize("name", ["imagefolder", "coco", "segfolder"])
def test_every_kind_of_data_reads_them(tmp_path, name):
    write_set(name, tmp_path)
    recipe = DataRecipe(name=name, root=str(tmp_path), image_size=32, workers=0)
    source = load_data(recipe)
    assert (np.asarray(source.test.load(0)) == GREY[:, :, None]).all()
    if name == "imagefolder":
        loader = Loader(source.test, recipe, None, 32, torch.device("cpu"), 0)
        (batch,) = loader.batches(eval_plan(2, 2, 0, 1))
        assert len(batch.images) == 1
        assert ["32 bits" in reason for reason in loader.bad.values()] == [True]
