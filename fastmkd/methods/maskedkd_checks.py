"""What `MaskedKD` refuses, and why."""

from __future__ import annotations

import math
import numbers

from torch import nn

from ..nn.ragged_vit import why_not_ragged
from ..nn.vit import MaskedViT
from .bases import BaseDistillation
from .strategies import MaskStrategy

__all__ = ["check_keep_mass", "check_numbers", "wrap"]


def check_numbers(keep_ratio: float, weight: float, ce_weight: float, temperature: float, micro_batches: int) -> None:
    """Raises unless the numbers of a method make sense; they are named as in `MaskedKD`.

    Raises:
        ValueError: one is out of range.
        TypeError: one is no number.

    Example:
        >>> check_numbers(0.5, 1.0, 1.0, 1.0, micro_batches=0)
        Traceback (most recent call last):
        ValueError: micro_batches is 0; expected a whole number of at least 1.
    """
    expected = {
        "keep_ratio": (keep_ratio, "a number above 0 and at most 1"),
        "weight": (weight, "a finite number of at least 0"),
        "ce_weight": (ce_weight, "a finite number of at least 0"),
        "temperature": (temperature, "a finite positive number"),
    }
    for name, (number, what) in expected.items():
        _check_number(name, number, what)
    if not 0 < keep_ratio <= 1:  # NaN fails too
        raise ValueError(f"keep_ratio is {keep_ratio}; expected a share of the patches above 0 and at most 1.")
    for name, value in (("weight", weight), ("ce_weight", ce_weight)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected a finite number of at least 0.")
    if weight == 0 and ce_weight == 0:
        raise ValueError("weight and ce_weight are both 0, so nothing is learnt; make one of them positive.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
    if not isinstance(micro_batches, int) or isinstance(micro_batches, bool) or micro_batches < 1:
        raise ValueError(f"micro_batches is {micro_batches!r}; expected a whole number of at least 1.")


def _check_number(name: str, value: object, expected: str) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected {expected}.")


def check_keep_mass(
    keep_mass: float,
    teacher: MaskedViT,
    base: BaseDistillation,
    strategy: MaskStrategy,
    mask: str,
    compiled: bool | str,
) -> None:
    """Raises unless each image may keep another number of patches.

    Args:
        keep_mass: share of the saliency.
        teacher: must run packed.
        base: may read logits only.
        strategy: must give scores of at least 0.
        mask: who is masked.
        compiled: `teacher_compile`.

    Raises:
        ValueError: what is against it.
    """
    _check_number("keep_mass", keep_mass, "a number above 0 and at most 1")
    if not 0 < keep_mass <= 1:  # NaN fails too
        raise ValueError(f"keep_mass is {keep_mass}; expected a share of the saliency above 0 and at most 1.")
    if mask != "teacher":
        raise ValueError("keep_mass is for a masked teacher; use mask='teacher', or keep_ratio alone.")
    if not base.reads_logits_only:
        raise ValueError(
            f"keep_mass shows the teacher another number of patches of each image, but base {type(base).__name__} "
            "compares patches or attention; use base='logit', or keep_ratio alone."
        )
    if getattr(strategy, "order", "top") == "bottom":
        raise ValueError("keep_mass needs saliencies of at least 0, which strategy 'bottom' negates; use another one.")
    reason = why_not_ragged(teacher.model)
    if reason is not None:
        raise ValueError(f"keep_mass needs a teacher that runs packed: {reason}. Use keep_ratio alone.")
    if compiled is not False:
        raise ValueError(
            f"teacher_compile is {compiled!r}, but with keep_mass every batch has another number of patches and would "
            "be compiled anew; leave teacher_compile out, or use keep_ratio alone."
        )


def wrap(name: str, model: nn.Module) -> MaskedViT:
    """Returns a network as a `MaskedViT`.

    Args:
        name: "student" or "teacher", for the message.
        model: the network.

    Raises:
        TypeError: its patches cannot be left out.
    """
    if isinstance(model, MaskedViT):
        return model
    try:
        return MaskedViT(model)
    except TypeError as error:
        raise TypeError(f"{name} is not a ViT whose patches can be left out: {error}") from None
