"""Data sets by name: pictures, classes, normalisation. A missing file says where it may come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .coco import LAYOUT, open_coco
from .errors import UserError, shorten
from .idx import read_idx
from .mask_pictures import SCENES, MaskSet, open_cityscapes, open_mask_folder, open_scene_masks
from .pictures import FilePictures, TensorPictures, find_classes
from .schema import DataRecipe
from .seeds import generator
from .shards import SHARDS, ShardPictures, open_shards
from .tasks import classification_only

__all__ = ["DATASETS", "DataSource", "load_data"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASK_SIZE = 512  # of training crops
SCENE_SIZE = 128  # of a canvas of the made set
SPLIT_SEED = 0  # a split belongs to the data set, not to the run: runs with other seeds must stay comparable


@dataclass
class DataSource:
    """A data set, ready to train and test on.

    Attributes:
        train: pictures to train on (`fastmkd.train.pictures.Pictures`).
        test: pictures to test on.
        classes: their names, in the order of the labels.
        channels: of a picture.
        image_size: side in pixels that the networks get; a detector makes the shorter side of a picture this long.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        task: what the pictures are for.
        notes: what was left out while reading, a sentence each.
    """

    train: Any
    test: Any
    classes: list[str]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: Literal["classification", "detection", "segmentation"] = "classification"
    notes: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """How many classes."""
        return len(self.classes)


def load_data(recipe: DataRecipe) -> DataSource:
    """Finds and opens the data set of a recipe.

    Args:
        recipe: the recipe's part `data`.

    Raises:
        UserError: unknown name, files missing or damaged, an empty folder, a normalisation of the wrong length.

    Example:
        >>> source = load_data(DataRecipe(name="digits"))
        >>> len(source.train), len(source.test), source.channels, source.image_size
        (1438, 359, 1, 8)
    """
    if recipe.name not in DATASETS:
        raise UserError(f"data.name is {recipe.name!r}; known are {', '.join(DATASETS)}.")
    source = DATASETS[recipe.name](recipe)
    if recipe.task is not None and recipe.task != source.task:
        raise UserError(f"data.task is {recipe.task}, but data {recipe.name} is for {source.task}.")
    if recipe.image_size is not None:
        source.image_size = recipe.image_size
        for part in ("train", "test"):
            pictures = getattr(source, part)
            if isinstance(pictures, TensorPictures):
                setattr(source, part, pictures.resized(recipe.image_size))
    for name in ("mean", "std"):
        values = getattr(recipe, name)
        if values is None:
            continue
        if len(values) != source.channels or (name == "std" and min(values) <= 0):
            raise UserError(
                f"data.{name} is {values}; expected {source.channels} numbers (std above 0), one a channel."
            )
        setattr(source, name, tuple(values))
    if recipe.validation_fraction is not None:
        chosen, held_out = stratified_split(_kinds(source), recipe.validation_fraction)
        source.train, source.test = source.train.subset(chosen), source.train.subset(held_out)
    if recipe.limit is not None and recipe.limit < len(source.train):
        order = torch.randperm(len(source.train), generator=generator(SPLIT_SEED, "limit"))
        source.train = source.train.subset(order[: recipe.limit])
    if recipe.label_fraction is not None:
        classification_only(source, "data.label_fraction")
        index = balanced_subset(source.train.labels, source.classes, recipe.label_fraction, recipe.subset_seed)
        source.train = source.train.subset(index)
    return source


def _kinds(source: DataSource) -> Tensor:
    """``(N,)``: what a split of the training pictures must do justice to."""
    labels: Tensor = source.train.labels
    return labels if source.task == "classification" else torch.zeros_like(labels)


def balanced_subset(labels: Tensor, classes: Sequence[str], fraction: float, seed: int) -> Tensor:
    """Chooses as many pictures of each class, `fraction` of all together.

    Args:
        labels: ``(N,)`` int64.
        classes: their names.
        fraction: above 0, up to 1; each class gives `fraction` N / classes pictures, rounded, at least one.
        seed: chooses which; with one seed a smaller fraction is a part of a larger one.

    Returns:
        Ascending indices.

    Raises:
        UserError: a class has not as many.

    Example:
        >>> labels = torch.tensor([0, 1, 1, 0, 1, 0])
        >>> labels[balanced_subset(labels, ["cat", "dog"], 0.7, seed=0)].bincount()
        tensor([2, 2])
    """
    count = max(1, round(fraction * len(labels) / len(classes)))
    sizes = labels.bincount(minlength=len(classes)).tolist()
    short = [f"{name} has {size}" for name, size in zip(classes, sizes, strict=True) if size < count]
    if short:
        raise UserError(
            f"data.label_fraction is {fraction}, which takes {count} of the {len(labels)} training pictures from each "
            f"of {len(classes)} classes, but {shorten(short)}; choose a smaller share, or more pictures if data.limit "
            "or data.validation_fraction took them."
        )
    chosen = []
    for label, members in enumerate(labels.argsort(stable=True).split(sizes)):
        order = torch.randperm(len(members), generator=generator(seed, "labels", label))
        chosen.append(members[order[:count]])
    return torch.cat(chosen).sort().values


def stratified_split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Splits picture indices so that each class gives `fraction` of its pictures (at least one) to the test part.

    Args:
        labels: ``(N,)`` int64.
        fraction: above 0, below 1.

    Returns:
        Indices to train on and to test on, both ascending; the same ones every time.

    Example:
        >>> train, test = stratified_split(torch.tensor([0, 0, 1, 1]), 0.5)
        >>> len(train), len(test)
        (2, 2)
    """
    train, test = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator(SPLIT_SEED, "split", label))]
        count = max(1, round(fraction * len(members)))
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def _digits(recipe: DataRecipe) -> DataSource:
    """1,797 handwritten digits of 8 x 8 pixels with 17 grey levels, from scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    pictures = TensorPictures(images, torch.from_numpy(digits.target).long())
    train, test = stratified_split(pictures.labels, recipe.test_fraction)
    return DataSource(
        pictures.subset(train), pictures.subset(test), [str(i) for i in range(10)], 1, 8, (0.3053,), (0.3760,)
    )


FASHION_CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def _fashion_mnist(recipe: DataRecipe) -> DataSource:
    """70,000 pieces of clothing, 28 x 28 grey pixels, from IDX files."""
    root = Path(recipe.root or "data")
    if recipe.download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(root), download=True)
    folders = [root, root / "FashionMNIST" / "raw", root / "fashion-mnist"]  # ours, torchvision's, Debian's layout
    if recipe.root is None:
        folders.append(DEBIAN_FASHION_MNIST)
    parts = []
    for split in ("train", "t10k"):
        images = read_idx(_find_idx(folders, f"{split}-images-idx3-ubyte"), num_dims=3)
        labels = read_idx(_find_idx(folders, f"{split}-labels-idx1-ubyte"), num_dims=1).long()
        if len(labels) != len(images):
            raise UserError(f"Fashion-MNIST's {split} part has {len(images)} pictures but {len(labels)} labels.")
        if labels.max() >= len(FASHION_CLASSES):
            raise UserError(f"Fashion-MNIST's {split} labels go up to {int(labels.max())}; expected 0 to 9.")
        parts.append(TensorPictures(images[:, None], labels))
    return DataSource(parts[0], parts[1], FASHION_CLASSES, 1, parts[0].images.shape[-1], (0.2860,), (0.3530,))


def _find_idx(folders: list[Path], name: str) -> Path:
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    looked = ", ".join(map(str, folders))
    raise UserError(
        f"Fashion-MNIST's file {name} (or .gz) is in none of {looked}. Install Debian's package dataset-fashion-mnist, "
        "point data.root at a folder that has the four files, or set data.download: true."
    )


def _cifar(recipe: DataRecipe) -> DataSource:
    """60,000 colour pictures of 32 x 32 pixels in 10 or 100 classes, through torchvision (which checks the files)."""
    from torchvision import datasets

    kind, title = (datasets.CIFAR10, "CIFAR-10") if recipe.name == "cifar10" else (datasets.CIFAR100, "CIFAR-100")
    root = recipe.root or "data"
    try:
        sets = [kind(root, train=train, download=recipe.download) for train in (True, False)]
    except RuntimeError:
        raise UserError(
            f"{title} is not in the folder {root}, or is damaged; point data.root at the folder that holds "
            f"{kind.base_folder}, or set data.download: true."
        ) from None
    parts = [
        TensorPictures(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in sets
    ]
    # Mean and standard deviation of the training pixels.
    mean, std = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }[recipe.name]
    return DataSource(parts[0], parts[1], list(sets[0].classes), 3, 32, mean, std)


def _image_folder(recipe: DataRecipe) -> DataSource:
    """``root/train/class/picture`` and ``root/val/class/picture``; without the two, ``root/class/picture`` is split."""
    layout = "expected root/train/CLASS/PICTURE and root/val/CLASS/PICTURE, or root/CLASS/PICTURE"
    if recipe.root is None:
        raise UserError(f"data.root is not given; {layout}.")
    root = Path(recipe.root)
    if not root.is_dir():
        raise UserError(f"data.root is {root}, which is not a folder; {layout}.")
    train = root / "train"
    if not train.is_dir():
        classes = _classes(root, layout)
        whole = FilePictures.of_folder(root, classes)
        first, second = stratified_split(whole.labels, recipe.test_fraction)
        if not len(first):
            raise UserError(f"{root} has {len(whole)} pictures in {len(classes)} classes; a split needs 2 a class.")
        parts = [whole.subset(first), whole.subset(second)]
    else:
        test = next((root / name for name in ("val", "test", "valid") if (root / name).is_dir()), None)
        if test is None:
            raise UserError(f"{root} has a folder train but none of val, test, valid; {layout}.")
        classes = _classes(train, layout)
        unknown = sorted(set(find_classes(test)) - set(classes))
        if unknown:
            raise UserError(f"{test} has classes that {train} has not: {shorten(unknown)}.")
        present = find_classes(test)
        parts = [FilePictures.of_folder(train, classes), FilePictures.of_folder(test, present)]
        parts[1].labels = torch.tensor([classes.index(name) for name in present])[parts[1].labels]
    size = recipe.image_size or 224
    return DataSource(parts[0], parts[1], classes, 3, size, IMAGENET_MEAN, IMAGENET_STD)


def _shards(recipe: DataRecipe) -> DataSource:
    """``root/train/*.tar`` and ``root/val/*.tar``; without the two, the pictures of ``root/*.tar`` are split."""
    if recipe.root is None:
        raise UserError(f"data.root is not given; {SHARDS}.")
    root = Path(recipe.root)
    if not root.is_dir():
        raise UserError(f"data.root is {root}, which is not a folder; {SHARDS}.")
    if (root / "train").is_dir():
        test_folder = next((root / name for name in ("val", "test", "valid") if (root / name).is_dir()), None)
        if test_folder is None:
            raise UserError(f"{root} has a folder train but none of val, test, valid; {SHARDS}.")
        (train, notes), (test, more) = open_shards(root / "train"), open_shards(test_folder)
        notes = [*notes, *more]
    else:
        whole, notes = open_shards(root)
        first, second = stratified_split(whole.labels, recipe.test_fraction)
        train, test = whole.subset(first), whole.subset(second)
    classes = _shard_classes(root, train, test)
    return DataSource(train, test, classes, 3, recipe.image_size or 224, IMAGENET_MEAN, IMAGENET_STD, notes=notes)


def _shard_classes(root: Path, *parts: ShardPictures) -> list[str]:
    """Names from ``classes.txt``, else the numbers themselves."""
    last = max((part.stored[int(part.labels.argmax())] for part in parts if len(part)), key=lambda place: place.label)
    largest = last.label
    if not (root / "classes.txt").is_file():
        return [str(label) for label in range(largest + 1)]
    classes = (root / "classes.txt").read_text().split("\n")
    classes = [name.strip() for name in classes if name.strip()]
    if largest >= len(classes):
        raise UserError(f"{root / 'classes.txt'} names {len(classes)} classes, but {last} has the class {largest}.")
    return classes


def _coco(recipe: DataRecipe) -> DataSource:
    """Boxes in COCO's format; without a part to test on, the training pictures are split."""
    if recipe.root is None:
        raise UserError(f"data.root is not given; {LAYOUT}.")
    root = Path(recipe.root)
    if not root.is_dir():
        raise UserError(f"data.root is {root}, which is not a folder; {LAYOUT}.")
    first, second = open_coco(root)
    train, notes = first.pictures, first.notes
    if second is None:
        chosen, held_out = stratified_split(torch.zeros_like(train.labels), recipe.test_fraction)
        train, test = train.subset(chosen), train.subset(held_out)
    else:
        test, notes = second.pictures, [*notes, *second.notes]
    classes = list(first.categories.values())
    return DataSource(train, test, classes, 3, 800, IMAGENET_MEAN, IMAGENET_STD, "detection", notes)


def _segmentation(masks: MaskSet, image_size: int) -> DataSource:
    """Pictures with the class of each pixel."""
    return DataSource(*masks, 3, image_size, IMAGENET_MEAN, IMAGENET_STD, "segmentation")


def _scenes(recipe: DataRecipe) -> DataSource:
    """What ``fastmkd scenes`` made: boxes or masks."""
    if recipe.task not in ("detection", "segmentation"):
        raise UserError(f"data.task is {recipe.task}; the pictures of scenes are for detection or segmentation.")
    if recipe.root is None or not (Path(recipe.root) / "train.json").is_file():
        raise UserError(f"data.root is {recipe.root}, which has no train.json; {SCENES}.")
    if recipe.task == "segmentation":
        return _segmentation(open_scene_masks(recipe.root), SCENE_SIZE)
    source = _coco(recipe)
    source.image_size = SCENE_SIZE
    return source


def _classes(folder: Path, layout: str) -> list[str]:
    classes = find_classes(folder)
    if not classes:
        raise UserError(f"{folder} is empty: no folder of a class is in it; {layout}.")
    return classes


DATASETS: dict[str, Callable[[DataRecipe], DataSource]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagefolder": _image_folder,
    "shards": _shards,
    "coco": _coco,
    "segfolder": lambda recipe: _segmentation(open_mask_folder(recipe.root), MASK_SIZE),
    "cityscapes": lambda recipe: _segmentation(open_cityscapes(recipe.root), MASK_SIZE),
    "scenes": _scenes,
}
