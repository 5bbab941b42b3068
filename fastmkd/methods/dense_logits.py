"""Maps of class logits, as detectors and segmenters make them, for CWD's loss (MKD, Table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .dense_networks import Form

__all__ = ["class_maps", "head_of"]


def head_of(network: Any, form: Form, role: str) -> nn.Module:
    """Returns the module that says logits of classes at every position of every level.

    That is ``head.classification_head`` of torchvision's one-stage detectors, and of a two-stage detector the head of
    the proposals, ``rpn.head``, whose class is "an object". A head in one piece that says logits first, as that of
    RepPoints, is taken whole. A segmenter's is the whole network.

    Args:
        network: the network.
        form: of it.
        role: "student" or "teacher", for messages.

    Raises:
        ValueError: a network that has none.
    """
    if form.task == "segmentation":
        whole: nn.Module = network
        return whole
    owner = network.rpn if hasattr(network, "rpn") else network
    head = getattr(owner, "head", None)
    head = getattr(head, "classification_head", head)
    if form.task == "classification" or not isinstance(head, nn.Module):
        raise ValueError(
            f"logits_weight compares maps of class logits, which the {role}, a {type(network).__name__}, does not "
            "have where they are looked for; set logits_weight=0."
        )
    return head


def class_maps(said: Any, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Returns maps of logits, ``(B, K, h, w)`` each.

    Args:
        said: by the module of `head_of`. A segmenter says logits or a mapping with "out". A detector says a map of each
            level, alone or first in a tuple, or such a list first in a tuple, or the logits of all levels in a row,
            ``(B, positions * anchors, classes)``.
        sizes: ``(h, w)`` of a detector's levels.

    Example:
        >>> import torch
        >>> [x.shape for x in class_maps(torch.zeros(1, 30, 4), [(2, 4), (1, 2)])]  # three anchors
        [torch.Size([1, 12, 2, 4]), torch.Size([1, 12, 1, 2])]
    """
    if isinstance(said, Mapping):
        said = said["out"]
    if isinstance(said, tuple) and not isinstance(said[0], Tensor):
        said = said[0]
    if not isinstance(said, Tensor):
        return [x[0] if isinstance(x, tuple) else x for x in said]
    if said.dim() == 4:
        return [said]
    anchors = said.shape[1] // sum(h * w for h, w in sizes)
    rows = said.split([h * w * anchors for h, w in sizes], dim=1)  # (B, h * w * A, K) each
    return [
        x.reshape(len(x), h, w, -1).permute(0, 3, 1, 2)  # (B, A * K, h, w)
        for x, (h, w) in zip(rows, sizes, strict=True)
    ]
