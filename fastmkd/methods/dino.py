r"""DINO with a masked teacher (MaskedKD, Section 4.3; Caron et al., ICCV 2021).

.. math:: \theta_T \leftarrow m \, \theta_T + (1 - m) \, \theta_S
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.vit import MaskedViT
from ..ops import select_tokens
from .base import DistillMethod, DistillOutput, Panel
from .choices import choose
from .crops import random_crops
from .dino_head import DinoHead, dino_loss
from .panels import kept_panel, saliency_panel
from .skipped import SkippedBatches
from .strategies import STRATEGIES, MaskStrategy, Scores
from .views import Needs, View, classifier_of, observe

__all__ = ["MaskedDINO"]


class MaskedDINO(DistillMethod):
    r"""Self-distillation without labels whose moving-average teacher sees a part of each global crop.

    The student sees two global crops and several local ones. Its CLS attention on a global crop chooses the patches of
    that crop which the teacher gets; local crops take no part in that. Loss, centring and head are DINO's; defaults are
    those of its "vanilla" recipe, which the paper follows (Appendix A), and the keep ratio that did best in Table 5.

    The teacher is a copy of the student that follows it: with momentum m from `momentum` to 1 along half a cosine over
    `total_updates`. It is part of ``state_dict()``, under ``ema.``, but not trained. It moves at the beginning of a
    step if the student's weights have changed since the last one, so any loop and gradient accumulation will do.

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
        total_updates: optimizer steps until m reaches 1; None keeps it as it is.
        local_crops: how many local crops an image gets if `forward` cuts them.
        local_size: their side in pixels; None takes 96 / 224 of the image's, rounded to whole patches.
        global_scale: smallest and largest share of the area of a global crop.
        local_scale: the same of a local crop.

    Attributes:
        skipped: batches that were left out because the teacher's output was not finite.

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
    updates: Tensor
    _student_vit: MaskedViT
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
    ) -> None:
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {keep_ratio}; expected a share of the patches above 0 and at most 1.")
        for name, value in (("center_momentum", center_momentum), ("momentum", momentum)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected a number from 0 to 1.")
        temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
        for name, value in temperatures.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite positive number.")
        for name, count in (("out_features", out_features), ("total_updates", total_updates)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1.")
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
        if len(classifier_of(vit)) > 1:
            raise ValueError("student is a distilled DeiT, whose two heads DINO has no use for; use a plain one.")
        super().__init__(student)
        # Views of student and teacher, kept out of the module tree so that no parameter appears twice.
        self.__dict__["_student_vit"] = vit
        self.heads["dino"] = DinoHead(vit.embed_dim, out_features, hidden, bottleneck)
        self.ema = nn.ModuleDict({"backbone": copy.deepcopy(vit.model), "head": copy.deepcopy(self.heads["dino"])})
        self.__dict__["_teacher_vit"] = MaskedViT(self.ema["backbone"])
        self.ema.requires_grad_(False).eval()
        self.register_buffer("center", torch.zeros(out_features))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.keep_ratio, self.strategy = float(keep_ratio), chosen
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center_momentum, self.momentum, self.total_updates = center_momentum, momentum, total_updates
        self.local_crops, self.local_size = local_crops, local_size
        self.global_scale, self.local_scale = tuple(global_scale), tuple(local_scale)
        self.skipped = SkippedBatches()
        self._seen_writes: int | None = None

    def forward(self, images: Tensor | Sequence[Tensor], targets: Any = None) -> DistillOutput:
        """Moves the teacher, runs both networks on all crops and returns the loss.

        Args:
            images: ``(B, C, H, W)``, of which crops are cut here (position, size and flip; no colours), or a list of
                crops ``(B, C, h, w)`` of the caller's making, the two global ones first.
            targets: not looked at.

        Returns:
            `DistillOutput` with the term ``dino``; `student_output` are the features ``(B, D)`` of the first crop.

        Raises:
            ValueError: fewer than two crops, or crops of a size that the student does not take.
        """
        crops = self.cut(images) if isinstance(images, Tensor) else list(images)
        if len(crops) < 2 or crops[0].shape != crops[1].shape:
            raise ValueError(
                "images holds no two global crops of one shape; pass them first, or a batch to cut them from."
            )
        if self.training and self._seen_writes != (writes := self._writes()):
            self.update_teacher()
            self._seen_writes = writes
        large, small = torch.cat(crops[:2]), crops[2:]
        needs = Needs(features=True)
        if self.keep_ratio < 1:
            needs = needs | self.strategy.needs(self._student_vit)
        seen = observe(self._student_vit, large, None, needs)
        features = [self._features(seen)]
        if small:
            features.append(self._features(observe(self._student_vit, torch.cat(small), None, Needs(features=True))))
        student = self.heads["dino"](torch.cat(features)).unflatten(0, (len(crops), -1))  # (V, B, K)
        teacher = self._ask_teacher(large, seen).unflatten(0, (2, -1))  # (2, B, K)
        good = teacher.isfinite().all()
        self.skipped.note(good)
        teacher = torch.where(good, teacher, torch.zeros_like(teacher))
        loss = dino_loss(student, teacher, self.center, self.student_temperature, self.teacher_temperature) * good
        if self.training:
            self._move_center(teacher, good)
        return DistillOutput(loss, {"dino": loss.detach()}, features[0][: len(crops[0])])

    def cut(self, images: Tensor) -> list[Tensor]:
        """Cuts two global crops of the images' size, and the local ones.

        Args:
            images: ``(B, C, H, W)``.
        """
        height, width = images.shape[-2:]
        patch = self._student_vit.model.patch_embed.patch_size[0]
        side = self.local_size or max(1, round(96 / 224 * height / patch)) * patch
        large = [random_crops(images, (height, width), self.global_scale) for _ in range(2)]  # type: ignore[arg-type]
        small = [random_crops(images, (side, side), self.local_scale) for _ in range(self.local_crops)]  # type: ignore[arg-type]
        return large + small

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Moves the teacher towards the student; `forward` calls it by itself."""
        teacher: list[Tensor] = list(self.ema.parameters())
        student: list[Tensor] = [*self._student_vit.parameters(), *self.heads["dino"].parameters()]
        step = list(torch._foreach_sub(student, teacher))
        torch._foreach_mul_(step, 1 - self.current_momentum().to(step[0].dtype))
        torch._foreach_add_(teacher, step)
        self.updates += 1

    def current_momentum(self) -> Tensor:
        """Returns m of the next update, a scalar on the device."""
        if self.total_updates is None:
            return torch.tensor(self.momentum, dtype=torch.float32, device=self.updates.device)
        progress = (self.updates.float() / self.total_updates).clamp(max=1)
        return 1 - (1 - self.momentum) * (torch.cos(math.pi * progress) + 1) / 2

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

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names the classifier's parameters.

        Args:
            student: the student, as passed.
        """
        unused = {id(p) for layer in classifier_of(student) for p in layer.parameters()}
        return [name for name, p in student.named_parameters() if id(p) in unused]

    def train(self, mode: bool = True) -> Self:
        """Sets the student's and the head's mode; the teacher stays in eval mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.ema.eval()
        return self

    def _features(self, view: View) -> Tensor:
        assert view.features is not None
        return view.features

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, student: View) -> Tensor:
        keep = self._choose(images, student)[1] if self.keep_ratio < 1 else None
        return self.ema["head"](self._features(observe(self._teacher_vit, images, keep, Needs(features=True))))

    @torch.no_grad()
    def _choose(self, images: Tensor, student: View) -> tuple[Scores, Tensor]:
        """Scores of the patches, and ``(B, k)`` those the teacher gets to see."""
        scores = self.strategy.scores(images, student, student.grid)
        k = max(1, round(self.keep_ratio * math.prod(student.grid)))
        return scores, select_tokens(scores.values, k, scores.grid, student.grid)

    @torch.no_grad()
    def _move_center(self, teacher: Tensor, good: Tensor) -> None:
        mean = teacher.flatten(0, 1).mean(0, dtype=self.center.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        self.center += (1 - self.center_momentum) * (mean - self.center) * good

    def _writes(self) -> int:
        """A number that grows whenever somebody writes to the student's or the head's weights."""
        return sum(p._version for p in (*self._student_vit.parameters(), *self.heads["dino"].parameters()))
