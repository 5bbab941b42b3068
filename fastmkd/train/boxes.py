"""Pictures with boxes: files on a disk, and one flat table of all boxes, which worker processes share for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pictures import as_rgb, open_picture

__all__ = ["BoxPictures", "BoxTable"]


class BoxTable(NamedTuple):
    """Boxes of all pictures, those of one picture next to each other.

    Attributes:
        boxes: ``(M, 4)`` float32, corners x0 y0 x1 y1 in pixels.
        labels: ``(M,)`` int64 from 1.
        iscrowd: ``(M,)`` bool, boxes around many things at once.
        area: ``(M,)`` float32, of the thing, in pixels.
        start: ``(N + 1,)`` int64; picture i has boxes ``start[i]`` to ``start[i + 1]``.
    """

    boxes: Tensor
    labels: Tensor
    iscrowd: Tensor
    area: Tensor
    start: Tensor

    def largest(self) -> Tensor:
        """Returns ``(N,)`` int64 labels of the largest boxes, 0 for pictures without any.

        Example:
            >>> table = BoxTable(
            ...     torch.zeros(2, 4), torch.tensor([5, 7]), torch.zeros(2) > 0, torch.tensor([1.0, 9.0]),
            ...     torch.tensor([0, 0, 2]),
            ... )
            >>> table.largest()
            tensor([0, 7])
        """
        counts = self.start.diff()
        owner = torch.arange(len(counts)).repeat_interleave(counts)  # (M,)
        order = self.area.argsort(stable=True)
        order = order[owner[order].argsort(stable=True)]  # by picture, then by area
        labels = torch.zeros(len(counts), dtype=torch.int64)
        labels[counts > 0] = self.labels[order][self.start[1:][counts > 0] - 1]
        return labels


class BoxPictures:
    """Picture files of any sizes, read when they are needed and converted to RGB, and what is in them.

    Args:
        paths: the files.
        ids: ``(N,)`` int64, the data set's own numbers of them.
        sizes: ``(N, 2)`` int64 widths and heights that the boxes were made for; a file of another size is broken.
        table: the boxes.
        index: which of all of these, in what order; None is all.
    """

    def __init__(
        self, paths: Sequence[Path], ids: Tensor, sizes: Tensor, table: BoxTable, index: Tensor | None = None
    ) -> None:
        self.paths, self.ids, self.sizes, self.table = paths, ids, sizes, table
        self.index = torch.arange(len(paths)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> Tensor:
        """``(N,)`` int64 classes of the largest boxes, 0 for pictures without any."""
        return self.table.largest()[self.index]

    def load(self, index: int) -> Any:
        """Picture `index` as an RGB PIL image.

        Args:
            index: from 0.

        Raises:
            ValueError: the file has another size than its boxes were made for.
        """
        number = int(self.index[index])
        with open_picture(self.paths[number]) as picture:
            said = tuple(self.sizes[number].tolist())
            if picture.size != said:
                raise ValueError(
                    f"it has {picture.size[0]} x {picture.size[1]} pixels, but its boxes were made for {said[0]} x "
                    f"{said[1]}"
                )
            return as_rgb(picture)

    def target(self, index: int) -> dict[str, Tensor]:
        """What is in picture `index`.

        Args:
            index: from 0.

        Returns:
            ``boxes`` ``(n, 4)`` float32, ``labels`` ``(n,)`` int64, ``iscrowd`` ``(n,)`` bool and ``area`` ``(n,)``
            float32 as in `BoxTable`, and ``image_id``, an int64 scalar; n may be 0.
        """
        number = int(self.index[index])
        first, last = self.table.start[number : number + 2].tolist()
        parts = {name: getattr(self.table, name)[first:last] for name in ("boxes", "labels", "iscrowd", "area")}
        return {**parts, "image_id": self.ids[number]}

    def where(self, index: int) -> str:
        """Names picture `index` for a message.

        Args:
            index: from 0.
        """
        return str(self.paths[int(self.index[index])])

    def subset(self, index: Tensor) -> BoxPictures:
        """Returns the pictures `index`; the table stays shared.

        Args:
            index: int64.
        """
        return BoxPictures(self.paths, self.ids, self.sizes, self.table, self.index[index])
