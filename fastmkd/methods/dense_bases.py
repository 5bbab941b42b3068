"""Losses that MKD is compared with (MKD, Tables 2, 3, 5 and 6), over the same levels, each as its paper has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..nn.masks import cell_scores
from .dense_base import DenseBase, DenseStep, adapt_level, adapted_levels, adapters, head_at, one_width
from .dense_method import LevelShape
from .dpk_ratio import RatioRule
from .fgd import FGDImitation, attention_weights
from .losses import squared_error, wide
from .mkd_losses import Relation, channel_logit_loss

__all__ = ["CWD", "DPKFGD", "FGD", "MGD", "DenseBase", "DenseStep", "Hint"]


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
        adapted = adapted_levels(heads, student, teacher)
        return torch.stack([squared_error(s, t) for s, t in zip(adapted, teacher, strict=True)]).sum()


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
        return {"adapt": adapters(levels)}

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
        pairs = zip(adapted_levels(heads, student, teacher), teacher, strict=True)
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
        return {"adapt": adapters(levels), "generate": generators}

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
        errors = []
        for at, (s, t) in enumerate(zip(student, teacher, strict=True)):
            guess, _ = self.view(heads, at, s, t, step.epoch)
            errors.append((wide(guess) - wide(t)).square().sum() / len(s))
        return torch.stack(errors).sum()

    def view(
        self, heads: nn.ModuleDict, at: int, student: Tensor, teacher: Tensor, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the generated map, and also shows what it was generated from.

        Args:
            heads: convolutions and generators.
            at: number of the level.
            student: of this level.
            teacher: of this level.
            epoch: not looked at.
        """
        s = adapt_level(heads, at, student, teacher)
        size = (s.shape[2], s.shape[3])
        noise = cell_scores("random", len(s), size, s.device).view(len(s), 1, *size)
        masked = s * (noise >= self.mask_ratio).to(s.dtype)
        generated: Tensor = head_at(heads, "generate", at)(masked)
        return generated, {"masked features": masked, "generated features": generated}


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
        imitation = self.imitation(levels)
        relation = nn.ModuleList(Relation(level.teacher_channels) for level in levels)
        return {"adapt": adapters(levels), "imitation": imitation, "relation": relation}

    def imitation(self, levels: Sequence[LevelShape]) -> FGDImitation:
        """Makes the imitation term of all levels.

        Args:
            levels: their shapes, all of the same width.
        """
        _, other = one_width(levels)
        return FGDImitation(
            other, other, [level.size for level in levels], hybrid=False, foreground_weight=self.foreground_weight,
            background_weight=self.background_weight, temperature=self.temperature,
        )  # fmt: skip

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
        adapted = adapted_levels(heads, student, teacher)
        imitated = student if imitation.hybrid else adapted  # DPK's encoders take the student's map as it is
        total: Tensor = imitation(imitated, teacher, step.boxes, step.image_size, step.epoch)
        for relation, s, t in zip(relations, adapted, teacher, strict=True):
            s, t = wide(s), wide(t)
            pairs = zip(attention_weights(s, self.temperature), attention_weights(t, self.temperature), strict=True)
            attention = torch.stack([(a - b).abs().sum() / len(s) for a, b in pairs]).sum()
            total = total + self.attention_weight * attention + self.relation_weight * relation(s, t)
        return total

    def view(
        self, heads: nn.ModuleDict, at: int, student: Tensor, teacher: Tensor, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the adapted map, and also shows the spatial attention of the teacher.

        Args:
            heads: of all levels.
            at: number of the level.
            student: of this level.
            teacher: of this level.
            epoch: not looked at.
        """
        adapted, maps = super().view(heads, at, student, teacher, epoch)
        return adapted, {**maps, "teacher's attention": attention_weights(teacher, self.temperature)[0]}


class DPKFGD(FGD):
    """DPK for detectors: FGD with hybrid features in its imitation term (DPK, Eq. 9), see `fastmkd.methods.fgd`.

    The attention and relation terms are FGD's own, of the adapted student's map, with FGD's weights.

    Args:
        ratio: the teacher's share, see `fastmkd.DPK`.
        foreground_weight: w_f; 2e-3 for one-stage detectors, 5e-5 for two-stage ones.
        background_weight: w_b; 5e-4 and 2.5e-5.
        encoder_depth: of each stage.
        decoder_depth: of each stage.
        width: of each stage.
        attention_weight: FGD's gamma; 1e-3 and 5e-5.
        relation_weight: FGD's lambda; 5e-6 and 5e-7.
        temperature: of the attention.

    Raises:
        ValueError: a weight out of range.

    Example:
        >>> DPKFGD().needs_boxes
        True
    """

    def __init__(
        self,
        ratio: float | str | RatioRule = "cka",
        foreground_weight: float = 2e-3,
        background_weight: float = 5e-4,
        encoder_depth: int = 6,
        decoder_depth: int = 4,
        width: int = 512,
        attention_weight: float = 1e-3,
        relation_weight: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(foreground_weight, background_weight, attention_weight, relation_weight, temperature)
        self.ratio = ratio
        self.encoder_depth, self.decoder_depth, self.width = encoder_depth, decoder_depth, width

    def imitation(self, levels: Sequence[LevelShape]) -> FGDImitation:
        """Makes the imitation term, with two encoders and a decoder for each level.

        Args:
            levels: their shapes, all of the same width.
        """
        own, other = one_width(levels)
        return FGDImitation(
            own, other, [level.size for level in levels], ratio=self.ratio, foreground_weight=self.foreground_weight,
            background_weight=self.background_weight, temperature=self.temperature, encoder_depth=self.encoder_depth,
            decoder_depth=self.decoder_depth, width=self.width,
        )  # fmt: skip

    def view(
        self, heads: nn.ModuleDict, at: int, student: Tensor, teacher: Tensor, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the hybrid map, with the share that the rule says, and also shows the teacher's attention.

        Args:
            heads: the imitation term.
            at: number of the level.
            student: of this level.
            teacher: of this level.
            epoch: for schedules.
        """
        imitation = cast(FGDImitation, heads["imitation"])
        hybrid = imitation.predict(at, student, teacher, epoch)
        return hybrid, {
            "hybrid features": hybrid,
            "teacher's attention": attention_weights(teacher, self.temperature)[0],
        }
