"""Which batches a method left out because its teacher answered with NaN or infinity."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["SkippedBatches"]

REMEMBERED = 16


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

    def note(self, good: Tensor) -> None:
        """Counts a batch.

        Args:
            good: boolean scalar; False if the batch is skipped.
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
            warnings.warn(
                f"the teacher's output for batch {int(self._seen)} (the first this method saw is 0) is not finite; the "
                "batch is skipped. Look at that batch's images, or run the teacher in float32 (teacher_dtype).",
                stacklevel=3,
            )
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
