"""The picture of a detector's boxes: labels stay inside, the surest lie on top, and nothing found is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fastmkd.train.sheet import choose
from fastmkd.train.show_boxes import figure_of_boxes

CLASSES = ["ankle boot", "bag", "dress", "trouser"]


def boxes_of(*corners: tuple[float, ...], labels: list[int], scores: list[float] | None = None) -> dict[str, Any]:
    found = {"boxes": torch.tensor(corners).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}
    crowd = {"iscrowd": torch.zeros(len(labels), dtype=torch.bool)}
    return found | (crowd if scores is None else {"scores": torch.tensor(scores)})


def drawn(true: dict[str, Any], said: dict[str, Any], size: tuple[int, int] = (60, 90)) -> tuple[Any, Any, Any]:
    figure = figure_of_boxes([torch.rand(3, *size)], [true], [said], CLASSES)
    figure.canvas.draw()
    above, below = figure.axes
    return figure, above, below


def test_labels_stay_inside_the_picture():
    # At the upper border, in the upper right corner, out of the picture on both sides, in the middle.
    corners = [(5.0, 0.0, 30.0, 20.0), (80.0, 0.0, 90.0, 30.0), (-4.0, -3.0, 94.0, 50.0), (40.0, 30.0, 60.0, 50.0)]
    for size in ((60, 90), (90, 60), (30, 90)):
        scaled = [(x0 * size[1] / 90, y0 * size[0] / 60, x1 * size[1] / 90, y1 * size[0] / 60)
                  for x0, y0, x1, y1 in corners]  # fmt: skip
        _, above, _ = drawn(boxes_of(*scaled, labels=[1, 1, 4, 3]), boxes_of(labels=[], scores=[]), size)
        picture = above.get_window_extent()
        for text in above.texts:
            label = text.get_window_extent()
            assert picture.x0 - 1 <= label.x0 < label.x1 <= picture.x1 + 1, text
            assert picture.y0 - 1 <= label.y0 < label.y1 <= picture.y1 + 1, text
    assert [text.get_color() for text in above.texts] == ["white", "white", "white", "black"]


def test_the_surest_lie_on_top_and_nothing_is_said():
    same = (10.0, 20.0, 50.0, 50.0)
    said = boxes_of(same, same, same, same, labels=[2, 1, 0, 3], scores=[0.9, 0.4, 0.99, 0.2])
    _, _, below = drawn(boxes_of(labels=[]), said)
    assert [text.get_text() for text in below.texts] == ["ankle boot 0.40", "bag 0.90"]  # 0 is the background
    assert below.get_xlabel() == ""
    _, _, below = drawn(boxes_of(labels=[]), boxes_of(same, same, labels=[2, 0], scores=[0.26, 0.8]))
    assert (below.texts[:], below.get_xlabel()) == ([], "none; best 0.26")
    _, _, below = drawn(boxes_of(labels=[]), boxes_of(labels=[], scores=[]))
    assert below.get_xlabel() == "none"


def test_pictures_without_boxes_come_last():
    test = SimpleNamespace(labels=torch.tensor([0, 2, 0, 1, 2]))  # of the largest box, 0 for none
    source: Any = SimpleNamespace(test=test, task="detection", classes=["bag", "dress"])
    assert choose(source, 5).tolist() == [3, 1, 0, 4, 2]
    source.task = "classification"
    assert choose(source, 3).tolist() == [0, 3, 1]
