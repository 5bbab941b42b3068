"""DMAE's alignment between classifiers, the strongest of its baselines (DMAE, Section 4.3 and Table 4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .alignment import HEADS, projection_head
from .baselines import Answers, Baseline, Step
from .dpk_stage import resize

__all__ = ["FeatureAlignment"]


class FeatureAlignment(Baseline):
    r"""The student, learning labels, follows layers of a teacher that has been fine-tuned on them (DMAE, Section 4.3).

    .. math:: \sum_l \frac{1}{\Omega(z^T_l)} \| \sigma(z^S_l) - z^T_l \|_1

    It is what `fastmkd.DMAE` adds to its loss, but of whole images, and of the patches alone. ViT-B's ``blocks.8``
    follows ViT-L's ``blocks.17``, three quarters of the depth of both.

    Args:
        head: sigma, "mlp2" (hidden width that of the teacher), "linear" or "mlp3".
        loss: "l1" or "l2", mean of absolute or squared differences.

    Raises:
        ValueError: a head or loss that is not known.

    Example:
        >>> base = FeatureAlignment(head="linear")
        >>> maps = [Answers(torch.zeros(2, 5), [torch.ones(2, width, 3, 3)]) for width in (4, 6)]
        >>> base.heads(*maps)
        {'align0': Sequential(
          (0): Linear(in_features=4, out_features=6, bias=True)
        )}
    """

    def __init__(self, head: Literal["mlp2", "linear", "mlp3"] = "mlp2", loss: Literal["l1", "l2"] = "l1") -> None:
        for name, value, known in (("head", head, tuple(HEADS)), ("loss", loss, ("l1", "l2"))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}.")
        self.head, self.loss_name = head, loss

    def heads(self, student: Answers, teacher: Answers) -> dict[str, nn.Module]:
        """A projection head for each stage.

        Args:
            student: for one image.
            teacher: for one image.
        """
        pairs = zip(student.maps, teacher.maps, strict=True)
        return {f"align{i}": projection_head(self.head, s.shape[1], t.shape[1]) for i, (s, t) in enumerate(pairs)}

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the sum over stages, in float32.

        Args:
            heads: the projection heads.
            student: its maps count.
            teacher: its maps count.
            step: not looked at.
        """
        errors = []
        for head, s, t in zip(heads.values(), student.maps, teacher.maps, strict=True):
            tokens = resize(s, (t.shape[2], t.shape[3])).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
            projected, target = head(tokens), t.permute(0, 2, 3, 1)
            wide = torch.promote_types(torch.promote_types(projected.dtype, target.dtype), torch.float32)
            gap = projected.to(wide) - target.to(wide)
            errors.append((gap.abs() if self.loss_name == "l1" else gap.square()).mean())
        return torch.stack(errors).sum()
