r"""MaskedKD: the teacher sees only the patches that the student's CLS token attends to (MaskedKD, Section 3).

.. math:: L = L_{CE}(f_S(x), y) + \lambda \, L_{KD}(f_S(x), f_T(x_{mask}))

What is distilled is a `BaseDistillation` (``bases/``), which patches are shown a `MaskStrategy` (``strategies.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..nn.ragged import RaggedKeep, keep_by_mass
from ..nn.vit import MaskedViT
from ..ops import select_tokens
from .base import DistillOutput, Panel
from .bases import BASES, BaseDistillation
from .choices import choose
from .lanes import Lane, in_line, lane_between
from .linear_probe import ProbingMethod
from .losses import cross_entropy
from .maskedkd_checks import check_keep_mass, check_numbers, wrap
from .panels import kept_panel, saliency_panel
from .skipped import SkippedBatches, finite_pixels
from .strategies import STRATEGIES, MaskStrategy, Scores
from .teacher_call import CompileMode, TeacherCall
from .teacher_input import Norm, TeacherInput
from .teacher_tokens import merging_teacher
from .views import Needs, View, join, observe

__all__ = ["MaskedKD"]

NOTHING = Needs()


class MaskedKD(ProbingMethod):
    r"""Distils a ViT teacher that sees only the image patches which matter to the student (MaskedKD, Eq. 1 and 2).

    The student sees the whole image. The attention of its CLS token in the last layer ranks the patches, the teacher
    runs without gradients on the ``k = max(1, round(keep_ratio * N))`` best of its own N patches (Python's `round`:
    halves go to the even number), and the loss is ``ce_weight * CE + weight * KD``; with ``base="logit"``, KD is
    ``temperature^2 * KL(teacher || student)``.

    Student and teacher may cut the image differently: the saliency map is resized bilinearly to the teacher's grid, and
    the image to the size of a teacher with a fixed one (Appendix B). ``keep_ratio=1`` is ordinary distillation.

    With `keep_mass` each image keeps as few patches as hold that share of its saliency: more where the student looks
    everywhere, fewer where it looks at one thing. The teacher then runs on a packed row of tokens, without padding; the
    term ``kept`` is the share of all patches that it saw. This goes beyond the paper.

    A distilled DeiT student with ``set_distilled_training()`` learns the labels with its class head and the teacher
    with its distillation head, as in DeiT; its `student_output` is the mean of both, as at inference.

    If the teacher's output is not finite, or the images are not, the whole batch is skipped: the loss is 0 with zero
    gradients for every parameter, and `skipped` counts and numbers such batches. Where a strategy ranks patches by what
    the student sees, images that are not finite are refused instead, see `forward`.

    Args:
        student: timm VisionTransformer (or a `MaskedViT` of one) with a CLS token; trained in place.
        teacher: timm VisionTransformer (or a `MaskedViT`) with the same classes; frozen in place.
        keep_ratio: share of the patches to keep, above 0 and at most 1.
        base: what is distilled: "logit", "manifold", "attention", "g2sd", or a `BaseDistillation` with its options.
        weight: lambda, weight of the distillation loss.
        temperature: tau of the softmax of both.
        strategy: which patches are kept (Table 3): "saliency", "random", "bottom", "patch", "first", "middle", or a
            `MaskStrategy` with its options, such as `ExternalSaliency`.
        keep_mass: share of each image's saliency that the teacher must see, above 0 and at most 1, in the place of
            `keep_ratio`. For a teacher of timm's VisionTransformer class and a base that reads logits only ("logit",
            "g2sd"). None keeps the same number of patches of every image.
        mask: who sees only the kept patches. "student" is the paper's counter-example (Fig. 3): the student first looks
            at the whole image without gradients, if the strategy needs that, then learns from its kept patches.
        teacher_tokens: how the teacher is made cheaper. "merge" is the paper's other comparison (Fig. 3): it sees all
            patches and merges like ones from block to block, at the cost of one masked to `keep_ratio`; see
            `fastmkd.nn.MergedViT`. For the teachers and bases of `keep_mass`; no strategy has a part in it.
        linear_probe: train the student's classifier only; the rest is frozen and in eval mode (Appendix C).
        include_prefix: the authors' variant of the saliency: softmax over all tokens, mean over heads.
        ce_weight: weight of the cross-entropy; with 0 no targets are needed.
        teacher_device: keeps the teacher on this device; images go there and its answers come back.
        teacher_dtype: runs the teacher under autocast to this dtype (float32 switches autocast off); None leaves it to
            the caller's autocast.
        teacher_compile: runs the teacher through ``torch.compile``, see `TeacherCall`. Not with `keep_mass`.
        micro_batches: cuts each batch into so many parts; while a teacher on a GPU works on one, on a stream of its
            own, the student runs on the next (Appendix E). The loss is computed once, on all parts together.
        student_norm: ``(mean, std)`` per channel that the images were normalised with; only needed with `teacher_norm`.
        teacher_norm: ``(mean, std)`` that the teacher expects, if it is not the student's.

    Attributes:
        skipped: batches that were left out because of the teacher or the images, see `SkippedBatches`.

    Raises:
        ValueError: an argument out of range, different class counts, networks that the base or the strategy cannot use,
            an unknown name.
        TypeError: a student or teacher that is not a maskable ViT.

    Example:
        >>> import timm
        >>> make = lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
        >>> method = MaskedKD(make(), make(), keep_ratio=0.5)
        >>> out = method(torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4]))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['ce', 'kd']
        >>> sorted(MaskedKD(make(), make(), base="attention")(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])).terms)
        ['attention', 'ce', 'kd']
    """

    _student_vit: MaskedViT
    _teacher_vit: MaskedViT

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        keep_ratio: float = 0.5,
        base: str | BaseDistillation = "logit",
        weight: float = 1.0,
        temperature: float = 1.0,
        *,
        strategy: str | MaskStrategy = "saliency",
        keep_mass: float | None = None,
        mask: Literal["teacher", "student"] = "teacher",
        teacher_tokens: Literal["mask", "merge"] = "mask",
        linear_probe: bool = False,
        include_prefix: bool = False,
        ce_weight: float = 1.0,
        teacher_device: torch.device | str | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_compile: bool | CompileMode = False,
        micro_batches: int = 1,
        student_norm: Norm | None = None,
        teacher_norm: Norm | None = None,
    ) -> None:
        check_numbers(keep_ratio, weight, ce_weight, temperature, micro_batches)
        if mask not in ("teacher", "student"):
            raise ValueError(f"mask is {mask!r}; expected 'teacher' or 'student'.")
        teacher_call = TeacherCall(observe, teacher_dtype, teacher_compile)
        if teacher_tokens not in ("mask", "merge"):
            raise ValueError(f"teacher_tokens is {teacher_tokens!r}; expected 'mask' or 'merge'.")
        # MaskedKD is usually made from a recipe, where the two are names or {class_path, init_args}.
        chosen_base = choose("base", base, BaseDistillation, BASES)  # type: ignore[type-abstract]
        chosen_strategy = choose("strategy", strategy, MaskStrategy, STRATEGIES)  # type: ignore[type-abstract]
        wrapped_student, wrapped_teacher = wrap("student", student), wrap("teacher", teacher)
        if wrapped_student.num_classes != wrapped_teacher.num_classes or wrapped_student.num_classes == 0:
            raise ValueError(
                f"student has {wrapped_student.num_classes} classes and teacher {wrapped_teacher.num_classes}; logit "
                "distillation needs the same positive number. Create them with the same num_classes."
            )
        chosen_base.needs(wrapped_student, wrapped_teacher)  # raises unless the networks fit
        if keep_mass is not None:
            check_keep_mass(keep_mass, wrapped_teacher, chosen_base, chosen_strategy, mask, teacher_compile)
        if teacher_tokens == "merge":
            wrapped_teacher = merging_teacher(wrapped_teacher, keep_ratio, keep_mass, chosen_base, mask)
        elif keep_mass is not None or keep_ratio < 1:
            chosen_strategy.needs(wrapped_student)
        if linear_probe and not chosen_base.reads_logits_only:
            raise ValueError(
                f"linear_probe freezes everything that base {type(chosen_base).__name__} compares; use base='logit'."
            )
        teacher_input = TeacherInput(wrapped_teacher, student_norm, teacher_norm)
        super().__init__(student, teacher, linear_probe=linear_probe, teacher_device=teacher_device)
        # Views of student and teacher, kept out of the module tree so that no parameter appears twice.
        self.__dict__["_student_vit"] = wrapped_student
        self.__dict__["_teacher_vit"] = wrapped_teacher
        self._teacher_input = teacher_input
        self.keep_ratio = float(keep_ratio)
        self.keep_mass = None if keep_mass is None else float(keep_mass)
        self.base = chosen_base
        self.strategy = chosen_strategy
        self.mask, self.teacher_tokens = mask, teacher_tokens
        self.weight = float(weight)
        self.temperature = float(temperature)
        self.include_prefix = include_prefix
        self.ce_weight = float(ce_weight)
        self.micro_batches = micro_batches
        self._teacher_call = teacher_call
        self.skipped = SkippedBatches()
        model = wrapped_student.model
        self._had_two_heads = getattr(model, "distilled_training", None)
        if chosen_base.two_heads:
            model.set_distilled_training(True)
        self.train(self.training)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> DistillOutput:
        """Runs student and masked teacher and returns the loss.

        Args:
            images: ``(B, C, H, W)`` floating point, normalised for the student.
            targets: ``(B,)`` int64 class indices or ``(B, K)`` soft labels; may be None if `ce_weight` is 0.

        Returns:
            `DistillOutput` with the terms ``ce`` (if there are targets) and those of the base, ``kd`` at least.

        Raises:
            ValueError: images or targets of a wrong size, or a saliency that is not finite (the student has diverged or
                the images hold NaN; on a GPU an asynchronous assert).
            TypeError: images or targets of a wrong dtype.
        """
        if targets is None and self.ce_weight > 0:
            raise ValueError("targets is None but ce_weight is above 0; pass classes or soft labels, or ce_weight=0.")
        lane: Lane = in_line
        fine: Tensor | None = None
        if not (self.hides_patches and self.looks_at_student):  # a saliency of NaN is refused, not skipped
            images, fine = finite_pixels(images)
        parts: Sequence[Tensor] = (images,)
        if self.micro_batches > 1:
            lane = lane_between(images.device, next(self._teacher_vit.parameters()).device)
            parts = images.tensor_split(max(1, min(self.micro_batches, len(images))))
        seen = [self._run(part, lane) for part in parts]
        # One loss on the whole batch: a base may compare images with each other, and a bad answer skips them all.
        student, teacher = join([view for view, _ in seen]), join([answer() for _, answer in seen])
        good = teacher.is_finite() if fine is None else teacher.is_finite() & fine
        self.skipped.note(good, fine)
        teacher = teacher.map(lambda x: torch.where(good, x, torch.zeros_like(x)))
        mean = student.logits
        if self.ce_weight > 0:
            # Without labels the class head would have no loss at all, so then both heads learn from the teacher.
            student = dataclasses.replace(student, logits=student.heads[-1])
        kd = self.base.loss(student, teacher, self.temperature)
        loss, terms = self.weight * kd.total, kd.terms
        if targets is not None:
            ce = cross_entropy(student.heads[0], targets)
            loss, terms = self.ce_weight * ce + loss, {"ce": ce, **terms}
        if isinstance(teacher.keep, RaggedKeep):
            terms = {**terms, "kept": teacher.keep.counts.float().mean() / math.prod(teacher.grid)}
        # A product, so that a skipped batch gives every parameter a gradient of zero.
        return DistillOutput(loss * good, {name: term.detach() * good for name, term in terms.items()}, mean)

    @torch.no_grad()
    def teacher_logits(self, images: Tensor, saliency: Tensor | None) -> Tensor:
        """Returns the teacher's logits on the patches that `saliency` selects, without gradients.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.
            saliency: ``(B, N_student)`` scores of the student's patches; None shows the teacher everything.

        Returns:
            ``(B, K)`` on the device of `images`.
        """
        keep = None
        if saliency is not None:
            grid = self._student_vit.patch_grid((images.shape[-2], images.shape[-1]))
            keep = self._best(Scores(saliency, grid), self._teacher_input.grid((images.shape[-2], images.shape[-1])))
        return self.ask_teacher(images, keep).logits

    @torch.no_grad()
    def ask_teacher(self, images: Tensor, keep: Tensor | RaggedKeep | None, needs: Needs = NOTHING) -> View:
        """Returns what the teacher makes of some patches, without gradients.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.
            keep: ``(B, k)`` indices in the teacher's grid, or another number of each image; None shows it everything.
            needs: what to record besides the logits.

        Returns:
            Its view, on the device of `images`.
        """
        return self._teacher_call(self._teacher_vit, self._teacher_input(images), keep, needs)

    @property
    def hides_patches(self) -> bool:
        """Whether one of the networks does not see the whole image."""
        return self.teacher_tokens == "mask" and (self.keep_mass is not None or self.keep_ratio < 1)

    @property
    def looks_at_student(self) -> bool:
        """Whether the strategy ranks patches by what the student sees."""
        return self.strategy.needs(self._student_vit) != NOTHING

    @torch.no_grad()
    def patch_scores(self, images: Tensor) -> Scores:
        """Returns what the strategy thinks of each patch.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.
        """
        return self._score(images, self._look(images))

    @torch.no_grad()
    def pictures(self, images: Tensor) -> list[Panel]:
        """Shows the input, the patches' scores (stretched to 0..1 per image) and the patches that are seen.

        Args:
            images: ``(B, C, H, W)`` as in `forward`.

        Returns:
            Panels ``input``, ``saliency`` and ``kept patches``, all of the images' height and width.
        """
        size = (images.shape[-2], images.shape[-1])
        scores = self.patch_scores(images)
        grid = self.masked_grid(size)
        return [
            *super().pictures(images),
            saliency_panel(scores.values, scores.grid, size),
            kept_panel(self._best(scores, grid), grid, size),
        ]

    def release(self) -> nn.Module:
        """Gives student and teacher back as they came; see `DistillMethod.release`.

        Returns:
            The student.
        """
        if self.base.two_heads:
            self._student_vit.model.set_distilled_training(self._had_two_heads)
        return super().release()

    def _run(self, images: Tensor, lane: Lane) -> tuple[View, Callable[[], View]]:
        """The student's view of some images, and what waits for the teacher's."""
        needs, teacher_needs = self.base.needs(self._student_vit, self._teacher_vit)
        if self.mask == "student":  # the teacher depends on nothing
            answer = lane(lambda: self.ask_teacher(images, None, teacher_needs))
            keep = self._select(images, self._look(images)) if self.hides_patches else None
            return observe(self._student_vit, images, keep, needs), answer
        if self.hides_patches:
            needs = needs | self.strategy.needs(self._student_vit)
        student = observe(self._student_vit, images, None, needs, self.include_prefix)
        keep = self._select(images, student) if self.hides_patches else None
        return student, lane(lambda: self.ask_teacher(images, keep, teacher_needs))

    @torch.no_grad()
    def _look(self, images: Tensor) -> View | None:
        """The student's view of the whole image, for a strategy that needs it."""
        if not self.looks_at_student:
            return None
        return observe(self._student_vit, images, None, self.strategy.needs(self._student_vit), self.include_prefix)

    def _select(self, images: Tensor, student: View | None) -> Tensor | RaggedKeep:
        """Indices of the patches that the masked network keeps."""
        return self._best(self._score(images, student), self.masked_grid((images.shape[-2], images.shape[-1])))

    @torch.no_grad()
    def _score(self, images: Tensor, student: View | None) -> Scores:
        return self.strategy.scores(images, student, self.masked_grid((images.shape[-2], images.shape[-1])))

    def _best(self, scores: Scores, grid: tuple[int, int]) -> Tensor | RaggedKeep:
        if self.keep_mass is not None:
            return keep_by_mass(scores.values, self.keep_mass, grid=scores.grid, target_grid=grid)
        k = max(1, round(self.keep_ratio * math.prod(grid))) if self.hides_patches else math.prod(grid)
        return select_tokens(scores.values, k, scores.grid, grid)

    def masked_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the patch grid of the network that is masked.

        Args:
            size: ``(H, W)`` pixels of the images.
        """
        return self._teacher_input.grid(size) if self.mask == "teacher" else self._student_vit.patch_grid(size)
