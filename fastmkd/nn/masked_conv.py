"""Convolution of packed maps: hidden positions are neither read nor computed.

The meaning is that of the dense layer between two masks, ``y = conv(x * m_in) * m_out``, with the bias added at visible
positions only. A 1 x 1 convolution is a plain matrix product of the rows; every other one is the op
`fastmkd.ops.masked_conv2d` with the tables of the batch's plan. Where few positions are hidden and a table of
measurements says that the dense library is faster, it is a convolution of the dense map (`fastmkd.nn.crossings`).

The op gives the same bits for any number of threads; a CPU's matrix product, dense convolution and PyTorch's batch norm
do not. Under ``torch.use_deterministic_algorithms(True)`` all convolutions take the op, and batch norms sum in fixed
order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype
from ..ops.masked_conv2d import masked_conv2d
from .crossings import goes_dense
from .dense_way import dense_convolve
from .packed import PackedFeatures, pack
from .plan import MaskPlan, Pair, Window
from .where import refuse_reentrant_checkpoint, where

__all__ = ["MaskedConv2d", "conv2d", "convolve", "fixed_order", "same_window"]


class MaskedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that also takes packed maps, or a dense map with its mask.

    Constructor, parameters and ``state_dict`` are those of `torch.nn.Conv2d`, and so is a call with a dense map alone.

    Example:
        >>> conv = MaskedConv2d(3, 8, 3, stride=2, padding=1)
        >>> images, visible = torch.randn(2, 3, 8, 8), torch.tensor([[[True, False]], [[False, True]]])
        >>> conv(pack(images, visible))
        PackedFeatures(shape=(2, 8, 4, 4), rows=16, dtype=torch.float32)
        >>> conv(images, visible)[0, 0, 0, 2:].tolist()
        [0.0, 0.0]
    """

    def forward(self, input: Any, visible: Tensor | MaskPlan | None = None) -> Any:
        """Convolves a packed map, a dense map between masks, or a dense map.

        Args:
            input: `PackedFeatures`, or ``(B, C, H, W)``.
            visible: ``(B, gh, gw)`` bool, True = visible, or a `MaskPlan`; for a dense `input` only.

        Returns:
            `PackedFeatures` for a packed map, else ``(B, C', H', W')``, with zeros where hidden if `visible` is given.

        Raises:
            ValueError: wrong channels; a stride or padding with which the masked cells do not stay whole; padding other
                than zeros, or `visible`, together with a packed map.
            TypeError: a dtype other than the weight's.
        """
        if visible is not None:
            if isinstance(input, PackedFeatures):
                raise ValueError("visible is given, but input is packed and carries its mask already; leave it out.")
            return self._convolve_rows(pack(input, visible)).to_dense()
        if isinstance(input, PackedFeatures):
            if input.requires_grad and not torch.is_grad_enabled():
                refuse_reentrant_checkpoint(PackedFeatures)
            return self._convolve_rows(input)
        return super().forward(input)

    def _convolve_rows(self, x: PackedFeatures) -> PackedFeatures:
        if self.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode is {self.padding_mode!r}{where()}; a masked convolution pads with zeros. Set "
                "padding_mode='zeros', or call .to_dense() before this layer."
            )
        padding = self.padding if isinstance(self.padding, str) else _pair(self.padding)
        return conv2d(x, self.weight, self.bias, _pair(self.stride), padding, _pair(self.dilation), groups=self.groups)


def conv2d(
    input: PackedFeatures,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> PackedFeatures:
    """`torch.nn.functional.conv2d` for a packed map.

    Under autocast, values, weight and bias are cast as a convolution's are.

    Args:
        input: ``(B, Cin, H, W)``, packed.
        weight: ``(Cout, Cin / groups, kh, kw)``.
        bias: ``(Cout,)`` or None.
        stride: an int or ``(vertical, horizontal)``.
        padding: an int, ``(vertical, horizontal)``, "same" or "valid".
        dilation: an int or ``(vertical, horizontal)``.
        groups: number of groups.

    Returns:
        ``(B, Cout, H / stride, W / stride)``, packed.

    Raises:
        ValueError: wrong channels, or cells that would not stay whole.
        TypeError: dtypes that differ.

    Example:
        >>> x = pack(torch.ones(1, 1, 2, 4), torch.tensor([[[True, False]]]))
        >>> conv2d(x, torch.ones(1, 1, 3, 3), padding=1).values.flatten()
        tensor([4., 4., 4., 4.])
    """
    kernel, stride, dilation = (weight.shape[2], weight.shape[3]), _pair(stride), _pair(dilation)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(
                f"padding is 'same' and stride {stride}{where()}; PyTorch defines 'same' for stride 1 only."
            )
        window = same_window(kernel, dilation)
    else:
        window = Window(kernel, stride, (0, 0) if padding == "valid" else _pair(padding), dilation)
    return convolve(input, weight, bias, window, groups)


def convolve(
    input: PackedFeatures, weight: Tensor, bias: Tensor | None, window: Window, groups: int = 1
) -> PackedFeatures:
    """Convolves a packed map with any window; `conv2d` with the geometry spelled out.

    Args:
        input: ``(B, Cin, H, W)``, packed.
        weight: ``(Cout, Cin / groups, kh, kw)``.
        bias: ``(Cout,)`` or None.
        window: kernel, stride, padding before and after, and dilation.
        groups: number of groups.

    Returns:
        ``(B, Cout, H / stride, W / stride)``, packed.

    Raises:
        ValueError: wrong channels, or cells that would not stay whole.
        TypeError: dtypes that differ.

    Example:
        >>> x = pack(torch.ones(1, 1, 1, 4), torch.tensor([[[True, False]]]))
        >>> convolve(x, torch.ones(1, 1, 1, 2), None, same_window((1, 2))).values.flatten()
        tensor([2., 1.])
    """
    if input.channels_last:
        raise ValueError(
            f"a convolution got a packed map of shape {tuple(input.shape)}, channels last{where()}; "
            "permute(0, 3, 1, 2) first."
        )
    values, weight, bias = _as_autocast(input.values, weight, bias)
    if values.dtype != weight.dtype:
        raise TypeError(
            f"the packed map has dtype {values.dtype} but weight {weight.dtype}{where()}; cast one of them."
        )
    if values.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"the packed map has {values.shape[1]} channels but weight of shape {tuple(weight.shape)} with groups "
            f"{groups} takes {weight.shape[1] * groups}{where()}."
        )
    size = window.output_size(input.size_hw)
    unpadded = window.padding == (0, 0) and window.padding_end in (None, (0, 0))
    if window.kernel == (1, 1) and unpadded and not fixed_order(values):
        if window.stride != (1, 1):
            values = values.index_select(0, input.plan.forward_taps(input.cell, window)[:, 0])
        return input.with_values(_pointwise(values, weight, bias, groups), size)
    if goes_dense(values, weight, input.plan, input.cell, window, groups):
        return input.with_values(dense_convolve(values, weight, bias, input.plan, input.cell, window, groups), size)
    taps = input.plan.taps(input.cell, window, backward=values.requires_grad and torch.is_grad_enabled())
    out = masked_conv2d(
        values.contiguous(),  # channels may have been split off
        weight.contiguous(),
        bias,
        taps.forward,
        taps.backward,
        taps.forward_order,
        taps.backward_order,
        groups,
    )
    return input.with_values(out, size)


def same_window(kernel: Pair, dilation: Pair = (1, 1)) -> Window:
    """Returns the window of a convolution with stride 1 that keeps the size; an odd zero goes after the map.

    Args:
        kernel: ``(kh, kw)``.
        dilation: ``(vertical, horizontal)``.

    Example:
        >>> same_window((3, 4))[2:]
        ((1, 1), (1, 1), (1, 2))
    """
    total = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
    before = (total[0] // 2, total[1] // 2)
    after = (total[0] - before[0], total[1] - before[1])
    return Window(kernel, (1, 1), before, dilation, None if before == after else after)


def fixed_order(values: Tensor) -> bool:
    """Returns whether sums over `values` must not depend on the number of threads.

    Args:
        values: rows of a packed map.

    Example:
        >>> fixed_order(torch.ones(2, 3))
        False
    """
    return values.device.type == "cpu" and torch.are_deterministic_algorithms_enabled()


def _pointwise(values: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """A matrix product for each group: ``(N, Cin)`` -> ``(N, Cout)``."""
    if groups == 1:
        return F.linear(values, weight.flatten(1), bias)
    rows, kernel = values.unflatten(1, (groups, -1)), weight.flatten(1).unflatten(0, (groups, -1))
    out = torch.einsum("ngi,goi->ngo", rows, kernel).flatten(1)
    return out if bias is None else out + bias


def _as_autocast(values: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = autocast_dtype(values.device)
    if dtype is None or values.dtype == torch.float64:
        return values, weight, bias
    return values.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
