"""Data in COCO's format: what is right is read as it stands, what is wrong is refused or left out, and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drawn_boxes import change, draw_boxes

from fastmkd.train.coco import read_coco
from fastmkd.train.data import load_data
from fastmkd.train.errors import UserError
from fastmkd.train.loading import Loader, epoch_plan
from fastmkd.train.schema import AugmentRecipe, DataRecipe
from fastmkd.train.tasks import Detection, task_of

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_boxes(tmp_path / "set")


def recipe(root: Path, **keys) -> DataRecipe:
    return DataRecipe(**{"name": "coco", "root": str(root), "workers": 0, **keys})


def one_box(image: int = 100, category: int = 3, bbox=(1, 2, 3, 4), **more) -> dict:
    return {"id": 900, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


def test_boxes_are_the_files(root):
    source = load_data(recipe(root))
    assert (source.task, source.classes, source.image_size, source.notes) == ("detection", ["red", "green"], 800, [])
    said = json.loads((root / "train.json").read_text())
    for number, image in enumerate(said["images"]):
        target = source.train.target(number)
        boxes = [a for a in said["annotations"] if a["image_id"] == image["id"]]
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in boxes)]
        assert target["boxes"].tolist() == expected
        assert target["labels"].tolist() == [{3: 1, 7: 2}[a["category_id"]] for a in boxes]
        assert target["area"].tolist() == [a["area"] for a in boxes]
        assert (int(target["image_id"]), target["iscrowd"].any().item()) == (image["id"], False)
        assert target["boxes"].shape == (len(boxes), 4)
    assert len(source.train.target(4)["boxes"]) == 0
    assert source.train.labels[4] == 0
    part = source.train.subset(torch.tensor([7, 2])).subset(torch.tensor([1]))
    assert torch.equal(part.target(0)["boxes"], source.train.target(2)["boxes"])
    assert (part.where(0), part.labels.tolist()) == (source.train.where(2), [source.train.labels[2].item()])


def test_cocos_own_layout_and_a_set_without_a_part_to_test_on(root):
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        (root / f"{part}.json").rename(root / f"annotations/instances_{part}2017.json")
        (root / part).rename(root / f"{part}2017")
    assert [len(part) for part in (load_data(recipe(root)).train, load_data(recipe(root)).test)] == [10, 5]
    (root / "annotations/instances_val2017.json").unlink()
    source = load_data(recipe(root, test_fraction=0.3))
    assert (len(source.train), len(source.test)) == (7, 3)
    names = {part.where(i) for part in (source.train, source.test) for i in range(len(part))}
    assert len(names) == 10


def test_parts_of_the_training_pictures(root):
    source = load_data(recipe(root, validation_fraction=0.4, limit=4))
    assert (len(source.train), len(source.test)) == (4, 4)
    train, test = ({part.where(i) for i in range(4)} for part in (source.train, source.test))
    assert not train & test
    assert all("/train/" in name for name in train | test)
    with pytest.raises(UserError, match=r"data\.label_fraction is for classifiers.*detection"):
        load_data(recipe(root, label_fraction=0.5))
    with pytest.raises(UserError, match=r"data\.task is segmentation, but data coco is for detection"):
        load_data(recipe(root, task="segmentation"))


def test_a_box_is_cut_at_the_border_and_one_without_area_is_left_out_and_named(root):
    boxes = [
        {**one_box(bbox=(-3, -2, 10, 12)), "id": 1},
        {**one_box(bbox=(5, 5, 500, 500)), "id": 2},
        {**one_box(bbox=(5, 5, 0, 9)), "id": 11},
        {**one_box(bbox=(5, 5, 9, -4)), "id": 12},
        {**one_box(bbox=(500, 5, 9, 9)), "id": 13},
        {**one_box(bbox=(float("nan"), 5, 9, 9)), "id": 14},
        {**one_box(bbox=(5, 5, 9)), "id": 15},
        {**one_box(bbox=(40.0, 5, 1e-7, 9)), "id": 16},
    ]
    change(root / "train.json", annotations=boxes)
    part = read_coco(root / "train.json", root / "train")
    width, height = part.pictures.sizes[0].tolist()
    assert part.pictures.target(0)["boxes"].tolist() == [[0, 0, 7, 10], [5, 5, width, height]]
    assert part.pictures.target(0)["area"].tolist() == [70, (width - 5) * (height - 5)]
    (note,) = part.notes
    assert "6 boxes have no area inside their picture" in note
    assert "11, 12, 13, 14, 15, 16" in note
    assert load_data(recipe(root)).notes == [note]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"annotations": [one_box(category=90)]}, r"1 annotations have an category_id .* 900 \(90\)"),
        ({"annotations": [one_box(image=7)]}, r"1 annotations have an image_id .* 900 \(7\)"),
        ({"annotations": [{"id": 900, "image_id": 100, "category_id": 3}]}, r"id 900 has bbox None; expected list"),
        ({"annotations": [[1, 2]]}, r"annotation with \[1, 2\] has image_id None"),
        ({"annotations": {}}, "no list 'annotations'"),
        ({"categories": []}, "empty list 'categories'"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "two categories with id 3"),
        ({"categories": [{"id": True, "name": "a"}]}, "has id True; expected int"),
        ({"images": lambda images: images.append(images[0])}, "two images with id 100"),
        ({"images": lambda images: images[0].update(file_name="../0.png")}, "outside the pictures' folder"),
        ({"images": lambda images: images[0].update(width="44")}, "id 100 has width '44'; expected int"),
        ({"images": lambda images: images[0].update(height=0)}, "expected at least 1 x 1"),
    ],
)
def test_a_file_that_is_wrong_is_refused(root, parts, said):
    change(root / "train.json", **parts)
    with pytest.raises(UserError, match=said):
        load_data(recipe(root))


def test_missing_and_damaged_files(root, tmp_path):
    with pytest.raises(UserError, match=r"data\.root is not given; expected root/train\.json"):
        load_data(DataRecipe(name="coco"))
    with pytest.raises(UserError, match="not a folder"):
        load_data(recipe(tmp_path / "none"))
    with pytest.raises(UserError, match=r"has no train\.json"):
        load_data(recipe(tmp_path))
    change(root / "val.json", categories=[{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}])
    with pytest.raises(UserError, match=r"differ in their categories: 7 'blue', 7 'green'"):
        load_data(recipe(root))
    (root / "train.json").write_text('{"images": [')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_data(recipe(root))
    (root / "val").rename(root / "elsewhere")
    draw_boxes(tmp_path / "other")
    (tmp_path / "other/val").rename(tmp_path / "other/elsewhere")
    with pytest.raises(UserError, match=r"the folder of its pictures, .*val, is not"):
        load_data(recipe(tmp_path / "other"))


def test_broken_missing_and_lying_pictures_are_replaced_or_skipped_and_named(root):
    (root / "train/0.png").write_bytes(b"broken")
    (root / "train/1.png").unlink()
    change(root / "train.json", images=lambda images: images[2].update(width=60, height=61))
    source = load_data(recipe(root, batch_size=5))
    assert source.train.sizes[2].tolist() == [60, 61]
    loader = Loader(source.train, recipe(root), AugmentRecipe(), 64, CPU, 0, Detection())
    batches = list(loader.batches(epoch_plan(10, 5, seed=0, epoch=0)))
    assert [len(batch.images) for batch in batches] == [5, 5]
    assert sorted(Path(name).name for name in loader.bad) == ["0.png", "1.png", "2.png"]
    assert "its boxes were made for 60 x 61" in loader.bad[str(root / "train/2.png")]
    tester = Loader(source.train, recipe(root), None, 64, CPU, 0, Detection())
    (batch,) = tester.batches([torch.arange(10)])
    assert batch.numbers.tolist() == list(range(3, 10))
    assert len(tester.bad) == 3


def test_flips_take_boxes_with_them_and_crowds_stay_out_of_training(root):
    change(root / "train.json", annotations=lambda boxes: boxes.append(one_box(bbox=(1, 1, 30, 30), iscrowd=1)))
    source = load_data(recipe(root))
    task, plan = task_of(source), [torch.arange(10)]
    loaders = [Loader(source.train, recipe(root), augment, 64, CPU, 0, task)
               for augment in (None, AugmentRecipe(), AugmentRecipe(flip=1.0))]  # fmt: skip
    tested, plain, flipped = (next(iter(loader.batches(plan))) for loader in loaders)
    assert len(tested.targets[0]["boxes"]) == len(plain.targets[0]["boxes"]) + 1
    assert tested.targets[0]["iscrowd"].sum() == 1
    assert not any(target["iscrowd"].any() for target in plain.targets)
    for one, other, a, b in zip(plain.images, flipped.images, plain.targets, flipped.targets, strict=True):
        assert torch.equal(one.flip(-1), other)
        width = one.shape[-1]
        assert torch.equal(b["boxes"][:, 0], width - a["boxes"][:, 2])
        assert (b["boxes"][:, :2] < b["boxes"][:, 2:]).all()
        assert torch.equal(a["labels"], b["labels"])
        for x0, y0, x1, y1 in b["boxes"][-1:].int().tolist():  # drawn last: its corners still are of one colour
            assert (other[:, y0, x0] == other[:, y1 - 1, x1 - 1]).all()


def test_batches_do_not_depend_on_workers_or_on_where_reading_starts(root):
    source = load_data(recipe(root))
    augment, plan = AugmentRecipe(flip=0.5), epoch_plan(10, 2, seed=3, epoch=1)
    seen = []
    for workers, start in ((0, 0), (2, 0), (0, 3)):
        loader = Loader(source.train, recipe(root, workers=workers), augment, 64, CPU, 3, Detection())
        seen.append([(image, target["boxes"]) for batch in loader.batches(plan, epoch=1, start=start)
                     for image, target in zip(batch.images, batch.targets, strict=True)])  # fmt: skip
    assert len(seen[0]) == 10
    for other, first in ((seen[1], seen[0]), (seen[2], seen[0][6:])):
        for (image, boxes), (same, alike) in zip(other, first, strict=True):
            assert torch.equal(image, same)
            assert torch.equal(boxes, alike)
