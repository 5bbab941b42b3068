"""Enlarging packed maps: nearest neighbours by whole factors, as between the branches of HRNet and in pyramids.

Such a step repeats each pixel within its own cell, so hidden cells stay hidden and nothing of them is read. Any other
interpolation would mix visible and hidden pixels, and is refused.
"""

from __future__ import annotations

from typing import Any

from .packed import PackedFeatures
from .plan import Pair
from .where import where

__all__ = ["interpolate"]

MODES = ("nearest", "nearest-exact")  # the same for whole factors


def interpolate(
    input: PackedFeatures,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> PackedFeatures:
    """`torch.nn.functional.interpolate` for a packed map.

    Args:
        input: ``(B, C, H, W)``, packed.
        size: of the result, an int or ``(H', W')``, whole multiples of the map's; None takes `scale_factor`.
        scale_factor: a whole number, or one for each axis.
        mode: ``"nearest"`` or ``"nearest-exact"``.
        align_corners: must be None, as PyTorch asks for with these modes.
        recompute_scale_factor: makes no difference to whole factors.
        antialias: must be False, as PyTorch asks for with these modes.

    Returns:
        ``(B, C, H', W')``, packed.

    Raises:
        ValueError: another mode or options of one, factors that are not whole, or not exactly one of `size` and
            `scale_factor`.

    Example:
        >>> import torch
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.arange(4.0).view(1, 1, 1, 4), torch.tensor([[[False, True]]]))
        >>> interpolate(x, scale_factor=2).to_dense()[0, 0]
        tensor([[0., 0., 0., 0., 2., 2., 3., 3.],
                [0., 0., 0., 0., 2., 2., 3., 3.]])
    """
    if mode not in MODES or align_corners is not None or antialias:
        options = f"mode={mode!r}, align_corners={align_corners}, antialias={antialias}"
        raise ValueError(
            f"interpolate got a packed map and {options}{where()}; that would mix visible and hidden pixels. Take "
            "mode='nearest' without the other two, or call .to_dense() before this layer."
        )
    if input.channels_last:
        raise ValueError(
            f"interpolate got a packed map of shape {tuple(input.shape)}, channels last{where()}; permute(0, 3, 1, 2) "
            "first."
        )
    (fy, fx), (ch, cw) = _factors(input, size, scale_factor), input.cell
    cells = input.values.view(input.plan.num_cells, ch, 1, cw, 1, -1)
    larger = cells.expand(-1, -1, fy, -1, fx, -1).reshape(-1, input.values.shape[1])  # (N * fy * fx, C)
    return input.with_values(larger, (input.size_hw[0] * fy, input.size_hw[1] * fx))


def _factors(x: PackedFeatures, size: Any, scale_factor: Any) -> Pair:
    """How often each pixel is repeated, down and across."""
    if (size is None) == (scale_factor is None):
        raise ValueError(f"interpolate got size={size} and scale_factor={scale_factor}; expected exactly one of them.")
    asked = scale_factor if size is None else size
    down, across = asked if isinstance(asked, (tuple, list)) and len(asked) == 2 else (asked, asked)
    try:
        factors = [
            float(wanted) / (1 if size is None else now) for wanted, now in zip((down, across), x.size_hw, strict=True)
        ]
    except (TypeError, ValueError):
        factors = [0.0, 0.0]
    if any(factor < 1 or not factor.is_integer() for factor in factors):
        what = f"scale_factor={scale_factor}" if size is None else f"size={size}"
        raise ValueError(
            f"interpolate got a packed map of shape {tuple(x.shape)} and {what}{where()}; expected whole factors of at "
            "least 1, which repeat each pixel within its cell. Call .to_dense() before this layer."
        )
    return int(factors[0]), int(factors[1])
