"""Images as the teacher wants them: its size and its normalisation, whatever the student's are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.vit import MaskedViT

__all__ = ["Norm", "TeacherInput"]

Norm = tuple[Sequence[float], Sequence[float]]


class TeacherInput(nn.Module):
    """Resizes (MaskedKD, Appendix B) and renormalises images; does neither where both networks agree.

    Args:
        teacher: the network the images are for.
        student_norm: ``(mean, std)`` per channel that the images were normalised with.
        teacher_norm: ``(mean, std)`` that the teacher expects.

    Raises:
        ValueError: one norm without the other, a wrong number of channels, a standard deviation that is not positive.

    Example:
        >>> import timm
        >>> teacher = MaskedViT(timm.create_model("deit_tiny_patch16_224", depth=1))
        >>> TeacherInput(teacher)(torch.zeros(1, 3, 96, 96)).shape
        torch.Size([1, 3, 224, 224])
    """

    _scale: Tensor | None
    _shift: Tensor | None

    def __init__(self, teacher: MaskedViT, student_norm: Norm | None = None, teacher_norm: Norm | None = None) -> None:
        super().__init__()
        scale, shift = _renormalisation(student_norm, teacher_norm, teacher.model.patch_embed.proj.in_channels)
        self.__dict__["_teacher"] = teacher  # no submodule
        self.register_buffer("_scale", scale, persistent=False)
        self.register_buffer("_shift", shift, persistent=False)

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the pixels ``(H, W)`` that the teacher gets for images of some size.

        Args:
            size: ``(H, W)`` of the images.
        """
        embed = self.__dict__["_teacher"].model.patch_embed
        fixed = getattr(embed, "strict_img_size", True) and embed.img_size is not None
        return tuple(embed.img_size) if fixed else size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the teacher's patch grid for images of some size.

        Args:
            size: ``(H, W)`` of the images.
        """
        grid: tuple[int, int] = self.__dict__["_teacher"].patch_grid(self.size(size))
        return grid

    def forward(self, images: Tensor) -> Tensor:
        """Returns the images for the teacher.

        Args:
            images: ``(B, C, H, W)`` as the student gets them.
        """
        size = (images.shape[-2], images.shape[-1])
        if self.size(size) != size:
            images = F.interpolate(images, self.size(size), mode="bilinear", align_corners=False)
        if self._scale is None or self._shift is None:
            return images
        return images * self._scale + self._shift


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
