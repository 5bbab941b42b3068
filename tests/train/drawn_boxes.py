"""A tiny data set in COCO's format: coloured rectangles on grey noise, pictures of several sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {3: (220, 30, 30), 7: (30, 200, 40)}  # by category id; ids have holes, as COCO's


def content(count: int, seed: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """JSON content and pixels; every fifth picture has nothing in it."""
    draw = np.random.default_rng(seed)
    pictures, images, annotations = [], [], []
    for number in range(count):
        width, height = (int(side) for side in draw.integers(44, 72, 2))
        pixels = draw.integers(90, 120, (height, width, 3), dtype=np.uint8)
        images.append({"id": 100 + number, "file_name": f"{number}.png", "width": width, "height": height})
        for _ in range(0 if number % 5 == 4 else int(draw.integers(1, 3))):
            w, h = (int(side) for side in draw.integers(14, 32, 2))
            x, y = int(draw.integers(0, width - w)), int(draw.integers(0, height - h))
            category = int(draw.choice(list(COLOURS)))
            pixels[y : y + h, x : x + w] = COLOURS[category]
            box = {"id": len(annotations) + 1, "image_id": 100 + number, "category_id": category}
            annotations.append({**box, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
        pictures.append(pixels)
    categories = [{"id": 7, "name": "green"}, {"id": 3, "name": "red"}]
    return {"images": images, "annotations": annotations, "categories": categories}, pictures


def draw_boxes(root: Path, train: int = 10, val: int = 5) -> Path:
    """Writes ``root/train.json``, ``root/train/*.png`` and the same for val."""
    for part, count, seed in (("train", train, 0), ("val", val, 1)):
        folder = root / part
        folder.mkdir(parents=True)
        data, pictures = content(count, seed)
        for image, pixels in zip(data["images"], pictures, strict=True):
            Image.fromarray(pixels).save(folder / image["file_name"])
        (root / f"{part}.json").write_text(json.dumps(data))
    return root


def change(file: Path, **parts: Any) -> None:
    """Replaces or, given a function of it, changes parts of a JSON file."""
    data = json.loads(file.read_text())
    for name, value in parts.items():
        if callable(value):
            value(data[name])
        else:
            data[name] = value
    file.write_text(json.dumps(data))
