r"""What MKD compares: layer-normalised maps, their global relations, and maps of logits (MKD, Eq. 3 to 5).

.. math:: L_{feat} = \sum_i \frac{1}{2 N_i} (F_i^T - \hat F_i^S)^2, \qquad
    L_{global} = \sum_i (R(F_i^T) - R(\hat F_i^S))^2

"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.recovered_loss import Recovered, recovered_loss, relation_error
from .mkd_decoder import AdaptiveDecoder

__all__ = [
    "ContextBlock",
    "Relation",
    "batched_added",
    "channel_logit_loss",
    "normalise",
    "recover",
    "relation_loss",
]


def recover(
    decoder: AdaptiveDecoder, rows: Tensor, grid: tuple[int, int], teacher: Tensor, relation: Relation | None
) -> Recovered:
    """Compares one level after a layer norm of both sides over the channels of each position.

    The paper says "a layer normalization operation"; over channels it leaves no position louder than another. The
    rebuilt map is written neither before nor after its norm, see `fastmkd.ops.recovered_loss`.

    Args:
        decoder: the level's decoder.
        rows: ``(B, gh * gw, p * p * C)`` from it; the gradient flows here.
        grid: ``(gh, gw)`` tokens.
        teacher: ``(B, C, h, w)``, a constant.
        relation: the level's pair of context blocks, or None.

    Returns:
        The level's summand of L_feat, and what `relation_loss` needs.

    Example:
        >>> decoder = AdaptiveDecoder(4, 6, patch=2, width=8, depth=1)
        >>> rows = decoder(torch.randn(2, 4, 4, 4), torch.ones(2, 2, 2, dtype=torch.bool))
        >>> recover(decoder, rows, (2, 2), torch.randn(2, 6, 4, 4), None).error.shape
        torch.Size([])
    """
    size, patch = (teacher.shape[2], teacher.shape[3]), decoder.patch
    if size != (grid[0] * patch, grid[1] * patch):  # cut off at the edge, or averaged: a row for each position
        rows, patch = decoder.to_map(rows, grid, size).permute(0, 2, 3, 1).flatten(1, 2), 1
    return recovered_loss(rows, teacher.detach(), patch, None if relation is None else relation.queries())


def relation_loss(relations: Sequence[Relation], recovered: Sequence[Recovered], positions: Sequence[int]) -> Tensor:
    """Returns L_global, the sum over levels (MKD, Eq. 4); the context blocks of all levels run as one batch.

    Args:
        relations: a pair of context blocks for each level.
        recovered: of each level, from `recover`.
        positions: h * w of each level.

    Example:
        >>> relation, same = Relation(4), torch.zeros(2, 4)
        >>> relation_loss([relation], [Recovered(torch.tensor(0.5), same, same.expand(2, 2, 4))], [9])  # 4 * 9 ones
        tensor(36., grad_fn=<SumBackward0>)
    """
    alike: dict[int, list[int]] = {}  # the levels of each width; a pyramid has one width
    for level, relation in enumerate(relations):
        alike.setdefault(relation.channels, []).append(level)
    errors = []
    for levels in alike.values():
        blocks = [block for level in levels for block in (relations[level].student, relations[level].teacher)]
        contexts = torch.cat([recovered[level].contexts for level in levels])  # (2 * L, B, C)
        added = batched_added(blocks, contexts).unflatten(0, (-1, 2))  # (L, 2, B, C)
        apart = (added[:, 0] - added[:, 1]).unbind()
        errors += [relation_error(recovered[i], d, positions[i]) for i, d in zip(levels, apart, strict=True)]
    return torch.stack(errors).sum()


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
        out: Tensor = x + self.transform(context[..., None, None])
        return out


def batched_added(blocks: Sequence[ContextBlock], contexts: Tensor) -> Tensor:
    """Returns what several context blocks of one width add to every position; two batched matrix products.

    Args:
        blocks: n of them.
        contexts: ``(n, B, C)``, for each block the mean over positions, weighted by a softmax of its `attend`.

    Returns:
        ``(n, B, C)``.

    Example:
        >>> batched_added([ContextBlock(8), ContextBlock(8)], torch.randn(2, 3, 8)).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """
    alike = zip(*(block.transform.parameters() for block in blocks), strict=True)
    first, b1, scale, shift, last, b2 = (torch.stack([w.reshape(len(w), -1).mT for w in ws]) for ws in alike)
    hidden = torch.baddbmm(b1, contexts, first)  # (n, 1, C / 2) + (n, B, C) @ (n, C, C / 2) -> (n, B, C / 2)
    hidden = F.layer_norm(hidden, hidden.shape[2:]) * scale + shift
    return torch.baddbmm(b2, hidden.relu(), last)  # (n, B, C)


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
        self.channels = channels
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
