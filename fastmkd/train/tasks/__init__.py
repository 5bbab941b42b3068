"""What the one engine does not know: how pictures of a task become batches, and what a network is judged by there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from .base import Task
from .classification import Classification
from .detection import Detection
from .segmentation import Segmentation

if TYPE_CHECKING:
    from ..data import DataSource

__all__ = ["TASKS", "Classification", "Detection", "Segmentation", "Task", "classification_only", "task_of"]

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Detection(), Segmentation())}


def task_of(source: DataSource) -> Task:
    """Returns the task that a data set is for.

    Args:
        source: the data.

    Example:
        >>> from fastmkd.train.data import DataRecipe, load_data
        >>> task_of(load_data(DataRecipe(name="digits"))).name
        'classification'
    """
    return TASKS[source.task]


def classification_only(source: DataSource, what: str) -> None:
    """Refuses data whose pictures have no class.

    Args:
        source: the data.
        what: wants classes, for the message.

    Raises:
        UserError: the data is for another task.
    """
    if source.task != "classification":
        raise UserError(f"{what} is for classifiers, and the data of this recipe is for {source.task}.")
