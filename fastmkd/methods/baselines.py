"""Losses that DPK is compared with (DPK, Tables 1 and 2), over the same layers, each as its paper has it."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dpk_stage import resize
from .losses import logit_kd, squared_error, wide

__all__ = [
    "Answers",
    "AttentionTransfer",
    "Baseline",
    "DecoupledKD",
    "FitNet",
    "ReviewKD",
    "Step",
    "VanillaKD",
]

LOWEST = -1e4


class Answers(NamedTuple):
    """What a network said of a batch.

    Attributes:
        logits: ``(B, K)``.
        maps: ``(B, C, h, w)``, one a stage.
    """

    logits: Tensor
    maps: Sequence[Tensor] = ()


class Step(NamedTuple):
    """What a loss may ask besides what the networks said.

    Attributes:
        targets: ``(B,)`` int64 class indices or ``(B, K)`` soft labels.
        temperature: tau of softened predictions.
        epoch: from 0.
        numbers: ``(B,)`` int64, where in the training set each image stands; for a base that needs them.
    """

    targets: Tensor
    temperature: float = 1.0
    epoch: int = 0
    numbers: Tensor | None = None


class Baseline(abc.ABC):
    """A distillation loss that `FeatureKD` adds to the cross-entropy. An object keeps options only.

    Attributes:
        weight: usual weight in the loss, for `FeatureKD(weight=None)`.
        needs_layers: False for a loss of the predictions alone.
        needs_image_numbers: True for one that remembers the training images by their numbers, see `memories`.
    """

    weight: float = 1.0
    needs_layers: bool = True
    needs_image_numbers: bool = False

    def heads(self, student: Answers, teacher: Answers) -> dict[str, nn.Module]:
        """Makes what is trained besides the student; nothing unless a subclass says so.

        Args:
            student: for one image, to see shapes.
            teacher: for one image.
        """
        return {}

    def memories(self, stages: int, train_labels: Tensor) -> dict[str, nn.Module]:
        """Makes what keeps something of every training image; nothing unless a subclass says so.

        Args:
            stages: number of layers.
            train_labels: ``(N,)`` int64, the classes of the training images.
        """
        return {}

    @abc.abstractmethod
    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns a scalar.

        Args:
            heads: what `heads` and `memories` made.
            student: gradients flow here.
            teacher: constants.
            step: the rest.
        """


class VanillaKD(Baseline):
    """``tau^2 * KL(teacher || student)`` of the predictions (Hinton et al., 2015).

    CRD's benchmark, whose numbers Table 1 of DPK repeats, has ``ce_weight=0.1, weight=0.9, temperature=4``.

    Example:
        >>> VanillaKD().needs_layers
        False
    """

    weight = 0.9
    needs_layers = False

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the divergence.

        Args:
            heads: not needed.
            student: its logits count.
            teacher: its logits count.
            step: its temperature counts.
        """
        return logit_kd(student.logits, teacher.logits, step.temperature)


class FitNet(Baseline):
    """Mean squared error of the maps after a 1 x 1 convolution of the student's (Romero et al., 2015).

    The usual weight is that of CRD's benchmark.

    Example:
        >>> FitNet().weight
        100.0
    """

    weight = 100.0

    def heads(self, student: Answers, teacher: Answers) -> dict[str, nn.Module]:
        """A 1 x 1 convolution for each stage.

        Args:
            student: for one image.
            teacher: for one image.
        """
        pairs = zip(student.maps, teacher.maps, strict=True)
        return {f"adapt{i}": nn.Conv2d(s.shape[1], t.shape[1], 1) for i, (s, t) in enumerate(pairs)}

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the sum over stages.

        Args:
            heads: the convolutions.
            student: its maps count.
            teacher: its maps count.
            step: not looked at.
        """
        errors = []
        for adapt, s, t in zip(heads.values(), student.maps, teacher.maps, strict=True):
            adapted = adapt(resize(s, (t.shape[2], t.shape[3])))
            errors.append(squared_error(adapted, t))
        return torch.stack(errors).sum()


class AttentionTransfer(Baseline):
    r"""Mean squared error of the spatial attention maps (Zagoruyko & Komodakis, 2017).

    .. math:: \sum_{stages} \mathrm{MSE}(Q^S, Q^T), \qquad Q = v / \|v\|_2, \quad v_{ij} = \frac{1}{C} \sum_c F_{cij}^2

    The larger map is averaged down to the smaller one's size. The usual weight is that of CRD's benchmark.

    Example:
        >>> AttentionTransfer.attention(torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2))
        tensor([[0.6000, 0.8000]])
    """

    weight = 1000.0

    @staticmethod
    def attention(features: Tensor) -> Tensor:
        """``(B, C, h, w)`` -> ``(B, h * w)`` of norm 1.

        Args:
            features: a map.
        """
        return F.normalize(wide(features).square().mean(1).flatten(1))

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the sum over stages.

        Args:
            heads: not needed.
            student: its maps count.
            teacher: its maps count.
            step: not looked at.
        """
        errors = []
        for s, t in zip(student.maps, teacher.maps, strict=True):
            size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
            own, other = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (s, t))
            errors.append(squared_error(self.attention(own), self.attention(other)))
        return torch.stack(errors).sum()


class DecoupledKD(Baseline):
    r"""Decoupled knowledge distillation (Zhao et al., 2022).

    .. math:: \alpha \, \mathrm{KL}(b^T \| b^S) + \beta \, \mathrm{KL}(\hat p^T \| \hat p^S)

    where b are the two probabilities of the true class and of all others together, and :math:`\hat p` those of the
    other classes among themselves; both at temperature tau and times tau squared. It grows over the first epochs.

    Args:
        target_weight: alpha.
        other_weight: beta; 8 on CIFAR-100, 0.5 on ImageNet.
        warmup_epochs: epochs until the whole weight is reached.

    Raises:
        ValueError: a weight or a number of epochs below 0.

    Example:
        >>> DecoupledKD().other_weight
        8.0
    """

    needs_layers = False

    def __init__(self, target_weight: float = 1.0, other_weight: float = 8.0, warmup_epochs: int = 20) -> None:
        named = {"target_weight": target_weight, "other_weight": other_weight, "warmup_epochs": warmup_epochs}
        for name, value in named.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        self.target_weight, self.other_weight = float(target_weight), float(other_weight)
        self.warmup_epochs = warmup_epochs

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the weighted sum of both divergences.

        Args:
            heads: not needed.
            student: its logits count.
            teacher: its logits count.
            step: targets are class indices.

        Raises:
            ValueError: soft labels, which have no true class.
        """
        targets, temperature = step.targets, step.temperature
        if targets.dim() != 1:
            raise ValueError("targets are soft labels, but base 'dkd' needs the true class; switch mixing off.")
        s, t = wide(student.logits) / temperature, wide(teacher.logits) / temperature
        true = torch.arange(s.shape[1], device=s.device) == targets[:, None]  # (B, K)
        target_loss = (_divergence(_binary(s, targets, true), _binary(t, targets, true))).mean() * temperature**2
        # A finite number instead of minus infinity: its probability is 0 as well, and no gradient is NaN.
        others = [x.masked_fill(true, LOWEST).log_softmax(1).masked_fill(true, LOWEST) for x in (s, t)]
        other_loss = _divergence(*others).mean() * temperature**2
        return _grown(step.epoch, self.warmup_epochs) * (
            self.target_weight * target_loss + self.other_weight * other_loss
        )


class Fusion(nn.Module):
    """Attention-based fusion of a stage with what the stages above it have gathered (Chen et al., 2021, Fig. 3).

    Args:
        student_channels: C_S.
        width: channels of what is gathered.
        teacher_channels: C_T.
        above: whether there is a stage above.
    """

    def __init__(self, student_channels: int, width: int, teacher_channels: int, above: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student_channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if above else None
        self.expand = nn.Sequential(
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )

    def forward(self, student: Tensor, gathered: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns the stage's map in the teacher's shape, and what is gathered with it.

        Args:
            student: ``(B, C_S, h, w)``.
            gathered: ``(B, width, h', w')`` from the stage above, or None.
            size: ``(h, w)`` of the teacher's map.

        Returns:
            ``(B, C_T, h, w)`` and ``(B, width, h, w)``.
        """
        x: Tensor = self.reduce(student)
        if self.attend is not None:
            assert gathered is not None
            gathered = F.interpolate(gathered, x.shape[2:], mode="nearest")
            own, other = self.attend(torch.cat((x, gathered), dim=1)).split(1, dim=1)  # (B, 1, h, w) each
            x = own * x + other * gathered
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


class ReviewKD(Baseline):
    r"""Knowledge review (Chen et al., 2021): a student's stage learns from the teacher's stages up to its own.

    From the last stage down, each stage of the student is fused with what those above it have gathered and compared
    with the teacher's by the hierarchical context loss: the mean squared errors of the whole map and of its averages
    over 4 x 4, 2 x 2 and 1 x 1 parts, with weights 1, 1/2, 1/4 and 1/8. It grows over the first epochs. Layers are
    named from the first stage to the last.

    Args:
        width: channels of what is gathered; None is the student's in the last stage, at most 512.
        warmup_epochs: epochs until the whole weight is reached.

    Raises:
        ValueError: a width or a number of epochs out of range.

    Example:
        >>> ReviewKD().warmup_epochs
        20
    """

    def __init__(self, width: int | None = None, warmup_epochs: int = 20) -> None:
        if width is not None and width < 1:
            raise ValueError(f"width is {width}; expected at least 1.")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs is {warmup_epochs}; expected at least 0.")
        self.width, self.warmup_epochs = width, warmup_epochs

    def heads(self, student: Answers, teacher: Answers) -> dict[str, nn.Module]:
        """A fusion for each stage.

        Args:
            student: for one image.
            teacher: for one image.
        """
        width, last = self.width or min(512, student.maps[-1].shape[1]), len(student.maps) - 1
        pairs = zip(student.maps, teacher.maps, strict=True)
        return {f"fuse{i}": Fusion(s.shape[1], width, t.shape[1], i < last) for i, (s, t) in enumerate(pairs)}

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the sum over stages.

        Args:
            heads: the fusions.
            student: its maps count.
            teacher: its maps count.
            step: its epoch counts.
        """
        gathered: Tensor | None = None
        errors = []
        for fuse, s, t in reversed(list(zip(heads.values(), student.maps, teacher.maps, strict=True))):
            predicted, gathered = fuse(s, gathered, (t.shape[2], t.shape[3]))
            errors.append(context_error(predicted, t))
        return _grown(step.epoch, self.warmup_epochs) * torch.stack(errors).sum()


def context_error(x: Tensor, y: Tensor) -> Tensor:
    """Returns the hierarchical context loss of two maps (Chen et al., 2021, Section 3.3).

    Args:
        x: ``(B, C, h, w)``.
        y: ``(B, C, h, w)``.

    Example:
        >>> context_error(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
        tensor(1.)
    """
    x, y = wide(x), wide(y)
    weight, total, error = 1.0, 1.0, squared_error(x, y)
    for parts in (4, 2, 1):
        if parts < x.shape[2]:
            weight /= 2
            total += weight
            smaller, other = (F.adaptive_avg_pool2d(each, parts) for each in (x, y))
            error = error + weight * squared_error(smaller, other)
    return error / total


def _grown(epoch: int, warmup_epochs: int) -> float:
    """Share of the weight in an epoch."""
    return min(1.0, (epoch + 1) / warmup_epochs) if warmup_epochs else 1.0


def _binary(logits: Tensor, targets: Tensor, true: Tensor) -> Tensor:
    """Log-probabilities ``(B, 2)`` of the true class and of all others together."""
    whole = logits.log_softmax(1)
    return torch.cat((whole.gather(1, targets[:, None]), whole.masked_fill(true, LOWEST).logsumexp(1)[:, None]), dim=1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of log-probabilities ``(B, K)``, for each image."""
    return (teacher.exp() * (teacher - student)).sum(1)
