"""mAP: known values, crowds, and pycocotools' own way from files as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drawn_boxes import change, draw_boxes
from torch import nn

from fastmkd.train.accelerator import make_accelerator
from fastmkd.train.average_precision import NAMES, average_precision, evaluate_boxes
from fastmkd.train.boxes import BoxPictures, BoxTable
from fastmkd.train.coco import read_coco
from fastmkd.train.errors import UserError
from fastmkd.train.loading import Loader
from fastmkd.train.schema import DataRecipe, Recipe, RunRecipe
from fastmkd.train.tasks import Detection

COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval


def pictures(boxes, labels=None, crowd=None) -> BoxPictures:
    """One picture of 200 x 200 with these boxes."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    n = len(corners)
    sides = corners[:, 2:] - corners[:, :2]
    table = BoxTable(
        corners, torch.tensor(labels or [1] * n), torch.tensor(crowd or [False] * n), sides.prod(1),
        torch.tensor([0, n]),
    )  # fmt: skip
    return BoxPictures([Path("a.png")], torch.tensor([9]), torch.tensor([[200, 200]]), table)


def found(*rows) -> dict[int, torch.Tensor]:
    return {0: torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)}


def test_known_values():
    two = pictures([[0, 0, 20, 20], [100, 100, 150, 150]])
    small, medium = (0, 0, 20, 20, 0.9, 1), (100, 100, 150, 150, 0.8, 1)
    perfect = average_precision(two, found(small, medium))
    assert perfect == pytest.approx(dict.fromkeys(NAMES[:5], 100))  # no large box is there
    # One of two found: precision 1 at the recalls 0, 0.01 ... 0.5, which are 51 of 101.
    assert average_precision(two, found(small))["map"] == pytest.approx(100 * 51 / 101)
    assert average_precision(two, found())["map"] == 0
    # The wrong class finds nothing, and what it claims counts for no class that is there.
    assert average_precision(two, found((*small[:5], 2), (*medium[:5], 2)))["map"] == 0
    # IoU 20 * 17 / 400 = 0.85: right at 0.5 to 0.85, eight of ten thresholds.
    one = pictures([[0, 0, 20, 20]])
    close = average_precision(one, found((0, 0, 20, 17, 0.9, 1)))
    assert (close["map50"], close["map75"]) == pytest.approx((100, 100))
    assert close["map"] == pytest.approx(80)
    assert average_precision(pictures([]), found(small)) == {}


def test_a_crowd_forgives_and_counts_for_nothing():
    crowd = pictures([[0, 0, 20, 20], [50, 50, 200, 200]], crowd=[False, True])
    inside = [(60 + 20 * i, 60, 80 + 20 * i, 80, 0.95, 1) for i in range(4)]
    assert average_precision(crowd, found((0, 0, 20, 20, 0.9, 1), *inside))["map"] == pytest.approx(100)
    single = pictures([[0, 0, 20, 20], [50, 50, 200, 200]])
    assert average_precision(single, found((0, 0, 20, 20, 0.9, 1), *inside))["map"] < 50


def test_against_pycocotools_on_its_own_files(tmp_path, capsys):
    root = draw_boxes(tmp_path / "set", train=20)
    crowd = {"id": 900, "image_id": 100, "category_id": 3, "bbox": [1, 1, 30, 30], "area": 900, "iscrowd": 1}
    change(root / "train.json", annotations=lambda boxes: boxes.append(crowd))
    part = read_coco(root / "train.json", root / "train")
    torch.manual_seed(0)
    detections, rows = {}, []
    for number in range(20):
        boxes = part.pictures.target(number)["boxes"]
        near = (boxes + 4 * torch.randn_like(boxes)).repeat(2, 1)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 2)
        scores, labels = torch.rand(len(near)), torch.randint(1, 3, (len(near),))
        detections[number] = torch.cat([near, scores[:, None], labels[:, None]], dim=1)
        for (x0, y0, x1, y1), score, label in zip(
            near.double().tolist(), scores.tolist(), labels.tolist(), strict=True
        ):
            rows.append({"image_id": 100 + number, "category_id": [3, 7][label - 1], "score": score,
                         "bbox": [x0, y0, x1 - x0, y1 - y0]})  # fmt: skip
    (root / "found.json").write_text(json.dumps(rows))
    truth = COCO(str(root / "train.json"))
    oracle = COCOeval(truth, truth.loadRes(str(root / "found.json")), "bbox")
    oracle.evaluate()
    oracle.accumulate()
    oracle.summarize()
    capsys.readouterr()
    scores = average_precision(part.pictures, detections)
    assert capsys.readouterr().out == ""  # pycocotools talks a lot
    expected = {name: 100 * value for name, value in zip(NAMES, oracle.stats, strict=False) if value >= 0}
    assert scores == pytest.approx(expected)
    assert 5 < scores["map"] < 60


class Knows(nn.Module):
    """Finds what is there, in the order the pictures come; stays in training mode outside of tests."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.answers, self.batches = iter(answers), 0

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        assert not self.training
        self.batches += 1
        return [{**(one := next(self.answers)), "scores": torch.ones(len(one["boxes"]))} for _ in images]


def test_a_detector_on_pictures_of_mixed_sizes_one_of_them_broken(tmp_path):
    root = draw_boxes(tmp_path / "set")
    (root / "val/1.png").write_bytes(b"broken")
    part, recipe = read_coco(root / "val.json", root / "val"), DataRecipe(workers=0)
    loader = Loader(part.pictures, recipe, None, 64, torch.device("cpu"), 0, Detection())
    model = Knows([part.pictures.target(i) for i in (0, 2, 3, 4)]).train()
    accelerator = make_accelerator(Recipe(run=RunRecipe(device="cpu")))
    finish = Detection().finisher(None)
    scores = evaluate_boxes(model, loader, finish, 5, 2, accelerator)
    assert scores["map"] == pytest.approx(100)
    assert (scores["images"], model.batches, model.training) == (4, 3, True)
    assert list(loader.bad) == [str(root / "val/1.png")]
    change(root / "val.json", annotations=[])
    bare = read_coco(root / "val.json", root / "val").pictures
    loader = Loader(bare, recipe, None, 64, torch.device("cpu"), 0, Detection())
    with pytest.raises(UserError, match="none of the test pictures has a box"):
        evaluate_boxes(Knows([bare.target(0)] * 4), loader, finish, 5, 2, accelerator)
