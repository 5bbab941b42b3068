r"""What MKD compares: layer-normalised maps, their global relations, and maps of logits (MKD, Eq. 3 to 5).

.. math:: L_{feat} = \sum_i \frac{1}{2 N_i} (F_i^T - \hat F_i^S)^2, \qquad
    L_{global} = \sum_i (R(F_i^T) - R(\hat F_i^S))^2

"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import recovered_loss, relation_error
from .mkd_decoder import AdaptiveDecoder

__all__ = [
    "ContextBlock",
    "LevelErrors",
    "Relation",
    "channel_logit_loss",
    "feature_error",
    "level_errors",
    "normalise",
]


class LevelErrors(NamedTuple):
    """The two errors of one level.

    Attributes:
        feat: its summand of L_feat.
        relation: its summand of L_global; None where nobody asked.
    """

    feat: Tensor
    relation: Tensor | None


def level_errors(
    decoder: AdaptiveDecoder, rows: Tensor, grid: tuple[int, int], teacher: Tensor, relation: Relation | None
) -> LevelErrors:
    """Returns the errors of one level: SRM's last step, the layer norm of both sides, and both losses.

    They come from one pass over the rows and the teacher's map (`fastmkd.ops.recovered_loss`); only where tokens reach
    beyond the map, whose size they do not divide, maps are made and compared step by step.

    Args:
        decoder: the level's decoder.
        rows: ``(B, gh * gw, p * p * C)`` from it; the gradient flows here.
        grid: ``(gh, gw)`` tokens.
        teacher: ``(B, C, h, w)``, a constant.
        relation: the level's pair of context blocks, or None.

    Example:
        >>> decoder = AdaptiveDecoder(4, 6, patch=2, width=8, depth=1)
        >>> rows = decoder(torch.randn(2, 4, 4, 4), torch.ones(2, 2, 2, dtype=torch.bool))
        >>> level_errors(decoder, rows, (2, 2), torch.randn(2, 6, 4, 4), None).feat.shape
        torch.Size([])
    """
    size = (teacher.shape[2], teacher.shape[3])
    p, teacher = decoder.patch, teacher.detach()
    if (grid[0] * p, grid[1] * p) != size:
        if p > 1:  # tokens that reach beyond the map
            prediction, target = normalise(decoder.to_map(rows, grid, size)), normalise(teacher)
            related = None if relation is None else relation(prediction, target.to(prediction.dtype))
            return LevelErrors(feature_error(prediction, target.to(prediction.dtype)), related)
        rows = decoder.to_map(rows, grid, size).flatten(2).mT  # (B, h * w, C_T)
    if relation is None:
        return LevelErrors(recovered_loss(rows, teacher, p).error, None)
    blocks = (relation.student, relation.teacher)
    recovered = recovered_loss(rows, teacher, p, torch.cat([block.attend.weight.flatten(1) for block in blocks]))
    student, taught = (block.added(context) for block, context in zip(blocks, recovered.contexts, strict=True))
    return LevelErrors(recovered.error, relation_error(recovered, student - taught, size[0] * size[1]))


def normalise(features: Tensor) -> Tensor:
    """Layer norm over the channels of each position, without weights, in float32 (float64 for float64).

    The paper says "a layer normalization operation"; over channels it leaves no position louder than another.

    Args:
        features: ``(B, C, h, w)``.

    Example:
        >>> normalise(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)).flatten()
        tensor([-1.0000,  1.0000])
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32)).permute(0, 2, 3, 1)
    return F.layer_norm(wide, wide.shape[-1:]).permute(0, 3, 1, 2)


def feature_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns half the mean squared error of two maps (Eq. 3).

    Args:
        prediction: ``(B, C, h, w)``, normalised.
        target: ``(B, C, h, w)``, normalised.

    Example:
        >>> feature_error(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
        tensor(0.5000)
    """
    return 0.5 * F.mse_loss(prediction, target)


class ContextBlock(nn.Module):
    """R of Eq. 4: a map plus what a small network makes of its attention-pooled context (GCNet; FGD, Eq. 8).

    The last convolution starts at zero, so R starts as the identity.

    Args:
        channels: C.

    Example:
        >>> x = torch.randn(2, 8, 3, 3)
        >>> torch.equal(ContextBlock(8)(x), x)
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.attend = nn.Conv2d(channels, 1, 1, bias=False)  # a softmax does not see a bias
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm((hidden, 1, 1)), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        nn.init.kaiming_normal_(self.attend.weight, mode="fan_in")
        for parameter in self.transform[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, C, h, w)``.

        Args:
            x: ``(B, C, h, w)``.
        """
        share = self.attend(x).flatten(2).softmax(2)  # (B, 1, h * w)
        context = (x.flatten(2) @ share.mT.to(x.dtype))[..., 0]  # (B, C)
        return x + self.added(context)[:, :, None, None]

    def added(self, context: Tensor) -> Tensor:
        """Returns what every position gets, ``(B, C)``.

        Args:
            context: ``(B, C)``, attention-pooled.
        """
        out: Tensor = self.transform(context[:, :, None, None])
        return out[:, :, 0, 0]


class Relation(nn.Module):
    """L_global of one level: a context block of its own for each side (FGD, Eq. 9).

    Args:
        channels: C of both.

    Example:
        >>> Relation(4)(torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))  # 4 * 9 ones for each image
        tensor(36., grad_fn=<DivBackward0>)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student, self.teacher = ContextBlock(channels), ContextBlock(channels)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Returns the squared error summed over the map, averaged over images.

        Args:
            prediction: ``(B, C, h, w)``.
            target: ``(B, C, h, w)``.
        """
        return (self.student(prediction) - self.teacher(target)).square().sum() / len(prediction)


def channel_logit_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Returns CWD's loss of maps of logits: for each class, where it is, as a distribution (Shu et al., ICCV 2021).

    .. math:: \frac{\tau^2}{B C} \sum_{b,c} \mathrm{KL}(\mathrm{softmax}_{ij}(z^T_{bc} / \tau)\,\|\,
        \mathrm{softmax}_{ij}(z^S_{bc} / \tau))

    Args:
        student: ``(B, C, h, w)``; the gradient flows here.
        teacher: ``(B, C, h, w)``; a constant.
        temperature: tau.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> z = torch.randn(2, 3, 4, 4)
        >>> bool(channel_logit_loss(z, z + 1) < 1e-6)  # a shift of a channel changes nothing
        True
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student.shape)} but the teacher's {tuple(teacher.shape)}; both "
            "must tell apart the same classes, with the same anchors. Set logits_weight=0 otherwise."
        )
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = (
        F.log_softmax(z.to(wide).flatten(2).flatten(0, 1) / temperature, dim=1) for z in (student, teacher.detach())
    )  # (B * C, h * w)
    return F.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2
