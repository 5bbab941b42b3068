r"""DPK for detectors: the imitation term of FGD on a feature pyramid, with hybrid features (DPK, Eq. 8 and 9).

.. math:: L = w_f M A^S A^C (F^t - \hat F)^2 + w_b (1 - M) A^S A^C (F^t - \hat F)^2

:math:`\hat F` is the adapted student's map :math:`f(F^s)` in Eq. 8, FGD's own, and DPK's hybrid map :math:`F^h` in
Eq. 9. As in FGD (Yang et al., CVPR 2022), a box counts the same whatever its size, and so does the whole background;
the error is summed over channels and cells and averaged over images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .dpk_ratio import RatioRule, choose_ratio
from .dpk_stage import DPKStage, draw_from_teacher, least_patch_size, resize

__all__ = ["FGDImitation", "attention_weights", "box_masks", "imitation_loss"]


def attention_weights(features: Tensor, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    r"""Returns spatial and channel attention, softmaxes of the mean absolute values over the other axes.

    .. math:: A^S = H W \, \mathrm{softmax}(\tfrac{1}{C} \sum_c |F| / T), \qquad A^C = C \, \mathrm{softmax}(
        \tfrac{1}{H W} \sum_{ij} |F| / T)

    Args:
        features: ``(B, C, H, W)``; the teacher's map.
        temperature: T, positive.

    Returns:
        ``(B, 1, H, W)`` and ``(B, C, 1, 1)``, each 1 on average.

    Example:
        >>> [a.shape for a in attention_weights(torch.randn(2, 3, 4, 5))]
        [torch.Size([2, 1, 4, 5]), torch.Size([2, 3, 1, 1])]
    """
    size = features.abs().to(torch.promote_types(features.dtype, torch.float32))
    cells, channels = size.mean(1).flatten(1) / temperature, size.mean((2, 3)) / temperature
    spatial = (cells.softmax(1) * cells.shape[1]).view(-1, 1, *features.shape[2:])
    return spatial, (channels.softmax(1) * channels.shape[1])[:, :, None, None]


def box_masks(
    boxes: Sequence[Tensor], image_size: tuple[int, int], map_size: tuple[int, int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Returns how much each cell of a map counts as foreground and as background.

    A cell that boxes reach into is foreground with 1 / (cells of the smallest such box), all others are background with
    1 / (their number). Where boxes lie is not read from the device.

    Args:
        boxes: for each image ``(n, 4)`` corners ``x0, y0, x1, y1`` in pixels; n may be 0.
        image_size: ``(H, W)`` pixels of the padded images.
        map_size: ``(h, w)`` cells.
        device: where the masks are made; None takes that of the boxes.

    Returns:
        ``(B, 1, h, w)`` float32 each; one of the two is 0 in every cell.

    Raises:
        ValueError: boxes of a wrong shape.

    Example:
        >>> foreground, background = box_masks([torch.tensor([[0.0, 0.0, 16.0, 8.0]])], (16, 16), (2, 2))
        >>> foreground[0, 0], background[0, 0]
        (tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]]), tensor([[0.0000, 0.0000],
                [0.5000, 0.5000]]))
    """
    (height, width), (h, w) = image_size, map_size
    found = []
    for i, corners in enumerate(boxes):
        if corners.dim() != 2 or corners.shape[1] != 4:
            raise ValueError(f"boxes[{i}] has shape {tuple(corners.shape)}; expected (n, 4), corners in pixels.")
        corners = corners.to(device=device, dtype=torch.float32)
        columns = _reached(corners[:, 0] * (w / width), corners[:, 2] * (w / width), w)
        rows = _reached(corners[:, 1] * (h / height), corners[:, 3] * (h / height), h)
        cells = rows[:, :, None] & columns[:, None, :]  # (n, h, w)
        share = cells / cells.sum((1, 2), keepdim=True).clamp_min(1)
        nothing = torch.zeros(1, h, w, device=corners.device)
        found.append(torch.cat((share, nothing)).amax(0))
    foreground = torch.stack(found)[:, None]  # (B, 1, h, w)
    free = (foreground == 0).float()
    return foreground, free / free.sum((2, 3), keepdim=True).clamp_min(1)


def _reached(start: Tensor, end: Tensor, count: int) -> Tensor:
    """``(n,), (n,) -> (n, count)``: the cells that intervals reach into, at least one each."""
    first = start.floor()
    last = torch.maximum(end.ceil(), first + 1)
    cell = torch.arange(count, device=start.device)
    return (cell >= first[:, None]) & (cell < last[:, None])


def imitation_loss(
    prediction: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    foreground_weight: float,
    background_weight: float,
    temperature: float = 0.5,
) -> Tensor:
    """Returns the weighted squared error of one level (DPK, Eq. 8 or 9), summed over the map, averaged over images.

    Args:
        prediction: ``(B, C, h, w)``, f(F^s) or F^h; the gradient flows here.
        teacher: ``(B, C, h, w)``.
        foreground: ``(B, 1, h, w)`` from `box_masks`.
        background: likewise.
        foreground_weight: w_f.
        background_weight: w_b.
        temperature: of the teacher's attention.

    Returns:
        Scalar in float32 (float64 for float64).

    Example:
        >>> x, everywhere = torch.zeros(1, 2, 2, 2), torch.full((1, 1, 2, 2), 0.25)
        >>> imitation_loss(x + 1, x, everywhere, 0 * everywhere, 3.0, 1.0)
        tensor(6.)
    """
    wide = torch.promote_types(torch.promote_types(prediction.dtype, teacher.dtype), torch.float32)
    spatial, channel = attention_weights(teacher.detach(), temperature)
    cells = foreground_weight * foreground + background_weight * background
    squared = (prediction.to(wide) - teacher.detach().to(wide)).square()
    return (squared * channel * (spatial * cells)).sum() / len(teacher)


class FGDImitation(nn.Module):
    """The imitation term over all levels of a feature pyramid, with FGD's features (Eq. 8) or DPK's (Eq. 9).

    Nothing is shared between levels. DPK's paper gives the weights: 2e-3 and 5e-4 for one-stage detectors (the
    default), 5e-5 and 2.5e-5 for two-stage ones.

    Args:
        student_channels: C_S of every level.
        teacher_channels: C_T.
        map_sizes: ``(h, w)`` of each level for an ordinary image; other sizes may come later.
        hybrid: True for Eq. 9; False adapts the student's map with a 1 x 1 convolution if the channels differ.
        ratio: the teacher's share of the tokens, see `DPK`.
        foreground_weight: w_f.
        background_weight: w_b.
        temperature: of the attention.
        encoder_depth: of each `DPKStage`.
        decoder_depth: of each `DPKStage`.
        width: of each `DPKStage`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> sizes = [(13, 19), (7, 10)]
        >>> term = FGDImitation(8, 8, sizes, ratio=0.5, encoder_depth=1, decoder_depth=1, width=16)
        >>> levels = [torch.randn(2, 8, *size) for size in sizes]
        >>> term(levels, [x + 1 for x in levels], [torch.zeros(0, 4), torch.zeros(0, 4)], (104, 152)).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        map_sizes: Sequence[tuple[int, int]],
        hybrid: bool = True,
        ratio: float | str | RatioRule = "cka",
        foreground_weight: float = 2e-3,
        background_weight: float = 5e-4,
        temperature: float = 0.5,
        encoder_depth: int = 6,
        decoder_depth: int = 4,
        width: int = 512,
    ) -> None:
        super().__init__()
        for name, value in (("foreground_weight", foreground_weight), ("background_weight", background_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        if not map_sizes:
            raise ValueError("map_sizes is empty; give (h, w) of each level of the pyramid.")
        rule = choose_ratio(ratio)
        self.weights, self.temperature, self.hybrid = (foreground_weight, background_weight), temperature, hybrid
        self.levels, self.rules = nn.ModuleList(), nn.ModuleList()
        for size in map_sizes:
            if hybrid:
                k = least_patch_size(size)
                stage: nn.Module = DPKStage(
                    student_channels, teacher_channels, size, k, width, encoder_depth, decoder_depth
                )
                self.rules.append(copy.deepcopy(rule))
            elif student_channels != teacher_channels:
                stage = nn.Conv2d(student_channels, teacher_channels, 1)
            else:
                stage = nn.Identity()
            self.levels.append(stage)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        boxes: Sequence[Tensor],
        image_size: tuple[int, int],
        epoch: int = 0,
    ) -> Tensor:
        """Returns the sum over levels.

        Args:
            student: ``(B, C_S, h, w)`` of each level; the gradient flows here.
            teacher: ``(B, C_T, h, w)`` of each level.
            boxes: true boxes of each image, ``(n, 4)`` corners in pixels.
            image_size: ``(H, W)`` pixels of the padded images.
            epoch: from 0, for schedules.

        Raises:
            ValueError: another number of levels, or of images.
        """
        if not len(student) == len(teacher) == len(self.levels):
            raise ValueError(
                f"student has {len(student)} levels and teacher {len(teacher)}; this term was made for "
                f"{len(self.levels)}."
            )
        errors = []
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if len(boxes) != len(s):
                raise ValueError(f"boxes holds {len(boxes)} images but the maps {len(s)}; give one tensor an image.")
            t, size = t.detach(), (t.shape[2], t.shape[3])
            masks = box_masks(boxes, image_size, size, t.device)
            errors.append(imitation_loss(self.predict(i, s, t, epoch), t, *masks, *self.weights, self.temperature))
        return torch.stack(errors).sum()

    def predict(self, level: int, student: Tensor, teacher: Tensor, epoch: int = 0) -> Tensor:
        """Returns what is compared with the teacher's map of a level, f(F^s) or F^h, ``(B, C_T, h, w)``.

        Args:
            level: its number.
            student: ``(B, C_S, h, w)``.
            teacher: ``(B, C_T, h, w)``.
            epoch: from 0, for schedules.
        """
        stage, size = self.levels[level], (teacher.shape[2], teacher.shape[3])
        if not isinstance(stage, DPKStage):
            adapted: Tensor = stage(resize(student, size))
            return adapted
        share = self.rules[level](resize(student.detach(), size), teacher, epoch)
        hybrid: Tensor = stage(student, teacher, draw_from_teacher("random", len(student), stage.grid(size), share))
        return hybrid
