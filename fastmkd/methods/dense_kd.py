"""The methods that MKD is compared with, behind one class: a task's own loss and a `DenseBase` over the same levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .base import DistillOutput, Panel
from .choices import choose
from .dense_bases import CWD, DPKFGD, FGD, MGD, DenseBase, DenseStep, Hint
from .dense_checks import check_detection_batch
from .dense_method import DenseMethod
from .dense_pictures import dense_pictures
from .task_loss import task_loss
from .teacher_call import CompileMode

__all__ = ["DENSE_BASES", "DenseKD"]

# By the name that DenseKD(base=...) and a recipe use.
DENSE_BASES: dict[str, Callable[[], DenseBase]] = {
    "mgd": MGD,
    "fgd": FGD,
    "dpk": DPKFGD,
    "fitnet": Hint,
    "cwd": CWD,
}


class DenseKD(DenseMethod):
    r"""MGD, FGD, DPK-FGD, FitNet or CWD between any two detectors, segmenters or classifiers, by name.

    The loss is the task's plus ``weight * base``, and ``logits_weight`` times CWD's loss of the maps of class logits.

    Args:
        student: the network to train.
        teacher: a network of the same task; frozen in place.
        base: "mgd", "fgd", "dpk", "fitnet", "cwd", or a `fastmkd.methods.dense_bases.DenseBase` with its options.
        weight: of the base; None takes its usual one.
        logits_weight: of CWD's logit loss.
        layers: the levels, see `fastmkd.MKD`.
        inherit: start from the teacher's neck and head, where shapes agree.
        logits_temperature: tau of the logit loss.
        image_size: of the image on which shapes are learnt when the method is made, and with them the patches of
            "dpk"; None takes what a detector resizes to.
        teacher_device: keeps the teacher on this device.
        teacher_dtype: runs the teacher under autocast to this dtype; None leaves it to the caller's autocast.
        teacher_compile: runs the teacher through ``torch.compile``, see `TeacherCall`.

    Raises:
        ValueError: an argument out of range, networks or levels that do not belong together, a base that needs boxes
            without a detector.
        TypeError: a network, layers or a base of the wrong type.

    Example:
        >>> import timm
        >>> nets = [timm.create_model(name, num_classes=10) for name in ("resnet18", "resnet34")]
        >>> method = DenseKD(*nets, base="mgd", image_size=64)
        >>> out = method(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))
        >>> sorted(out.terms), list(method.heads)
        (['base', 'ce'], ['adapt', 'generate'])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        base: str | DenseBase = "mgd",
        weight: float | None = None,
        logits_weight: float = 0.0,
        layers: Mapping[str, str] | None = None,
        *,
        inherit: bool = False,
        logits_temperature: float = 4.0,
        image_size: int | Sequence[int] | None = None,
        teacher_device: torch.device | str | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_compile: bool | CompileMode = False,
    ) -> None:
        chosen = choose("base", base, DenseBase, DENSE_BASES)  # type: ignore[type-abstract]
        weight = chosen.weight if weight is None else weight
        for name, value in (("weight", weight), ("logits_weight", logits_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
        if not 0 < logits_temperature < math.inf:
            raise ValueError(f"logits_temperature is {logits_temperature}; expected a finite positive number.")
        super().__init__(student, teacher, layers, image_size, logits_weight > 0, teacher_device, teacher_dtype,
                         teacher_compile)  # fmt: skip
        try:
            if chosen.needs_boxes and self.form.task != "detection":
                raise ValueError(f"base {base!r} needs the boxes of a detector, but these are for {self.form.task}.")
            self.heads.update(chosen.heads(self.levels))
            if inherit:
                self.inherit()
        except (TypeError, ValueError):
            self.release()
            raise
        first = next(student.parameters())
        self.heads.to(device=first.device, dtype=first.dtype)
        self.base, self.weight, self.logits_weight = chosen, float(weight), float(logits_weight)
        self.logits_temperature, self.epoch = float(logits_temperature), 0

    def set_epoch(self, epoch: float) -> None:
        """Tells a base with a schedule which epoch it is.

        Args:
            epoch: from 0; a fraction counts as the epoch that it lies in.
        """
        self.epoch = int(epoch)

    def forward(self, images: Any, targets: Any) -> DistillOutput:
        """Runs both networks and returns the loss.

        Args:
            images: as `fastmkd.MKD.forward` takes them.
            targets: likewise.

        Returns:
            `DistillOutput` with the terms of the task, ``base``, and ``logits`` if it has a weight.

        Raises:
            ValueError: images or targets of a wrong size or with wrong values, a detector in eval mode.
            TypeError: images or targets of the wrong type.
        """
        if self.form.task == "detection":
            check_detection_batch(self.student, images, targets)
        seen = self.watch_student(images, targets)
        loss, task, prediction = task_loss(seen.output, targets)
        taught = self.ask_teacher(seen.images)
        student = [seen.levels.maps[level.name] for level in self.levels]
        teacher = [taught.maps[level.teacher] for level in self.levels]
        step = DenseStep(seen.boxes, (seen.images.shape[2], seen.images.shape[3]), self.epoch)
        base = self.base.loss(self.heads, student, teacher, step)
        terms, loss = {**task, "base": base}, loss + self.weight * base
        if self.logits_weight:
            terms["logits"] = self.logit_error(seen.levels, taught, self.logits_temperature)
            loss = loss + self.logits_weight * terms["logits"]
        return DistillOutput(loss, {name: term.detach() for name, term in terms.items()}, prediction)

    def pictures(self, images: Any, level: str | None = None, targets: Any = None) -> list[Panel]:
        """Shows both networks' features, what the base makes of the student's, and how far that is from the teacher's.

        Args:
            images: as in `forward`.
            level: which of the student's levels to show; None is the finest.
            targets: of a detector, for the foreground of "fgd" and "dpk"; None leaves that panel out.

        Returns:
            Panels ``input``, ``teacher features`` and ``student features`` (mean absolute values); of "mgd" ``masked
            features`` and ``generated features``, of "fgd" ``teacher's attention`` and ``foreground``, of "dpk" these
            and ``hybrid features``, of the others ``adapted features`` where widths differ (of "fgd" too); and
            ``distance to teacher`` of the last of these features (after a layer norm, as MKD's).

        Raises:
            ValueError: a level that there is not, or targets that do not fit the images.
            TypeError: targets of the wrong type.
        """
        return dense_pictures(self, images, level, targets)
