r"""Alignment: a layer of the student, through a small head, follows a layer of a frozen teacher (DMAE, Eq. 3).

.. math:: L_{align} = \sum_l \frac{1}{\Omega(z^T_l)} \| \sigma(z^S_l) - z^T_l \|_1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.cait import Cait
from torch import Tensor, nn

from ..nn.vit import MaskedViT

__all__ = [
    "HEADS",
    "Alignment",
    "BlockOutputs",
    "Layers",
    "check_pair",
    "common_prefix",
    "observe_blocks",
    "pair_layers",
    "prefix_length",
    "projection_head",
    "term_names",
]

Layers = int | Sequence[int] | None

# Linear layers by the name of a projection head (DMAE, Table 3a).
HEADS = {"linear": 1, "mlp2": 2, "mlp3": 3}


class BlockOutputs(NamedTuple):
    """Outputs of some blocks of a ViT.

    Attributes:
        tokens: ``(B, P + k, D)`` by the block's index from 0.
    """

    tokens: dict[int, Tensor]

    def map(self, fn: Callable[[Tensor], Tensor]) -> BlockOutputs:
        """The same with a function applied to every tensor.

        Args:
            fn: for example a move to another device.
        """
        return BlockOutputs({block: fn(x) for block, x in self.tokens.items()})


def observe_blocks(vit: MaskedViT, images: Tensor, keep: Tensor | None, blocks: Sequence[int]) -> BlockOutputs:
    """Runs a ViT on the kept patches up to the last of some blocks.

    Args:
        vit: the network.
        images: ``(B, C, H, W)``.
        keep: ``(B, k)`` patches; None for all.
        blocks: indices from 0.
    """
    wanted = sorted(set(blocks))
    return BlockOutputs(dict(zip(wanted, vit.forward_intermediates(images, wanted, keep), strict=True)))


def projection_head(kind: str, width: int, target: int) -> nn.Sequential:
    """Makes what turns a student's features into a teacher's (DMAE, Section 4.1 and Table 3a).

    Args:
        kind: "linear", "mlp2" or "mlp3", with as many linear layers and GELU between them.
        width: of the student's features.
        target: of the teacher's features and of everything between.

    Example:
        >>> [type(layer).__name__ for layer in projection_head("mlp2", 4, 6)]
        ['Linear', 'GELU', 'Linear']
    """
    layers: list[nn.Module] = [nn.Linear(width, target)]
    for _ in range(HEADS[kind] - 1):
        layers += [nn.GELU(), nn.Linear(target, target)]
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


class Alignment(nn.ModuleList):
    """The projection heads of the aligned layers, and how far what they make is from the teacher's layers.

    The patch tokens are compared, and of the prefix tokens those that stand first in both networks and are of one kind.

    Args:
        student: the network to train.
        teacher: the network to learn from.
        layers: pairs of blocks (student's, teacher's), from 1.
        head: "mlp2", "linear" or "mlp3" (Table 3a).
        loss: "l1" or "l2", absolute or squared differences (Table 3c).
        normalize: compare features of unit length, as the public code does.
        patches_only: tokens come without prefix tokens on both sides.

    Example:
        >>> import timm
        >>> names = ("deit_tiny_patch16_224", "deit_small_patch16_224")
        >>> student, teacher = (MaskedViT(timm.create_model(name, depth=2)) for name in names)
        >>> align = Alignment(student, teacher, [(1, 2)])
        >>> align({0: torch.zeros(2, 50, 192)}, {1: torch.zeros(2, 50, 384)})[0].shape
        torch.Size([2, 50, 384])
    """

    def __init__(
        self,
        student: MaskedViT,
        teacher: MaskedViT,
        layers: Sequence[tuple[int, int]],
        head: str = "mlp2",
        loss: str = "l1",
        normalize: bool = False,
        patches_only: bool = False,
    ) -> None:
        super().__init__(projection_head(head, student.embed_dim, teacher.embed_dim) for _ in layers)
        self.layers, self.loss, self.normalize = list(layers), loss, normalize
        self.prefixes = (0, 0) if patches_only else (prefix_length(student), prefix_length(teacher))
        self.common = 0 if patches_only else common_prefix(student, teacher)

    @property
    def student_blocks(self) -> tuple[int, ...]:
        """Indices from 0 of the student's aligned blocks."""
        return tuple(own - 1 for own, _ in self.layers)

    @property
    def teacher_blocks(self) -> tuple[int, ...]:
        """Indices from 0 of the teacher's aligned blocks."""
        return tuple(other - 1 for _, other in self.layers)

    def forward(self, student: dict[int, Tensor], teacher: dict[int, Tensor]) -> list[Tensor]:
        """Returns for each pair of layers ``(B, c + k, D_T)``: the differences, those of c common prefix tokens first.

        Args:
            student: ``(B, P + k, D)`` of its aligned blocks by index from 0.
            teacher: ``(B, P_T + k, D_T)`` of its.
        """
        own_prefix, other_prefix = self.prefixes
        found = []
        for project, s, t in zip(self, self.student_blocks, self.teacher_blocks, strict=True):
            projected = project(_rows(student[s], own_prefix, self.common))
            target = _rows(teacher[t], other_prefix, self.common)
            wide = torch.promote_types(torch.promote_types(projected.dtype, target.dtype), torch.float32)
            projected, target = projected.to(wide), target.to(wide)
            if self.normalize:
                projected, target = F.normalize(projected, dim=-1), F.normalize(target, dim=-1)
            gap = projected - target
            found.append(gap.abs() if self.loss == "l1" else gap.square())
        return found


def _rows(x: Tensor, prefix: int, common: int) -> Tensor:
    """``(B, P + k, D)`` -> ``(B, c + k, D)``: the first c prefix tokens and the patches."""
    return x if prefix == common else torch.cat((x[:, :common], x[:, prefix:]), dim=1)


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
        ValueError: a layer that does not exist, different numbers of layers, or a pair that is named twice.
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
    pairs = list(zip(own, other, strict=True))
    twice = [pair for pair in pairs if pairs.count(pair) > 1]
    if twice:
        raise ValueError(
            f"student_layer and teacher_layer name the pair {twice[0][0]} and {twice[0][1]} twice; name each pair "
            "once, and raise alpha for more weight."
        )
    return pairs


def term_names(layers: Sequence[tuple[int, int]]) -> list[str]:
    """Returns what the loss of each pair of aligned layers is called among a method's terms.

    Args:
        layers: pairs of blocks (student's, teacher's), from 1.

    Example:
        >>> term_names([(6, 12), (12, 24)]), term_names([(2, 4), (2, 8), (3, 8)])
        (['align.6', 'align.12'], ['align.2-4', 'align.2-8', 'align.3'])
    """
    taken = Counter(own for own, _ in layers)
    return [f"align.{own}" if taken[own] == 1 else f"align.{own}-{other}" for own, other in layers]


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
