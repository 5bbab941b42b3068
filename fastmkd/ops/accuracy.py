"""When a result is right: no further from float64 than twice what PyTorch itself is in the same dtype.

The rule needs no tolerance chosen by hand: a kernel that rounds as PyTorch does passes at every size, one that loses
digits fails at every size. The floor covers samples on which PyTorch happens to be exact. That of float64 results is
larger: the reference is no wider than they are, and rounds its own sums in another order. So is that of TF32, whose
factors keep 10 bits: PyTorch's library may round them where a kernel cuts them off, and be three times closer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import map_tensors

__all__ = ["FLOOR_EPS", "TF32_EPS", "Verdict", "judge", "upcast"]

FLOOR_EPS = 4  # the floor, in units in the last place of the largest reference value
FLOOR_EPS_FLOAT64 = 64  # sums of several hundred products
PART = 1 << 26  # elements that are compared at once
TF32_EPS = 2.0**-10  # what a factor loses at most when it is cut off


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison: errors are largest absolute differences to the float64 reference."""

    ok: bool
    error: float
    allowed: float
    detail: str = ""


def upcast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with every floating-point tensor in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, args)


def judge(out: Tensor, exact: Tensor, plain: Tensor, tf32: bool = False) -> Verdict:
    """Compares a backend's output with the float64 reference, allowing twice plain PyTorch's own error.

    Args:
        out: what the backend returned.
        exact: the reference on float64 inputs.
        plain: the reference on the inputs in their own dtype.
        tf32: the backend computed its products as TF32.

    Returns:
        A `Verdict`; integer outputs must be equal, NaN is never right.

    Example:
        >>> x = torch.linspace(0, 1, 5)
        >>> judge(x + 1e-3, x.double(), x).ok
        False
    """
    if out.shape != plain.shape or out.dtype != plain.dtype:
        detail = f"{out.dtype} {tuple(out.shape)}, not {plain.dtype} {tuple(plain.shape)}"
        return Verdict(False, float("nan"), 0.0, detail)
    if not out.is_floating_point():
        wrong = int((out != plain).sum())
        return Verdict(wrong == 0, float(wrong), 0.0, f"{wrong} of {out.numel()} entries differ" if wrong else "")
    if out.numel() == 0:
        return Verdict(True, 0.0, 0.0)
    error = _distance(out, exact)
    scale = float(exact.abs().max())
    floor = FLOOR_EPS_FLOAT64 if out.dtype == torch.float64 else FLOOR_EPS
    eps = TF32_EPS if tf32 else torch.finfo(out.dtype).eps
    allowed = 2 * _distance(plain, exact) + floor * eps * scale
    return Verdict(error <= allowed, error, allowed)  # a NaN compares False


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference in float64, by parts: a huge tensor does not fit several times more."""
    parts = zip(a.reshape(-1).split(PART), b.reshape(-1).split(PART), strict=True)
    return float(torch.stack([(x.double() - y.double()).abs().max() for x, y in parts]).max())
