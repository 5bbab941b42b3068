"""What all methods between levels show of a batch, and what `fastmkd.DenseKD` shows of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Panel
from .dense_checks import check_detection_batch
from .dense_networks import read_levels, run_features
from .features import eval_mode
from .fgd import box_masks
from .mkd_losses import normalise

if TYPE_CHECKING:
    from .dense_kd import DenseKD
    from .dense_method import DenseMethod, LevelShape
    from .mkd_masking import Sight

__all__ = ["Look", "choose_level", "dense_pictures", "distance", "heat", "look_at"]


class Look(NamedTuple):
    """Both networks' maps of one level.

    Attributes:
        images: ``(B, C, H, W)`` of the batch that both got, on the scale that the images came in.
        student: ``(B, C_S, h, w)``.
        teacher: ``(B, C_T, h, w)``.
        boxes: true boxes of each image in pixels of that batch; None if there were no targets.
    """

    images: Tensor
    student: Tensor
    teacher: Tensor
    boxes: list[Tensor] | None

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)`` of the batch."""
        return self.images.shape[2], self.images.shape[3]

    def panels(self) -> list[Panel]:
        """Returns ``teacher features`` and ``student features``, mean absolute values (MKD, Fig. 1)."""
        pairs = (("teacher features", self.teacher), ("student features", self.student))
        return [Panel(title, heat(x.abs().mean(1), self.size), "heat") for title, x in pairs]


def choose_level(method: DenseMethod, name: str | None) -> int:
    """Returns which of a method's levels to show.

    Args:
        method: has the levels.
        name: the student's level; None is the finest.

    Raises:
        ValueError: a level that there is not.
    """
    names = [level.name for level in method.levels]
    if name is None:
        return min(range(len(names)), key=lambda i: method.levels[i].stride)
    if name not in names:
        raise ValueError(f"level is {name!r}; this method has {', '.join(names)}.")
    return names.index(name)


def look_at(
    method: DenseMethod, level: LevelShape, images: Any, targets: Any = None, sight: Sight | None = None
) -> Look:
    """Runs both networks, the student in the mode that it is in.

    Args:
        method: which networks.
        level: which of its levels.
        images: of a detector a list of images, else ``(B, C, H, W)``.
        targets: of a detector, for its boxes; None has none.
        sight: of the masked backbone in whose context this happens, or None.
    """
    batch, boxes = images, None
    transform = getattr(method.student, "transform", None)
    if transform is not None:
        batched, transformed = transform(list(images), targets)
        batch = batched.tensors
        boxes = None if transformed is None else [target["boxes"] for target in transformed]
    found: dict[str, Tensor] = {}
    with read_levels(method.student, [level.name], found, method.densify(sight)):
        method.student(batch) if not method.form.features else run_features(method.student, method.form, batch)
    teacher = method.ask_teacher(batch).maps[level.teacher]
    if transform is not None:
        mean, std = (batch.new_tensor(x).view(-1, 1, 1) for x in (transform.image_mean, transform.image_std))
        batch = batch * std + mean
    return Look(batch, found[level.name], teacher, boxes)


@torch.no_grad()
def dense_pictures(method: DenseKD, images: Any, name: str | None = None, targets: Any = None) -> list[Panel]:
    """Returns the panels of `fastmkd.DenseKD.pictures`.

    Args:
        method: which networks and which base.
        images: of a detector a list of images, else ``(B, C, H, W)``.
        name: the student's level; None is the finest.
        targets: of a detector, for a base that needs boxes; None leaves them out.

    Raises:
        ValueError: a level that there is not, or targets that do not fit the images.
        TypeError: targets of the wrong type.
    """
    at = choose_level(method, name)
    if method.form.task != "detection":
        targets = None
    elif targets is not None:
        check_detection_batch(method.student, images, targets)
    with eval_mode(method):  # the heads too: a measured ratio must not remember what was only looked at
        look = look_at(method, method.levels[at], images, targets)
        guess, maps = method.base.view(method.heads, at, look.student, look.teacher, method.epoch)
    panels = [Panel("input", look.images, "image"), *look.panels()]
    panels += [Panel(title, heat(x.abs().mean(1), look.size), "heat") for title, x in maps.items()]
    if method.base.needs_boxes and look.boxes is not None:
        cells = (look.teacher.shape[2], look.teacher.shape[3])
        foreground = box_masks(look.boxes, look.size, cells, look.images.device)[0] > 0  # (B, 1, h, w)
        panels.append(Panel("foreground", F.interpolate(foreground.float(), look.size)[:, 0], "mask"))
    return [*panels, Panel("distance to teacher", distance(guess, look.teacher, look.size), "heat")]


def distance(guess: Tensor, teacher: Tensor, size: tuple[int, int], where: Tensor | None = None) -> Tensor:
    """Returns how far two maps are from each other: the root of the mean square over channels, after a layer norm.

    That is what MKD's loss measures (Fig. 2); other methods show the same, so that pictures can be compared.

    Args:
        guess: ``(B, C, h, w)``.
        teacher: likewise.
        size: ``(H, W)`` of the picture.
        where: ``(B, H, W)`` bool, what counts; None is everything.

    Example:
        >>> one = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
        >>> distance(torch.cat((one, one), 3), torch.cat((one, -one), 3), (1, 2))
        tensor([[[0., 1.]]])
    """
    far = (normalise(guess) - normalise(teacher)).square().mean(1).sqrt()  # (B, h, w)
    return heat(F.interpolate(far[:, None], size, mode="nearest")[:, 0], size, where)


def heat(values: Tensor, size: tuple[int, int], where: Tensor | None = None) -> Tensor:
    """Stretches maps to 0..1, each by itself, and enlarges them.

    Args:
        values: ``(B, h, w)``.
        size: ``(H, W)``.
        where: ``(B, h, w)`` bool, what counts; elsewhere is 0.

    Example:
        >>> heat(torch.tensor([[[1.0, 3.0]]]), (1, 4))
        tensor([[[0., 0., 1., 1.]]])
    """
    values = values.float()
    flat = values if where is None else values.masked_fill(~where, math.inf)
    low = flat.flatten(1).amin(1)[:, None, None]
    values = values - low if where is None else (values - low).masked_fill(~where, 0.0)
    high = values.flatten(1).amax(1)[:, None, None].clamp_min(torch.finfo(torch.float32).tiny)
    return F.interpolate((values / high)[:, None], size, mode="nearest")[:, 0]
