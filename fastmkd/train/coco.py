"""Detection data in COCO's format: a JSON file of pictures, boxes and categories, and a folder of pictures.

Only what detection needs is read (``images``, ``annotations``, ``categories``; no polygons), and all of it is checked
before training begins, but for the pictures themselves, which are opened one by one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from .boxes import BoxPictures, BoxTable
from .errors import UserError, shorten

__all__ = ["LAYOUT", "CocoPart", "find_part", "open_coco", "read_coco"]

LAYOUT = (
    "expected root/train.json beside the folder root/train, and the same for val; or COCO's own "
    "root/annotations/instances_train2017.json and root/train2017"
)
MOST = 2**53  # of any number in a file; sums and tensors hold it


class CocoPart(NamedTuple):
    """A JSON file and the pictures that it is about.

    Attributes:
        pictures: with boxes whose labels are 1 to K in the order of the file's category ids.
        categories: name by the file's own id, ascending.
        notes: what was left out, a sentence each.
    """

    pictures: BoxPictures
    categories: dict[int, str]
    notes: list[str]


def find_part(root: Path, part: str) -> tuple[Path, Path] | None:
    """Returns the JSON file and the folder of a part of a data set, None if it has no such part.

    Args:
        root: of the data set.
        part: train, val or test.

    Raises:
        UserError: there is a file but no folder.
    """
    own = [(root / f"{part}.json", root / part)]
    coco = sorted((root / "annotations").glob(f"instances_{part}*.json"), reverse=True)  # the newest year first
    for file in coco:
        folder = file.stem.removeprefix("instances_")
        own += [(file, root / folder), (file, root / "images" / folder)]
    found = [(file, folder) for file, folder in own if file.is_file()]
    if not found:
        return None
    complete = [(file, folder) for file, folder in found if folder.is_dir()]
    if not complete:
        raise UserError(f"{found[0][0]} is there, but the folder of its pictures, {found[0][1]}, is not; {LAYOUT}.")
    return complete[0]


def open_coco(root: Path) -> tuple[CocoPart, CocoPart | None]:
    """Reads what to train on and what to test on.

    Args:
        root: folder of the data set.

    Returns:
        The two parts, the second None where there is none.

    Raises:
        UserError: files are missing, damaged or contradict each other.
    """
    train = find_part(root, "train")
    if train is None:
        raise UserError(f"{root} has no train.json and no annotations/instances_train*.json; {LAYOUT}.")
    first = read_coco(*train)
    test = find_part(root, "val") or find_part(root, "test")
    if test is None:
        return first, None
    second = read_coco(*test)
    if first.categories != second.categories:
        differing = [f"{i} {name!r}" for i, name in sorted(first.categories.items() ^ second.categories.items())]
        raise UserError(
            f"{train[0]} and {test[0]} differ in their categories: {shorten(differing)} is in one of them only; both "
            "must list the same ids and names."
        )
    return first, second


def read_coco(file: Path, folder: Path) -> CocoPart:
    """Reads a JSON file in COCO's format.

    Boxes (x, y, width, height there) become corners, cut off at the border of their picture; those that then have no
    area are left out and named. Ids of categories may have holes; labels are 1 to K in their order.

    Args:
        file: the JSON file.
        folder: of the pictures.

    Raises:
        UserError: not JSON, a part or a key is missing, an id stands twice or points nowhere, or there are no pictures.
    """
    content = _read_json(file)
    categories = _categories(content["categories"], file)
    ids, names, sizes = _images(content["images"], file)
    table, notes = _boxes(content["annotations"], ids, sizes, list(categories), file)
    pictures = BoxPictures([folder / name for name in names], torch.tensor(list(ids)), torch.tensor(sizes), table)
    return CocoPart(pictures, categories, notes)


def _read_json(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); get the file again.") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{file} has no list {key!r}; expected COCO's format: images, annotations, categories.")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{file} has an empty list {key!r}; there is nothing to learn from it.")
    whole: dict[str, list[Any]] = content
    return whole


def _get(entry: Any, key: str, kind: type | tuple[type, ...], what: str, file: Path) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > MOST):
        name = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else repr(entry)[:60]
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{file}: {what} with {name} has {key} {value!r}; expected {kinds}.")
    return value


def _categories(entries: list[Any], file: Path) -> dict[int, str]:
    categories: dict[int, str] = {}
    for entry in entries:
        number = _get(entry, "id", int, "the category", file)
        if number in categories:
            raise UserError(f"{file} has two categories with id {number}; each needs its own.")
        categories[number] = _get(entry, "name", str, "the category", file)
    return dict(sorted(categories.items()))


def _images(entries: list[Any], file: Path) -> tuple[dict[int, int], list[str], list[list[int]]]:
    """Where each id stands, file names, and ``[width, height]``."""
    ids: dict[int, int] = {}
    names: list[str] = []
    sizes: list[list[int]] = []
    for entry in entries:
        number = _get(entry, "id", int, "the image", file)
        if number in ids:
            raise UserError(f"{file} has two images with id {number}; each needs its own.")
        name = _get(entry, "file_name", str, "the image", file)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{file}: the image with id {number} has file_name {name!r}, outside the pictures' folder.")
        size = [_get(entry, key, int, "the image", file) for key in ("width", "height")]
        if min(size) < 1:
            raise UserError(f"{file}: the image with id {number} is {size[0]} x {size[1]}; expected at least 1 x 1.")
        ids[number] = len(names)
        names.append(name)
        sizes.append(size)
    return ids, names, sizes


def _boxes(
    entries: list[Any], ids: dict[int, int], sizes: list[list[int]], categories: list[int], file: Path
) -> tuple[BoxTable, list[str]]:
    labels = {number: label for label, number in enumerate(categories, start=1)}
    names: list[str] = []
    boxes: list[list[float]] = []
    places, classes, crowds, areas = [], [], [], []
    lost: dict[str, list[str]] = {"image_id": [], "category_id": []}
    for entry in entries:
        image = _get(entry, "image_id", int, "the annotation", file)
        category = _get(entry, "category_id", int, "the annotation", file)
        bbox, area = _get(entry, "bbox", list, "the annotation", file), entry.get("area")
        names.append(str(entry.get("id", "?")))
        if image not in ids:
            lost["image_id"].append(f"{names[-1]} ({image})")
        if category not in labels:
            lost["category_id"].append(f"{names[-1]} ({category})")
        whole = len(bbox) == 4 and all(isinstance(value, int | float) and abs(value) <= MOST for value in bbox)
        places.append(ids.get(image, 0))
        boxes.append(bbox if whole else [math.nan] * 4)
        classes.append(labels.get(category, 0))
        crowds.append(bool(entry.get("iscrowd")))
        areas.append(area if isinstance(area, int | float) and 0 < area <= MOST else math.nan)
    for key, listed in {"image_id": "images", "category_id": "categories"}.items():
        if lost[key]:
            raise UserError(
                f"{file}: {len(lost[key])} annotations have an {key} that {listed!r} does not list: "
                f"{shorten(lost[key])}; mend the file."
            )
    place = torch.tensor(places, dtype=torch.int64)
    low, size = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4).split(2, dim=1)  # (M, 2) each
    border = torch.tensor(sizes, dtype=torch.float64)[place]  # (M, 2)
    corners = torch.cat([low.clamp(min=0), (low + size).minimum(border)], dim=1).float()
    sides = corners[:, 2:] - corners[:, :2]
    good = (sides > 0).all(1) & corners.isfinite().all(1)
    area = torch.tensor(areas, dtype=torch.float32)
    area = torch.where(area.isnan(), sides.prod(1), area)
    order = place.argsort(stable=True)  # the file's order within a picture
    order = order[good[order]]
    counts = place[order].bincount(minlength=len(ids))
    table = BoxTable(
        corners[order],
        torch.tensor(classes, dtype=torch.int64)[order],
        torch.tensor(crowds, dtype=torch.bool)[order],
        area[order],
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
    )
    empty = [name for name, fine in zip(names, good.tolist(), strict=True) if not fine]
    said = f"{len(empty)} boxes have no area inside their picture and were left out, annotation ids {shorten(empty)}."
    return table, [f"{file}: {said}"] if empty else []
