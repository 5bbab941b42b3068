"""MaskedKD's teacher made cheaper by merging its tokens instead of masking them, and whom that does not suit."""

from __future__ import annotations

from ..nn.ragged_vit import why_not_ragged
from ..nn.token_merging import MergedViT
from ..nn.vit import MaskedViT
from .bases import BaseDistillation

__all__ = ["merging_teacher"]


def merging_teacher(
    teacher: MaskedViT, keep_ratio: float, keep_mass: float | None, base: BaseDistillation, mask: str
) -> MergedViT:
    """Returns the teacher as one that merges its tokens at the cost of a masked one (MaskedKD, Fig. 3).

    Args:
        teacher: the network to learn from.
        keep_ratio: share of the patches of the masked teacher that costs as much.
        keep_mass: must be None.
        base: what is distilled; must read logits only.
        mask: must be "teacher".

    Raises:
        ValueError: what does not go together, a teacher whose tokens cannot be merged, or a share that merging cannot
            reach.
    """
    if mask != "teacher":
        raise ValueError("teacher_tokens='merge' makes the teacher cheaper, mask='student' the student; use one.")
    if keep_mass is not None:
        raise ValueError("keep_mass says which patches are masked and teacher_tokens='merge' masks none; use one.")
    if not base.reads_logits_only:
        raise ValueError(
            f"teacher_tokens='merge' leaves the teacher no token for each patch, but base {type(base).__name__} "
            "compares patches or attention; use base='logit', or teacher_tokens='mask'."
        )
    reason = why_not_ragged(teacher.model)
    if reason is not None:
        raise ValueError(f"teacher_tokens='merge' needs a teacher that can: {reason}. Use teacher_tokens='mask'.")
    return MergedViT(teacher.model, keep_ratio=keep_ratio)
