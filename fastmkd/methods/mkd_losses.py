r"""What MKD compares: layer-normalised maps, their global relations, and maps of logits (MKD, Eq. 3 to 5).

.. math:: L_{feat} = \sum_i \frac{1}{2 N_i} (F_i^T - \hat F_i^S)^2, \qquad
    L_{global} = \sum_i (R(F_i^T) - R(\hat F_i^S))^2

"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.recovered_loss import recovered_loss, relation_error
from .mkd_decoder import AdaptiveDecoder

__all__ = [
    "ContextBlock",
    "LevelErrors",
    "Relation",
    "channel_logit_loss",
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
    """Returns the errors of one level, after a layer norm of both sides over the channels of each position.

    The paper says "a layer normalization operation"; over channels it leaves no position louder than another. The
    rebuilt map is written neither before nor after its norm, see `fastmkd.ops.recovered_loss`.

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
    size, patch = (teacher.shape[2], teacher.shape[3]), decoder.patch
    if size != (grid[0] * patch, grid[1] * patch):  # cut off at the edge, or averaged: a row for each position
        rows, patch = decoder.to_map(rows, grid, size).permute(0, 2, 3, 1).flatten(1, 2), 1
    queries = None if relation is None else relation.queries()
    recovered = recovered_loss(rows, teacher.detach(), patch, queries)
    if relation is None:
        return LevelErrors(recovered.error, None)
    added = relation.added(recovered.contexts)
    return LevelErrors(recovered.error, relation_error(recovered, added, size[0] * size[1]))


def normalise(features: Tensor) -> Tensor:
    """Layer norm over the channels of each position, without weights, in float32 (float64 for float64).

    Args:
        features: ``(B, C, h, w)``.

    Example:
        >>> normalise(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)).flatten()
        tensor([-1.0000,  1.0000])
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32)).permute(0, 2, 3, 1)
    return F.layer_norm(wide, wide.shape[-1:]).permute(0, 3, 1, 2)


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
        self.attend = nn.Conv2d(channels, 1, 1, bias=False)  # a softmax would take a bias away again
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
        return x + self.added(context)[..., None, None]

    def added(self, context: Tensor) -> Tensor:
        """Returns what is added to every position, ``(B, C)``.

        Args:
            context: ``(B, C)``, the mean over positions, weighted by a softmax of `attend`.
        """
        out: Tensor = self.transform(context[..., None, None])
        return out[..., 0, 0]


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

    def queries(self) -> Tensor:
        """Returns the weights of both attentions, ``(2, C)``."""
        return torch.stack([block.attend.weight.flatten() for block in (self.student, self.teacher)])

    def added(self, contexts: Tensor) -> Tensor:
        """Returns what the student's block adds to every position less what the teacher's adds, ``(B, C)``.

        Args:
            contexts: ``(2, B, C)``, of the student's and of the teacher's map.
        """
        return self.student.added(contexts[0]) - self.teacher.added(contexts[1])


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
