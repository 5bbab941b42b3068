"""Which share of the tokens the teacher provides (DPK, Eq. 5 and Table 6): measured on the features, or by schedule.

Every rule returns a scalar on the features' device, and nothing waits for that device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.cka import as_rows, cka_matrix
from ..ops.centred_gram import MIN_BATCH, centred_gram
from .choices import choose
from .ranks import average, gather

__all__ = [
    "RATIOS",
    "CkaGap",
    "CosineGap",
    "ExponentialDecay",
    "FixedRatio",
    "LinearDecay",
    "MeasuredRatio",
    "RatioRule",
    "choose_ratio",
]


Shapes = tuple[torch.Size, torch.Size]  # (C, h, w) of the student's map and of the teacher's


class RatioRule(nn.Module):
    """Base: says which share of a stage's tokens comes from the teacher. Each stage has its own copy.

    A subclass implements `forward`.

    Example:
        >>> FixedRatio(0.75)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), epoch=0)
        tensor(0.7500)
    """

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """Raises unless the rule can be used on maps like these; every map will do unless a subclass says so.

        Args:
            student: ``(B, C_S, h, w)``.
            teacher: ``(B, C_T, h, w)``.
        """

    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Returns the share, a float32 scalar from 0 to 1.

        Args:
            student: ``(B, C_S, h, w)``.
            teacher: ``(B, C_T, h, w)``.
            epoch: from 0.
        """
        raise NotImplementedError


class FixedRatio(RatioRule):
    """The same share in every step (Table 5).

    Args:
        share: from 0 to 1.

    Raises:
        ValueError: a share out of range.

    Example:
        >>> FixedRatio(0.55).share
        0.55
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"ratio is {share}; expected the teacher's share of the tokens, from 0 to 1.")
        self.share = float(share)

    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Returns the share.

        Args:
            student: its device counts.
            teacher: not looked at.
            epoch: not looked at.
        """
        return torch.full((), self.share, device=student.device)


class ExponentialDecay(RatioRule):
    r"""A share that falls by the same factor every epoch, :math:`\pi_i = \pi_0 \cdot 0.95^{epoch}` (Section 3.3).

    Args:
        start: share in epoch 0.
        factor: from 0 to 1.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> ExponentialDecay()(torch.zeros(1), torch.zeros(1), epoch=2)
        tensor(0.9025)
    """

    def __init__(self, start: float = 1.0, factor: float = 0.95) -> None:
        super().__init__()
        for name, value in (("start", start), ("factor", factor)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected a number from 0 to 1.")
        self.start, self.factor = float(start), float(factor)

    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Returns the share in an epoch.

        Args:
            student: its device counts.
            teacher: not looked at.
            epoch: from 0; one before it counts as 0.
        """
        return torch.full((), self.start * self.factor ** max(epoch, 0), device=student.device)


class LinearDecay(RatioRule):
    r"""A share that falls by the same amount every epoch, :math:`\pi_i = \pi_0 - epoch \cdot decrement` (Section 3.3).

    It never falls below 0. The paper prints a decrement of 0.95, the default, with which the teacher gives nothing from
    the third epoch on; to arrive at 0.05 after 100 epochs take 0.0095.

    Args:
        start: share in epoch 0.
        decrement: at least 0.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> LinearDecay(decrement=0.25)(torch.zeros(1), torch.zeros(1), epoch=3)
        tensor(0.2500)
    """

    def __init__(self, start: float = 1.0, decrement: float = 0.95) -> None:
        super().__init__()
        if not 0 <= start <= 1:
            raise ValueError(f"start is {start}; expected a number from 0 to 1.")
        if not (decrement >= 0 and math.isfinite(decrement)):
            raise ValueError(f"decrement is {decrement}; expected a finite number of at least 0.")
        self.start, self.decrement = float(start), float(decrement)

    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Returns the share in an epoch.

        Args:
            student: its device counts.
            teacher: not looked at.
            epoch: from 0; one before it counts as 0.
        """
        return torch.full((), max(0.0, self.start - max(epoch, 0) * self.decrement), device=student.device)


class MeasuredRatio(RatioRule):
    """A share that follows the features' gap, measured anew in every step; base of `CkaGap` and `CosineGap`.

    It is measured over the batches of all ranks, which must be of one size, and clamped to 0..1; a gap that is not a
    number counts as the largest, so the share is then 1. The maps of all ranks are gathered for that, which is what one
    process with the global batch would measure; on many nodes they are too large (docs/scaling.md), and "sums" adds up
    a few numbers of each rank's batch instead. Batches of fewer than `least` images are joined with the last ones until
    there are so many; until then the last share stays, which is 1 at the start. A batch smaller than the one before it
    (the ragged last of an epoch) keeps the last share; from the second batch of a smaller size on it is measured again,
    so that a run that goes on with smaller batches follows the gap. In eval mode nothing is remembered.

    A subclass implements `gap`.

    Args:
        across_ranks: True gathers the maps of all ranks, "sums" adds up what each rank measures, False measures each
            rank's batch alone and sends nothing.

    Raises:
        ValueError: anything else.
    """

    last: Tensor
    largest: Tensor
    least = 1

    def __init__(self, across_ranks: bool | Literal["sums"] = True) -> None:
        super().__init__()
        if across_ranks not in (True, False, "sums"):
            raise ValueError(f"across_ranks is {across_ranks!r}; expected True, False or 'sums'.")
        self.across_ranks = across_ranks
        # On the device, so that nothing waits for it; in the state, so that a resumed run goes on with the same bits.
        self.register_buffer("last", torch.ones(()))
        # The size of the batch before. Older versions kept the largest so far, under this name in their checkpoints.
        self.register_buffer("largest", torch.zeros((), dtype=torch.int64))
        self._recent: list[tuple[Tensor, Tensor, Shapes]] = []  # batches too small to be measured alone

    def rows(self, features: Tensor) -> Tensor:
        """Returns ``(B, d)``, in any order; in the same one for each batch of fewer than `least` images.

        Args:
            features: ``(B, C, h, w)``.
        """
        return features.flatten(1)

    def gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns how far student and teacher are from each other, a scalar; 0 is not at all.

        Args:
            student: ``(n, d_S)``.
            teacher: ``(n, d_T)``.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Measures the share.

        Args:
            student: ``(B, C_S, h, w)``.
            teacher: ``(B, C_T, h, w)``.
            epoch: not looked at.
        """
        x, y = self.rows(student), self.rows(teacher)
        if self.across_ranks is True:
            x, y = gather(x), gather(y)
        images = len(x)
        if images < self.least:
            x, y = self._join_recent(x, y, (student.shape[1:], teacher.shape[1:]))
        elif self.training:
            self._recent = []
        if len(x) < self.least:
            share = self.last.float()
        else:
            share = self.gap(x, y).float().nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).clamp(0, 1)
        share = torch.where(self.largest > images, self.last.float(), share)
        if self.training:
            self.last.copy_(share)
            self.largest.fill_(images)
        return share

    def _join_recent(self, x: Tensor, y: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """The batch with as many of the last ones of its shapes as it takes to have `least` images."""
        fitting = [small for small in self._recent if small[2] == shapes]
        fitting.append((x, y, shapes))
        while sum(len(small[0]) for small in fitting[1:]) >= self.least:
            fitting.pop(0)
        if self.training:
            self._recent = fitting
        return torch.cat([small[0] for small in fitting]), torch.cat([small[1] for small in fitting])


class CkaGap(MeasuredRatio):
    r"""One minus the minibatch CKA of the two maps, :math:`\pi_i = 1 - CKA(X_i, Y_i)` (Eq. 5 to 7).

    With "sums" the ranks' batches are the minibatches of Eq. 7: each rank's three HSIC_1 are added up, then divided.

    Args:
        across_ranks: see `MeasuredRatio`.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> CkaGap()(x, 2 * x + 1, epoch=0).round(decimals=4).abs()
        tensor(0.)
    """

    least = MIN_BATCH

    def rows(self, features: Tensor) -> Tensor:
        """Returns ``(B, d)`` in the order of memory, on which CKA does not depend within a batch.

        Args:
            features: ``(B, C, h, w)``.
        """
        if len(features) < self.least:  # to be joined with others, which may lie in another order
            return features.flatten(1)
        return as_rows(features)

    def gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns 1 - CKA.

        Args:
            student: ``(n, d_S)``.
            teacher: ``(n, d_T)``.
        """
        if self.across_ranks != "sums":
            return 1 - cka_matrix([student], [teacher])[0, 0]
        k, el = (centred_gram([x])[0].double() for x in (student, teacher))  # (n, n)
        both, own_k, own_el = average(torch.stack([(k * el).sum(), k.square().sum(), el.square().sum()]))
        return 1 - both / (own_k.sqrt() * own_el.sqrt())


class CosineGap(MeasuredRatio):
    """One minus the mean cosine of the angle between the two flattened maps of an image (Table 6, "1-CosineSimi").

    Args:
        across_ranks: see `MeasuredRatio`.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> CosineGap()(x, 3 * x, epoch=0).round(decimals=4).abs()
        tensor(0.)
    """

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """Raises unless the maps have the same channels: an angle needs one space.

        Args:
            student: ``(B, C_S, h, w)``.
            teacher: ``(B, C_T, h, w)``.

        Raises:
            ValueError: they differ.
        """
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"ratio is 'cosine' but the student's map has {student.shape[1]} channels and the teacher's "
                f"{teacher.shape[1]}; the angle needs as many. Use ratio='cka'."
            )

    def gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns 1 - mean cosine.

        Args:
            student: ``(n, d)``.
            teacher: ``(n, d)``.
        """
        cosine = F.cosine_similarity(student.float(), teacher.float()).mean()
        return 1 - (average(cosine) if self.across_ranks == "sums" else cosine)


# By the name that DPK(ratio=...) and a recipe use; any number is a FixedRatio.
RATIOS: dict[str, Callable[[], RatioRule]] = {
    "cka": CkaGap,
    "cosine": CosineGap,
    "exponential": ExponentialDecay,
    "linear": LinearDecay,
}


def choose_ratio(value: Any) -> RatioRule:
    """Returns the rule that a number, a name, ``{class_path, init_args}`` or an object stands for.

    Args:
        value: see `DPK`.

    Raises:
        ValueError: a number out of range, or a name that is not known.
        TypeError: anything else.

    Example:
        >>> choose_ratio(0.5).share, type(choose_ratio("cka")).__name__
        (0.5, 'CkaGap')
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return FixedRatio(value)
    return choose("ratio", value, RatioRule, RATIOS)
