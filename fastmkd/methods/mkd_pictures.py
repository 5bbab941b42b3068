"""What MKD shows of a batch: its Figures 1, 2 and 6."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Panel
from .dense_networks import read_levels, run_features
from .features import eval_mode
from .mkd_losses import normalise
from .mkd_masking import mask_at

if TYPE_CHECKING:
    from .mkd import MKD

__all__ = ["heat", "mkd_pictures"]


@torch.no_grad()
def mkd_pictures(method: MKD, images: Any, name: str | None = None) -> list[Panel]:
    """Returns the panels of `fastmkd.MKD.pictures`.

    Args:
        method: which network.
        images: of a detector a list of images, else ``(B, C, H, W)``.
        name: the student's level; None is the finest.

    Raises:
        ValueError: a level that there is not.
    """
    chosen = {level.name: i for i, level in enumerate(method.levels)}
    if name is not None and name not in chosen:
        raise ValueError(f"level is {name!r}; this method has {', '.join(chosen)}.")
    at = chosen[name] if name is not None else min(chosen.values(), key=lambda i: method.levels[i].stride)
    level = method.levels[at]
    transform = getattr(method.student, "transform", None)
    found: dict[str, Tensor] = {}
    with eval_mode(method.student), method._backbone.masking(method.draw) as sight:
        batch = images if transform is None else transform(list(images))[0].tensors
        with read_levels(method.student, [level.name], found, method.densify(sight)):
            method.student(batch) if not method.form.features else run_features(method.student, method.form, batch)
    student, teacher = found[level.name], method.ask_teacher(batch).maps[level.teacher]
    shown = batch
    if transform is not None:  # back to the scale of the images that came in
        mean, std = (batch.new_tensor(x).view(-1, 1, 1) for x in (transform.image_mean, transform.image_std))
        shown = batch * std + mean
    size = (batch.shape[2], batch.shape[3])
    seen = torch.ones(len(batch), *size, device=batch.device)
    if sight.visible is not None:
        seen = mask_at(sight.visible, sight.padded)[:, : size[0], : size[1]].float()
    panels = [
        Panel("input", shown, "image"),
        Panel("masked input", seen, "mask"),
        Panel("teacher features", heat(teacher.abs().mean(1), size), "heat"),
        Panel("student features", heat(student.abs().mean(1), size), "heat"),
    ]
    if "decoders" not in method.heads:
        return panels
    decoders: Any = method.heads["decoders"]
    decoder, visible = decoders[at], method.visible_tokens(sight, level)
    grid = (visible.shape[1], visible.shape[2])
    restored = decoder.to_map(decoder(student, visible), grid, (teacher.shape[2], teacher.shape[3]))
    far = (normalise(restored) - normalise(teacher)).square().mean(1).sqrt()  # (B, h, w)
    shown_far = F.interpolate(far[:, None], size, mode="nearest")[:, 0]
    attention = decoder.attention(student, visible)[:, (grid[0] // 2) * grid[1] + grid[1] // 2]  # (B, N)
    return [
        *panels,
        Panel("restored features", heat(restored.abs().mean(1), size), "heat"),
        Panel("distance to teacher", heat(shown_far, size, seen > 0), "heat"),
        Panel("decoder attention", heat(attention.unflatten(1, grid), size), "heat"),
    ]


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
