"""Contrastive representation distillation among the images of a batch, one of the losses that DPK is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baselines import Answers, Baseline

__all__ = ["BatchCRD"]


class BatchCRD(Baseline):
    r"""CRD (Tian et al., 2020) with the other images of the batch as negatives, in place of its memory bank.

    Each network's map is averaged over its positions, taken to `width` dimensions by a linear layer of its own and
    normalised. A student's embedding :math:`s_i` must tell the teacher's :math:`t_i` of the same image from those of
    the batch's images of other classes, and the other way round:

    .. math:: -\frac{1}{B} \sum_i \log \frac{e^{s_i t_i / \tau}}{e^{s_i t_i / \tau} + \sum_{j: y_j \neq y_i}
        e^{s_i t_j / \tau}} \; + \; (s \leftrightarrow t)

    The paper keeps an embedding of every training image and draws 16,384 negatives from these by the image's number,
    which a method of this library is not told; it contrasts them by noise-contrastive estimation. Here there are at
    most B - 1 negatives, those of this rank: take large batches, and do not quote the result as the paper's CRD.

    The layer to name is the last stage. The usual weight, width and temperature are those of CRD's benchmark.

    Args:
        width: of the embeddings.
        temperature: tau of the contrast, which is not that of softened predictions.

    Raises:
        ValueError: a width below 1 or a temperature that is not positive.

    Example:
        >>> base = BatchCRD()
        >>> image = Answers(torch.zeros(1, 10), [torch.zeros(1, 64, 8, 8)])
        >>> {name: head.in_features for name, head in base.heads(image, image).items()}
        {'student0': 64, 'teacher0': 64}
    """

    weight = 0.8

    def __init__(self, width: int = 128, temperature: float = 0.07) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; expected at least 1.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        self.width, self.temperature = width, float(temperature)

    def heads(self, student: Answers, teacher: Answers) -> dict[str, nn.Module]:
        """Two linear layers for each stage.

        Args:
            student: for one image.
            teacher: for one image.
        """
        made: dict[str, nn.Module] = {}
        for i, (s, t) in enumerate(zip(student.maps, teacher.maps, strict=True)):
            made[f"student{i}"] = nn.Linear(s.shape[1], self.width)
            made[f"teacher{i}"] = nn.Linear(t.shape[1], self.width)
        return made

    def loss(
        self, heads: nn.ModuleDict, student: Answers, teacher: Answers, targets: Tensor, temperature: float, epoch: int
    ) -> Tensor:
        """Returns the sum over stages.

        Args:
            heads: the linear layers.
            student: its maps count.
            teacher: its maps count.
            targets: ``(B,)`` class indices, whose equals are no negatives; of soft labels only an image itself is none.
            temperature: not looked at; the contrast has its own.
            epoch: not looked at.
        """
        every = torch.arange(len(targets), device=targets.device)
        itself = every[:, None] == every  # (B, B)
        left_out = (targets[:, None] == targets) & ~itself if targets.dim() == 1 else torch.zeros_like(itself)
        errors = []
        for i, (s, t) in enumerate(zip(student.maps, teacher.maps, strict=True)):
            own, other = embed(heads[f"student{i}"], s), embed(heads[f"teacher{i}"], t)  # (B, width)
            scores = (own @ other.mT / self.temperature).masked_fill(left_out, float("-inf"))
            errors += [F.cross_entropy(scores, every), F.cross_entropy(scores.mT, every)]
        return torch.stack(errors).sum()


def embed(head: nn.Module, features: Tensor) -> Tensor:
    """``(B, C, h, w)`` -> ``(B, width)`` of norm 1, in at least float32.

    Args:
        head: ``(B, C)`` -> ``(B, width)``.
        features: a map.

    Example:
        >>> embed(nn.Identity(), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 5, 5))
        tensor([[0.6000, 0.8000]])
    """
    embedded: Tensor = head(features.mean((2, 3)))
    return F.normalize(embedded if embedded.dtype == torch.float64 else embedded.float())
