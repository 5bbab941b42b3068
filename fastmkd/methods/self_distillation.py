r"""What methods share whose teacher is a moving average of the student (DINO, MoCo v3).

.. math:: \theta_T \leftarrow m \, \theta_T + (1 - m) \, \theta_S
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from ..nn.vit import MaskedViT
from .base import DistillMethod
from .crops import random_crops
from .views import classifier_of

__all__ = ["SelfDistillation", "check_momentum"]


class SelfDistillation(DistillMethod):
    """Base of methods whose teacher follows the student, with momentum m from `momentum` to 1 along half a cosine.

    The averages are part of ``state_dict()``, under ``ema.``, but not trained. They move at the beginning of a step if
    the student's weights have changed since the last one, so any loop and gradient accumulation will do.

    Args:
        student: timm VisionTransformer (or a `MaskedViT`); trained in place. Its classifier is not used.
        momentum: m at the beginning.
        total_updates: optimizer steps until m reaches 1; None keeps it as it is.
        teacher: a frozen network besides, see `DistillMethod`.
        teacher_device: keeps that on this device.

    Raises:
        TypeError: a student that is not a maskable ViT.
        ValueError: a distilled DeiT, or a number out of range.
    """

    ema: nn.ModuleDict
    updates: Tensor
    _student_vit: MaskedViT

    def __init__(
        self,
        student: nn.Module,
        momentum: float,
        total_updates: int | None,
        teacher: nn.Module | None = None,
        *,
        teacher_device: torch.device | str | None = None,
    ) -> None:
        check_momentum("momentum", momentum)
        if total_updates is not None and total_updates < 1:
            raise ValueError(f"total_updates is {total_updates}; expected at least 1.")
        vit = student if isinstance(student, MaskedViT) else MaskedViT(student)
        if len(classifier_of(vit)) > 1:
            raise ValueError("student is a distilled DeiT, whose two heads have no use here; use a plain one.")
        super().__init__(student, teacher, teacher_device=teacher_device)
        # A view of the student, kept out of the module tree so that no parameter appears twice.
        self.__dict__["_student_vit"] = vit
        self.momentum, self.total_updates = momentum, total_updates
        self.ema = nn.ModuleDict()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._seen_writes: int | None = None

    def follow(self, networks: Mapping[str, nn.Module]) -> None:
        """Makes the averages, as copies.

        Args:
            networks: what is averaged, by its name in `ema`.
        """
        self.__dict__["_followed"] = dict(networks)
        for name, network in networks.items():
            self.ema[name] = copy.deepcopy(network)
        self.ema.requires_grad_(False).eval()

    def begin_step(self) -> None:
        """Moves the averages if the student has changed since the last step; to be called first in `forward`."""
        if self.training and self._seen_writes != (writes := self._writes()):
            self.update_teacher()
            self._seen_writes = writes

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Moves the averages towards the student; `begin_step` calls it by itself."""
        teacher: list[Tensor] = list(self.ema.parameters())
        student = list(self._followed_parameters())
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

    def _followed_parameters(self) -> Iterable[nn.Parameter]:
        return (p for network in self.__dict__["_followed"].values() for p in network.parameters())

    def _writes(self) -> int:
        """A number that grows whenever somebody writes to what is averaged."""
        return sum(p._version for p in self._followed_parameters())


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
