"""Batches: which pictures, in which order, on which process, and how a run goes on in the middle of an epoch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import needs_pictures, shift_and_flip
from .errors import UserError
from .pictures import Pictures, TensorPictures
from .schema import AugmentRecipe, DataRecipe
from .seeds import generator, seed_all
from .tasks import Classification, Task
from .tasks.base import Reader

__all__ = ["Batch", "Loader", "epoch_plan", "eval_plan"]

# A set in memory moves to a GPU as a whole below this size.
MAX_DEVICE_BYTES = 2**31


class Batch(NamedTuple):
    """Pictures and targets on the device.

    Attributes:
        images: ``(B, C, H, W)`` uint8; for detection a list of ``(3, H, W)``.
        targets: ``(B,)`` int64; for detection a list of dicts, for segmentation ``(B, H, W)``.
        numbers: ``(B,)`` int64, where in the set each picture stands.
    """

    images: Any
    targets: Any
    numbers: Tensor


def epoch_plan(
    num_pictures: int, batch_size: int, seed: int, epoch: int, *, rank: int = 0, world: int = 1, group: int = 1
) -> Tensor:
    """Returns which pictures each batch of an epoch takes; what does not fill a whole update is left to other epochs.

    Args:
        num_pictures: size of the training set.
        batch_size: of one process.
        seed: of the run.
        epoch: from 0.
        rank: of this process.
        world: number of processes; together they see each picture at most once an epoch.
        group: batches per update.

    Returns:
        ``(batches, batch_size)`` int64; the number of batches is a multiple of `group`.

    Raises:
        UserError: the set is smaller than one update.

    Example:
        >>> epoch_plan(10, 2, seed=0, epoch=0, group=2).shape
        torch.Size([4, 2])
    """
    images_per_update = batch_size * world * group
    updates = num_pictures // images_per_update
    if updates == 0:
        raise UserError(
            f"one update takes {images_per_update} pictures (data.batch_size {batch_size} x processes {world} x "
            f"optim.accumulate {group}) but there are only {num_pictures}; make data.batch_size smaller."
        )
    order = torch.randperm(num_pictures, generator=generator(seed, "shuffle", epoch))
    batches = order[: updates * images_per_update].view(updates * group, world, batch_size)
    return batches[:, rank]


def eval_plan(num_pictures: int, batch_size: int, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Returns the batches of the test pictures of one process; together the processes see each picture once.

    Args:
        num_pictures: size of the test set.
        batch_size: of one process.
        rank: of this process.
        world: number of processes.

    Example:
        >>> [len(batch) for batch in eval_plan(5, 2)]
        [2, 2, 1]
    """
    return list(torch.arange(rank, num_pictures, world).split(batch_size)) if rank < num_pictures else []


class Loader:
    """Reads the batches of a plan and puts them on a device.

    Pictures that cannot be read are collected in `bad` (name to reason). In training the next readable picture of the
    set takes the place of a bad one, so that batches keep their size on every process; in testing it is left out.

    Args:
        pictures: what to read from.
        recipe: the recipe's part `data`.
        augment: what to do to the pictures; None for testing.
        image_size: side in pixels.
        device: where batches go.
        seed: of the run.
        task: how pictures become batches; None is classification.

    Attributes:
        pictures: what it reads from.
        bad: what could not be read.
    """

    def __init__(
        self,
        pictures: Pictures,
        recipe: DataRecipe,
        augment: AugmentRecipe | None,
        image_size: int,
        device: torch.device,
        seed: int,
        task: Task | None = None,
    ) -> None:
        self.pictures = pictures
        self.bad: dict[str, str] = {}
        self.augment, self.image_size, self.device, self.seed = augment, image_size, device, seed
        self._order = _Order()
        self._images = self._labels = None
        self._loader: DataLoader[Any] | None = None
        if isinstance(pictures, TensorPictures) and (augment is None or not needs_pictures(augment)):
            small = pictures.images.numel() <= MAX_DEVICE_BYTES
            home = device if small else torch.device("cpu")
            self._images, self._labels = pictures.images.to(home), pictures.labels.to(home)
        else:
            task = task or Classification()
            dataset = _Readable(pictures, task.reader(augment, image_size), seed, replace=augment is not None)
            self._loader = DataLoader(
                dataset,
                batch_sampler=self._order,
                num_workers=recipe.workers,
                collate_fn=functools.partial(_collate, task),
                pin_memory=device.type == "cuda",
                persistent_workers=recipe.workers > 0,
            )

    def batches(self, plan: Tensor | list[Tensor], epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of `plan` from number `start` on, without those of which no picture can be read.

        Args:
            plan: picture indices of each batch.
            epoch: seeds the augmentation.
            start: first batch to read; the earlier ones are not touched.
        """
        for batch in self.planned(plan, epoch, start):
            if batch is not None:
                yield batch

    def planned(self, plan: Tensor | list[Tensor], epoch: int = 0, start: int = 0) -> Iterator[Batch | None]:
        """Yields as many things as `plan` has batches from `start` on: None for one of which no picture can be read.

        Args:
            plan: see `batches`.
            epoch: see `batches`.
            start: see `batches`.
        """
        if self._loader is None:
            yield from self._from_memory(plan, epoch, start)
            return
        self._order.set(plan[start:], epoch)
        for read in self._loader:
            if isinstance(read, UserError):
                raise read
            batch, bad = read
            self.bad.update(bad)
            yield moved(batch, self.device) if len(batch.numbers) else None

    def close(self) -> None:
        """Ends the reading processes, whoever still holds this object; reading on would start others."""
        reading: Any = getattr(self._loader, "_iterator", None)  # kept between epochs, and ended by nothing public
        if reading is not None:
            reading._shutdown_workers()
            assert self._loader is not None
            self._loader._iterator = None

    def blank(self) -> Batch:
        """Returns a batch of one black picture of class 0, for a process that has nothing to read while others have.

        Example:
            >>> from fastmkd.train.data import load_data
            >>> recipe = DataRecipe(name="digits")
            >>> Loader(load_data(recipe).test, recipe, None, 8, torch.device("cpu"), seed=0).blank().images.shape
            torch.Size([1, 1, 8, 8])
        """
        channels = 3 if self._images is None else self._images.shape[1]  # files are converted to RGB
        image = torch.zeros(1, channels, self.image_size, self.image_size, dtype=torch.uint8, device=self.device)
        none = torch.zeros(1, dtype=torch.int64, device=self.device)
        return Batch(image, none, none)

    def _from_memory(self, plan: Tensor | list[Tensor], epoch: int, start: int) -> Iterator[Batch]:
        assert self._images is not None
        assert self._labels is not None
        for number in range(start, len(plan)):
            index = plan[number].to(self._images.device)
            read = (self._images[index], self._labels[index], index)
            images, targets, index = (part.to(self.device, non_blocking=True) for part in read)
            augment = self.augment
            if augment is not None and (augment.crop == "pad" or augment.flip):
                # The first picture of a batch tells apart batches of an epoch and processes.
                seed_all(self.seed, "shift", epoch, int(plan[number][0]))
                images = shift_and_flip(images, augment.pad if augment.crop == "pad" else 0, augment.flip)
            yield Batch(images, targets, index)


def moved(value: Any, device: torch.device) -> Any:
    """Moves all tensors in nested lists, tuples and dicts; the copy may still be under way.

    Args:
        value: tensors at the leaves.
        device: where they go.

    Example:
        >>> moved([{"boxes": torch.zeros(0, 4)}], torch.device("cpu"))
        [{'boxes': tensor([], size=(0, 4))}]
    """
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [moved(part, device) for part in value]
        return parts if isinstance(value, list) else type(value)(*parts)  # named tuples only
    return value.to(device, non_blocking=True)


class _Order:
    """Batch sampler that outlives epochs, so that worker processes do too; items are (epoch, picture)."""

    def __init__(self) -> None:
        self.plan: Tensor | list[Tensor] = []
        self.epoch = 0

    def set(self, plan: Tensor | list[Tensor], epoch: int) -> None:
        self.plan, self.epoch = plan, epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.plan:
            yield [(self.epoch, index) for index in batch.tolist()]

    def __len__(self) -> int:
        return len(self.plan)


class _Item(NamedTuple):
    """A picture as a worker read it: None if it cannot be read. `bad` names those that could not, with the reason."""

    image: Tensor | None
    target: Any
    number: int
    bad: dict[str, str]


class _Readable(Dataset[Any]):
    """Pictures that survive broken files: ``[(epoch, index)]`` gives an `_Item`."""

    def __init__(self, pictures: Pictures, read: Reader, seed: int, replace: bool) -> None:
        self.pictures, self.read, self.seed, self.replace = pictures, read, seed, replace

    def __getitem__(self, item: tuple[int, int]) -> _Item | UserError:
        epoch, wanted = item
        bad: dict[str, str] = {}
        for offset in range(len(self.pictures) if self.replace else 1):
            index = (wanted + offset) % len(self.pictures)
            try:
                picture, target = self.pictures.load(index), self.pictures.target(index)
            except UserError as error:  # the data do not fit together, which leaving a picture out would hide
                return error
            except Exception as error:  # decoders raise anything: OSError, SyntaxError, ValueError, bomb errors ...
                bad[self.pictures.where(index)] = f"{type(error).__name__}: {error}"
                continue
            if self.replace:
                seed_all(self.seed, "picture", epoch, wanted)
            image, target = self.read(picture, target)
            return _Item(image, target, index, bad)
        if self.replace:
            return UserError(f"none of {len(self.pictures)} pictures can be read; the first failed with {_first(bad)}.")
        return _Item(None, None, -1, bad)


def _first(bad: dict[str, str]) -> str:
    name, reason = next(iter(bad.items()))
    return f"{reason} ({name})"


def _collate(task: Task, found: list[_Item | UserError]) -> tuple[Batch, dict[str, str]] | UserError:
    for item in found:
        if isinstance(item, UserError):
            return item  # raised in the main process, where no traceback of a worker is added to its sentence
    items = [item for item in found if isinstance(item, _Item)]
    bad = {name: reason for item in items for name, reason in item.bad.items()}
    good = [(item.image, item.target, item.number) for item in items if item.image is not None]
    images, targets = task.collate([image for image, _, _ in good], [target for _, target, _ in good])
    return Batch(images, targets, torch.tensor([number for _, _, number in good], dtype=torch.int64)), bad
