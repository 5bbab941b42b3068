"""``fastmkd scenes OUT``: makes a small set for detection and segmentation out of pictures that are already here.

Writes pictures, COCO annotations (``train.json``, ``val.json``) and class masks (``train_masks``, ``val_masks``).
Training pictures are made of the source's training part only, validation pictures of its test part.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from .checkpoint import atomic_write
from .coco_rle import encode_mask
from .data import load_data
from .errors import UserError
from .parser_messages import parse
from .pictures import TensorPictures
from .scenes import STYLES, Scene, make_scene
from .schema import DataRecipe

__all__ = ["ScenesRecipe", "draw_scenes", "main", "write_scenes"]

SMALLEST = 32  # pixels; below, most objects would be specks


@dataclass
class ScenesRecipe:
    """Which set to make.

    Attributes:
        source: what stands on the canvases.
        root: folder of the source's files; null looks in the usual places.
        images: training pictures.
        val_images: validation pictures; null is a quarter as many.
        size: side of a canvas in pixels.
        split: easy has one to three large things apart on a plain ground; hard has many of all sizes, over each other
            and the border, on textures with clutter, crowds, and canvases of several sizes.
        seed: another one makes another set.
    """

    source: Literal["fashion-mnist", "digits"] = "fashion-mnist"
    root: str | None = None
    images: int = 1000
    val_images: int | None = None
    size: int = 128
    split: Literal["easy", "hard"] = "hard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.val_images is None:
            self.val_images = max(1, self.images // 4)
        for name, least in (("images", 1), ("val_images", 1), ("size", SMALLEST), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; expected at least {least}.")


def write_scenes(out: str | Path, recipe: ScenesRecipe) -> dict[str, list[Scene]]:
    """Makes a set in a new folder; a folder that is there is complete.

    Args:
        out: the folder.
        recipe: which set.

    Returns:
        The first pictures of each part, for a look.

    Raises:
        UserError: the folder exists, or the source's files are missing.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another folder for the set.")
    source = load_data(DataRecipe(name=recipe.source, root=recipe.root))
    making = out.with_name(f"{out.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    first: dict[str, list[Scene]] = {}
    for part, pictures, count in (("train", source.train, recipe.images), ("val", source.test, recipe.val_images)):
        assert isinstance(pictures, TensorPictures)
        assert count is not None
        first[part] = _write_part(making, part, pictures, count, source.classes, recipe)
    making.rename(out)
    return first


def _write_part(
    folder: Path, part: str, source: TensorPictures, count: int, classes: Sequence[str], recipe: ScenesRecipe
) -> list[Scene]:
    pictures, masks = folder / part, folder / f"{part}_masks"
    for path in (pictures, masks):
        path.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    shown = []
    for number in range(count):
        scene = make_scene(source, STYLES[recipe.split], recipe.size, recipe.seed, part, number)
        name = f"{number + 1:06}.png"
        Image.fromarray(scene.image).save(pictures / name)
        Image.fromarray(scene.classes).save(masks / name)
        height, width = scene.classes.shape
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        for thing in scene.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,  # from 1: pycocotools takes 0 for "no match"
                    "image_id": number + 1,
                    "category_id": thing.category,
                    "bbox": list(thing.box),
                    "area": int(thing.mask.sum()),
                    "iscrowd": int(thing.crowd),
                    "segmentation": encode_mask(thing.mask),
                    "sources": list(thing.sources),
                }
            )
        if number < 6:
            shown.append(scene)
    made = f"fastmkd scenes: {recipe.split}, {recipe.source}, size {recipe.size}, seed {recipe.seed}"
    content = {
        "info": {"description": made},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(classes)],
    }
    (folder / f"{part}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    return shown


def draw_scenes(scenes: Sequence[Scene], out: str | Path) -> None:
    """Draws pictures in a row, and under each its masks with the boxes; crowds are grey.

    Args:
        scenes: what to draw.
        out: PNG to write; it has 128 colours, so that it stays small.
    """
    gap = 4
    height = max(scene.classes.shape[0] for scene in scenes)
    width = sum(scene.classes.shape[1] + gap for scene in scenes) - gap
    sheet = Image.new("RGB", (width, 2 * height + gap), "white")
    hues = np.random.RandomState(3).randint(60, 240, (64, 3)).astype(np.uint8)
    left = 0
    for scene in scenes:
        truth = np.zeros_like(scene.image)
        for number, thing in enumerate(scene.objects):
            truth[thing.mask] = 120 if thing.crowd else hues[number]
        drawn = Image.fromarray(truth)
        pen = ImageDraw.Draw(drawn)
        for thing in scene.objects:
            x, y, w, h = thing.box
            pen.rectangle((x, y, x + w - 1, y + h - 1), outline="grey" if thing.crowd else "white")
        sheet.paste(Image.fromarray(scene.image), (left, height - drawn.height))
        sheet.paste(drawn, (left, height + gap))
        left += drawn.width + gap
    small = sheet.quantize(128, dither=Image.Dither.NONE)
    atomic_write(out, lambda part: small.save(part, format="PNG", optimize=True))


def main(argv: Sequence[str]) -> int:
    """Makes a set.

    Args:
        argv: after the command's name.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="fastmkd scenes", exit_on_error=False, allow_abbrev=False, description=(__doc__ or "").strip()
    )
    parser.add_argument("out", type=str, help="folder to make")
    parser.add_class_arguments(ScenesRecipe)
    parser.add_argument("--sheet", type=str | None, help="also draw the first training pictures in this .png")
    arguments = parse(parser, argv)
    out, sheet = arguments.pop("out"), arguments.pop("sheet")
    recipe = ScenesRecipe(**arguments.as_dict())
    shown = write_scenes(out, recipe)
    sys.stdout.write(f"wrote {recipe.images} training and {recipe.val_images} validation pictures to {out}\n")
    if sheet is not None:
        draw_scenes(shown["train"], sheet)
        sys.stdout.write(f"wrote {sheet}\n")
    return 0
