"""What MKD shows of a batch: its Figures 1, 2 and 6."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .base import Panel
from .dense_pictures import choose_level, distance, look_at
from .features import eval_mode
from .mkd_masking import mask_at

if TYPE_CHECKING:
    from .mkd import MKD

__all__ = ["mkd_pictures"]


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
    at = choose_level(method, name)
    level = method.levels[at]
    with eval_mode(method.student), method._backbone.masking(method.draw) as sight:
        look = look_at(method, level, images, sight=sight)
    student, teacher = look.student, look.teacher
    seen = torch.ones(len(student), *look.padded, device=student.device)
    if sight.visible is not None:
        seen = mask_at(sight.visible, sight.padded)[:, : look.padded[0], : look.padded[1]].float()
    seen = look.cut(seen)
    panels = [Panel("input", look.images, "image"), Panel("masked input", seen, "mask"), *look.panels()]
    if "decoders" not in method.heads:
        return panels
    decoders: Any = method.heads["decoders"]
    decoder, visible = decoders[at], method.visible_tokens(sight, level)
    grid = (visible.shape[1], visible.shape[2])
    restored = decoder.to_map(decoder(student, visible), grid, (teacher.shape[2], teacher.shape[3]))
    attention = decoder.attention(student, visible)[:, (grid[0] // 2) * grid[1] + grid[1] // 2]  # (B, N)
    return [
        *panels,
        look.features("restored features", restored),
        look.heat("distance to teacher", distance(restored, teacher), seen > 0),
        look.heat("decoder attention", attention.unflatten(1, grid)),
    ]
