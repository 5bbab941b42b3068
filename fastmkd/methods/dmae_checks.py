"""Which student, teacher, layers and numbers `DMAE` takes, and why not others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.models.cait import Cait

from ..nn.vit import MaskedViT
from .mae_decoder import HEADS

__all__ = ["check_numbers", "check_pair", "check_student", "common_prefix", "pair_layers", "prefix_length"]

Layers = int | Sequence[int] | None


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


def check_pair(student: MaskedViT, teacher: MaskedViT) -> None:
    """Raises unless the same patches mean the same to both.

    Args:
        student: the network to train.
        teacher: the network to learn from.

    Raises:
        ValueError: they cut the image differently, or take other channels.
    """
    own, other = student.model.patch_embed, teacher.model.patch_embed
    if (own.proj.kernel_size, own.proj.stride) != (other.proj.kernel_size, other.proj.stride):
        raise ValueError(
            f"student has patches of {_sides(own.proj.kernel_size)} pixels and teacher of "
            f"{_sides(other.proj.kernel_size)}, so they cannot see the same ones; create the student with "
            f"patch_size={other.proj.kernel_size[0]}, or take a teacher with patches as the student's."
        )
    if own.proj.in_channels != other.proj.in_channels:
        raise ValueError(
            f"student takes {own.proj.in_channels} channels and teacher {other.proj.in_channels}; create both with the "
            "same in_chans."
        )
    sizes = [embed.img_size for embed in (own, other) if getattr(embed, "strict_img_size", True)]
    if len(sizes) == 2 and tuple(sizes[0]) != tuple(sizes[1]):
        raise ValueError(
            f"student takes images of {_sides(sizes[0])} pixels and teacher of {_sides(sizes[1])}, so their grids of "
            f"patches differ; create both with the same img_size, or the teacher with dynamic_img_size=True."
        )


def pair_layers(student: Layers, teacher: Layers, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Returns which layer of the student learns from which of the teacher's; both count blocks from 1.

    Args:
        student: layers as in `DMAE`; None is three quarters of the depth.
        teacher: likewise; None takes those at the same share of the depth as the student's.
        student_depth: number of blocks.
        teacher_depth: number of blocks.

    Raises:
        ValueError: a layer that does not exist, or different numbers of layers.
        TypeError: layers that are not whole numbers.

    Example:
        >>> pair_layers(None, None, 12, 24), pair_layers([6, 12], None, 12, 24)
        ([(9, 18)], [(6, 12), (12, 24)])
    """
    own = _layers("student_layer", "student", student, student_depth)
    if teacher is None and student is not None:
        other = [max(1, round(layer * teacher_depth / student_depth)) for layer in own]
    else:
        other = _layers("teacher_layer", "teacher", teacher, teacher_depth)
    if len(own) != len(other):
        raise ValueError(
            f"student_layer names {len(own)} layers and teacher_layer {len(other)}; each of the student's learns from "
            "one of the teacher's, so give as many."
        )
    return list(zip(own, other, strict=True))


def _layers(name: str, role: str, value: Layers, depth: int) -> list[int]:
    if value is None:
        return [max(1, round(0.75 * depth))]
    found = [value] if isinstance(value, int) else value
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(type(layer) is int for layer in found):
        raise TypeError(f"{name} is {value!r}; expected a whole number, or several.")
    wrong = [layer for layer in found if not 1 <= layer <= depth]
    if wrong or not found:
        said = wrong[0] if wrong else "empty"
        raise ValueError(f"{name} is {said}; the {role} has {depth} blocks, which count from 1 to {depth}.")
    return list(found)


def prefix_length(vit: MaskedViT) -> int:
    """Returns how many tokens stand before the patches in the blocks; none in CaiT, whose class token comes later.

    Args:
        vit: the network.
    """
    return len(_prefix(vit.model))


def common_prefix(student: MaskedViT, teacher: MaskedViT) -> int:
    """Returns how many of the first tokens are of the same kind in both networks (class, distillation, register).

    Args:
        student: the network to train.
        teacher: the network to learn from.

    Example:
        >>> import timm
        >>> names = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")
        >>> common_prefix(*(MaskedViT(timm.create_model(name, depth=1)) for name in names))
        1
    """
    count = 0
    for own, other in zip(_prefix(student.model), _prefix(teacher.model), strict=False):
        if own != other:
            break
        count += 1
    return count


def _prefix(model: Any) -> list[str]:
    if isinstance(model, Cait):
        return []
    kinds = [] if model.cls_token is None else ["class"]
    other = "register" if getattr(model, "dist_token", None) is None else "distillation"
    return kinds + [other] * (int(model.num_prefix_tokens) - len(kinds))


def _sides(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
