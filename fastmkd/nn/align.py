"""From a level of a feature pyramid to a decoder's tokens (MKD, Section 3.1.3).

MKD matches the channels of a level with a 1 x 1 convolution and brings the level to the mask's resolution with a
convolution of stride p. Nothing lies between the two, so that they are one convolution, whose weight is the product of
both: it is made in each step, which costs a product of weights and saves a product and a map of the level's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["align_tokens", "fold_pointwise"]


def fold_pointwise(pointwise: nn.Conv2d, align: nn.Conv2d | None) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias of the convolution that does what two do one after the other; differentiable.

    Args:
        pointwise: 1 x 1, the first.
        align: the second, without padding and groups; None for the first alone.

    Returns:
        ``(D, C, p, p)``, and ``(D,)`` or None where neither has a bias.

    Raises:
        ValueError: a first convolution that is not 1 x 1, or a second one that pads: a bias would not reach the border.

    Example:
        >>> first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 2, stride=2)
        >>> x, (weight, bias) = torch.randn(1, 3, 4, 4), fold_pointwise(first, second)
        >>> torch.allclose(F.conv2d(x, weight, bias, stride=2), second(first(x)), atol=1e-5)
        True
    """
    if pointwise.kernel_size != (1, 1) or pointwise.stride != (1, 1) or pointwise.groups != 1:
        raise ValueError(f"pointwise is {pointwise}; expected a 1 x 1 convolution of stride 1 and one group.")
    if align is None:
        return pointwise.weight, pointwise.bias
    if align.padding != (0, 0) or align.groups != 1 or align.dilation != (1, 1):
        raise ValueError(f"align is {align}; expected a convolution without padding, groups and dilation.")
    # As one matrix product; the result is channels-last, as the products of a convolution want it.
    weight = align.weight.movedim(1, 3) @ pointwise.weight.flatten(1)  # (D, p, p, W) @ (W, C)
    bias = align.bias
    if pointwise.bias is not None:
        through = align.weight.sum((2, 3)) @ pointwise.bias
        bias = through if bias is None else bias + through
    return weight.movedim(3, 1), bias


def align_tokens(
    features: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None, mask_token: Tensor, positions: Tensor
) -> Tensor:
    """Tokens of a level at the mask's resolution: features where visible, the mask token elsewhere, plus positions.

    A level that is finer than the mask is brought to its resolution by the convolution's stride, a coarser one by
    repeating its nearest features (always by size, since 25 and 13 are no multiples).

    Args:
        features: ``(B, C, H, W)``.
        visible: ``(B, gh, gw)`` bool.
        weight: ``(D, C, p, p)``, of a convolution with stride p.
        bias: ``(D,)`` or None.
        mask_token: ``(D,)``.
        positions: ``(gh * gw, D)``.

    Returns:
        ``(B, gh * gw, D)``.

    Example:
        >>> visible = torch.tensor([[[True, False]]])
        >>> args = torch.ones(1, 1, 1), None, torch.tensor([-1.0]), torch.tensor([[0.1], [0.2]])
        >>> align_tokens(torch.ones(1, 1, 2, 4), visible, torch.ones(1, 1, 2, 2), *args[1:])
        tensor([[[ 4.1000],
                 [-0.8000]]])
    """
    grid = (visible.shape[1], visible.shape[2])
    x = F.conv2d(features, weight, bias, stride=weight.shape[2])
    if x.shape[2:] != grid:
        x = F.interpolate(x, grid, mode="nearest")
    tokens = torch.where(visible.flatten(1)[:, :, None], x.flatten(2).mT, mask_token)
    return tokens + positions
