"""The parameter inheriting scheme: a student's neck and head start from the teacher's (MKD, Table 3, after ICD)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["inherit_head"]


@torch.no_grad()
def inherit_head(student: nn.Module, teacher: nn.Module, part: str) -> tuple[list[str], list[str]]:
    """Copies the teacher's parameters and buffers outside of the backbone into the student, where shapes agree.

    Args:
        student: changed in place.
        teacher: left alone.
        part: the student's backbone; "" for a classifier, of which the classifier alone is no backbone.

    Returns:
        Names that were copied, and names outside of the backbone that were not.

    Raises:
        ValueError: nothing could be copied.

    Example:
        >>> make = lambda width: nn.ModuleDict({"body": nn.Linear(2, width), "head": nn.Linear(width, 3)})
        >>> inherit_head(make(4), make(5), "body")
        (['head.bias'], ['head.weight'])
    """
    theirs = teacher.state_dict()
    inherited, left = [], []
    for name, value in student.state_dict(keep_vars=True).items():
        if not _outside(name, student, part):
            continue
        if name in theirs and theirs[name].shape == value.shape:
            value.detach().copy_(theirs[name])
            inherited.append(name)
        else:
            left.append(name)
    if not inherited:
        raise ValueError(
            f"inherit is True, but nothing outside of {part or 'the stages'!r} has the teacher's name and shape"
            f"{': ' + ', '.join(left) if left else ''}; set inherit=False."
        )
    return inherited, left


def _outside(name: str, student: Any, part: str) -> bool:
    if part:
        return not name.startswith(f"{part}.")
    head = (getattr(student, "pretrained_cfg", None) or {}).get("classifier", "fc")
    return name.startswith(f"{head}.") if isinstance(head, str) else any(name.startswith(f"{h}.") for h in head)
