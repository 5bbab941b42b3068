r"""DPK: part of the teacher's feature map is stitched into the student's before the student mimics it (DPK, ICLR 2023).

.. math:: L = L_{cls} + \alpha L_{logits} + \beta \sum_{stages} \mathrm{MSE}(F^t, F^h), \qquad
    \pi = 1 - \mathrm{CKA}(F^t, F^s)

A share :math:`\pi` of the hybrid map's :math:`F^h` tokens is the teacher's: much while the two networks are far from
each other, less as the student gets closer. `DPKStage` makes :math:`F^h`, a `RatioRule` says :math:`\pi`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillMethod, DistillOutput, Panel, split_heads, supervised_loss
from .dpk_ratio import RatioRule, choose_ratio
from .dpk_stage import DPKStage, MaskKind, Prior, Target, draw_from_teacher, least_patch_size, resize
from .features import Features, check_layers, input_shape, observe_maps, probe
from .losses import logit_kd
from .teacher_call import CompileMode, TeacherCall

__all__ = ["DPK"]

PatchSize = int | Mapping[str, int] | None


class DPK(DistillMethod):
    r"""Dynamic prior knowledge: the student's map, completed by parts of the teacher's, predicts the teacher's map.

    For each stage a convolution of k x k with stride k cuts both maps into tokens, two ViT encoders process them, a
    share :math:`\pi` of the student's tokens is replaced by the teacher's, and a shared ViT decoder predicts the
    teacher's map; the loss is the mean squared error against the raw map, all in `heads`. Student and teacher may be
    CNNs or vision transformers, in any combination; the student's map is resized to the size of the teacher's.

    The share is one for the batch, drawn anew where it falls for every image. By default it is ``1 - CKA`` of the two
    maps over the batches of all ranks, see `fastmkd.methods.dpk_ratio.MeasuredRatio` for small and ragged batches.

    The shapes of the maps are learnt from one black image when the method is made, so that its parameters exist before
    an optimizer asks for them.

    Args:
        student: a classifier; trained in place.
        teacher: a classifier of the same classes; frozen in place.
        layers: the stages: the teacher's layer by the student's, names as in ``named_modules()``.
        alpha: weight of the logit loss, ``tau^2 * KL(teacher || student)``.
        beta: weight of the feature loss, in which each stage counts the same (Appendix A.2).
        temperature: tau; the paper has 1 on ImageNet and 4 on CIFAR-100.
        ratio: the teacher's share of the tokens (Table 6): "cka", "cosine", "exponential", "linear", a number for a
            fixed one, or a `RatioRule` with its options. The schedules need `set_epoch`.
        encoder_depth: blocks of each encoder.
        decoder_depth: blocks of the decoder; the paper has 6 for one stage and 4 for several.
        width: d of tokens and blocks.
        patch_size: k of all stages, or by the student's layer; None is the least that gives at most 49 tokens.
        mask: how the teacher's tokens lie: "random", "block" or "grid" (Table 6).
        prior: what replaces the student's tokens (Table 7): "teacher", "zero" or "learnable".
        transform: what processes tokens (Table 8): "encoder-decoder", "mlp-decoder", "conv" or "1x1".
        target: where the error is taken (Table 9): "full", or "non-masked" for the student's tokens alone.
        image_size: side of the training images, or (height, width); None takes the network's own, see
            `fastmkd.methods.features.input_shape`.
        teacher_device: keeps the teacher on this device; images go there and its answers come back.
        teacher_dtype: runs the teacher under autocast to this dtype (float32 switches autocast off); None leaves it to
            the caller's autocast.
        teacher_compile: runs the teacher through ``torch.compile``, see `TeacherCall`.

    Raises:
        ValueError: an argument out of range, a layer that does not exist, different classes.
        TypeError: a network, layers or a ratio of the wrong type.

    Example:
        >>> import timm
        >>> student = timm.create_model("resnet18", num_classes=10)
        >>> teacher = timm.create_model("resnet34", num_classes=10)
        >>> method = DPK(student, teacher, encoder_depth=1, decoder_depth=1, width=64, image_size=32)
        >>> out = method(torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4]))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['ce', 'feat', 'kd', 'ratio']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, str] | None = None,
        alpha: float = 0.8,
        beta: float = 0.2,
        temperature: float = 1.0,
        ratio: float | str | RatioRule = "cka",
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        width: int = 512,
        patch_size: PatchSize = None,
        *,
        mask: MaskKind = "random",
        prior: Prior = "teacher",
        transform: str = "encoder-decoder",
        target: Target = "full",
        image_size: int | Sequence[int] | None = None,
        teacher_device: torch.device | str | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_compile: bool | CompileMode = False,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        for name, count, least in (
            ("encoder_depth", encoder_depth, 0), ("decoder_depth", decoder_depth, 0), ("width", width, 1)
        ):  # fmt: skip
            if not isinstance(count, int) or count < least:
                raise ValueError(f"{name} is {count!r}; expected a whole number of at least {least}.")
        if mask not in ("random", "block", "grid"):
            raise ValueError(f"mask is {mask!r}; expected 'random', 'block' or 'grid'.")
        if target not in ("full", "non-masked"):
            raise ValueError(f"target is {target!r}; expected 'full' or 'non-masked'.")
        teacher_call = TeacherCall(observe_maps, teacher_dtype, teacher_compile)
        rule = choose_ratio(ratio)
        super().__init__(student, teacher, teacher_device=teacher_device)
        try:
            pairs = check_layers({"layer4": "layer4"} if layers is None else layers, student, teacher)
            self._make_stages(student, teacher, pairs, rule, patch_size, image_size, width, encoder_depth,
                              decoder_depth, transform, prior)  # fmt: skip
        except (TypeError, ValueError):
            self.release()
            raise
        self.layers = pairs
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), float(temperature)
        self.mask, self.target, self._teacher_call = mask, target, teacher_call
        self.epoch = 0

    def _make_stages(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: dict[str, str],
        rule: RatioRule,
        patch_size: PatchSize,
        image_size: int | Sequence[int] | None,
        width: int,
        encoder_depth: int,
        decoder_depth: int,
        transform: str,
        prior: Prior,
    ) -> None:
        shape = input_shape(student, image_size)
        of_student, self._student_copied = probe(student, "student", list(pairs), shape)
        of_teacher, self._teacher_copied = probe(teacher, "teacher", list(pairs.values()), shape)
        classes = [split_heads(found.output)[0].shape[-1] for found in (of_student, of_teacher)]
        if classes[0] != classes[1]:
            raise ValueError(
                f"student has {classes[0]} classes and teacher {classes[1]}; logit distillation needs the same number. "
                "Create them with the same num_classes."
            )
        self.rules = nn.ModuleDict()
        for name, of in pairs.items():
            s, t = of_student.maps[name], of_teacher.maps[of]
            size = (t.shape[2], t.shape[3])
            rule.check(resize(s, size), t)
            k = _patch_size(patch_size, name, pairs, size)
            key = name.replace(".", "_")  # no dots in a ModuleDict
            if key in self.heads:
                raise ValueError(f"layers has two stages called {key!r} once dots are underscores; rename a module.")
            self.heads[key] = DPKStage(
                s.shape[1], t.shape[1], size, k, width, encoder_depth, decoder_depth, transform, prior
            )
            self.rules[key] = copy.deepcopy(rule)
        weight = next(student.parameters())
        self.heads.to(weight.device)
        self.rules.to(weight.device)

    def set_epoch(self, epoch: float) -> None:
        """Tells the schedules of `ratio` which epoch it is.

        Args:
            epoch: from 0; a fraction counts as the epoch that it lies in.
        """
        self.epoch = int(epoch)

    def forward(self, images: Tensor, targets: Tensor) -> DistillOutput:
        """Runs both networks, stitches, and returns the loss.

        Args:
            images: ``(B, C, H, W)`` floating point.
            targets: ``(B,)`` int64 class indices or ``(B, K)`` soft labels.

        Returns:
            `DistillOutput` with the terms ``ce``, ``kd``, ``feat`` (sum over stages), ``ratio`` (mean over stages), and
            with several stages ``ratio.<layer>`` of each.

        Raises:
            ValueError: images or targets of a wrong size.
            TypeError: targets of a wrong dtype.
        """
        student, teacher = self._ask_student(images), self._ask_teacher(images)
        heads, of_teacher = split_heads(student.output), split_heads(teacher.output)
        errors, shares = [], {}
        for name, stage, share, from_teacher in self._stitching(student, teacher):
            target = teacher.maps[self.layers[name]]
            hybrid = stage(student.maps[name], target, from_teacher)
            seen = None if self.target == "full" else _enlarge(~from_teacher, stage, target)
            errors.append(feature_error(hybrid, target, seen))
            shares[name] = share
        # Hard labels for the first head and the teacher for the last: one and the same unless a distilled DeiT trains.
        ce = supervised_loss(heads[:1], targets)
        kd = logit_kd(heads[-1], torch.stack(of_teacher).mean(0), self.temperature)
        feat = torch.stack(errors).sum()
        terms = {"ce": ce, "kd": kd, "feat": feat, "ratio": torch.stack(list(shares.values())).mean()}
        if len(shares) > 1:
            terms.update({f"ratio.{name}": share for name, share in shares.items()})
        return DistillOutput(
            ce + self.alpha * kd + self.beta * feat,
            {name: term.detach() for name, term in terms.items()},
            torch.stack(heads).mean(0) if len(heads) > 1 else heads[0],
        )

    @torch.no_grad()
    def pictures(self, images: Tensor) -> list[Panel]:
        """Shows the input and, for each stage, which part of the map is the student's own (1).

        Args:
            images: ``(B, C, H, W)`` as in `forward`.
        """
        size = (images.shape[-2], images.shape[-1])
        student, teacher = self._ask_student(images), self._ask_teacher(images)
        panels = super().pictures(images)
        for name, stage, _, from_teacher in self._stitching(student, teacher):
            own = _enlarge(~from_teacher, stage, teacher.maps[self.layers[name]]).float()  # (B, 1, h, w)
            panels.append(Panel(f"student's part of {name}", F.interpolate(own, size)[:, 0], "mask"))
        return panels

    def _stitching(self, student: Features, teacher: Features) -> list[tuple[str, DPKStage, Tensor, Tensor]]:
        """For each stage: student's layer, stage, the teacher's share, and ``(B, N)`` where it is."""
        found = []
        for (name, of), stage, rule in zip(self.layers.items(), self.heads.values(), self.rules.values(), strict=True):
            s, t = student.maps[name].detach(), teacher.maps[of]
            assert isinstance(stage, DPKStage)
            size = (t.shape[2], t.shape[3])
            share = rule(resize(s, size), t, self.epoch)
            from_teacher = draw_from_teacher(self.mask, len(s), stage.grid(size), share)
            found.append((name, stage, share, from_teacher))
        return found

    def _ask_student(self, images: Tensor) -> Features:
        return observe_maps(self.student, images, list(self.layers), self._student_copied)

    def _ask_teacher(self, images: Tensor) -> Features:
        return self._teacher_call(self.teacher, images, list(self.layers.values()), self._teacher_copied)


def feature_error(hybrid: Tensor, target: Tensor, seen: Tensor | None) -> Tensor:
    """Returns the mean squared error of two maps in float32 (float64 for float64), over a part of them if asked.

    Args:
        hybrid: ``(B, C, h, w)``; the gradient flows here.
        target: ``(B, C, h, w)``.
        seen: ``(B, 1, h, w)`` bool; None is everywhere. Nowhere gives 0.

    Example:
        >>> feature_error(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), None)
        tensor(1.)
    """
    wide = torch.promote_types(torch.promote_types(hybrid.dtype, target.dtype), torch.float32)
    squared = (hybrid.to(wide) - target.to(wide)).square()
    if seen is None:
        return squared.mean()
    return (squared * seen).sum() / (seen.sum() * target.shape[1]).clamp_min(1)


def _enlarge(cells: Tensor, stage: DPKStage, target: Tensor) -> Tensor:
    """``(B, N)`` of tokens -> ``(B, 1, h, w)`` of the map, each cell repeated."""
    h, w = target.shape[-2:]
    k = stage.patch_size
    grid = cells.unflatten(1, stage.grid((h, w)))[:, None]
    return grid.repeat_interleave(k, 2).repeat_interleave(k, 3)[:, :, :h, :w]


def _patch_size(value: PatchSize, name: str, pairs: Mapping[str, str], size: tuple[int, int]) -> int:
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in pairs]
        if unknown:
            raise ValueError(f"patch_size names {unknown[0]!r}, which is not among the student's {', '.join(pairs)}.")
        value = value.get(name)
    if value is None:
        return least_patch_size(size)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= max(size):
        raise ValueError(
            f"patch_size of {name} is {value!r}; the map has {size[0]} x {size[1]} cells, expected a whole number from "
            f"1 to {max(size)}."
        )
    return value
