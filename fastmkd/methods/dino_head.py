"""DINO's projection head and loss (Caron et al., ICCV 2021, Eq. 1 and 2, Appendix C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DinoHead", "dino_loss"]


class DinoHead(nn.Module):
    """Three-layer MLP, L2 normalisation, then prototypes of length 1 (DINO, Appendix C).

    The prototypes are a weight-normalised layer whose length is fixed at 1, as the authors' `norm_last_layer` has it.

    Args:
        in_features: width of the backbone's features.
        out_features: K, number of prototypes.
        hidden: width of the MLP.
        bottleneck: width before the prototypes.

    Example:
        >>> DinoHead(12, 100)(torch.zeros(2, 12)).shape
        torch.Size([2, 100])
    """

    def __init__(self, in_features: int, out_features: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.empty(out_features, bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits.

        Args:
            x: ``(B, in_features)``.

        Returns:
            ``(B, K)``, each from -1 to 1.
        """
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    r"""Returns the cross-entropy between the views of an image (DINO, Eq. 2, with the centring of Section 3.1).

    .. math:: \frac{1}{|P|} \sum_{(g, v) \in P} - \frac{1}{B} \sum_b
        \mathrm{softmax}\Big(\frac{z^T_{gb} - c}{\tau_t}\Big)
        \cdot \log \mathrm{softmax}\Big(\frac{z^S_{vb}}{\tau_s}\Big)

    where P are the pairs of a global view g of the teacher and another view v of the student.

    Args:
        student: ``(V, B, K)`` logits of all views, the teacher's G views first; gradients flow here.
        teacher: ``(G, B, K)``; constants.
        center: ``(K,)`` c.
        student_temperature: tau_s.
        teacher_temperature: tau_t, the smaller the sharper.

    Returns:
        Scalar in float32 (float64 for float64 logits).

    Example:
        >>> z = torch.zeros(3, 2, 4)
        >>> float(dino_loss(z, z[:2], torch.zeros(4)).exp())
        4.0
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    target = ((teacher.detach().to(wide) - center.to(wide)) / teacher_temperature).softmax(-1)  # (G, B, K)
    log_p = (student.to(wide) / student_temperature).log_softmax(-1)  # (V, B, K)
    views, globals_ = len(student), len(teacher)
    losses = [-(target[g] * log_p[v]).sum(-1).mean() for g in range(globals_) for v in range(views) if v != g]
    return torch.stack(losses).mean()
