"""Which batches a method left out because NaN or infinity came from its teacher or stood in the images."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["SkippedBatches", "finite_pixels"]

REMEMBERED = 16


def finite_pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns images without NaN and infinity, and whether there were none, as a boolean scalar on the device.

    A batch that is left out must still run: its loss times zero is zero, and so are its gradients, only if nothing on
    the way is NaN. Broken pixels alone become zeros, so that the running statistics of a batch norm, which a NaN would
    spoil for good, see nearly the images they would have seen.

    Args:
        images: ``(B, C, H, W)``.

    Example:
        >>> finite_pixels(torch.tensor([1.0, float("nan")]))
        (tensor([1., 0.]), tensor(False))
    """
    finite = images.isfinite()
    return torch.where(finite, images, 0), finite.all()


class SkippedBatches:
    """Counts batches on the device, without waiting for it, and remembers the first that were skipped.

    On a CPU a skipped batch is reported at once by a warning; on a GPU whoever wants to know reads `count` or
    `numbers`, which waits for the device. The record belongs to this process and this run: it is in no state_dict.

    Example:
        >>> skipped = SkippedBatches()
        >>> for good in (True, True):
        ...     skipped.note(torch.tensor(good))
        >>> skipped.count, skipped.numbers
        (0, [])
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._skipped: Tensor | None = None
        self._numbers: Tensor | None = None

    def note(self, good: Tensor, images: Tensor | None = None) -> None:
        """Counts a batch.

        Args:
            good: boolean scalar; False if the batch is skipped.
            images: boolean scalar; False if it is because of the images. None is True.
        """
        if self._seen is None or self._seen.device != good.device:
            self._seen = torch.zeros((), dtype=torch.int64, device=good.device)
            self._skipped = torch.zeros((), dtype=torch.int64, device=good.device)
            self._numbers = torch.zeros(REMEMBERED + 1, dtype=torch.int64, device=good.device)
        assert self._skipped is not None
        assert self._numbers is not None
        # The last cell takes whatever is not to be remembered.
        cell = torch.where(good, REMEMBERED, self._skipped.clamp(max=REMEMBERED))
        self._numbers.scatter_(0, cell.view(1), self._seen.view(1))
        if good.device.type == "cpu" and not torch.compiler.is_compiling() and not good:
            number = f"batch {int(self._seen)} (the first this method saw is 0)"
            if images is None or images:
                said = (
                    f"the teacher's output for {number} is not finite; the batch is skipped. Look at that batch's "
                    "images, or run the teacher in float32 (teacher_dtype)."
                )
            else:
                said = f"{number} has images with NaN or infinity; the batch is skipped. Look at where they come from."
            warnings.warn(said, stacklevel=3)
        self._skipped += ~good
        self._seen += 1

    @property
    def count(self) -> int:
        """How many batches were skipped."""
        return 0 if self._skipped is None else int(self._skipped)

    @property
    def numbers(self) -> list[int]:
        """Numbers, from 0, of the first skipped batches, at most 16 of them."""
        return [] if self._numbers is None else self._numbers[: min(self.count, REMEMBERED)].tolist()
