"""What MKD and the baselines beside it share: two networks with named levels, one batch tensor, a task's own loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.frozen import frozen_parts
from .base import DistillMethod
from .dense_checks import check_normalisation
from .dense_logits import class_maps, head_of
from .dense_networks import Form, Levels, form_of, pair_levels, probe_levels, read_levels, run_features
from .dense_strides import last_stage, level_strides
from .features import eval_mode, input_shape
from .inherit import inherit_head
from .level_sizes import resized_size, size_of_level
from .mkd_losses import channel_logit_loss
from .mkd_masking import Sight
from .overwritten import refuse_overwritten
from .teacher_call import CompileMode, TeacherCall

__all__ = ["DenseMethod", "LevelShape", "Seen"]


class LevelShape(NamedTuple):
    """What the heads of a level must know.

    Attributes:
        name: of the student's level.
        teacher: the teacher's.
        stride: pixels between positions.
        student_channels: C_S.
        teacher_channels: C_T.
        size: ``(h, w)`` for the image that was tried; of a detector without `image_size` for one as it resizes them.
    """

    name: str
    teacher: str
    stride: int
    student_channels: int
    teacher_channels: int
    size: tuple[int, int]


class Seen(NamedTuple):
    """What the student did with a batch.

    Attributes:
        output: what its forward returned.
        images: ``(B, C, H, W)``, what its backbone got: the transformed, padded batch of a detector.
        levels: of the student.
        boxes: true boxes of each image in pixels of that batch; None without a detector.
    """

    output: Any
    images: Tensor
    levels: Levels
    boxes: list[Tensor] | None


class DenseMethod(DistillMethod):
    """Base of methods that compare the levels of two detectors, segmenters or classifiers.

    The student runs once, as ever; what its backbone gets is also what the teacher's gets, so that there is one
    transform. Of a teacher nothing runs but what makes its levels, unless logits are asked for.

    Args:
        student: the network to train.
        teacher: the network to learn from.
        layers: the levels: the teacher's layer by the student's; None takes those of `form_of`.
        image_size: of the image on which shapes are learnt; None is right for any network that takes 256 pixels, and
            has the sizes of a detector's levels from how it resizes.
        wants_logits: whether maps of class logits are read too.
        teacher_device: keeps the teacher on this device.
        teacher_dtype: runs the teacher under autocast to this dtype; None leaves it to the caller's autocast.
        teacher_compile: runs the teacher through ``torch.compile``, see `TeacherCall`.
        backbone: the part of the student that a mask is for; None takes that of `form_of`.

    Attributes:
        levels: a `LevelShape` for each pair.
        part_stride: pixels between positions of the coarsest map that the part makes.
        frozen_parts: names of the largest parts of the student that came frozen and stay so, such as first stages.
        student_copied: the student's levels that a later layer overwrites, which are read from copies.
        inherited: names that the student began with from the teacher, see `inherit`.
        not_inherited: names of its neck and head that do not fit the teacher's.

    Raises:
        ValueError: networks of different tasks, or whose levels do not belong together.
        TypeError: networks or layers of the wrong type.
    """

    tasks = ("classification", "detection", "segmentation")
    form: Form
    levels: list[LevelShape]
    part_stride: int
    student_copied: tuple[str, ...]

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, str] | None,
        image_size: int | Sequence[int] | None,
        wants_logits: bool,
        teacher_device: torch.device | str | None,
        teacher_dtype: torch.dtype | None,
        teacher_compile: bool | CompileMode,
        backbone: str | None = None,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher is a {type(teacher).__name__}; expected a torch.nn.Module.")
        teacher_call = TeacherCall(_observe_teacher, teacher_dtype, teacher_compile)
        # Before the method freezes anything itself.
        frozen = frozen_parts(student) if isinstance(student, nn.Module) else []
        super().__init__(student, teacher, teacher_device=teacher_device)
        self.frozen_parts = frozen
        self._teacher_call, self.wants_logits = teacher_call, wants_logits
        self.inherited: list[str] = []
        self.not_inherited: list[str] = []
        try:
            self.form, self._teacher_form = form_of(student, "student"), form_of(teacher, "teacher")
            if backbone is not None:
                if backbone not in dict(student.named_modules()):
                    raise ValueError(f"backbone is {backbone!r}; the student has no module of that name.")
                whole, part = (input_shape(student.get_submodule(name), 64)[0] for name in (self.form.part, backbone))
                if whole != part:
                    raise ValueError(
                        f"backbone is {backbone!r}, which gets maps of {part} channels and not the images of {whole}: "
                        "a mask of these does not fit it. Name the module that gets the images."
                    )
                self.form = self.form._replace(part=backbone)
            if self.form.task != self._teacher_form.task:
                raise ValueError(
                    f"student is made for {self.form.task} but teacher for {self._teacher_form.task}; both must do the "
                    "same."
                )
            check_normalisation(student, teacher)
            if wants_logits:
                for role, network, form in (("student", student, self.form), ("teacher", teacher, self._teacher_form)):
                    head_of(network, form, role)
            self.levels = self._find_levels(student, teacher, layers, image_size)
            if self.form.task == "detection" and image_size is None and (resized := resized_size(student)):
                self.levels = [x._replace(size=size_of_level(resized, x.stride)) for x in self.levels]
        except (TypeError, ValueError):
            self.release()
            raise

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names what a segmenter's encoder has beyond the stages that are used, such as the last of a PSPNet's.

        Args:
            student: the student, as passed.
        """
        form = form_of(student, "student")
        if form.task != "segmentation":
            return ()
        part: nn.Module = student.get_submodule(form.part)
        weight = next(part.parameters())
        images = weight.new_zeros(1, input_shape(part, 64)[0], 64, 64)
        named = {
            name: p for name, p in student.named_parameters() if name.startswith(f"{form.part}.") and p.requires_grad
        }
        with eval_mode(part), torch.enable_grad():
            maps, _ = torch.utils._pytree.tree_flatten(part(images))
            total = torch.stack([x.sum() for x in maps]).sum()
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True) if total.requires_grad else ()
        return [name for name, gradient in zip(named, found, strict=bool(found)) if gradient is None]

    def _find_levels(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, str] | None,
        image_size: int | Sequence[int] | None,
    ) -> list[LevelShape]:
        if layers is None:
            if not self.form.layers or len(self.form.layers) != len(self._teacher_form.layers):
                raise ValueError("which levels to compare is not known for these networks; name them as layers.")
            layers = dict(zip(self.form.layers, self._teacher_form.layers, strict=True))
        if not isinstance(layers, Mapping) or not all(
            isinstance(name, str) for pair in layers.items() for name in pair
        ):
            raise TypeError(f"layers is {layers!r}; expected names as in {{'layer4': 'layer4'}}, student: teacher.")
        if not layers:
            raise ValueError("layers is empty; name at least one pair of layers, {student: teacher}.")
        # The masked part's own maps too: how coarse they become decides what a mask may be.
        last, known = last_stage(student, self.form)
        of_student, size, self.student_copied = probe_levels(
            student, self.form, "student", list(dict.fromkeys([*layers, *last])), image_size
        )
        of_teacher, _, self._teacher_copied = probe_levels(
            teacher, self._teacher_form, "teacher", list(layers.values()), size
        )
        pairs = pair_levels(layers, of_student, of_teacher)
        strides = level_strides(student, self.form, "student", of_student, size)
        theirs = level_strides(teacher, self._teacher_form, "teacher", of_teacher, size)
        found = []
        for own, other in pairs.items():
            if strides[own] != theirs[other]:
                raise ValueError(
                    f"the student's level {own!r} has a position every {strides[own]} pixels but the teacher's "
                    f"{other!r} every {theirs[other]}; pair levels of the same stride with "
                    "layers={student's: teacher's}."
                )
            s, t = of_student[own], of_teacher[other]
            found.append(LevelShape(own, other, strides[own], s.shape[1], t.shape[1], (t.shape[2], t.shape[3])))
        made = [stride for name, stride in strides.items() if name.partition(":")[0] in last]
        self.part_stride = max(known, *(made or [level.stride for level in found]))
        return found

    def inherit(self) -> None:
        """Lets the student's neck and head start from the teacher's, where names and shapes agree.

        Raises:
            ValueError: nothing of them fits.
        """
        assert self.teacher is not None
        self.inherited, self.not_inherited = inherit_head(self.student, self.teacher, self.form.part)

    @property
    def layers(self) -> dict[str, str]:
        """The teacher's level by the student's."""
        return {level.name: level.teacher for level in self.levels}

    def watch_student(self, images: Any, targets: Any, sight: Sight | None = None) -> Seen:
        """Runs the student once and reads its levels; hooks live for this call.

        Args:
            images: as in ``forward``.
            targets: as in ``forward``; only a detector looks at them.
            sight: of the masked backbone in whose context this happens, or None.
        """
        form, found = self.form, dict[str, Tensor]()
        entered: list[Tensor] = []
        said: list[Any] = []
        sizes: list[tuple[int, int]] = []
        boxes: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
            entered.append(args[0])

        def measure(_module: nn.Module, _args: Any, pyramid: Any) -> None:
            sizes.extend((x.shape[2], x.shape[3]) for x in pyramid.values())

        def locate(_module: nn.Module, _args: Any, transformed: Any) -> None:
            boxes.extend(target["boxes"] for target in transformed[1] or ())

        with contextlib.ExitStack() as stack:
            part = self.student.get_submodule(form.part)
            stack.callback(part.register_forward_pre_hook(enter, prepend=True).remove)
            if form.task == "detection":
                transform: Any = self.student.get_submodule("transform")
                stack.callback(transform.register_forward_hook(locate).remove)
            if self.wants_logits and form.task == "detection":
                features, head = self.student.get_submodule(form.features), head_of(self.student, form, "student")
                stack.callback(features.register_forward_hook(measure).remove)
                stack.callback(head.register_forward_hook(lambda _m, _a, out: said.append(out)).remove)
            reading = read_levels(self.student, list(self.layers), found, self.densify(sight), self.student_copied)
            versions = stack.enter_context(reading)
            output = self.student(images, targets) if form.task == "detection" else self.student(images)
        refuse_overwritten(found, versions)
        if self.wants_logits and form.task == "segmentation":
            said.append(output)
        logits = class_maps(said[0], sizes) if said else []
        return Seen(output, entered[0], Levels(found, logits), boxes if form.task == "detection" else None)

    def densify(self, sight: Sight | None) -> Callable[[str, Any], Any]:
        """Returns what makes dense maps, of the size without a mask, of what modules inside the masked part return.

        Args:
            sight: what the part saw, or None.
        """
        part = self.form.part
        inside = f"{part}." if part else ""

        def dense(name: str, output: Any) -> Any:
            if sight is None or name == part or not name.startswith(inside):
                return output
            return sight.dense(output, name.removeprefix(inside))

        return dense

    def ask_teacher(self, images: Tensor) -> Levels:
        """Returns the teacher's levels, constants, on the device of the images.

        Args:
            images: ``(B, C, H, W)``, what the student's backbone got.
        """
        names = [level.teacher for level in self.levels]
        return self._teacher_call(
            self.teacher, images, self._teacher_form, names, self._teacher_copied, self.wants_logits
        )

    def logit_error(self, student: Levels, teacher: Levels, temperature: float) -> Tensor:
        """Returns CWD's loss of the maps of class logits, summed over levels.

        Args:
            student: gradients flow here.
            teacher: a constant.
            temperature: tau.
        """
        maps = teacher.logits
        if self.form.task == "segmentation":
            # The student pads for its encoder and cuts its answer; the teacher answers for the padding too.
            maps = [t[..., : s.shape[2], : s.shape[3]] for s, t in zip(student.logits, maps, strict=True)]
        pairs = zip(student.logits, maps, strict=True)
        return torch.stack([channel_logit_loss(s, t, temperature) for s, t in pairs]).sum()


def _observe_teacher(
    network: nn.Module, images: Tensor, form: Form, layers: Sequence[str], copied: Sequence[str], logits: bool
) -> Levels:
    """Runs what makes the levels, and with logits also what makes these."""
    found: dict[str, Tensor] = {}
    with read_levels(network, layers, found, copied=copied) as versions:
        maps = _class_maps_of(network, images, form, logits)
    refuse_overwritten(found, versions)
    return Levels(found, maps)


def _class_maps_of(network: nn.Module, images: Tensor, form: Form, logits: bool) -> list[Tensor]:
    """Runs what makes the levels; the maps of class logits if they are wanted, else none."""
    if not logits:
        run_features(network, form, images)
        return []
    if form.task == "segmentation":
        return class_maps(network(images), [])
    pyramid = list(run_features(network, form, images).values())
    said = head_of(network, form, "teacher")(pyramid)
    return class_maps(said, [(x.shape[2], x.shape[3]) for x in pyramid])
