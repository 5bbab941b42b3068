"""Mean average precision of a detector as COCO defines it, by pycocotools, on any number of processes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .boxes import BoxPictures
from .errors import UserError
from .loading import Loader, eval_plan
from .tasks.base import Finish

__all__ = ["average_precision", "evaluate_boxes"]

# What COCOeval.summarize puts at the first places of its numbers.
NAMES = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


@torch.no_grad()
def evaluate_boxes(
    model: nn.Module, loader: Loader, finish: Finish, num_pictures: int, batch_size: int, accelerator: Any
) -> dict[str, float]:
    """Tests a detector; its mode is restored.

    Args:
        model: a list of images to a list of dicts with ``boxes``, ``labels`` and ``scores``.
        loader: of the test pictures, a `fastmkd.train.boxes.BoxPictures`.
        finish: scales pixels.
        num_pictures: size of the test set.
        batch_size: of one process.
        accelerator: of Hugging Face Accelerate; gives autocast and the processes.

    Returns:
        See `average_precision`, and ``images``, how many could be read.

    Raises:
        UserError: there is no box in the test pictures.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    was_training = model.training
    model.eval()
    found = []
    for batch in loader.batches(
        eval_plan(num_pictures, batch_size, accelerator.process_index, accelerator.num_processes)
    ):
        images, _ = finish(batch.images, batch.targets)
        with accelerator.autocast():
            outputs = model(images)
        for number, output in zip(batch.numbers.tolist(), outputs, strict=True):
            parts = [output["boxes"], output["scores"][:, None], output["labels"][:, None]]
            found.append((number, torch.cat([part.float() for part in parts], dim=1).cpu().numpy()))  # (n, 6)
    model.train(was_training)
    everything = {number: torch.from_numpy(rows) for number, rows in gather_object(found)}
    pictures: Any = loader.pictures
    # One process counts, the others wait: it takes a minute for the whole of COCO.
    scores = [average_precision(pictures, everything) if accelerator.is_main_process else None]
    (shared,) = broadcast_object_list(scores)
    assert shared is not None
    if everything and "map" not in shared:
        raise UserError("none of the test pictures has a box, so there is nothing to test detections against.")
    return {**shared, "images": float(len(everything))}


def average_precision(pictures: BoxPictures, found: Mapping[int, Tensor]) -> dict[str, float]:
    """Compares detections with the boxes of pictures, crowds included.

    Args:
        pictures: with what is in them.
        found: by picture, ``(n, 6)``: corners x0 y0 x1 y1 in pixels, score, label from 1.

    Returns:
        ``map`` (over IoU 0.50 to 0.95), ``map50``, ``map75``, and ``map_small``, ``map_medium``, ``map_large`` for
        areas up to 32² and 96² pixels and beyond, in percent; without those that no box is for.

    Example:
        >>> from pathlib import Path
        >>> from fastmkd.train.boxes import BoxTable
        >>> one, corners = torch.tensor([1]), torch.tensor([[2.0, 2, 12, 12]])
        >>> table = BoxTable(corners, one, one > 1, torch.tensor([100.0]), torch.tensor([0, 1]))
        >>> pictures = BoxPictures([Path("a.png")], one, torch.tensor([[16, 16]]), table)
        >>> round(average_precision(pictures, {0: torch.tensor([[2.0, 2, 12, 12, 0.9, 1]])})["map"], 6)
        100.0
    """
    from pycocotools.cocoeval import COCOeval

    true, said = [], []
    for number in sorted(found):
        target, rows = pictures.target(number), found[number]
        true += _entries(number, target["boxes"], target["labels"], area=target["area"], iscrowd=target["iscrowd"])
        said += _entries(number, rows[:, :4], rows[:, 5].long(), score=rows[:, 4])
    if not true:
        return {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        comparison = COCOeval(_index(true, found), _index(said, found), "bbox")
        comparison.evaluate()
        comparison.accumulate()
        comparison.summarize()
    return {name: 100 * float(value) for name, value in zip(NAMES, comparison.stats, strict=False) if value >= 0}


def _entries(number: int, boxes: Tensor, labels: Tensor, **more: Tensor) -> list[dict[str, Any]]:
    corners = boxes.double()
    sides = corners[:, 2:] - corners[:, :2]
    columns = {
        "bbox": torch.cat([corners[:, :2], sides], dim=1).tolist(),
        "category_id": labels.tolist(),
        "area": sides.prod(1).tolist(),
        "iscrowd": [0] * len(boxes),
        **{name: values.to(torch.int64 if values.dtype == torch.bool else torch.float64).tolist()
           for name, values in more.items()},
    }  # fmt: skip
    return [{"image_id": number, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def _index(entries: list[dict[str, Any]], numbers: Mapping[int, Any]) -> Any:
    """COCO's object about annotations; ids begin at 1, because it takes 0 for no match."""
    from pycocotools.coco import COCO

    data = COCO()
    data.dataset = {
        "images": [{"id": number} for number in sorted(numbers)],
        "categories": [{"id": label} for label in sorted({entry["category_id"] for entry in entries})],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(entries, start=1)],
    }
    data.createIndex()
    return data
