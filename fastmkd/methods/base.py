"""What all methods share: a student that is trained, a teacher that is frozen, and the shape of the result.

A method is an ordinary module that fits into any training loop: optimise ``method.parameters()``, call
``method(images, targets).loss.backward()``. It owns neither network; `DistillMethod.release` gives both back as they
were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..ops.devices import check_device
from .losses import cross_entropy

__all__ = ["DistillMethod", "DistillOutput", "Panel", "split_heads", "supervised_loss"]


class DistillOutput(NamedTuple):
    """Result of a step of a method.

    Attributes:
        loss: scalar to call ``backward()`` on.
        terms: the parts of the loss before weighting, by name; detached scalars for logging.
        student_output: what the student predicted: ``(B, classes)`` logits, or pixels in pre-training. A detector
            predicts nothing in training; its losses stand here, by name.

    Example:
        >>> loss, terms, logits = DistillOutput(torch.zeros(()), {}, torch.zeros(1, 2))
    """

    loss: Tensor
    terms: dict[str, Tensor]
    student_output: Any


class Panel(NamedTuple):
    """One kind of picture that a method can show for a batch.

    Attributes:
        title: what it shows.
        image: ``(B, C, H, W)`` for an image, ``(B, H, W)`` in [0, 1] for a heat map or a mask (1 = visible). An image
            keeps the scale it came in: whoever normalised the pixels knows how to undo it.
        kind: how to draw it.

    Example:
        >>> Panel("kept patches", torch.ones(1, 8, 8), "mask").kind
        'mask'
    """

    title: str
    image: Tensor
    kind: Literal["image", "heat", "mask"]


class DistillMethod(nn.Module):
    """Base of all methods: trains the passed student, freezes the passed teacher, copies neither.

    `student` is a submodule, so its parameters are the method's, together with those of `heads`. The teacher is not: it
    is in neither ``parameters()`` nor ``state_dict()``, its parameters do not require gradients, and it stays in eval
    mode whatever ``train()`` is told. It follows ``to``, ``half`` and ``cuda`` unless `teacher_device` pins it.

    Student parameters that the loss cannot reach are frozen while the method owns the student, so that plain DDP works
    without find_unused_parameters; a subclass names them in `unreachable_parameters`.

    Attributes:
        needs_image_numbers: True for a method that remembers single training images: its call is
            ``method(images, targets, numbers=numbers)`` with ``(B,)`` int64, where in the training set each stands.

    Args:
        student: the network to train.
        teacher: the network to learn from, or None.
        teacher_device: keeps the teacher on this device; None lets it move with the method.

    Attributes:
        tasks: what the method can train: classification, detection, segmentation.
        pretrains: whether the student leaves without a classifier that has learnt anything. Such a method needs no
            targets and is judged by its own loss on test pictures.
        lengths: arguments of the constructor that say how long the training is, with "epochs", "last_epochs" or
            "updates" for each; a recipe that leaves them out gets them from its schedule. A number of updates, which is
            known last, is set as the attribute of that name.

    Raises:
        TypeError: `student` or `teacher` is not a module.
        ValueError: `student` and `teacher` are the same object, or `teacher_device` is not there.

    Example:
        >>> method = DistillMethod(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> sorted(method.state_dict())
        ['student.bias', 'student.weight']
    """

    tasks: tuple[str, ...] = ("classification",)
    pretrains: bool = False
    lengths: Mapping[str, Literal["epochs", "last_epochs", "updates"]] = MappingProxyType({})
    student: nn.Module
    teacher: nn.Module | None
    heads: nn.ModuleDict
    needs_image_numbers: bool = False

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None = None, *, teacher_device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student is a {type(student).__name__}; expected a torch.nn.Module.")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher is a {type(teacher).__name__}; expected a torch.nn.Module.")
        if teacher is None and teacher_device is not None:
            raise ValueError(f"teacher_device is {teacher_device} but there is no teacher to put there.")
        if teacher_device is not None:
            teacher_device = check_device("teacher_device", teacher_device)
        shared = set() if teacher is None else set(map(id, student.parameters())) & set(map(id, teacher.parameters()))
        if shared:
            raise ValueError(
                f"student and teacher share {len(shared)} parameters, so freezing one freezes the other; "
                "pass copy.deepcopy(student) as the teacher."
            )
        self.student = student
        self.heads = nn.ModuleDict()
        self._frozen_student = _freeze(student, self.unreachable_parameters(student))
        self._teacher_pinned = teacher_device is not None
        self._frozen_teacher: list[str] = []
        # Past nn.Module's registration: the teacher is no submodule, so no optimizer, checkpoint or DDP ever sees it.
        self.__dict__["teacher"] = teacher
        if teacher is not None:
            if teacher_device is not None:
                teacher.to(teacher_device)
            self._teacher_training = teacher.training
            self._frozen_teacher = _freeze(teacher, [name for name, _ in teacher.named_parameters()])
            teacher.eval()

    def unreachable_parameters(self, student: nn.Module) -> Iterable[str]:
        """Names of student parameters that this method's loss cannot reach; none unless a subclass says so.

        Args:
            student: the student, as passed.
        """
        return ()

    def set_epoch(self, epoch: float) -> None:
        """Tells the method where in the training it is; one with a schedule of its own reads it, others do not care.

        Args:
            epoch: from 0; 22.5 is half-way through the 23rd. ``fastmkd train`` tells it before each update.
        """

    def bare_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turns the student's weights as they are in training into those of the student as it was passed.

        Args:
            weights: by the names that ``student.state_dict()`` has now; the same ones unless the method put layers of
                its own into the student.
        """
        return weights

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers are to leave without weight decay: those the student names.

        Example:
            >>> student = nn.Linear(2, 2)
            >>> student.no_weight_decay = lambda: {"weight"}
            >>> DistillMethod(student).no_weight_decay()
            {'student.weight'}
        """
        says: Any = getattr(self.student, "no_weight_decay", set)
        return {f"student.{name}" for name in says()}

    @property
    def group_matcher(self) -> Callable[..., Callable[[str], int]]:
        """What timm asks for when learning rates shrink from layer to layer (``layer_decay``).

        Called with timm's ``coarse``, it gives a function from the name of a parameter to its layer: the student's own
        count, and the last layer for all that is not the student's, which so has the full learning rate.

        Raises:
            AttributeError: the student has none, so that timm sees that the method has none.
        """
        of_student: Any = self.student.group_matcher

        def matcher(coarse: bool = False) -> Callable[[str], int]:
            from timm.models import group_parameters

            layers: dict[str, int] = group_parameters(self.student, of_student(coarse=coarse), reverse=True)
            last = max(layers.values(), default=0)
            return lambda name: layers.get(name.removeprefix("student."), last) if name.startswith("student.") else last

        return matcher

    @property
    def has_pictures(self) -> bool:
        """Whether `pictures` shows more than the input."""
        return type(self).pictures is not DistillMethod.pictures

    def pictures(self, images: Tensor) -> list[Panel]:
        """What this method has to show for a batch; the input alone unless a subclass adds to it.

        Args:
            images: ``(B, C, H, W)``.
        """
        return [Panel("input", images.detach(), "image")]

    def release(self) -> nn.Module:
        """Gives student and teacher back: parameters that the method froze require gradients again.

        The teacher returns to the mode it came in. Calling it twice does no harm; to train on, make a new method.

        Returns:
            The student.
        """
        _thaw(self.student, self._frozen_student)
        teacher = self.__dict__["teacher"]
        if teacher is not None:
            _thaw(teacher, self._frozen_teacher)
            teacher.train(self._teacher_training)
        self._frozen_student, self._frozen_teacher = [], []
        return self.student

    def train(self, mode: bool = True) -> Self:
        """Sets the student's and the heads' mode; the teacher stays in eval mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        teacher = self.__dict__.get("teacher")
        if teacher is not None:
            teacher.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        teacher = self.__dict__.get("teacher")
        if teacher is not None and recurse and not self._teacher_pinned:
            teacher._apply(fn)
        return self


def split_heads(output: Any) -> tuple[Tensor, ...]:
    """Returns a classifier's output as a tuple of logits: one, or two from a distilled DeiT in training mode.

    Args:
        output: a tensor or a tuple of tensors.

    Raises:
        TypeError: anything else.
    """
    heads = output if isinstance(output, tuple) else (output,)
    if not heads or not all(isinstance(head, Tensor) for head in heads):
        raise TypeError(f"the student returned {type(output).__name__}; expected logits or a tuple of logits.")
    return heads


def supervised_loss(heads: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Mean over heads of the cross-entropy of each head.

    Args:
        heads: logits ``(B, K)`` of each head.
        targets: ``(B,)`` int64 or ``(B, K)`` floating point.
    """
    return torch.stack([cross_entropy(head, targets) for head in heads]).mean()


def _freeze(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Freezes the named parameters and returns the names of those that were trainable."""
    parameters = dict(module.named_parameters())
    frozen = [name for name in names if parameters[name].requires_grad]
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def _thaw(module: nn.Module, names: Iterable[str]) -> None:
    parameters = dict(module.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
