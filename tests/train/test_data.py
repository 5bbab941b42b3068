"""Data: files that lie, folders that are empty, pictures that are broken, and plans that can go on in the middle."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmkd.train.augment import Finisher, picture_transform, shift_and_flip
from fastmkd.train.data import DEBIAN_FASHION_MNIST, balanced_subset, load_data, stratified_split
from fastmkd.train.errors import UserError
from fastmkd.train.idx import read_idx
from fastmkd.train.loading import Loader, epoch_plan, eval_plan
from fastmkd.train.pictures import TensorPictures
from fastmkd.train.schema import AugmentRecipe, DataRecipe
from fastmkd.train.seeds import seed_all

CPU = torch.device("cpu")


def idx(shape: tuple[int, ...], values: bytes, code: int = 8) -> bytes:
    return bytes([0, 0, code, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


def test_idx_reads_plain_and_gzipped(tmp_path):
    content = idx((2, 2, 3), bytes(range(12)))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    expected = torch.arange(12, dtype=torch.uint8).view(2, 2, 3)
    assert torch.equal(read_idx(tmp_path / "a", 3), expected)
    assert torch.equal(read_idx(tmp_path / "a.gz", 3), expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"PNG" + bytes(20), "not an IDX file"),
        (idx((2, 2, 2), bytes(7)), "7 of 8 values"),
        (idx((2, 2, 2), bytes(9)), "goes on"),
        (idx((2, 2, 2), bytes(8), code=0x0D), "0x0d"),
        (idx((8,), bytes(8)) + bytes(8), "1 with 3|1 dimensions"),
        (idx((2**31, 2**31, 2**31), b""), "expected 1 to"),
        (idx((0, 28, 28), b""), "expected 1 to"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_refuses_what_is_wrong(tmp_path, content, said, zipped):
    path = tmp_path / ("images.gz" if zipped else "images")
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(UserError, match=said):
        read_idx(path, 3)


def test_idx_does_not_unpack_a_bomb(tmp_path):
    bomb = gzip.compress(idx((1, 4, 4), bytes(2**26)))  # declares 16 values, goes on for 64 MiB
    path = tmp_path / "bomb.gz"
    path.write_bytes(bomb)
    with pytest.raises(UserError, match="goes on"):
        read_idx(path, 3)
    path.write_bytes(gzip.compress(idx((2**20, 64, 64), bytes(2**26))))
    with pytest.raises(UserError, match="expected 1 to 1000"):
        read_idx(path, 3, max_bytes=1000)


def test_idx_says_that_a_gzip_file_is_cut_or_changed(tmp_path):
    whole = gzip.compress(idx((4, 16, 16), np.random.default_rng(0).bytes(1024)))
    path = tmp_path / "cut.gz"
    for content in (whole[: len(whole) // 2], whole[:100] + b"\xff\x00\xff" + whole[103:], b"not gzip at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged|cut off"):
            read_idx(path, 3)


def write_fashion(folder: Path, count: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx((count, 28, 28), bytes(count * 784)))
        labels = gzip.compress(idx((count,), bytes(i % 10 for i in range(count))))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(labels)


@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw", "fashion-mnist"])
def test_fashion_mnist_in_every_layout(tmp_path, layout):
    write_fashion(tmp_path / layout)
    source = load_data(DataRecipe(name="fashion-mnist", root=str(tmp_path)))
    assert (len(source.train), len(source.test), source.num_classes, source.image_size) == (20, 20, 10, 28)


def test_fashion_mnist_missing_or_inconsistent(tmp_path):
    with pytest.raises(UserError, match=r"dataset-fashion-mnist.*data\.root.*download"):
        load_data(DataRecipe(name="fashion-mnist", root=str(tmp_path)))
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((3,), bytes(3))))
    with pytest.raises(UserError, match="20 pictures but 3 labels"):
        load_data(DataRecipe(name="fashion-mnist", root=str(tmp_path)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((20,), bytes([77] * 20))))
    with pytest.raises(UserError, match="go up to 77"):
        load_data(DataRecipe(name="fashion-mnist", root=str(tmp_path)))


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debian_fashion_mnist_is_found():
    source = load_data(DataRecipe(name="fashion-mnist"))
    assert (len(source.train), len(source.test)) == (60_000, 10_000)
    assert source.train.labels.bincount().tolist() == [6000] * 10
    pixels = source.train.images.double() / 255
    assert pixels.mean().item() == pytest.approx(source.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(source.std[0], abs=1e-3)


def test_digits_split_is_fixed_and_fair():
    source = load_data(DataRecipe(name="digits"))
    assert len(source.train) + len(source.test) == 1797
    assert source.test.labels.bincount().min() >= 34
    assert torch.equal(load_data(DataRecipe(name="digits")).test.images, source.test.images)
    pixels = source.train.images.double() / 255
    assert pixels.mean().item() == pytest.approx(source.mean[0], abs=2e-3)
    assert pixels.std().item() == pytest.approx(source.std[0], abs=2e-3)


def test_size_limit_and_normalisation():
    source = load_data(DataRecipe(name="digits", image_size=16, limit=50, mean=[0.5], std=[0.25]))
    assert source.train.images.shape == (50, 1, 16, 16)
    assert (source.mean, source.std) == ((0.5,), (0.25,))
    with pytest.raises(UserError, match=r"data\.mean.*one a channel"):
        load_data(DataRecipe(name="digits", mean=[0.5, 0.5, 0.5]))
    with pytest.raises(UserError, match="imagefolder"):
        load_data(DataRecipe(name="imagnet"))


def test_cifar_missing(tmp_path):
    with pytest.raises(UserError, match=r"data\.root.*download: true"):
        load_data(DataRecipe(name="cifar10", root=str(tmp_path)))


def test_stratified_split_takes_every_picture_once():
    labels = torch.tensor([0] * 10 + [1] * 3)
    train, test = stratified_split(labels, 0.2)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(13))
    assert labels[test].bincount().tolist() == [2, 1]


def make_folder(root: Path, per_class: int = 4) -> Path:
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                size = (20 + i, 30)
                Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def test_image_folder_layouts_and_errors(tmp_path):
    with pytest.raises(UserError, match=r"data\.root is not given"):
        load_data(DataRecipe(name="imagefolder"))
    with pytest.raises(UserError, match="not a folder"):
        load_data(DataRecipe(name="imagefolder", root=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        load_data(DataRecipe(name="imagefolder", root=str(tmp_path / "empty")))
    root = make_folder(tmp_path / "set")
    source = load_data(DataRecipe(name="imagefolder", root=str(root), image_size=16))
    assert (source.classes, len(source.train), len(source.test)) == (["cat", "dog"], 8, 8)
    unsplit = load_data(DataRecipe(name="imagefolder", root=str(root / "train"), test_fraction=0.25))
    assert (len(unsplit.train), len(unsplit.test)) == (6, 2)
    (root / "train" / "fox").mkdir()
    with pytest.raises(UserError, match=r"fox holds no pictures"):
        load_data(DataRecipe(name="imagefolder", root=str(root)))
    (root / "train" / "fox").rmdir()
    (root / "val" / "owl").mkdir()
    with pytest.raises(UserError, match=r"classes that .* has not: owl"):
        load_data(DataRecipe(name="imagefolder", root=str(root)))


def test_validation_pictures_come_out_of_the_training_part():
    whole = load_data(DataRecipe(name="digits"))
    held_out = load_data(DataRecipe(name="digits", validation_fraction=0.25))
    assert len(held_out.train) + len(held_out.test) == len(whole.train)
    assert held_out.test.labels.bincount().min() > 30  # every class gives its share

    def bytes_of(pictures):
        return {image.numpy().tobytes() for image in pictures.images}

    test = bytes_of(whole.test) - bytes_of(whole.train)  # a few digits are there twice
    assert not test & bytes_of(held_out.test)
    assert not test & bytes_of(held_out.train)


def digits(**keys) -> TensorPictures:
    pictures = load_data(DataRecipe(name="digits", **keys)).train
    assert isinstance(pictures, TensorPictures)
    return pictures


def test_a_share_of_the_labels_is_the_same_number_of_each_class():
    """1,438 training digits: 1.4 of a class are 1, 14.4 are 14, 71.9 are 72."""
    parts = [digits(label_fraction=share) for share in (0.001, 0.01, 0.1, 0.5)]
    assert [part.labels.bincount().tolist() for part in parts] == [[n] * 10 for n in (1, 1, 14, 72)]
    assert torch.equal(digits(label_fraction=0.1).images, parts[2].images)
    names = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert names[0] == names[1] < names[2] < names[3]  # a smaller share is a part of a larger one
    other = digits(label_fraction=0.1, subset_seed=1)
    assert other.labels.bincount().tolist() == [14] * 10
    assert not torch.equal(other.images, parts[2].images)


def test_a_share_of_the_labels_is_of_what_limit_and_validation_leave():
    assert digits(label_fraction=0.5, limit=400).labels.bincount().tolist() == [20] * 10
    limited = {image.numpy().tobytes() for image in digits(limit=400).images}
    assert {image.numpy().tobytes() for image in digits(label_fraction=0.5, limit=400).images} <= limited
    left = digits(validation_fraction=0.5)
    chosen = digits(validation_fraction=0.5, label_fraction=0.1)
    assert chosen.labels.bincount().tolist() == [round(len(left) / 100)] * 10
    assert {image.numpy().tobytes() for image in chosen.images} <= {image.numpy().tobytes() for image in left.images}
    whole, part = (load_data(DataRecipe(name="digits", label_fraction=share)) for share in (None, 0.1))
    assert torch.equal(part.test.images, whole.test.images)


def test_a_class_with_too_few_pictures_is_named():
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 9)
    assert labels[balanced_subset(labels, ["cat", "dog", "owl"], 0.3, 0)].bincount().tolist() == [2, 2, 2]
    with pytest.raises(UserError, match=r"0\.5, which takes 3 of the 20 .* 3 classes, but dog has 2; choose"):
        balanced_subset(labels, ["cat", "dog", "owl"], 0.5, 0)
    with pytest.raises(UserError, match=r"takes 1 of the 20 .* 4 classes, but yak has 0"):
        balanced_subset(labels, ["cat", "dog", "owl", "yak"], 0.01, 0)
    even = torch.arange(20) % 4
    assert torch.equal(balanced_subset(even, list("abcd"), 1.0, 0), torch.arange(20))


def test_a_share_of_a_folder_opens_no_picture(tmp_path):
    for path in (root := make_folder(tmp_path / "set")).rglob("*.png"):
        path.write_bytes(b"no picture")
    source = load_data(DataRecipe(name="imagefolder", root=str(root), label_fraction=0.5))
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    assert [path.parent.name for path in source.train.stored] == ["cat", "cat", "dog", "dog"]
    assert len(source.test) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_skipped_and_named(tmp_path, workers):
    root = make_folder(tmp_path / "set")
    broken = root / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "train" / "dog" / "3.png").write_text("no picture")
    (root / "val" / "dog" / "0.png").write_bytes(b"")
    recipe = DataRecipe(name="imagefolder", root=str(root), image_size=16, workers=workers)
    source = load_data(recipe)
    loader = Loader(source.train, recipe, AugmentRecipe(crop="resized", flip=0.5), 16, CPU, seed=0)
    batches = list(loader.batches(epoch_plan(8, 4, seed=0, epoch=0)))
    assert [batch.images.shape for batch in batches] == [(4, 3, 16, 16)] * 2
    assert sorted(loader.bad) == [str(broken), str(root / "train" / "dog" / "3.png")]
    # The next readable picture stands in, under its own number.
    assert torch.cat([batch.numbers for batch in batches]).sort().values.tolist() == [0, 0, 2, 2, 3, 4, 5, 6]
    assert all(torch.equal(source.train.labels[batch.numbers], batch.targets) for batch in batches)
    tester = Loader(source.test, recipe, None, 16, CPU, seed=0)
    assert [n for batch in tester.batches(eval_plan(8, 3)) for n in batch.numbers.tolist()] == [0, 1, 2, 3, 5, 6, 7]
    assert list(tester.bad) == [str(root / "val" / "dog" / "0.png")]


def test_only_bad_pictures_is_an_error(tmp_path):
    root = make_folder(tmp_path / "set", per_class=1)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"x")
    recipe = DataRecipe(name="imagefolder", root=str(root), image_size=16, workers=0)
    loader = Loader(load_data(recipe).train, recipe, AugmentRecipe(), 16, CPU, seed=0)
    with pytest.raises(UserError, match="none of 2 pictures"):
        list(loader.batches(epoch_plan(2, 2, seed=0, epoch=0)))


def test_batches_from_memory_say_their_numbers():
    recipe = DataRecipe(name="digits")
    source = load_data(recipe)
    loader = Loader(source.train, recipe, AugmentRecipe(), 8, CPU, seed=0)
    plan = epoch_plan(len(source.train), 32, seed=0, epoch=0)
    for batch, numbers in zip(loader.batches(plan, start=2), plan[2:], strict=True):
        assert torch.equal(batch.numbers, numbers)
        assert torch.equal(batch.images, source.train.images[numbers])


def test_pictures_do_not_depend_on_workers_or_on_where_reading_starts(tmp_path):
    recipe = DataRecipe(name="imagefolder", root=str(make_folder(tmp_path / "set")), image_size=16)
    source = load_data(recipe)
    augment = AugmentRecipe(crop="resized", flip=0.5, rand_augment="rand-m9-mstd0.5-inc1")
    plan = epoch_plan(8, 2, seed=3, epoch=1)
    seen = []
    for workers, start in ((0, 0), (2, 0), (2, 2)):
        recipe.workers = workers
        loader = Loader(source.train, recipe, augment, 16, CPU, seed=3)
        seen.append(torch.cat([batch.images for batch in loader.batches(plan, epoch=1, start=start)]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][4:], seen[2])


def test_plans_cover_the_set_without_overlap():
    ranks = [epoch_plan(100, 4, seed=1, epoch=2, rank=rank, world=3, group=2) for rank in range(3)]
    assert all(plan.shape == (8, 4) for plan in ranks)
    together = torch.cat([plan.flatten() for plan in ranks])
    assert len(together.unique()) == len(together) == 96
    assert not torch.equal(ranks[0], epoch_plan(100, 4, seed=1, epoch=3, rank=0, world=3, group=2))
    tested = torch.cat([torch.cat(eval_plan(11, 4, rank, 3)) for rank in range(3)])
    assert torch.equal(tested.sort().values, torch.arange(11))
    assert eval_plan(2, 4, rank=2, world=3) == []
    with pytest.raises(UserError, match=r"one update takes 24 pictures.*only 20"):
        epoch_plan(20, 4, seed=0, epoch=0, world=3, group=2)


def test_shift_and_flip_against_the_obvious_way():
    images = torch.randint(1, 256, (64, 2, 5, 7), dtype=torch.uint8)
    seed_all(0, "test")
    moved = shift_and_flip(images, pad=2, flip=0.5)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    options = {
        (dy, dx, mirrored): padded[:, :, 2 + dy : 7 + dy, 2 + dx : 9 + dx]
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        for mirrored in (False, True)
    }
    found = set()
    for i in range(len(images)):
        # Mirroring comes first: the source column of x is W - 1 - x + dx.
        flipped = torch.nn.functional.pad(images[i].flip(-1), (2, 2, 2, 2))
        for (dy, dx, mirrored), window in options.items():
            expected = flipped[:, 2 + dy : 7 + dy, 2 - dx : 9 - dx] if mirrored else window[i]
            if torch.equal(moved[i], expected):
                found.add((dy, dx, mirrored))
                break
        else:
            pytest.fail(f"image {i} is no shifted and flipped copy")
    assert len({dy for dy, _, _ in found}) == len({dx for _, dx, _ in found}) == 5
    assert {mirrored for _, _, mirrored in found} == {False, True}


def test_finisher_normalises_and_mixes():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 3])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    plain, same = Finisher(mean, std, 5)(images, targets)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(plain, expected)
    assert same is targets
    seed_all(0, "test")
    mixed, soft = Finisher(mean, std, 5, AugmentRecipe(mixup=0.8, random_erasing=1.0))(images, targets)
    assert soft.shape == (4, 5)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    assert not torch.equal(mixed, plain)
    _, smooth = Finisher(mean, std, 5, AugmentRecipe(label_smoothing=0.1))(images, targets)
    torch.testing.assert_close(smooth[0], torch.tensor([0.92, 0.02, 0.02, 0.02, 0.02]))


def test_picture_transform_sizes_and_bad_rand_augment():
    picture = Image.new("RGB", (40, 60))
    for augment in (None, AugmentRecipe(), AugmentRecipe(crop="pad"), AugmentRecipe(crop="resized", flip=1.0)):
        assert picture_transform(augment, 24)(picture).shape == (3, 24, 24)
    with pytest.raises(UserError, match="rand_augment"):
        picture_transform(AugmentRecipe(rand_augment="rund-m9"), 24)


def test_tensor_pictures_check_their_input():
    with pytest.raises(TypeError, match="uint8"):
        TensorPictures(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one per image"):
        TensorPictures(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
