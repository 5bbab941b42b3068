"""Which student and which numbers `DMAE` takes, and why not others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.models.cait import Cait

from ..nn.vit import MaskedViT
from .alignment import HEADS

__all__ = ["check_numbers", "check_student"]


def check_numbers(
    mask_ratio: float, alpha: float, depth: int, width: int, heads: int, head: str, loss: str, student_positions: str
) -> None:
    """Raises unless the options of a `DMAE` make sense; they are named as there.

    Raises:
        ValueError: one is out of range or not known.

    Example:
        >>> check_numbers(0.75, 1.0, 8, 510, 16, "mlp2", "l1", "own")
        Traceback (most recent call last):
        ValueError: decoder_width is 510; expected a multiple of 4, for sine-cosine positions, and of decoder_heads, 16.
    """
    if not 0 < mask_ratio < 1:  # NaN fails too
        raise ValueError(f"mask_ratio is {mask_ratio}; expected a share of the patches above 0 and below 1.")
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}; expected a finite number of at least 0.")
    for name, count in (("decoder_depth", depth), ("decoder_width", width), ("decoder_heads", heads)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} is {count!r}; expected a whole number of at least 1.")
    if width % 4 or width % heads:
        raise ValueError(
            f"decoder_width is {width}; expected a multiple of 4, for sine-cosine positions, and of decoder_heads, "
            f"{heads}."
        )
    for name, value, known in (
        ("head", head, tuple(HEADS)), ("loss", loss, ("l1", "l2")),
        ("student_positions", student_positions, ("own", "sincos")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}.")


def check_student(vit: MaskedViT, student_positions: str) -> None:
    """Raises unless a student can be pre-trained as a masked autoencoder.

    Args:
        vit: the student.
        student_positions: as in `DMAE`.

    Raises:
        ValueError: its patches overlap, it drops patches by itself, or it has no positions to write to.
    """
    model: Any = vit.model
    proj = model.patch_embed.proj
    if tuple(proj.kernel_size) != tuple(proj.stride):
        raise ValueError(
            f"student cuts patches of {_sides(proj.kernel_size)} pixels every {_sides(proj.stride)}, so hidden ones "
            "would lie partly in the open; take a student whose patches do not overlap."
        )
    if getattr(getattr(model, "patch_drop", None), "prob", 0.0) > 0:
        raise ValueError(
            "student drops patches in training (patch_drop_rate > 0), and DMAE needs every patch that it shows; create "
            "it with patch_drop_rate=0."
        )
    if student_positions == "sincos":
        positions = getattr(model, "pos_embed", None)
        if positions is None or isinstance(model, Cait) or vit.embed_dim % 4:
            raise ValueError(
                "student_positions is 'sincos', but the student has no position embedding of a width that 4 divides "
                "to write them to; use 'own'."
            )


def _sides(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
