"""DINO with a masked teacher (MaskedKD, Section 4.3; Caron et al., ICCV 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.vit import MaskedViT
from ..ops import select_tokens
from .base import DistillOutput, Panel
from .choices import choose
from .crops import random_crops
from .dino_head import DinoHead, dino_loss
from .panels import kept_panel, saliency_panel
from .self_distillation import FEATURES, AlignWith, SelfDistillation, check_momentum
from .skipped import finite_pixels
from .strategies import STRATEGIES, MaskStrategy, Scores
from .views import Needs, View, observe

__all__ = ["MaskedDINO"]


class MaskedDINO(SelfDistillation):
    r"""Self-distillation without labels whose moving-average teacher sees a part of each global crop.

    The student sees two global crops and several local ones. Its CLS attention on a global crop chooses the patches of
    that crop which the teacher gets; local crops take no part in that. Loss, centring and head are DINO's; defaults are
    those of its "vanilla" recipe, which the paper follows (Appendix A), and the keep ratio that did best in Table 5.

    The teacher is a copy of the student that follows it, see `SelfDistillation`.

    Args:
        student: timm VisionTransformer (or a `MaskedViT`) with a CLS token; trained in place. A classifier, if it has
            one, is not used. It needs ``dynamic_img_size=True`` for local crops.
        keep_ratio: share of a global crop's patches that the teacher sees, above 0 and at most 1.
        strategy: which patches those are, see `MaskedKD`.
        out_features: K, prototypes of the head.
        hidden: width of the head's MLP.
        bottleneck: width of the head before the prototypes.
        student_temperature: tau_s.
        teacher_temperature: tau_t.
        center_momentum: share of the old centre that a step keeps.
        momentum: m at the beginning.
        total_updates: optimizer steps until m reaches 1; None keeps it as it is. A recipe that leaves it out has as
            many as its run.
        local_crops: how many local crops an image gets if `forward` cuts them.
        local_size: their side in pixels; None takes 96 / 224 of the image's, rounded to whole patches.
        global_scale: smallest and largest share of the area of a global crop.
        local_scale: the same of a local crop.
        teacher: a larger pre-trained ViT with patches as the student's, frozen in place, whose features the student's
            follow on whole images (DMAE, Section 4.8); None for none.
        alpha: weight of that alignment.
        student_layer: aligned block of the student, from 1, or several; None is three quarters of the depth.
        teacher_layer: aligned block of that teacher for each; None is the same share of the depth.
        align_head: what is put on the student's features, see `fastmkd.DMAE`.

    Attributes:
        skipped: batches that were left out because images or a teacher's output were not finite.

    Raises:
        ValueError: an argument out of range, or a student that the strategy or local crops cannot use.
        TypeError: a student that is not a maskable ViT.

    Example:
        >>> import timm
        >>> vit = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=0, dynamic_img_size=True)
        >>> method = MaskedDINO(vit, out_features=64, hidden=32, local_crops=2)
        >>> out = method(torch.randn(4, 3, 64, 64))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['dino']
    """

    center: Tensor
    _teacher_vit: MaskedViT

    def __init__(
        self,
        student: nn.Module,
        keep_ratio: float = 0.66,
        *,
        strategy: str | MaskStrategy = "saliency",
        out_features: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        total_updates: int | None = None,
        local_crops: int = 8,
        local_size: int | None = None,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        teacher: nn.Module | None = None,
        alpha: float = 1.0,
        student_layer: int | Sequence[int] | None = None,
        teacher_layer: int | Sequence[int] | None = None,
        align_head: Literal["mlp2", "linear", "mlp3"] = "mlp2",
    ) -> None:
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {keep_ratio}; expected a share of the patches above 0 and at most 1.")
        check_momentum("center_momentum", center_momentum)
        temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
        for name, value in temperatures.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite positive number.")
        if out_features < 1:
            raise ValueError(f"out_features is {out_features}; expected at least 1.")
        if local_crops < 0:
            raise ValueError(f"local_crops is {local_crops}; expected at least 0.")
        vit = student if isinstance(student, MaskedViT) else MaskedViT(student)
        chosen = choose("strategy", strategy, MaskStrategy, STRATEGIES)  # type: ignore[type-abstract]
        if keep_ratio < 1:
            chosen.needs(vit)
        if local_crops and getattr(vit.model.patch_embed, "strict_img_size", True):
            raise ValueError(
                "student takes one image size only but local crops are smaller; create it with dynamic_img_size=True, "
                "or use local_crops=0."
            )
        align = None if teacher is None else AlignWith(teacher, alpha, student_layer, teacher_layer, align_head)
        super().__init__(student, momentum, total_updates, align)
        self.heads["dino"] = DinoHead(vit.embed_dim, out_features, hidden, bottleneck)
        self.follow({"backbone": self._student_vit.model, "head": self.heads["dino"]})
        self.__dict__["_teacher_vit"] = MaskedViT(self.ema["backbone"])
        wide = torch.promote_types(self._weight.dtype, torch.float32)
        self.register_buffer("center", torch.zeros(out_features, dtype=wide, device=self._weight.device))
        self.keep_ratio, self.strategy = float(keep_ratio), chosen
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center_momentum = center_momentum
        self.local_crops, self.local_size = local_crops, local_size
        self.global_scale, self.local_scale = tuple(global_scale), tuple(local_scale)

    def forward(self, images: Tensor | Sequence[Tensor], targets: Any = None) -> DistillOutput:
        """Moves the teacher, runs both networks on all crops and returns the loss.

        Args:
            images: ``(B, C, H, W)``, of which crops are cut here (position, size and flip; no colours), or a list of
                crops ``(B, C, h, w)`` of the caller's making, the two global ones first; others may differ in size.
            targets: not looked at.

        Returns:
            `DistillOutput` with the term ``dino``; `student_output` are the features ``(B, D)`` of the first crop.

        Raises:
            ValueError: fewer than two crops, crops of different batches, crops of a size that the student does not
                take, or a saliency that is not finite (the student has diverged or a global crop that it is to rank
                holds NaN; on a GPU an asynchronous assert).
        """
        crops = self.cut(images) if isinstance(images, Tensor) else list(images)
        if len(crops) < 2 or crops[0].shape != crops[1].shape:
            raise ValueError(
                "images holds no two global crops of one shape; pass them first, or a batch to cut them from."
            )
        for i, crop in enumerate(crops):
            if crop.dim() != 4 or crop.shape[:2] != crops[0].shape[:2]:
                raise ValueError(
                    f"images[{i}] has the shape {tuple(crop.shape)} and images[0] {tuple(crops[0].shape)}; expected "
                    "(B, C, h, w) with B and C the same: each crop is one of every image of the batch."
                )
        self.begin_step()
        needs, ranking = self.needs(), self.strategy.needs(self._student_vit) if self.keep_ratio < 1 else Needs()
        large, found = torch.cat(crops[:2]), [finite_pixels(crop) for crop in crops]
        fine = torch.stack([each for _, each in found]).all()
        if ranking == Needs():  # a saliency of NaN is refused, not skipped
            large = torch.cat([crop for crop, _ in found[:2]])
        seen = observe(self._student_vit, large, None, needs | ranking)
        features = [self._features(seen), *self._local_features([crop for crop, _ in found[2:]])]
        student = self.heads["dino"](torch.cat(features)).unflatten(0, (len(crops), -1))  # (V, B, K)
        answer, taught = self._ask_teacher(large, seen), self.ask_frozen(large)
        good, (answer, *answers) = self.judge(fine, [answer, *taught.values()])
        taught, teacher = dict(zip(taught, answers, strict=True)), answer.unflatten(0, (2, -1))  # (2, B, K)
        loss = dino_loss(student, teacher, self.center, self.student_temperature, self.teacher_temperature)
        if self.training:
            self._move_center(teacher, good)
        return self.output(loss, "dino", good, features[0][: len(crops[0])], seen, taught)

    def cut(self, images: Tensor) -> list[Tensor]:
        """Cuts two global crops of the images' size, and the local ones.

        Args:
            images: ``(B, C, H, W)``.
        """
        patch = self._student_vit.model.patch_embed.patch_size[0]
        side = self.local_size or max(1, round(96 / 224 * images.shape[-2] / patch)) * patch
        large = self.global_crops(images, self.global_scale)  # type: ignore[arg-type]
        small = [random_crops(images, (side, side), self.local_scale) for _ in range(self.local_crops)]  # type: ignore[arg-type]
        return large + small

    @torch.no_grad()
    def pictures(self, images: Tensor) -> list[Panel]:
        """Shows the input, the patches' scores (stretched to 0..1 per image) and the patches the teacher would see.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.

        Returns:
            Panels ``input``, ``saliency`` and ``kept patches``, all of the images' height and width.
        """
        size = (images.shape[-2], images.shape[-1])
        view = observe(self._student_vit, images, None, self.strategy.needs(self._student_vit))
        scores, keep = self._choose(images, view)
        return [
            *super().pictures(images),
            saliency_panel(scores.values, scores.grid, size),
            kept_panel(keep, view.grid, size),
        ]

    def _local_features(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """The student's features ``(B, D)`` of each crop; those of one size run together."""
        by_size: dict[torch.Size, list[int]] = {}
        for i, crop in enumerate(crops):
            by_size.setdefault(crop.shape, []).append(i)
        found: dict[int, Tensor] = {}
        for numbers in by_size.values():
            together = torch.cat([crops[i] for i in numbers])
            features = self._features(observe(self._student_vit, together, None, FEATURES))
            found |= dict(zip(numbers, features.chunk(len(numbers)), strict=True))
        return [found[i] for i in range(len(crops))]

    def _ask_teacher(self, images: Tensor, student: View) -> Tensor:
        keep = self._choose(images, student)[1] if self.keep_ratio < 1 else None
        return self._observe_average(self._teacher_vit, images, keep, self.ema["head"])

    @torch.no_grad()
    def _choose(self, images: Tensor, student: View) -> tuple[Scores, Tensor]:
        """Scores of the patches, and ``(B, k)`` those the teacher gets to see."""
        scores = self.strategy.scores(images, student, student.grid)
        k = max(1, round(self.keep_ratio * math.prod(student.grid)))
        return scores, select_tokens(scores.values, k, scores.grid, student.grid)

    @torch.no_grad()
    def _move_center(self, teacher: Tensor, good: Tensor) -> None:
        """Towards the mean of the processes whose batch counts, the same on all of them; nowhere if there is none."""
        mean = teacher.flatten(0, 1).mean(0, dtype=self.center.dtype)
        found = torch.cat((mean, torch.ones_like(mean[:1]))) * good
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
        mean, count = found[:-1], found[-1]
        self.center += (1 - self.center_momentum) * (mean / count.clamp(min=1) - self.center) * (count > 0)
