"""Segmentation: files that do not fit, pictures and masks that move together, scores that count every pixel once."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import max_pool2d

from fastmkd.train.data import load_data
from fastmkd.train.errors import UserError
from fastmkd.train.loading import Loader, epoch_plan, eval_plan
from fastmkd.train.mask_pictures import CITYSCAPES, IGNORE
from fastmkd.train.mean_iou import confusion_matrix, evaluate_masks, mask_scores, of_one_size, predicted
from fastmkd.train.schema import AugmentRecipe, DataRecipe
from fastmkd.train.seeds import seed_all
from fastmkd.train.tasks import TASKS

CPU = torch.device("cpu")
TASK = TASKS["segmentation"]


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes; each pixel of a picture says the class that its mask has: red = 80 x class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 5)):
        for number in range(count):
            mask = rng.integers(0, 3, (8, 8), dtype=np.uint8).repeat(4 + number % 2, 0).repeat(4, 1)
            mask[:2] = IGNORE
            picture = np.zeros((*mask.shape, 3), np.uint8)
            picture[..., 0] = np.where(mask == IGNORE, 0, 80 * mask)
            write(tmp_path / "images" / part / f"{number}.png", picture)
            write(tmp_path / "masks" / part / f"{number}.png", mask)
    (tmp_path / "classes.txt").write_text("ground\ntree\n\nhouse\n")
    return tmp_path


def open_folder(folder: Path, **kwargs):
    return load_data(DataRecipe(name="segfolder", root=str(folder), workers=0, **kwargs))


def test_a_folder_is_read(folder):
    source = open_folder(folder, image_size=24)
    assert (source.task, source.classes, source.image_size) == ("segmentation", ["ground", "tree", "house"], 24)
    assert (len(source.train), len(source.test)) == (6, 5)
    target = source.train.target(1)
    assert target.shape == (40, 32)
    assert target.unique().tolist() == [0, 1, 2, IGNORE]
    assert len(open_folder(folder, limit=4).train) == 4
    assert len(open_folder(folder, validation_fraction=0.5).test) == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "classes.txt").unlink(), r"classes\.txt does not exist; write the names"),
        (lambda f: (f / "classes.txt").write_text("one\n"), r"names 1 classes; expected 2 to 255"),
        (lambda f: (f / "masks/train/3.png").unlink(), r"1 of 6 pictures have no mask .*images/train/3\.png"),
        (lambda f: (f / "images/val/0.png").unlink(), r"1 of 5 masks have no picture .*masks/val/0\.png"),
        (lambda f: (f / "masks/val").rename(f / "masks/test"), r"masks/val is not a folder; expected root/images"),
        (lambda f: [p.unlink() for p in (f / "images/train").iterdir()], r"images/train holds no pictures"),
    ],
)
def test_a_folder_with_parts_missing_is_refused(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said):
        open_folder(folder)


def test_root_must_be_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.root is not given; expected root/images"):
        load_data(DataRecipe(name="segfolder"))
    with pytest.raises(UserError, match="which is not a folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"make the set with: fastmkd scenes OUT"):
        load_data(DataRecipe(name="scenes", task="segmentation", root=str(tmp_path / "absent")))
    with pytest.raises(UserError, match=r"has no train\.json; make the set"):
        load_data(DataRecipe(name="scenes", task="segmentation", root=str(tmp_path)))
    with pytest.raises(UserError, match=r"data\.task .*detection or segmentation"):
        load_data(DataRecipe(name="scenes", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("workers", "mask", "said"),
    [
        (0, np.full((32, 32), 7, np.uint8), r"masks/train/0\.png holds the id 7; expected 0 to 2, or 255"),
        (0, np.full((32, 32), 700, np.uint16), r"holds the id 700; expected 0 to 2"),
        (0, np.zeros((32, 31), np.uint8), r"masks/train/0\.png is 31 x 32 pixels, but its picture .* is 32 x 32"),
        (0, np.zeros((32, 32, 3), np.uint8), r"masks/train/0\.png has the channels R, G, B; expected one channel"),
        (1, np.zeros((32, 31), np.uint8), r"masks/train/0\.png is 31 x 32 pixels, but its picture"),
    ],
)
def test_a_wrong_mask_stops_the_run_and_is_named(folder, workers, mask, said):
    write(folder / "masks/train/0.png", mask)
    recipe = DataRecipe(name="segfolder", root=str(folder), workers=workers)
    source = load_data(recipe)
    loader = Loader(source.train, recipe, AugmentRecipe(), 16, CPU, 0, TASK)
    with pytest.raises(UserError, match=said) as caught:
        list(loader.batches(epoch_plan(6, 3, 0, 0)))
    assert "Traceback" not in str(caught.value)


def test_a_broken_file_is_skipped_and_named(folder):
    (folder / "masks/val/2.png").write_bytes(b"no picture")
    source, recipe = open_folder(folder), DataRecipe(workers=0)
    loader = Loader(source.test, recipe, None, 16, CPU, 0, TASK)
    assert sum(len(batch.numbers) for batch in loader.batches(eval_plan(5, 2))) == 4
    assert list(loader.bad) == [str(folder / "images/val/2.png")]


def test_palette_masks_hold_ids(folder):
    mask = Image.open(folder / "masks/train/0.png").convert("L")
    expected = np.asarray(mask)
    coloured = Image.fromarray(expected, "L").copy()
    coloured.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    coloured.save(folder / "masks/train/0.png")
    assert Image.open(folder / "masks/train/0.png").mode == "P"
    assert np.array_equal(open_folder(folder).train.target(0).numpy(), expected)


def test_cityscapes_ids_become_classes(tmp_path):
    for part in ("train", "val"):
        write(tmp_path / f"leftImg8bit/{part}/ulm/ulm_0_leftImg8bit.png", np.zeros((6, 8, 3), np.uint8))
        ids = np.arange(48, dtype=np.uint8).reshape(6, 8)
        ids[ids > 33] = 255
        write(tmp_path / f"gtFine/{part}/ulm/ulm_0_gtFine_labelIds.png", ids)
    source = load_data(DataRecipe(name="cityscapes", root=str(tmp_path)))
    assert source.num_classes == 19
    target = source.train.target(0).flatten().tolist()
    assert [target[number] for number in CITYSCAPES.values()] == list(range(19))
    assert {target[i] for i in range(48) if i not in CITYSCAPES.values()} == {IGNORE}
    write(tmp_path / "gtFine/val/ulm/ulm_0_gtFine_labelIds.png", np.full((6, 8), 40, np.uint8))
    with pytest.raises(UserError, match="holds the id 40; expected 0 to 33"):
        source.test.target(0)
    (tmp_path / "gtFine/val/ulm/ulm_0_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError, match=r"1 masks are missing: .*ulm_0_gtFine_labelIds\.png"):
        load_data(DataRecipe(name="cityscapes", root=str(tmp_path)))


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_picture_and_mask_move_together(crop):
    size = 32
    mask = np.zeros((size, size), np.uint8)
    mask[4:20, 3:11] = 1
    mask[10:30, 14:28] = 2
    picture = Image.fromarray(np.stack([mask * 80] * 3, -1))
    read = TASK.reader(AugmentRecipe(crop=crop, pad=6, scale=(0.3, 1.0), flip=0.5), size)
    moved = 0
    for number in range(12):
        seed_all(0, "picture", number)
        image, target = read(picture, torch.from_numpy(mask))
        assert image.shape == (3, size, size)
        assert target.shape == (size, size)
        # Colours are mixed at edges only; where all neighbours are of one class they must tell it.
        label = torch.where(target == IGNORE, 0, target).float()[None, None]
        high, low = (sign * max_pool2d(sign * label, 5, 1, 2) for sign in (1, -1))
        plain = (high == low)[0, 0]
        assert plain.float().mean() > 0.3
        assert ((image[0].float() - 80 * label[0, 0])[plain].abs() < 8).all()
        assert (image[0][target == IGNORE] == 0).all()
        moved += not np.array_equal(target.numpy(), mask)
    assert moved >= (3 if crop == "none" else 10)


def test_outside_of_a_shifted_picture_does_not_count():
    read = TASK.reader(AugmentRecipe(crop="pad", pad=5), 16)
    picture, mask = Image.fromarray(np.full((16, 16, 3), 200, np.uint8)), torch.ones(16, 16, dtype=torch.uint8)
    seed_all(0, "picture", 1)
    image, target = read(picture, mask)
    assert (target == IGNORE).any()
    assert torch.equal(target == IGNORE, image[0] == 0)


def test_a_batch_of_several_sizes_is_cut_into_batches_of_one():
    images = [torch.full((3, size, 4), float(i)) for i, size in enumerate((4, 6, 4, 6, 2))]
    parts = list(of_one_size(images, [image[0].long() for image in images]))
    assert [part.shape[2] for part, _ in parts] == [4, 6, 2]
    assert [part[:, 0, 0, 0].tolist() for part, _ in parts] == [[0, 2], [1, 3], [4]]
    assert all(torch.equal(part[:, 0].long(), targets) for part, targets in parts)
    whole = torch.zeros(2, 3, 4, 4)
    assert [part.shape for part, _ in of_one_size(whole, whole[:, 0])] == [whole.shape]


def test_scores_by_hand():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 5, 6), torch.randint(0, 3, (2, 5, 6))
    targets[0, :2] = IGNORE
    expected = torch.zeros(4, 5, dtype=torch.int64)
    for true, said in zip(targets.flatten().tolist(), logits.argmax(1).flatten().tolist(), strict=True):
        if true != IGNORE:
            expected[true, said] += 1
    assert torch.equal(confusion_matrix(logits, targets), expected)
    # 3 of 4 pixels of class 0 and all 5 of class 1 are right; class 2 is said once and never true; class 3 is absent.
    scores = mask_scores(torch.tensor([[3, 0, 1, 0, 0], [0, 5, 0, 0, 0], [0] * 5, [0] * 5]))
    assert scores["miou"] == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 8 / 9)
    assert all(math.isnan(score) for score in mask_scores(torch.zeros(3, 4)).values())


@pytest.mark.parametrize("broken", ["nan", "inf", "-inf"])
def test_pixels_without_a_finite_answer_are_wrong(broken):
    """A network that says NaN everywhere would be right wherever class 0 is: the largest of its logits is the first."""
    logits, targets = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 4, dtype=torch.int64)
    logits[:, 0] = 1
    logits[..., 0, :] = float(broken)
    targets[..., 3] = IGNORE
    assert confusion_matrix(logits, targets).tolist() == [[3, 0, 0, 3], [0] * 4, [0] * 4]
    scores = mask_scores(confusion_matrix(logits, targets))
    assert scores == {"miou": 50.0, "pixel_accuracy": 50.0}
    logits[:] = float(broken)
    assert mask_scores(confusion_matrix(logits, targets)) == {"miou": 0.0, "pixel_accuracy": 0.0}
    assert predicted(logits[0]).unique().tolist() == [IGNORE]


class RedTells(torch.nn.Module):
    """Reads the class from the red channel; wrong in its first row."""

    num_classes = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        label = (images[:, 0] * 255 / 80).round().long()
        label[:, 2] = 0
        return torch.nn.functional.one_hot(label, 3).permute(0, 3, 1, 2).float()


def test_every_pixel_counts_once_whatever_the_batches(folder):
    from accelerate import Accelerator

    source = open_folder(folder)
    source.mean, source.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    model = RedTells().train()
    found = []
    for size in (1, 2, 5):
        loader = Loader(source.test, DataRecipe(workers=0), None, 16, CPU, 0, TASK)
        found.append(evaluate_masks(model, loader, TASK.finisher(source), 5, size, Accelerator(cpu=True)))
    assert found[0] == found[1] == found[2]
    assert model.training
    truth = [source.test.target(i) for i in range(5)]
    pixels = sum(int((target != IGNORE).sum()) for target in truth)
    wrong = sum(int(((target[2] != 0) & (target[2] != IGNORE)).sum()) for target in truth)
    assert wrong > 0
    assert found[0]["pixel_accuracy"] == pytest.approx(100 * (1 - wrong / pixels))
    assert found[0]["images"] == 5
    first = Rank(0)
    evaluate_masks(model, loader, TASK.finisher(source), 5, 2, first)
    second = Rank(1, first.sums)
    assert evaluate_masks(model, loader, TASK.finisher(source), 5, 2, second) == found[0]
    assert first.sums[1] == 3


class Rank:
    """One of two processes: what the other one counted is added to its sums."""

    num_processes, device = 2, CPU
    autocast = staticmethod(contextlib.nullcontext)

    def __init__(self, index: int, others: list[torch.Tensor] | None = None) -> None:
        self.process_index, self.others = index, others

    def reduce(self, sums: list[torch.Tensor], reduction: str) -> list[torch.Tensor]:
        assert reduction == "sum"
        self.sums = sums
        return sums if self.others is None else [a + b for a, b in zip(sums, self.others, strict=True)]
