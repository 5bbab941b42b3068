"""Losses that MKD is compared with (MKD, Tables 2, 3, 5 and 6), over the same levels, each as its paper has it."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.masks import cell_scores
from .dense_method import LevelShape
from .dpk_ratio import RatioRule
from .dpk_stage import resize
from .fgd import FGDImitation, attention_weights
from .mkd_losses import Relation, channel_logit_loss

__all__ = ["CWD", "DPKFGD", "FGD", "MGD", "DenseBase", "DenseStep", "Hint"]


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


class Hint(DenseBase):
    """FitNet (Romero et al., ICLR 2015): the mean squared error after a 1 x 1 convolution, summed over levels.

    Example:
        >>> Hint().weight
        1.0
    """

    def heads(self, levels: Sequence[LevelShape]) -> dict[str, nn.Module]:
        """A convolution for each level.

        Args:
            levels: their shapes.
        """
        return {
            "adapt": nn.ModuleList(nn.Conv2d(level.student_channels, level.teacher_channels, 1) for level in levels)
        }

    def loss(
        self, heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor], step: DenseStep
    ) -> Tensor:
        """Returns the sum over levels.

        Args:
            heads: the convolutions.
            student: of each level.
            teacher: of each level.
            step: not looked at.
        """
        adapted = _adapted(heads, student, teacher)
        return torch.stack([F.mse_loss(_wide(s), _wide(t)) for s, t in zip(adapted, teacher, strict=True)]).sum()


class CWD(DenseBase):
    """Channel-wise distillation of feature maps (Shu et al., ICCV 2021), after a 1 x 1 convolution if widths differ.

    Args:
        temperature: tau.

    Example:
        >>> CWD().weight
        50.0
    """

    weight = 50.0

    def __init__(self, temperature: float = 4.0) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        self.temperature = float(temperature)

    def heads(self, levels: Sequence[LevelShape]) -> dict[str, nn.Module]:
        """A convolution for each level whose widths differ.

        Args:
            levels: their shapes.
        """
        return {"adapt": _adapters(levels)}

    def loss(
        self, heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor], step: DenseStep
    ) -> Tensor:
        """Returns the sum over levels.

        Args:
            heads: the convolutions.
            student: of each level.
            teacher: of each level.
            step: not looked at.
        """
        pairs = zip(_adapted(heads, student, teacher), teacher, strict=True)
        return torch.stack([channel_logit_loss(s, t, self.temperature) for s, t in pairs]).sum()


class MGD(DenseBase):
    """Masked generative distillation (Yang et al., ECCV 2022): the student's map is masked, not its input.

    For each level: a 1 x 1 convolution if widths differ, a share of the positions set to zero, two 3 x 3 convolutions
    with a ReLU between them, and the squared error, summed over the map and averaged over images. Its paper has the
    weight 2e-5 and the ratio 0.65 for one-stage detectors, 5e-7 and 0.45 for two-stage ones, 2e-5 and 0.75 for
    segmentation.

    Args:
        mask_ratio: chance of a position to be hidden.

    Raises:
        ValueError: a `mask_ratio` out of range.

    Example:
        >>> MGD().mask_ratio
        0.65
    """

    weight = 2e-5

    def __init__(self, mask_ratio: float = 0.65) -> None:
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}; expected at least 0 and below 1.")
        self.mask_ratio = float(mask_ratio)

    def heads(self, levels: Sequence[LevelShape]) -> dict[str, nn.Module]:
        """A convolution where widths differ, and a generator for each level.

        Args:
            levels: their shapes.
        """
        generators = nn.ModuleList()
        for level in levels:
            width = level.teacher_channels
            generators.append(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            )
        return {"adapt": _adapters(levels), "generate": generators}

    def loss(
        self, heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor], step: DenseStep
    ) -> Tensor:
        """Returns the sum over levels.

        Args:
            heads: convolutions and generators.
            student: of each level.
            teacher: of each level.
            step: not looked at.
        """
        errors, generators = [], cast(nn.ModuleList, heads["generate"])
        for s, t, generate in zip(_adapted(heads, student, teacher), teacher, generators, strict=True):
            size = (s.shape[2], s.shape[3])
            noise = cell_scores("random", len(s), size, s.device).view(len(s), 1, *size)
            kept = noise >= self.mask_ratio
            errors.append((_wide(generate(s * kept.to(s.dtype))) - _wide(t)).square().sum() / len(s))
        return torch.stack(errors).sum()


class FGD(DenseBase):
    """Focal and global distillation (Yang et al., CVPR 2022): imitation by box, attention, and relation.

    The defaults are its paper's for one-stage detectors; two-stage ones have 5e-5, 2.5e-5, 5e-5 and 5e-7.

    Args:
        foreground_weight: alpha.
        background_weight: beta.
        attention_weight: gamma, of the absolute differences of both attentions.
        relation_weight: lambda.
        temperature: of the attention.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> FGD().needs_boxes
        True
    """

    needs_boxes = True

    def __init__(
        self,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 1e-3,
        relation_weight: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        for name, value in (("attention_weight", attention_weight), ("relation_weight", relation_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        self.foreground_weight, self.background_weight = foreground_weight, background_weight
        self.attention_weight, self.relation_weight = attention_weight, relation_weight
        self.temperature = temperature

    def heads(self, levels: Sequence[LevelShape]) -> dict[str, nn.Module]:
        """A convolution where widths differ, the imitation term, and a pair of context blocks for each level.

        Args:
            levels: their shapes, all of the same width.
        """
        _, other = _one_width(levels)
        imitation = FGDImitation(
            other, other, [level.size for level in levels], hybrid=False, foreground_weight=self.foreground_weight,
            background_weight=self.background_weight, temperature=self.temperature,
        )  # fmt: skip
        relation = nn.ModuleList(Relation(other) for _ in levels)
        return {"adapt": _adapters(levels), "imitation": imitation, "relation": relation}

    def loss(
        self, heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor], step: DenseStep
    ) -> Tensor:
        """Returns the weighted sum of the three terms.

        Args:
            heads: of all levels.
            student: of each level.
            teacher: of each level.
            step: its boxes and its size count.
        """
        assert step.boxes is not None
        imitation, relations = cast(FGDImitation, heads["imitation"]), cast(nn.ModuleList, heads["relation"])
        adapted = _adapted(heads, student, teacher)
        total: Tensor = imitation(adapted, teacher, step.boxes, step.image_size, step.epoch)
        for relation, s, t in zip(relations, adapted, teacher, strict=True):
            s, t = _wide(s), _wide(t)
            pairs = zip(attention_weights(s, self.temperature), attention_weights(t, self.temperature), strict=True)
            attention = torch.stack([(a - b).abs().sum() / len(s) for a, b in pairs]).sum()
            total = total + self.attention_weight * attention + self.relation_weight * relation(s, t)
        return total


class DPKFGD(DenseBase):
    """DPK for detectors: FGD's imitation with hybrid features (DPK, Eq. 9), see `fastmkd.methods.fgd`.

    Args:
        ratio: the teacher's share, see `fastmkd.DPK`.
        foreground_weight: w_f; 2e-3 for one-stage detectors, 5e-5 for two-stage ones.
        background_weight: w_b; 5e-4 and 2.5e-5.
        encoder_depth: of each stage.
        decoder_depth: of each stage.
        width: of each stage.

    Example:
        >>> DPKFGD().needs_boxes
        True
    """

    needs_boxes = True

    def __init__(
        self,
        ratio: float | str | RatioRule = "cka",
        foreground_weight: float = 2e-3,
        background_weight: float = 5e-4,
        encoder_depth: int = 6,
        decoder_depth: int = 4,
        width: int = 512,
    ) -> None:
        self.ratio, self.foreground_weight, self.background_weight = ratio, foreground_weight, background_weight
        self.encoder_depth, self.decoder_depth, self.width = encoder_depth, decoder_depth, width

    def heads(self, levels: Sequence[LevelShape]) -> dict[str, nn.Module]:
        """The imitation term, with two encoders and a decoder for each level.

        Args:
            levels: their shapes, all of the same width.
        """
        own, other = _one_width(levels)
        imitation = FGDImitation(
            own, other, [level.size for level in levels], ratio=self.ratio, foreground_weight=self.foreground_weight,
            background_weight=self.background_weight, encoder_depth=self.encoder_depth,
            decoder_depth=self.decoder_depth, width=self.width,
        )  # fmt: skip
        return {"imitation": imitation}

    def loss(
        self, heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor], step: DenseStep
    ) -> Tensor:
        """Returns the imitation term.

        Args:
            heads: of all levels.
            student: of each level.
            teacher: of each level.
            step: its boxes, its size and its epoch count.
        """
        assert step.boxes is not None
        loss: Tensor = heads["imitation"](student, teacher, step.boxes, step.image_size, step.epoch)
        return loss


def _adapters(levels: Sequence[LevelShape]) -> nn.ModuleList:
    """A 1 x 1 convolution for each level whose widths differ."""
    return nn.ModuleList(
        nn.Identity()
        if level.student_channels == level.teacher_channels
        else nn.Conv2d(level.student_channels, level.teacher_channels, 1)
        for level in levels
    )


def _adapted(heads: nn.ModuleDict, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
    """The student's levels in the teacher's width and size."""
    levels = zip(cast(nn.ModuleList, heads["adapt"]), student, teacher, strict=True)
    return [resize(adapt(s), (t.shape[2], t.shape[3])) for adapt, s, t in levels]


def _one_width(levels: Sequence[LevelShape]) -> tuple[int, int]:
    widths = {(level.student_channels, level.teacher_channels) for level in levels}
    if len(widths) > 1:
        raise ValueError("the levels differ in width, but FGD is for a pyramid, whose levels are equally wide.")
    return widths.pop()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
