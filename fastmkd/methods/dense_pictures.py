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
from .overwritten import refuse_overwritten

if TYPE_CHECKING:
    from .dense_kd import DenseKD
    from .dense_method import DenseMethod, LevelShape
    from .mkd_masking import Sight

__all__ = ["Look", "choose_level", "dense_pictures", "distance", "enlarge", "look_at", "stretch"]


class Look(NamedTuple):
    """Both networks' maps of one level.

    Attributes:
        images: ``(B, C, H, W)`` of the batch that both got, on the scale that the images came in, without padding that
            no image needs.
        student: ``(B, C_S, h, w)``.
        teacher: ``(B, C_T, h, w)``.
        boxes: true boxes of each image in pixels of that batch; None if there were no targets.
        padded: pixels ``(H', W')`` that the maps stand for.
    """

    images: Tensor
    student: Tensor
    teacher: Tensor
    boxes: list[Tensor] | None
    padded: tuple[int, int]

    def cut(self, x: Tensor) -> Tensor:
        """Returns a picture of the padded batch without the padding that no image needs.

        Args:
            x: ``(..., H', W')``.
        """
        return x[..., : self.images.shape[2], : self.images.shape[3]]

    def heat(self, title: str, values: Tensor, where: Tensor | None = None) -> Panel:
        """Returns a panel of maps, each stretched to 0..1 by itself and enlarged.

        Args:
            title: of the panel.
            values: ``(B, h, w)``.
            where: ``(B, H, W)`` bool, what counts; elsewhere is 0.
        """
        return Panel(title, stretch(self.cut(enlarge(values, self.padded)), where), "heat")

    def features(self, title: str, maps: Tensor) -> Panel:
        """Returns a panel of the mean absolute values of maps (MKD, Fig. 1).

        Args:
            title: of the panel.
            maps: ``(B, C, h, w)``.
        """
        return self.heat(title, maps.abs().mean(1))

    def panels(self) -> list[Panel]:
        """Returns ``teacher features`` and ``student features``."""
        return [self.features("teacher features", self.teacher), self.features("student features", self.student)]


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
        height, width = (max(sides) for sides in zip(*batched.image_sizes, strict=True))
        boxes = None if transformed is None else [target["boxes"] for target in transformed]
    found: dict[str, Tensor] = {}
    with read_levels(method.student, [level.name], found, method.densify(sight), method.student_copied) as versions:
        method.student(batch) if not method.form.features else run_features(method.student, method.form, batch)
    refuse_overwritten(found, versions)
    teacher = method.ask_teacher(batch).maps[level.teacher]
    shown = batch
    if transform is not None:
        mean, std = (batch.new_tensor(x).view(-1, 1, 1) for x in (transform.image_mean, transform.image_std))
        shown = (batch * std + mean)[:, :, :height, :width]
    return Look(shown, found[level.name], teacher, boxes, (batch.shape[2], batch.shape[3]))


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
    panels += [look.features(title, x) for title, x in maps.items()]
    if method.base.needs_boxes and look.boxes is not None:
        cells = (look.teacher.shape[2], look.teacher.shape[3])
        foreground = box_masks(look.boxes, look.padded, cells, look.images.device)[0][:, 0] > 0  # (B, h, w)
        panels.append(Panel("foreground", look.cut(enlarge(foreground, look.padded)), "mask"))
    return [*panels, look.heat("distance to teacher", distance(guess, look.teacher))]


def distance(guess: Tensor, teacher: Tensor) -> Tensor:
    """Returns how far two maps are from each other: the root of the mean square over channels, after a layer norm.

    That is what MKD's loss measures (Fig. 2); other methods show the same, so that pictures can be compared.

    Args:
        guess: ``(B, C, h, w)``.
        teacher: likewise.

    Returns:
        ``(B, h, w)``.

    Example:
        >>> one = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
        >>> distance(torch.cat((one, one), 3), torch.cat((one, -one), 3)).round(decimals=3)
        tensor([[[0., 2.]]])
    """
    return (normalise(guess) - normalise(teacher)).square().mean(1).sqrt()


def enlarge(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges maps by repeating what they hold.

    Args:
        values: ``(B, h, w)``, any dtype.
        size: ``(H, W)``.

    Returns:
        ``(B, H, W)`` float32.

    Example:
        >>> enlarge(torch.tensor([[[True, False]]]), (1, 4))
        tensor([[[1., 1., 0., 0.]]])
    """
    return F.interpolate(values[:, None].float(), size, mode="nearest")[:, 0]


def stretch(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Stretches maps to 0..1, each by itself.

    Args:
        values: ``(B, H, W)``.
        where: ``(B, H, W)`` bool, what counts; elsewhere is 0.

    Example:
        >>> stretch(torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    flat = values if where is None else values.masked_fill(~where, math.inf)
    low = flat.flatten(1).amin(1)[:, None, None]
    values = values - low if where is None else (values - low).masked_fill(~where, 0.0)
    high = values.flatten(1).amax(1)[:, None, None].clamp_min(torch.finfo(torch.float32).tiny)
    return values / high
