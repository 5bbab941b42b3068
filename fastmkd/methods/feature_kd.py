"""The methods that DPK and DMAE are compared with, behind one class: cross-entropy and a `Baseline` over layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .base import DistillMethod, DistillOutput, split_heads, supervised_loss
from .baselines import Answers, AttentionTransfer, Baseline, DecoupledKD, FitNet, ReviewKD, Step, VanillaKD
from .choices import choose
from .crd import CRD, BatchCRD
from .feature_alignment import FeatureAlignment
from .features import Features, check_layers, input_shape, observe_maps, probe
from .losses import logit_kd
from .teacher_call import CompileMode, TeacherCall

__all__ = ["BASELINES", "FeatureKD"]

# By the name that FeatureKD(base=...) and a recipe use.
BASELINES: dict[str, Callable[[], Baseline]] = {
    "kd": VanillaKD,
    "fitnet": FitNet,
    "at": AttentionTransfer,
    "dkd": DecoupledKD,
    "reviewkd": ReviewKD,
    "crd": CRD,
    "crd-batch": BatchCRD,
    "align": FeatureAlignment,
}


class FeatureKD(DistillMethod):
    r"""Vanilla KD, FitNet, attention transfer, DKD, ReviewKD, CRD or DMAE's alignment of any two classifiers, by name.

    The loss is ``ce_weight * CE + weight * base + logit_weight * KD`` with ``KD = tau^2 * KL(teacher || student)``.
    ``base="fitnet", weight=0.2, logit_weight=0.8`` makes it DPK's loss with FitNet's transform (Table 8).

    CRD remembers every training image: give it their classes as `train_labels`, and each call the place of its images
    among them, ``method(images, targets, numbers=numbers)``. Recipes do both.

    Args:
        student: a classifier; trained in place.
        teacher: a classifier of the same classes; frozen in place.
        base: "kd", "fitnet", "at", "dkd", "reviewkd", "crd", "crd-batch", "align", or a
            `fastmkd.methods.baselines.Baseline` with its options.
        layers: the stages: the teacher's layer by the student's; not needed for "kd" and "dkd".
        weight: of the base; None takes its usual one.
        logit_weight: of vanilla KD beside another base.
        temperature: tau; CRD's benchmark has 4.
        ce_weight: weight of the labels.
        image_size: side of the training images, or (height, width); None takes the network's own.
        train_labels: the class of each training image, for "crd" only.
        teacher_device: keeps the teacher on this device.
        teacher_dtype: runs the teacher under autocast to this dtype; None leaves it to the caller's autocast.
        teacher_compile: runs the teacher through ``torch.compile``, see `TeacherCall`.

    Raises:
        ValueError: an argument out of range, a layer that does not exist, different classes.
        TypeError: a network, layers or a base of the wrong type.

    Example:
        >>> import timm
        >>> nets = [timm.create_model(name, num_classes=10) for name in ("resnet18", "resnet34")]
        >>> method = FeatureKD(*nets, base="fitnet", layers={"layer4": "layer4"}, image_size=32)
        >>> method(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])).loss.backward()
        >>> list(method.heads)
        ['adapt0']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        base: str | Baseline = "kd",
        layers: Mapping[str, str] | None = None,
        weight: float | None = None,
        logit_weight: float = 0.0,
        temperature: float = 4.0,
        *,
        ce_weight: float = 1.0,
        image_size: int | Sequence[int] | None = None,
        train_labels: Sequence[int] | Tensor | None = None,
        teacher_device: torch.device | str | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_compile: bool | CompileMode = False,
    ) -> None:
        chosen = choose("base", base, Baseline, BASELINES)  # type: ignore[type-abstract]
        weight = chosen.weight if weight is None else weight
        for name, value in (("weight", weight), ("logit_weight", logit_weight), ("ce_weight", ce_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        teacher_call = TeacherCall(observe_maps, teacher_dtype, teacher_compile)
        if chosen.needs_layers and layers is None:
            raise ValueError(f"base {base!r} compares feature maps; name them: layers={{'layer4': 'layer4'}}.")
        labels = _labels(base, train_labels) if chosen.needs_image_numbers else None
        super().__init__(student, teacher, teacher_device=teacher_device)
        try:
            self.layers = check_layers(layers or {}, student, teacher) if chosen.needs_layers else {}
            shape = input_shape(student, image_size)
            names, of_teacher = list(self.layers), list(self.layers.values())
            found, self._student_copied = probe(student, "student", names, shape)
            theirs, self._teacher_copied = probe(teacher, "teacher", of_teacher, shape)
            own, other = self._answers(found, names), self._answers(theirs, of_teacher)
            if own.logits.shape != other.logits.shape:
                raise ValueError(
                    f"student has {own.logits.shape[-1]} classes and teacher {other.logits.shape[-1]}; create them "
                    "with the same num_classes."
                )
            first = next(student.parameters())
            self.heads.update(chosen.heads(own, other))
            self.heads.to(first.dtype)  # the memories stay in float32: a bfloat16 would swallow their small steps
            if labels is not None:
                self.heads.update(chosen.memories(len(self.layers), labels))
        except (TypeError, ValueError):
            self.release()
            raise
        self.heads.to(first.device)
        self.needs_image_numbers = labels is not None
        # By default DDP sends all buffers from rank 0 before each forward pass; these are large and the same on all.
        self._ddp_params_and_buffers_to_ignore = [n for n, _ in self.named_buffers() if n.startswith("heads.memory")]
        self.base, self.weight, self.logit_weight = chosen, float(weight), float(logit_weight)
        self.temperature, self.ce_weight, self._teacher_call = float(temperature), float(ce_weight), teacher_call
        self.epoch = 0

    def set_epoch(self, epoch: float) -> None:
        """Tells a base that grows over the first epochs which one it is.

        Args:
            epoch: from 0; a fraction counts as the epoch that it lies in.
        """
        self.epoch = int(epoch)

    def forward(self, images: Tensor, targets: Tensor, numbers: Tensor | None = None) -> DistillOutput:
        """Runs both networks and returns the loss.

        Args:
            images: ``(B, C, H, W)`` floating point.
            targets: ``(B,)`` int64 class indices or ``(B, K)`` soft labels.
            numbers: ``(B,)`` int64, the place of each image in `train_labels`; not looked at but for "crd".

        Returns:
            `DistillOutput` with the terms ``ce``, ``base``, and ``kd`` if it has a weight.

        Raises:
            ValueError: images, targets or numbers of a wrong size, or no numbers where they are needed.
            TypeError: targets or numbers of a wrong dtype.
        """
        if self.needs_image_numbers:
            _check_numbers(numbers, len(images))
        names, of_teacher = list(self.layers), list(self.layers.values())
        found = observe_maps(self.student, images, names, self._student_copied)
        heads = split_heads(found.output)
        student = self._answers(found, names)
        answer = self._teacher_call(self.teacher, images, of_teacher, self._teacher_copied)
        teacher = self._answers(answer, of_teacher)
        ce = supervised_loss(heads[:1], targets)
        step = Step(targets, self.temperature, self.epoch, numbers)
        base = self.base.loss(self.heads, student, teacher, step)
        loss, terms = self.ce_weight * ce + self.weight * base, {"ce": ce, "base": base}
        if self.logit_weight:
            terms["kd"] = logit_kd(student.logits, teacher.logits, self.temperature)
            loss = loss + self.logit_weight * terms["kd"]
        mean = torch.stack(heads).mean(0) if len(heads) > 1 else heads[0]
        return DistillOutput(loss, {name: term.detach() for name, term in terms.items()}, mean)

    def _answers(self, found: Features, names: Sequence[str]) -> Answers:
        """The last head's logits, which learn from the teacher where there are two, and the maps in order."""
        return Answers(split_heads(found.output)[-1], [found.maps[name] for name in names])


def _labels(base: object, train_labels: Sequence[int] | Tensor | None) -> Tensor:
    if train_labels is None:
        raise ValueError(
            f"base {base!r} remembers every training image; give it their classes as train_labels. Without them take "
            "'crd-batch'."
        )
    labels = torch.as_tensor(train_labels)
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"train_labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; expected the class of each "
            "training image, (N,) whole numbers."
        )
    return labels


def _check_numbers(numbers: Tensor | None, images: int) -> None:
    if numbers is None:
        raise ValueError(
            "numbers is None, but this method remembers the training images; call method(images, targets, "
            "numbers=numbers) with the place of each image in train_labels."
        )
    if numbers.dtype != torch.int64:
        raise TypeError(f"numbers has dtype {numbers.dtype}; expected torch.int64.")
    if numbers.shape != (images,):
        raise ValueError(f"numbers has shape {tuple(numbers.shape)}; expected ({images},), one for each image.")
