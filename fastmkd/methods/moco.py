r"""MoCo v3: two views of an image find each other among those of the batch (Chen, Xie and He, ICCV 2021).

.. math:: L = c(q_1, k_2) + c(q_2, k_1), \qquad
    c(q, k) = -2 \tau \, \frac{1}{B} \sum_b \log \frac{\exp(q_b k_b / \tau)}{\sum_j \exp(q_b k_j / \tau)}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.vit import MaskedViT
from .base import DistillOutput
from .self_distillation import AlignWith, SelfDistillation
from .skipped import finite_pixels
from .views import observe

__all__ = ["MoCoV3", "contrastive_loss", "mlp"]


def mlp(depth: int, in_features: int, hidden: int, out_features: int) -> nn.Sequential:
    """Linear layers without bias, each with batch norm, ReLU between them, no affine in the last norm (MoCo v3, 3).

    Args:
        depth: number of linear layers.
        in_features: width of the input.
        hidden: width between layers.
        out_features: width of the output.

    Example:
        >>> mlp(2, 6, 12, 4)(torch.randn(3, 6)).shape
        torch.Size([3, 4])
    """
    widths = [in_features, *[hidden] * (depth - 1), out_features]
    layers: list[nn.Module] = []
    for i in range(depth):
        last = i == depth - 1
        layers += [
            nn.Linear(widths[i], widths[i + 1], bias=False),
            nn.BatchNorm1d(widths[i + 1], affine=not last),
            *([] if last else [nn.ReLU(inplace=True)]),
        ]
    return nn.Sequential(*layers)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float, everywhere: bool = True) -> Tensor:
    """InfoNCE with the keys of all ranks as candidates, times 2 tau (MoCo v3, Algorithm 1).

    Args:
        queries: ``(B, D)``; gradients flow here.
        keys: ``(B, D)``, constants, one for each query.
        temperature: tau.
        everywhere: False takes the keys of this rank alone; then ranks may have different numbers of them.

    Returns:
        Scalar in float32 (float64 for float64 queries).

    Example:
        >>> x = torch.eye(4)
        >>> bool(contrastive_loss(x, x, 0.2) < contrastive_loss(x, x.flip(0), 0.2))
        True
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    q, k = F.normalize(queries.to(wide), dim=1), F.normalize(keys.detach().to(wide), dim=1)
    first = 0
    if everywhere and dist.is_available() and dist.is_initialized():
        everyone = [torch.empty_like(k) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, k.contiguous())
        first, k = dist.get_rank() * len(q), torch.cat(everyone)
    targets = torch.arange(first, first + len(q), device=q.device)
    return F.cross_entropy(q @ k.T / temperature, targets) * 2 * temperature  # (B, D) @ (D, all B) -> (B, all B)


class MoCoV3(SelfDistillation):
    r"""Contrastive self-distillation without labels: each view's query finds the other view's key (MoCo v3).

    Queries are the student's, through a projection and a prediction head; keys are those of a moving average of
    student and projection, see `SelfDistillation`. The patch embedding is frozen, as the authors do for stability.

    Args:
        student: timm VisionTransformer (or a `MaskedViT`); trained in place. A classifier, if it has one, is not used.
        temperature: tau.
        momentum: m at the beginning.
        total_updates: optimizer steps until m reaches 1; None keeps it as it is. A recipe that leaves it out has as
            many as its run.
        hidden: width of the heads' hidden layers.
        out_features: width of queries and keys.
        scale: smallest and largest share of the area of a view, if `forward` cuts them.
        freeze_patch_embed: False trains the patch embedding too.
        teacher: a larger pre-trained ViT with patches as the student's, frozen in place, whose features the student's
            follow on whole images (DMAE, Section 4.8); None for none.
        alpha: weight of that alignment.
        student_layer: aligned block of the student, from 1, or several; None is three quarters of the depth.
        teacher_layer: aligned block of that teacher for each; None is the same share of the depth.
        align_head: what is put on the student's features, see `fastmkd.DMAE`.

    Attributes:
        skipped: batches that were left out because images, keys or the frozen teacher's features were not finite.

    Raises:
        ValueError: an argument out of range, or a distilled DeiT.
        TypeError: a student that is not a maskable ViT.

    Example:
        >>> import timm
        >>> vit = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=0)
        >>> method = MoCoV3(vit, hidden=32, out_features=16)
        >>> out = method(torch.randn(4, 3, 64, 64))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['moco']
    """

    _teacher_vit: MaskedViT

    def __init__(
        self,
        student: nn.Module,
        temperature: float = 0.2,
        *,
        momentum: float = 0.99,
        total_updates: int | None = None,
        hidden: int = 4096,
        out_features: int = 256,
        scale: tuple[float, float] = (0.08, 1.0),
        freeze_patch_embed: bool = True,
        teacher: nn.Module | None = None,
        alpha: float = 1.0,
        student_layer: int | Sequence[int] | None = None,
        teacher_layer: int | Sequence[int] | None = None,
        align_head: Literal["mlp2", "linear", "mlp3"] = "mlp2",
    ) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        for name, count in (("hidden", hidden), ("out_features", out_features)):
            if count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1.")
        self.freeze_patch_embed = freeze_patch_embed  # unreachable_parameters, which the base class calls, asks for it
        align = None if teacher is None else AlignWith(teacher, alpha, student_layer, teacher_layer, align_head)
        super().__init__(student, momentum, total_updates, align)
        width = self._student_vit.embed_dim
        self.heads["project"] = mlp(3, width, hidden, out_features)
        self.heads["predict"] = mlp(2, out_features, hidden, out_features)
        self.follow({"backbone": self._student_vit.model, "project": self.heads["project"]})
        self.__dict__["_teacher_vit"] = MaskedViT(self.ema["backbone"])
        self.temperature, self.scale = temperature, tuple(scale)

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names the classifier's parameters and, if it is frozen, the patch embedding's.

        Args:
            student: the student, as passed.
        """
        frozen = [name for name, _ in student.named_parameters() if self.freeze_patch_embed and "patch_embed." in name]
        return [*super().unreachable_parameters(student), *frozen]

    def forward(self, images: Tensor | Sequence[Tensor], targets: Any = None) -> DistillOutput:
        """Moves the averages, runs both networks on both views and returns the loss.

        Args:
            images: ``(B, C, H, W)``, of which two views are cut here (position, size and flip; no colours), or a list
                of two views of the caller's making.
            targets: not looked at.

        Returns:
            `DistillOutput` with the term ``moco``; `student_output` are the features ``(B, D)`` of the first view.

        Raises:
            ValueError: not two views of one shape, or of a size that the student does not take.
        """
        views = self.global_crops(images, self.scale) if isinstance(images, Tensor) else list(images)  # type: ignore[arg-type]
        if len(views) != 2 or views[0].shape != views[1].shape:
            raise ValueError("images holds no two views of one shape; pass two, or a batch to cut them from.")
        self.begin_step()
        images, fine = finite_pixels(torch.cat(views))
        student = observe(self._student_vit, images, None, self.needs())
        features = self._features(student)
        # Each view has its own batch statistics, as if it were alone.
        queries = [self.heads["predict"](self.heads["project"](part)) for part in features.chunk(2)]
        keys = self._observe_average(self._teacher_vit, images, None, self._keys)
        taught = self.ask_frozen(images)
        good, (keys, *answers) = self.judge(fine, [keys, *taught.values()])
        # In training batches are equally long on all ranks; those of a test need not be.
        first, second = (
            contrastive_loss(*pair, self.temperature, everywhere=self.training)
            for pair in zip(queries, keys.chunk(2)[::-1], strict=True)
        )
        taught = dict(zip(taught, answers, strict=True))
        return self.output(first + second, "moco", good, features[: len(views[0])], student, taught)

    def _keys(self, features: Tensor) -> Tensor:
        return torch.cat([self.ema["project"](part) for part in features.chunk(2)])

    def train(self, mode: bool = True) -> Self:
        """Sets the student's and the heads' mode; the averages' batch norms go with them, the rest is in eval mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        if "project" in self.ema:
            self.ema["project"].train(mode)
        return self
