r"""What methods share whose teacher is a moving average of the student (DINO, MoCo v3).

.. math:: \theta_T \leftarrow m \, \theta_T + (1 - m) \, \theta_S

A layer of the student may follow one of a frozen network besides (DMAE, Section 4.8).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..nn.vit import MaskedViT
from .alignment import HEADS, Alignment, Layers, check_pair, observe_blocks, pair_layers, prefix_length
from .averages import HALF, Averages, at_least_float32, fingerprint
from .base import DistillMethod, DistillOutput
from .crops import random_crops
from .maskedkd_checks import wrap
from .skipped import SkippedBatches
from .teacher_call import TeacherCall
from .views import Needs, View, blocks_of, classifier_of, observe

__all__ = ["AlignWith", "SelfDistillation", "check_momentum"]

FEATURES = Needs(features=True)


class AlignWith(NamedTuple):
    """A frozen network to follow, with the options that `DMAE` has.

    Attributes:
        teacher: timm ViT with patches as the student's; frozen in place.
        alpha: weight of the alignment.
        student_layer: aligned block of the student, from 1, or several; None is three quarters of the depth.
        teacher_layer: aligned block of the teacher for each; None is the same share of the depth.
        head: "mlp2", "linear" or "mlp3".
    """

    teacher: nn.Module
    alpha: float = 1.0
    student_layer: Layers = None
    teacher_layer: Layers = None
    head: Literal["mlp2", "linear", "mlp3"] = "mlp2"


class SelfDistillation(DistillMethod):
    """Base of methods whose teacher follows the student, with momentum m from `momentum` to 1 along half a cosine.

    The averages are part of ``state_dict()``, under ``ema.``, but not trained. They move at the beginning of a step if
    the student's weights have changed since the last one, so any loop and gradient accumulation will do. Whether they
    have is found out on the device, see `fingerprint`. The averages of a student in half precision are kept in float32
    and run under autocast to the student's dtype.

    If images, or what a teacher makes of them, are not finite, the whole batch is skipped: the loss is 0 with zero
    gradients for every parameter, and `skipped` counts and numbers such batches.

    Args:
        student: timm VisionTransformer (or a `MaskedViT`); trained in place. Its classifier is not used.
        momentum: m at the beginning.
        total_updates: optimizer steps until m reaches 1; None keeps it as it is. A recipe that leaves it out has as
            many as its run.
        align: a frozen pre-trained ViT whose layers the student's follow; None for none.

    Raises:
        TypeError: a network that is not a maskable ViT.
        ValueError: a distilled DeiT, a number out of range, or networks that cut the image differently.
    """

    pretrains = True
    lengths = MappingProxyType({"total_updates": "updates"})
    ema: Averages
    updates: Tensor
    _seen: Tensor
    _student_vit: MaskedViT

    def __init__(
        self,
        student: nn.Module,
        momentum: float,
        total_updates: int | None,
        align: AlignWith | None = None,
    ) -> None:
        check_momentum("momentum", momentum)
        if total_updates is not None and total_updates < 1:
            raise ValueError(f"total_updates is {total_updates}; expected at least 1.")
        vit = student if isinstance(student, MaskedViT) else MaskedViT(student)
        if len(classifier_of(vit)) > 1:
            raise ValueError("student is a distilled DeiT, whose two heads have no use here; use a plain one.")
        checked = None if align is None else self._check_alignment(vit, align)
        super().__init__(student, None if align is None else align.teacher)
        # Views of student and teacher, kept out of the module tree so that no parameter appears twice.
        self.__dict__["_student_vit"] = vit
        self.alpha = 0.0 if align is None else float(align.alpha)
        if align is not None and checked is not None:
            other, layers = checked
            self.__dict__["_frozen_vit"] = other
            self.heads["align"] = Alignment(vit, other, layers, align.head, patches_only=True)
        self._frozen_call = TeacherCall(observe_blocks)
        self.momentum, self.total_updates = momentum, total_updates
        self.ema = Averages()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.skipped = SkippedBatches()

    def _check_alignment(self, vit: MaskedViT, align: AlignWith) -> tuple[MaskedViT, list[tuple[int, int]]]:
        if not (align.alpha >= 0 and math.isfinite(align.alpha)):
            raise ValueError(f"alpha is {align.alpha}; expected a finite number of at least 0.")
        if align.head not in HEADS:
            raise ValueError(f"head is {align.head!r}; expected {' or '.join(map(repr, HEADS))}.")
        other = wrap("teacher", align.teacher)
        check_pair(vit, other)
        depths = len(blocks_of(vit)), len(blocks_of(other))
        return other, pair_layers(align.student_layer, align.teacher_layer, *depths)

    def needs(self) -> Needs:
        """Returns what is read of the student on whole images: features, and aligned blocks if there are any."""
        if "align" not in self.heads:
            return Needs(features=True)
        align: Any = self.heads["align"]
        return Needs(features=True, blocks=frozenset(align.student_blocks))

    def ask_frozen(self, images: Tensor) -> dict[int, Tensor]:
        """Returns the patch tokens ``(B, N, D)`` of the frozen teacher's aligned layers by index; none without one.

        Args:
            images: ``(B, C, H, W)``.
        """
        if "align" not in self.heads:
            return {}
        align: Any = self.heads["align"]
        vit = self.__dict__["_frozen_vit"]
        found = self._frozen_call(vit, images, None, align.teacher_blocks).tokens
        return {block: tokens[:, prefix_length(vit) :] for block, tokens in found.items()}

    def judge(self, fine: Tensor, answers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Notes whether the batch counts.

        Args:
            fine: whether its images are finite, a boolean scalar.
            answers: what the teachers made of it.

        Returns:
            Boolean scalar, False if it is left out, and the answers, zeros if so.
        """
        good = torch.stack([fine, *(answer.isfinite().all() for answer in answers)]).all()
        self.skipped.note(good, fine)
        return good, [torch.where(good, answer, torch.zeros_like(answer)) for answer in answers]

    def output(
        self, loss: Tensor, name: str, good: Tensor, features: Tensor, student: View, taught: Mapping[int, Tensor]
    ) -> DistillOutput:
        """Returns the loss with the alignment, if there is one, and its terms; zero if the batch is left out.

        Args:
            loss: of the self-distillation.
            name: of its term.
            good: boolean scalar, False leaves the batch out.
            features: ``(B, D)`` of the first view.
            student: what it made of the whole images, with all that `needs` names.
            taught: from `ask_frozen`, finite.
        """
        loss = loss * good
        terms = {name: loss.detach()}
        if "align" in self.heads:
            errors = self.heads["align"](student.blocks, taught)
            aligned = torch.stack([error.mean() for error in errors]).sum() * good
            terms["align"] = aligned.detach()
            loss = loss + self.alpha * aligned
        return DistillOutput(loss, terms, features)

    def follow(self, networks: Mapping[str, nn.Module]) -> None:
        """Puts heads and buffers where the student is and makes the averages, as copies.

        Args:
            networks: what is averaged, by its name in `ema`.
        """
        weight = self._weight
        self.heads.to(device=weight.device, dtype=weight.dtype)
        self.updates = self.updates.to(weight.device)
        self.__dict__["_followed"] = dict(networks)
        self.ema = Averages(networks)
        # All zeros: nothing has been seen. Whole numbers, which no cast touches. In no state_dict: a checkpoint is
        # written behind a step, so that the first forward pass after it has a move to make.
        self.register_buffer("_seen", torch.zeros_like(self._fingerprint()), persistent=False)

    def begin_step(self) -> None:
        """Moves the averages if the student has changed since the last step; to be called first in `forward`."""
        if self.training:
            self.update_teacher(self._has_changed())

    @torch.no_grad()
    def update_teacher(self, changed: Tensor | None = None) -> None:
        """Moves the averages towards the student; `begin_step` calls it by itself.

        Args:
            changed: boolean scalar on the device, False moves nothing; None is True.
        """
        share = 1 - self.current_momentum()
        if changed is None:
            changed = torch.ones_like(share, dtype=torch.bool)
        elif changed.device.type == "cpu" and not torch.compiler.is_compiling() and not changed:
            return  # a CPU is asked at no cost; a GPU moves by nothing
        teacher: list[Tensor] = list(self.ema.parameters())
        student: list[Tensor] = list(self._followed_parameters())
        step = list(torch._foreach_sub(student, teacher))
        torch._foreach_mul_(step, (share * changed).to(step[0].dtype))
        torch._foreach_add_(teacher, step)
        self.updates += changed

    def current_momentum(self) -> Tensor:
        """Returns m of the next update, a scalar on the device."""
        if self.total_updates is None:
            return torch.full((), self.momentum, dtype=torch.float32, device=self.updates.device)
        progress = (self.updates.float() / self.total_updates).clamp(max=1)
        return 1 - (1 - self.momentum) * (torch.cos(math.pi * progress) + 1) / 2

    def global_crops(self, images: Tensor, scale: tuple[float, float]) -> list[Tensor]:
        """Cuts two views of the images' size: position, size and flip; no colours.

        Args:
            images: ``(B, C, H, W)``.
            scale: smallest and largest share of the area.
        """
        size = (images.shape[-2], images.shape[-1])
        return [random_crops(images, size, scale) for _ in range(2)]

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names the classifier's parameters.

        Args:
            student: the student, as passed.
        """
        unused = {id(p) for layer in classifier_of(student) for p in layer.parameters()}
        return [name for name, p in student.named_parameters() if id(p) in unused]

    def train(self, mode: bool = True) -> Self:
        """Sets the student's and the heads' mode; the averages stay in eval mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.ema.eval()
        return self

    @property
    def _weight(self) -> Tensor:
        """A weight of the student, where it is and as wide as it is."""
        weight: Tensor = self._student_vit.model.patch_embed.proj.weight
        return weight

    def _observe_average(
        self, vit: MaskedViT, images: Tensor, keep: Tensor | None, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What an average and its head make of images, in the student's precision."""
        weight, half = self._weight, self._weight.dtype in HALF
        precision = torch.autocast(weight.device.type, weight.dtype) if half else contextlib.nullcontext()
        with torch.no_grad(), precision:
            features = self._features(observe(vit, images.to(vit.model.patch_embed.proj.weight.dtype), keep, FEATURES))
            return head(features)

    def _features(self, view: View) -> Tensor:
        assert view.features is not None
        return view.features

    def _followed_parameters(self) -> Iterable[nn.Parameter]:
        return (p for network in self.__dict__["_followed"].values() for p in network.parameters())

    def _fingerprint(self) -> Tensor:
        """Of what is averaged, behind a one, so that it is never all zeros."""
        found = fingerprint(self._followed_parameters())
        return torch.cat((torch.ones_like(found[:1]), found))

    def _has_changed(self) -> Tensor:
        """Whether what is averaged is another than at the last call, a boolean scalar on the device."""
        now = self._fingerprint()
        changed = (now != self._seen).any()
        self._seen.copy_(now)
        return changed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen.zero_()  # what was loaded may lag by a step behind the same student

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():  # the centre is an average too
            after = self._buffers[name]
            assert buffer is not None
            assert after is not None
            self._buffers[name] = at_least_float32(buffer, after)
        return self


def check_momentum(name: str, value: float) -> None:
    """Checks a share from 0 to 1.

    Args:
        name: of the argument.
        value: what was passed.

    Raises:
        ValueError: out of range.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; expected a number from 0 to 1.")
