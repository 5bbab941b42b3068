"""Pictures with a mask of classes each, as files: a plain folder, the layout of Cityscapes, and the made set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..methods.task_loss import IGNORE
from .errors import UserError, shorten
from .pictures import SUFFIXES, as_rgb, open_picture

__all__ = ["IGNORE", "SCENES", "MaskPictures", "MaskSet", "open_cityscapes", "open_mask_folder", "open_scene_masks"]

Array = np.ndarray[Any, Any]

SCENES = "make the set with: fastmkd scenes OUT, and point data.root at OUT"
WRONG = -1  # in a table: an id that no mask may hold

CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


class MaskSet(NamedTuple):
    """What a folder holds.

    Attributes:
        train: to train on.
        test: to test on.
        classes: their names, in the order of the ids that the networks learn.
    """

    train: MaskPictures
    test: MaskPictures
    classes: list[str]


class MaskPictures:
    """Picture files and mask files, read when they are needed.

    Args:
        pictures: files.
        masks: files of one channel, as large as their pictures, one for each.
        table: ``(256,)`` the class of each id in a mask; 255 for pixels that do not count, -1 for an id that is wrong.

    Example:
        >>> len(MaskPictures([], [], ids_are_classes(3)))
        0
    """

    def __init__(self, pictures: Sequence[Path], masks: Sequence[Path], table: Array) -> None:
        self.pictures, self.masks, self.table = list(pictures), list(masks), table
        self.labels = torch.zeros(len(self.pictures), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int) -> Any:
        """Picture `index` as a PIL image.

        Args:
            index: from 0.
        """
        with open_picture(self.pictures[index]) as picture:
            return as_rgb(picture)

    def target(self, index: int) -> Tensor:
        """Classes of picture `index`, ``(H, W)`` uint8.

        Args:
            index: from 0.

        Raises:
            UserError: the mask has colours instead of ids, an id that is no class, or another size than its picture.
        """
        path = self.masks[index]
        with open_picture(self.pictures[index]) as picture, open_picture(path) as mask:
            if mask.size != picture.size:
                raise UserError(
                    f"the mask {path} is {mask.width} x {mask.height} pixels, but its picture "
                    f"{self.pictures[index]} is {picture.width} x {picture.height}; they must be of one size."
                )
            if len(mask.getbands()) != 1:
                raise UserError(
                    f"the mask {path} has the channels {', '.join(mask.getbands())}; expected one channel whose values "
                    "are class ids (a palette may give them colours)."
                )
            ids = np.asarray(mask)
        top = ids.max(initial=0)
        classes = self.table[np.minimum(ids, IGNORE)]
        wrong = np.unique(ids[classes == WRONG]) if top <= IGNORE else [top]
        if len(wrong):
            known = (self.table != WRONG).nonzero()[0]
            raise UserError(
                f"the mask {path} holds the id {wrong[0]}; expected {known[0]} to {known[-2]}, or {IGNORE} for pixels "
                "that do not count. Are there more classes than were named?"
            )
        return torch.from_numpy(classes.astype(np.uint8))

    def where(self, index: int) -> str:
        """Names picture `index` for a message.

        Args:
            index: from 0.
        """
        return str(self.pictures[index])

    def subset(self, index: Tensor) -> MaskPictures:
        """Returns the pictures `index`.

        Args:
            index: int64.
        """
        chosen = index.tolist()
        return MaskPictures([self.pictures[i] for i in chosen], [self.masks[i] for i in chosen], self.table)


def ids_are_classes(num_classes: int) -> Array:
    """The table of masks whose ids are the classes.

    Args:
        num_classes: ids run from 0 up to one less.
    """
    table = np.full(256, WRONG)
    table[:num_classes] = np.arange(num_classes)
    table[IGNORE] = IGNORE
    return table


def open_mask_folder(root: str | None) -> MaskSet:
    """Opens ``root/images/{train,val}/NAME.jpg`` with ``root/masks/{train,val}/NAME.png`` and ``root/classes.txt``.

    Args:
        root: the folder.

    Raises:
        UserError: a part is missing or empty, or a picture has no mask or a mask no picture.
    """
    layout = "expected root/images/train, root/masks/train, the same with val, and root/classes.txt"
    folder = _folder(root, layout)
    names = folder / "classes.txt"
    if not names.is_file():
        raise UserError(f"{names} does not exist; write the names of the classes in it, a line each, id 0 first.")
    classes = [line.strip() for line in names.read_text().splitlines() if line.strip()]
    if not 2 <= len(classes) <= IGNORE:
        raise UserError(f"{names} names {len(classes)} classes; expected 2 to {IGNORE}.")
    table = ids_are_classes(len(classes))
    parts = [_paired(folder / "images" / part, folder / "masks" / part, table, layout) for part in ("train", "val")]
    return MaskSet(parts[0], parts[1], classes)


def open_scene_masks(root: str) -> MaskSet:
    """Opens what ``fastmkd scenes`` made; class 0 is the background.

    Args:
        root: the folder, with its ``train.json``.

    Raises:
        UserError: pictures or masks are missing.
    """
    folder = Path(root)
    categories = json.loads((folder / "train.json").read_text())["categories"]
    classes = ["background", *(category["name"] for category in categories)]
    table = ids_are_classes(len(classes))
    parts = [_paired(folder / part, folder / f"{part}_masks", table, SCENES) for part in ("train", "val")]
    return MaskSet(parts[0], parts[1], classes)


def open_cityscapes(root: str | None) -> MaskSet:
    """Opens ``root/leftImg8bit/{train,val}/CITY`` with ``root/gtFine/{train,val}/CITY``; the 19 classes of its tables.

    Args:
        root: the folder.

    Raises:
        UserError: a part is missing or empty, or a picture has no ``_gtFine_labelIds.png``.
    """
    layout = "expected root/leftImg8bit and root/gtFine, each with train/CITY and val/CITY"
    folder = _folder(root, layout)
    table = np.full(256, WRONG)
    table[:34] = IGNORE
    table[IGNORE] = IGNORE
    for label, number in enumerate(CITYSCAPES.values()):
        table[number] = label
    parts = []
    for part in ("train", "val"):
        pictures = sorted((folder / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
        if not pictures:
            raise UserError(f"{folder / 'leftImg8bit' / part} holds no CITY/NAME_leftImg8bit.png; {layout}.")
        masks = [
            folder / "gtFine" / part / path.parent.name / path.name.replace("_leftImg8bit.", "_gtFine_labelIds.")
            for path in pictures
        ]
        absent = [str(path) for path in masks if not path.is_file()]
        if absent:
            raise UserError(f"{len(absent)} masks are missing: {shorten(absent, 2)}; {layout}.")
        parts.append(MaskPictures(pictures, masks, table))
    return MaskSet(parts[0], parts[1], list(CITYSCAPES))


def _folder(root: str | None, layout: str) -> Path:
    if root is None:
        raise UserError(f"data.root is not given; {layout}.")
    if not Path(root).is_dir():
        raise UserError(f"data.root is {root}, which is not a folder; {layout}.")
    return Path(root)


def _paired(pictures: Path, masks: Path, table: Array, layout: str) -> MaskPictures:
    """Pairs files by their names without the suffix."""
    for folder in (pictures, masks):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; {layout}.")
    of_pictures = {path.stem: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in SUFFIXES}
    of_masks = {path.stem: path for path in masks.iterdir() if path.suffix.lower() == ".png"}
    if not of_pictures:
        raise UserError(f"{pictures} holds no pictures ({', '.join(SUFFIXES)}); {layout}.")
    for some, others, kind in ((of_pictures, of_masks, "picture"), (of_masks, of_pictures, "mask")):
        alone = [str(path) for stem, path in some.items() if stem not in others]
        if alone:
            other = "mask" if kind == "picture" else "picture"
            raise UserError(
                f"{len(alone)} of {len(some)} {kind}s have no {other} of the same name: {shorten(alone, 2)}; "
                f"add it or take the {kind} away."
            )
    return MaskPictures(list(of_pictures.values()), [of_masks[stem] for stem in of_pictures], table)
