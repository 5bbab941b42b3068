r"""MaskedKD: the teacher sees only the patches that the student's CLS token attends to (MaskedKD, Section 3).

.. math:: L = L_{CE}(f_S(x), y) + \lambda \, L_{KD}(f_S(x), f_T(x_{mask}))
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.vit import MaskedViT
from ..ops import select_tokens
from .base import DistillMethod, DistillOutput, Panel, split_heads
from .losses import cross_entropy, logit_kd

__all__ = ["MaskedKD"]

BASES = ("logit",)
Norm = tuple[Sequence[float], Sequence[float]]


class MaskedKD(DistillMethod):
    r"""Distils a ViT teacher that sees only the image patches which matter to the student (MaskedKD, Eq. 1 and 2).

    The student sees the whole image. The attention of its CLS token in the last layer ranks the patches, the teacher
    runs without gradients on the ``k = max(1, round(keep_ratio * N))`` best of its own N patches (Python's `round`:
    halves go to the even number), and the loss is ``ce_weight * CE + weight * temperature^2 * KL(teacher || student)``.

    Student and teacher may cut the image differently: the saliency map is resized bilinearly to the teacher's grid, and
    the image to the size of a teacher with a fixed one (Appendix B). ``keep_ratio=1`` is ordinary logit distillation.

    A distilled DeiT student with ``set_distilled_training()`` learns the labels with its class head and the teacher
    with its distillation head, as in DeiT; its `student_output` is the mean of both, as at inference.

    Args:
        student: timm VisionTransformer (or a `MaskedViT` of one) with a CLS token; trained in place.
        teacher: timm VisionTransformer (or a `MaskedViT`) with the same classes; frozen in place.
        keep_ratio: share of the teacher's patches to keep, above 0 and at most 1.
        base: the distillation loss; ``"logit"``.
        weight: lambda, weight of the distillation loss.
        temperature: tau of the softmax of both.
        include_prefix: the authors' variant of the saliency: softmax over all tokens, mean over heads.
        ce_weight: weight of the cross-entropy; with 0 no targets are needed.
        teacher_device: keeps the teacher on this device; images go there and logits come back.
        teacher_dtype: runs the teacher under autocast to this dtype (float32 switches autocast off); None leaves it to
            the caller's autocast.
        student_norm: ``(mean, std)`` per channel that the images were normalised with; only needed with `teacher_norm`.
        teacher_norm: ``(mean, std)`` that the teacher expects, if it is not the student's.

    Raises:
        ValueError: an argument out of range, different class counts, a student without a CLS token, an unknown `base`.
        TypeError: a student or teacher that is not a maskable ViT.

    Example:
        >>> import timm
        >>> make = lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
        >>> method = MaskedKD(make(), make(), keep_ratio=0.5)
        >>> out = method(torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4]))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['ce', 'kd']
    """

    _student_vit: MaskedViT
    _teacher_vit: MaskedViT
    _pixel_scale: Tensor | None
    _pixel_shift: Tensor | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        keep_ratio: float = 0.5,
        base: str = "logit",
        weight: float = 1.0,
        temperature: float = 1.0,
        *,
        include_prefix: bool = False,
        ce_weight: float = 1.0,
        teacher_device: torch.device | str | None = None,
        teacher_dtype: torch.dtype | None = None,
        student_norm: Norm | None = None,
        teacher_norm: Norm | None = None,
    ) -> None:
        if not 0 < keep_ratio <= 1:  # NaN fails too
            raise ValueError(f"keep_ratio is {keep_ratio}; expected a share of the patches above 0 and at most 1.")
        if base not in BASES:
            raise ValueError(f"base is {base!r}; available are {', '.join(map(repr, BASES))}.")
        for name, value in (("weight", weight), ("ce_weight", ce_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        if weight == 0 and ce_weight == 0:
            raise ValueError("weight and ce_weight are both 0, so nothing is learnt; make one of them positive.")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        if teacher_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"teacher_dtype is {teacher_dtype}; expected torch.bfloat16, float16, float32 or None.")
        wrapped_student, wrapped_teacher = _wrap("student", student), _wrap("teacher", teacher)
        if keep_ratio < 1 and wrapped_student.num_prefix_tokens < 1:
            raise ValueError(
                "student has no CLS token, whose attention chooses the patches; create it with class_token=True, "
                "or use keep_ratio=1."
            )
        if wrapped_student.num_classes != wrapped_teacher.num_classes or wrapped_student.num_classes == 0:
            raise ValueError(
                f"student has {wrapped_student.num_classes} classes and teacher {wrapped_teacher.num_classes}; logit "
                "distillation needs the same positive number. Create them with the same num_classes."
            )
        scale, shift = _renormalisation(student_norm, teacher_norm, wrapped_teacher.model.patch_embed.proj.in_channels)
        super().__init__(student, teacher, teacher_device=teacher_device)
        # Views of student and teacher, kept out of the module tree so that no parameter appears twice.
        self.__dict__["_student_vit"] = wrapped_student
        self.__dict__["_teacher_vit"] = wrapped_teacher
        self.keep_ratio = float(keep_ratio)
        self.base = base
        self.weight = float(weight)
        self.temperature = float(temperature)
        self.include_prefix = include_prefix
        self.ce_weight = float(ce_weight)
        self.teacher_dtype = teacher_dtype
        self.register_buffer("_pixel_scale", scale, persistent=False)
        self.register_buffer("_pixel_shift", shift, persistent=False)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> DistillOutput:
        """Runs student and masked teacher and returns the loss.

        Args:
            images: ``(B, C, H, W)`` floating point, normalised for the student.
            targets: ``(B,)`` int64 class indices or ``(B, K)`` soft labels; may be None if `ce_weight` is 0.

        Returns:
            `DistillOutput` with the terms ``ce`` (if there are targets) and ``kd``.

        Raises:
            ValueError: images or targets of a wrong size, or a saliency that is not finite (the student has diverged or
                the images hold NaN; on a GPU an asynchronous assert).
            TypeError: images or targets of a wrong dtype.
        """
        if targets is None and self.ce_weight > 0:
            raise ValueError("targets is None but ce_weight is above 0; pass classes or soft labels, or ce_weight=0.")
        if self.keep_ratio < 1:
            output, saliency = self._student_vit(images, return_saliency=True, include_prefix=self.include_prefix)
        else:
            output, saliency = self._student_vit(images), None
        heads = split_heads(output)
        mean = torch.stack(heads).mean(0) if len(heads) > 1 else heads[0]
        # Without labels the class head would have no loss at all, so both heads learn from the teacher.
        distilled = heads[-1] if self.ce_weight > 0 else mean
        kd = logit_kd(distilled, self.teacher_logits(images, saliency), self.temperature)
        loss, terms = self.weight * kd, {"kd": kd.detach()}
        if targets is not None:
            ce = cross_entropy(heads[0], targets)
            loss, terms = self.ce_weight * ce + loss, {"ce": ce.detach(), **terms}
        return DistillOutput(loss, terms, mean)

    @torch.no_grad()
    def teacher_logits(self, images: Tensor, saliency: Tensor | None) -> Tensor:
        """Returns the teacher's logits on the patches that `saliency` selects, without gradients.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.
            saliency: ``(B, N_student)`` scores of the student's patches; None shows the teacher everything.

        Returns:
            ``(B, K)`` on the device of `images`.
        """
        teacher = self._teacher_vit
        if teacher.model.training:  # somebody called teacher.train() since
            teacher.model.eval()
        keep = None if saliency is None else self._select(images, saliency)
        images = self._for_teacher(images)
        weight = teacher.model.patch_embed.proj.weight
        images_there = images.to(device=weight.device, dtype=weight.dtype, non_blocking=True)
        keep_there = None if keep is None else keep.to(weight.device, non_blocking=True)
        autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.teacher_dtype is not None:
            lowered = self.teacher_dtype != torch.float32
            autocast = torch.autocast(weight.device.type, self.teacher_dtype if lowered else None, enabled=lowered)
        with autocast:
            return teacher(images_there, keep=keep_there).to(images.device)

    @torch.no_grad()
    def pictures(self, images: Tensor) -> list[Panel]:
        """Shows the input, the student's saliency (stretched to 0..1 per image) and the patches the teacher sees.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.

        Returns:
            Panels ``input``, ``saliency`` and ``kept patches``, all of the images' height and width.
        """
        _, saliency = self._student_vit(images, return_saliency=True, include_prefix=self.include_prefix)
        size = (images.shape[-2], images.shape[-1])
        low, high = saliency.amin(1, keepdim=True), saliency.amax(1, keepdim=True)
        heat = (saliency - low) / (high - low).clamp_min(torch.finfo(saliency.dtype).tiny)
        kept = torch.zeros(len(images), math.prod(self._teacher_grid(size)), device=images.device)
        kept.scatter_(1, self._select(images, saliency), 1.0)
        return [
            *super().pictures(images),
            Panel("saliency", _enlarge(heat, self._student_vit.patch_grid(size), size), "heat"),
            Panel("kept patches", _enlarge(kept, self._teacher_grid(size), size), "mask"),
        ]

    def _select(self, images: Tensor, saliency: Tensor) -> Tensor:
        """``(B, k)`` indices of the teacher's patches to keep."""
        size = (images.shape[-2], images.shape[-1])
        grid = self._teacher_grid(size)
        k = max(1, round(self.keep_ratio * math.prod(grid)))
        return select_tokens(saliency, k, self._student_vit.patch_grid(size), grid)

    def _teacher_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Pixels ``(H, W)`` that the teacher gets for images of `size`."""
        embed = self._teacher_vit.model.patch_embed
        fixed = getattr(embed, "strict_img_size", True) and embed.img_size is not None
        return tuple(embed.img_size) if fixed else size

    def _teacher_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return self._teacher_vit.patch_grid(self._teacher_size(size))

    def _for_teacher(self, images: Tensor) -> Tensor:
        """Images in the size and normalisation that the teacher expects."""
        size = (images.shape[-2], images.shape[-1])
        if self._teacher_size(size) != size:
            images = F.interpolate(images, self._teacher_size(size), mode="bilinear", align_corners=False)
        if self._pixel_scale is None or self._pixel_shift is None:
            return images
        return images * self._pixel_scale + self._pixel_shift


def _wrap(name: str, model: nn.Module) -> MaskedViT:
    if isinstance(model, MaskedViT):
        return model
    try:
        return MaskedViT(model)
    except TypeError as error:
        raise TypeError(f"{name} is not a ViT that MaskedKD can use: {error}") from None


def _renormalisation(student: Norm | None, teacher: Norm | None, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift ``(1, C, 1, 1)`` that turn the student's normalisation into the teacher's; None for no change."""
    if (student is None) != (teacher is None):
        raise ValueError("student_norm and teacher_norm belong together: pass both (mean, std) pairs or neither.")
    if student is None or teacher is None:
        return None, None
    for name, norm in (("student_norm", student), ("teacher_norm", teacher)):
        if len(norm) != 2 or any(len(values) != channels for values in norm):
            raise ValueError(
                f"{name} is {norm}; expected (mean, std) with {channels} numbers each, one for each channel."
            )
    (mean_s, std_s), (mean_t, std_t) = (
        [torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in norm] for norm in (student, teacher)
    )
    if min(std_s.min(), std_t.min()) <= 0:
        raise ValueError("student_norm and teacher_norm need positive standard deviations.")
    # x = pixel * std_s + mean_s in the original scale; the teacher wants (that - mean_t) / std_t.
    return (std_s / std_t).float(), ((mean_s - mean_t) / std_t).float()


def _enlarge(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``(B, gh * gw)`` values of cells -> ``(B, H, W)``, each cell filled with its value."""
    return F.interpolate(values.view(-1, 1, *grid), size, mode="nearest")[:, 0]
