"""What a loss over levels is to `fastmkd.DenseKD`, and what such losses share."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn

from .dense_method import LevelShape
from .dpk_stage import resize

__all__ = [
    "DenseBase", "DenseStep", "adapt_level", "adapted_levels", "adapters", "head_at", "one_width",
]  # fmt: skip


class DenseStep(NamedTuple):
    """What a loss may ask besides the levels.

    Attributes:
        boxes: true boxes of each image, ``(n, 4)`` corners in pixels of the batch; None without a detector.
        image_size: ``(H, W)`` pixels of the batch.
        epoch: from 0.
    """

    boxes: Sequence[Tensor] | None
    image_size: tuple[int, int]
    epoch: int = 0


class DenseBase(abc.ABC):
    """A loss over levels that `fastmkd.DenseKD` adds to the task's. An object keeps options only.

    Attributes:
        weight: usual weight in the loss, for ``DenseKD(weight=None)``.
        needs_boxes: True for one that only detectors can have.
    """

    weight: float = 1.0
    needs_boxes: bool = False

    @abc.abstractmethod
    def heads(self, levels: Sequence[LevelShape]) -> dict[str, nn.Module]:
        """Makes what is trained besides the student.

        Args:
            levels: their shapes.
        """

    @abc.abstractmethod
    def loss(
        self, heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor], step: DenseStep
    ) -> Tensor:
        """Returns a scalar.

        Args:
            heads: what `heads` made.
            student: ``(B, C_S, h, w)`` of each level; gradients flow here.
            teacher: ``(B, C_T, h, w)``, constants.
            step: the rest.
        """

    def view(
        self, heads: nn.ModuleDict, at: int, student: Tensor, teacher: Tensor, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns what is compared with the teacher's map of a level, and maps that show how it came about.

        Unless a subclass says otherwise that is the student's map, brought to the teacher's width and size.

        Args:
            heads: what `heads` made.
            at: number of the level.
            student: ``(B, C_S, h, w)`` of this level.
            teacher: ``(B, C_T, h, w)``.
            epoch: from 0.

        Returns:
            ``(B, C_T, h, w)``, and maps ``(B, C, h, w)`` by title.
        """
        adapted = adapt_level(heads, at, student, teacher)
        return adapted, {} if isinstance(head_at(heads, "adapt", at), nn.Identity) else {"adapted features": adapted}


def adapters(levels: Sequence[LevelShape]) -> nn.ModuleList:
    """Makes a 1 x 1 convolution for each level whose widths differ.

    Args:
        levels: their shapes.
    """
    return nn.ModuleList(
        nn.Identity()
        if level.student_channels == level.teacher_channels
        else nn.Conv2d(level.student_channels, level.teacher_channels, 1)
        for level in levels
    )


def adapted_levels(heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
    """Returns the student's levels in the teacher's width and size.

    Args:
        heads: with "adapt".
        student: ``(B, C_S, h, w)`` of each level.
        teacher: ``(B, C_T, h, w)`` of each level.
    """
    return [adapt_level(heads, at, s, t) for at, (s, t) in enumerate(zip(student, teacher, strict=True))]


def adapt_level(heads: nn.ModuleDict, at: int, student: Tensor, teacher: Tensor) -> Tensor:
    """Returns one of the student's levels in the teacher's width and size.

    Args:
        heads: with "adapt".
        at: number of the level.
        student: ``(B, C_S, h, w)``.
        teacher: ``(B, C_T, h, w)``.
    """
    return resize(head_at(heads, "adapt", at)(student), (teacher.shape[2], teacher.shape[3]))


def head_at(heads: nn.ModuleDict, name: str, at: int) -> nn.Module:
    """Returns the head of a level.

    Args:
        heads: by name a list of one for each level.
        name: which list.
        at: number of the level.
    """
    return cast(nn.ModuleList, heads[name])[at]


def one_width(levels: Sequence[LevelShape]) -> tuple[int, int]:
    """Returns C_S and C_T, which all levels must share.

    Args:
        levels: their shapes.

    Raises:
        ValueError: they differ.
    """
    widths = {(level.student_channels, level.teacher_channels) for level in levels}
    if len(widths) > 1:
        raise ValueError("the levels differ in width, but FGD is for a pyramid, whose levels are equally wide.")
    return widths.pop()
