"""The loss that a network has without any teacher: a classifier's, a segmenter's or a detector's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import split_heads, supervised_loss

__all__ = ["IGNORE", "task_loss"]

IGNORE = 255  # the label of pixels that do not count
AUXILIARY = 0.5  # weight of an auxiliary classifier


def task_loss(output: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Returns the loss of what a network said of a training batch.

    A detector says its losses, a mapping of scalars, which are summed. A segmenter says ``(B, K, H, W)`` logits, or a
    mapping of them with "out" and perhaps "aux" (which counts half); the loss is the mean cross-entropy over pixels
    whose label is not 255. A classifier says logits, or a tuple of them; the loss is `supervised_loss`.

    Args:
        output: of the network.
        targets: ``(B, H, W)`` int64 for a segmenter, ``(B,)`` or ``(B, K)`` for a classifier; not looked at for a
            detector.

    Returns:
        The loss, its terms by name, and the prediction: losses of a detector, logits else.

    Raises:
        TypeError: an output or targets of another kind.
        ValueError: targets of another size, or on a CPU labels out of range.

    Example:
        >>> loss, terms, _ = task_loss({"classification": torch.tensor(1.0), "bbox": torch.tensor(2.0)}, None)
        >>> loss, sorted(terms)
        (tensor(3.), ['bbox', 'classification'])
    """
    if isinstance(output, Mapping) and "out" in output:
        parts = {"ce": _pixel_cross_entropy(output["out"], targets)}
        loss = parts["ce"]
        if "aux" in output:
            parts["aux"] = _pixel_cross_entropy(output["aux"], targets)
            loss = loss + AUXILIARY * parts["aux"]
        return loss, parts, output["out"]
    if isinstance(output, Mapping):
        scalars = {str(name): value for name, value in output.items()}
        if not scalars or not all(isinstance(x, Tensor) and x.dim() == 0 for x in scalars.values()):
            raise TypeError(f"the network returned a mapping of {', '.join(scalars)}; expected a detector's losses.")
        wide = [x if x.dtype == torch.float64 else x.float() for x in scalars.values()]
        return torch.stack(wide).sum(), scalars, {name: value.detach() for name, value in scalars.items()}
    if isinstance(output, Tensor) and output.dim() == 4:
        ce = _pixel_cross_entropy(output, targets)
        return ce, {"ce": ce}, output
    if isinstance(output, list):
        raise ValueError(
            "the network returned a list, as a detector does in eval mode; call method.train() before training, and "
            "the student alone to predict."
        )
    heads = split_heads(output)
    ce = supervised_loss(heads, targets)
    return ce, {"ce": ce}, torch.stack(heads).mean(0) if len(heads) > 1 else heads[0]


def _pixel_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over pixels that count, in float32 (float64 for float64); 0 where none does."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        what = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets is {what}; expected (B, H, W) int64, the class of each pixel.")
    expected = (logits.shape[0], *logits.shape[2:])
    if targets.shape != expected:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected {tuple(expected)}, as the logits.")
    counted = targets != IGNORE
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[counted & ((targets < 0) | (targets >= logits.shape[1]))]
        if len(wrong):
            raise ValueError(
                f"targets holds the label {wrong[0].item()}; the logits have 0 to {logits.shape[1] - 1}, and "
                f"{IGNORE} is for pixels that do not count."
            )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum")
    return total / counted.sum().clamp_min(1)
