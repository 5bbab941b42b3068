"""The interface of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import UserError, shorten
from ..schema import AugmentRecipe, Recipe

if TYPE_CHECKING:
    from ..data import DataSource
    from ..loading import Loader

__all__ = ["FAMILIES", "Finish", "Reader", "Task"]

# A picture (PIL) and its target -> uint8 (C, H, W) and the target that goes with it. Runs in worker processes.
Reader = Callable[[Any, Any], tuple[Tensor, Any]]
# The images and targets of a batch on the device -> those that the method gets.
Finish = Callable[[Any, Any], tuple[Any, Any]]

# How names of networks begin that are no classifiers, and their task.
FAMILIES = {"detector": "detection", "segmenter": "segmentation"}


class Task(ABC):
    """What differs between classification, detection and segmentation in training.

    A batch goes this way: `reader` for each picture, `collate` in the same worker, then on the device what `finisher`
    returned, then the method; `evaluate` tests with batches made in the same way.

    Attributes:
        name: as `fastmkd.train.data.DataSource.task` says it.
        augments: keys of the recipe's part `augment` that the task knows; the others must keep their defaults.
    """

    name: str
    augments: tuple[str, ...]

    @abstractmethod
    def reader(self, augment: AugmentRecipe | None, size: int) -> Reader:
        """Returns what is done to one picture and its target as they come from the disk.

        Args:
            augment: the recipe's part; None for testing. Draws come from the global generators, seeded per picture.
            size: the data's `image_size`.
        """

    @abstractmethod
    def collate(self, images: list[Tensor], targets: list[Any]) -> tuple[Any, Any]:
        """Joins pictures to a batch.

        Args:
            images: what `reader` gave; may be empty.
            targets: likewise.
        """

    @abstractmethod
    def finisher(self, source: DataSource, augment: AugmentRecipe | None = None) -> Finish:
        """Returns what is done to a batch on the device, such as normalising.

        Args:
            source: the data.
            augment: the recipe's part; None for testing. Draws come from the global generators, seeded per batch.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, loader: Loader, finish: Finish, num_pictures: int, batch_size: int, accelerator: Any
    ) -> dict[str, float]:
        """Tests a network, whose mode is restored.

        Args:
            model: the network.
            loader: of the test pictures.
            finish: from `finisher`.
            num_pictures: size of the test set.
            batch_size: of one process.
            accelerator: of Hugging Face Accelerate; every process gets the same scores.

        Returns:
            Scores by name (`fastmkd.train.evaluate.worded` says them) and ``images``, how many could be read.
        """

    def notes(self, student: nn.Module) -> list[str]:
        """Says what a user should know about a student before it trains.

        Args:
            student: the network.
        """
        return []

    def check(self, recipe: Recipe, methods: tuple[str, ...]) -> None:
        """Refuses a recipe whose networks, method or augmentation are for another task.

        Args:
            recipe: what is asked for.
            methods: tasks that the recipe's method knows.

        Raises:
            UserError: says what does not fit.
        """
        teacher = recipe.teacher
        names = {"student": recipe.student.name, "teacher": teacher.name if teacher is not None else None}
        for role, name in names.items():
            if name is not None and (found := FAMILIES.get(name.partition(".")[0], "classification")) != self.name:
                family = next((key for key, task in FAMILIES.items() if task == self.name), None)
                wanted = f"a name such as {family}.{EXAMPLES[family]}" if family else "a classifier"
                raise UserError(
                    f"{role}.name is {name}, a network for {found}, but data {recipe.data.name} is for {self.name}; "
                    f"expected {wanted}."
                )
        if self.name not in methods:
            method = recipe.method.class_path.rpartition(".")[2]
            raise UserError(
                f"method {method} is for {' and '.join(methods)}, but data {recipe.data.name} is for {self.name}; "
                "Supervised trains without a teacher there."
            )
        plain = AugmentRecipe()
        foreign = [
            f"augment.{name}"
            for name, value in vars(recipe.augment).items()
            if name not in self.augments and value != getattr(plain, name)
        ]
        if foreign:
            known = ", ".join(f"augment.{name}" for name in self.augments)
            raise UserError(f"{shorten(foreign)} is set, which {self.name} does not have; it has {known}.")


EXAMPLES = {"detector": "retinanet", "segmenter": "pspnet"}
