"""Pooling of packed maps.

Local pooling computes ``y = pool(x * m_in) * m_out``: a hidden neighbour inside the image counts as zero, what lies
outside the image is padding as in PyTorch. Pooling over the whole map sees visible positions only. Pooling to a fixed
grid larger than one, as before the classifier of VGG, ends the masked part of a network: hidden positions count as
zeros and the result is an ordinary tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.masked_conv2d import masked_conv2d
from .packed import PackedFeatures
from .plan import Pair, Window
from .where import where

__all__ = ["adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d"]


def max_pool2d(
    input: PackedFeatures,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> PackedFeatures:
    """`torch.nn.functional.max_pool2d` for a packed map.

    Args:
        input: ``(B, C, H, W)``, packed.
        kernel_size: an int or ``(vertical, horizontal)``, as are the next three.
        stride: None means `kernel_size`.
        padding: minus infinity around the image.
        dilation: distance between taps.
        ceil_mode: round the output size up; the masked cells must stay whole all the same.
        return_indices: must be False.

    Returns:
        ``(B, C, H / stride, W / stride)``, packed.

    Raises:
        ValueError: cells that would not stay whole.
        TypeError: `return_indices`.

    Example:
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(-torch.ones(1, 1, 2, 4), torch.tensor([[[True, False]]]))
        >>> max_pool2d(x, 3, stride=1, padding=1).values.flatten()  # the right column borders on hidden zeros
        tensor([-1.,  0., -1.,  0.])
    """
    if return_indices:
        raise input._unsupported("max_pool2d with return_indices=True")
    window = _window(input, kernel_size, stride, padding, dilation, ceil_mode)
    plan, cell = input.plan, input.cell
    out = _MaxOverTaps.apply(input.values, plan.forward_taps(cell, window), plan.inside(cell, window))
    return input.with_values(out, window.output_size(input.size_hw))


def avg_pool2d(
    input: PackedFeatures,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> PackedFeatures:
    """`torch.nn.functional.avg_pool2d` for a packed map; the divisor does not depend on the mask.

    Args:
        input: ``(B, C, H, W)``, packed.
        kernel_size: an int or ``(vertical, horizontal)``, as are the next two.
        stride: None means `kernel_size`.
        padding: zeros around the image.
        ceil_mode: round the output size up; the masked cells must stay whole all the same.
        count_include_pad: divide by the padding too.
        divisor_override: divide by this.

    Returns:
        ``(B, C, H / stride, W / stride)``, packed.

    Raises:
        ValueError: cells that would not stay whole, or a `divisor_override` of 0.

    Example:
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.ones(1, 1, 2, 4), torch.tensor([[[True, False]]]))
        >>> avg_pool2d(x, 2).values
        tensor([[1.]])
    """
    if divisor_override == 0:
        raise ValueError("divisor_override is 0; expected what to divide the sums by, or None for the window's size.")
    window = _window(input, kernel_size, stride, padding, 1, ceil_mode)
    taps, channels = input.plan.taps(input.cell, window), input.shape[1]
    sums = masked_conv2d(
        input.values.contiguous(),
        input.values.new_ones(channels, 1, *window.kernel),
        None,
        taps.forward,
        taps.backward,
        taps.forward_order,
        taps.backward_order,
        channels,
    )
    size = window.output_size(input.size_hw)
    divisor = divisor_override or _divisor(input, window, size, count_include_pad)
    return input.with_values(sums / divisor, size)


def adaptive_avg_pool2d(input: PackedFeatures, output_size: Any) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d` for a packed map.

    Args:
        input: ``(B, C, H, W)``, packed.
        output_size: 1 for the mean over visible positions; a larger grid counts hidden positions as zeros.

    Returns:
        ``(B, C, *output_size)``, an ordinary tensor.

    Example:
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.arange(4.0).view(1, 1, 1, 4), torch.tensor([[[True, False]]]))
        >>> adaptive_avg_pool2d(x, 1), adaptive_avg_pool2d(x, (1, 2))
        (tensor([[[[0.5000]]]]), tensor([[[[0.5000, 0.0000]]]]))
    """
    _require_channels_first(input)
    if _is_one(output_size):
        return input.mean((2, 3), keepdim=True)
    return F.adaptive_avg_pool2d(input.to_dense(), output_size)


def adaptive_max_pool2d(input: PackedFeatures, output_size: Any, return_indices: bool = False) -> Tensor:
    """`torch.nn.functional.adaptive_max_pool2d` for a packed map.

    Args:
        input: ``(B, C, H, W)``, packed.
        output_size: 1 for the maximum over visible positions; a larger grid counts hidden positions as zeros.
        return_indices: must be False.

    Returns:
        ``(B, C, *output_size)``, an ordinary tensor.

    Raises:
        TypeError: `return_indices`.

    Example:
        >>> from fastmkd.nn.packed import pack
        >>> x = pack(torch.arange(4.0).view(1, 1, 1, 4) - 9, torch.tensor([[[True, False]]]))
        >>> adaptive_max_pool2d(x, 1)
        tensor([[[[-8.]]]])
    """
    _require_channels_first(input)
    if return_indices:
        raise input._unsupported("adaptive_max_pool2d with return_indices=True")
    if _is_one(output_size):
        return input.amax((2, 3), keepdim=True)
    return F.adaptive_max_pool2d(input.to_dense(), output_size)


class _MaxOverTaps(torch.autograd.Function):
    """Maximum under a window, tap by tap, so that the taps of all rows never lie in memory at once.

    As in PyTorch the first of equal values wins, and NaN beats all. No two output rows read one input row through the
    same tap, so the gradient's sums run in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, taps: Tensor, inside: Tensor) -> Tensor:
        extra = [values.new_full((1, values.shape[1]), fill) for fill in (0.0, -torch.inf)]
        padded = torch.cat((values, *extra))
        index = torch.where(taps >= 0, taps, torch.where(inside, len(values), len(values) + 1)).t().contiguous()
        best = padded.index_select(0, index[0])  # (N_out, C)
        winner = torch.zeros(best.shape, dtype=torch.int16, device=values.device)
        for tap in range(1, len(index)):
            value = padded.index_select(0, index[tap])
            winner = torch.maximum(winner, (value > best).to(torch.int16).mul_(tap))  # integers: where is slow on CPUs
            best = torch.maximum(best, value)
        ctx.rows = len(values)
        ctx.save_for_backward(winner, taps)
        return best

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        winner, taps = ctx.saved_tensors
        index = torch.where(taps < 0, ctx.rows, taps).t().contiguous()  # what has no row goes to an extra one
        total = grad.new_zeros(ctx.rows + 1, grad.shape[1])
        for tap in range(len(index)):
            total.index_add_(0, index[tap], grad * (winner == tap).to(grad.dtype))
        return total[:-1], None, None


def _divisor(x: PackedFeatures, window: Window, size: Pair, count_include_pad: bool) -> Tensor | int:
    """How many positions each window covers: a number, or ``(N_out, 1)`` if windows at the border cover fewer."""
    if window.padding_end is None and (count_include_pad or window.padding == (0, 0)):
        return window.kernel[0] * window.kernel[1]
    covered = []
    for a, position in enumerate(x.plan.positions(x.plan.cell(size))):
        margin = window.padding[a] if count_include_pad else 0
        start = position * window.stride[a] - window.padding[a]
        end = (start + window.kernel[a]).clamp_max(x.size_hw[a] + margin)
        covered.append(end - start.clamp_min(-margin))
    return (covered[0] * covered[1])[:, None]


def _window(x: PackedFeatures, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Window:
    _require_channels_first(x)
    kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    if kernel == x.size_hw and x.plan.grid != (1, 1):
        raise ValueError(
            f"a pooling window as large as the {kernel[0]} x {kernel[1]} map{where()} would mix cells; use "
            "adaptive_avg_pool2d or adaptive_max_pool2d with output size 1, which see the visible positions only."
        )
    window = Window(kernel, stride, padding, dilation)
    if not ceil_mode:
        return window
    after = []
    for a, size in enumerate(x.size_hw):
        reach = dilation[a] * (kernel[a] - 1) + 1
        out = -(-(size + 2 * padding[a] - reach) // stride[a]) + 1
        out -= (out - 1) * stride[a] >= size + padding[a]  # the last window must start in the image or its padding
        after.append(max((out - 1) * stride[a] + reach - size - padding[a], padding[a]))
    return window if tuple(after) == padding else window._replace(padding_end=(after[0], after[1]))


def _require_channels_first(x: PackedFeatures) -> None:
    if x.channels_last:
        raise ValueError(
            f"pooling got a packed map of shape {tuple(x.shape)}, channels last{where()}; permute(0, 3, 1, 2) first."
        )


def _is_one(output_size: Any) -> bool:
    return output_size == 1 or (isinstance(output_size, (tuple, list)) and tuple(output_size) in ((1,), (1, 1)))


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
