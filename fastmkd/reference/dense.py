"""The same CNN as plain masked PyTorch: dense maps, multiplied by the mask wherever a layer looks beyond one pixel.

Nothing here is shared with the packed engine. A `TorchFunctionMode` watches the functions that the unchanged network
calls, and replaces the few that mix positions:

* windows (convolution, local pooling): ``op(x * m)``; what they compute at hidden positions is never read,
* batch norm in training, group norm, global pooling: statistics over visible positions,
* all else treats each pixel alone and runs as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..nn.convert import revert_cnn
from ..nn.masked_norm import VisibleStatistics

__all__ = ["DenseTwin", "dense_twin"]


def dense_twin(cnn: nn.Module) -> DenseTwin:
    """Returns a copy of a network as plain masked PyTorch, the oracle and the eager baseline of a packed network.

    Args:
        cnn: a CNN, converted or not; left alone. Its batch norms must agree on `stats`.

    Returns:
        A module with parameters, buffers and names of its own copy, called as ``twin(images, visible)``.

    Raises:
        ValueError: batch norms that disagree on `stats`.

    Example:
        >>> from fastmkd.nn import convert_cnn, pack
        >>> cnn = convert_cnn(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1)))
        >>> images, visible = torch.randn(2, 1, 4, 4), torch.tensor([[[True, False]], [[True, True]]])
        >>> torch.allclose(dense_twin(cnn)(images, visible), cnn(pack(images, visible)), atol=1e-6)
        True
    """
    choices = {layer.stats for layer in cnn.modules() if isinstance(layer, VisibleStatistics)}
    if len(choices) > 1:
        raise ValueError("the batch norms of cnn disagree on stats; convert the whole network with one choice.")
    return DenseTwin(revert_cnn(copy.deepcopy(cnn)), choices.pop() if choices else "visible")


class DenseTwin(nn.Module):
    """A plain network that is told a mask with each call; made by `dense_twin`.

    Its children, parameters and buffers are those of the network, under the same names.

    Args:
        model: the network.
        stats: batch statistics over ``"visible"`` positions, or over ``"all"`` with hidden ones counted as zeros.

    Example:
        >>> twin = DenseTwin(nn.Sequential(nn.Conv2d(1, 2, 1)))
        >>> list(twin.state_dict())
        ['0.weight', '0.bias']
    """

    model: Any
    stats: str

    def __init__(self, model: nn.Module, stats: str = "visible") -> None:
        super().__init__()
        # Held outside _modules, whose dictionaries are the network's own: names and state_dict keys stay the same.
        self.__dict__.update(model=model, stats=stats, training=model.training)
        self.__dict__.update({name: vars(model)[name] for name in ("_modules", "_parameters", "_buffers")})

    def forward(self, images: Tensor, visible: Tensor) -> Any:
        """Returns what the network returns for images of which it sees a part.

        Args:
            images: ``(B, C, H, W)``.
            visible: ``(B, gh, gw)`` bool, True = visible.
        """
        with _MaskedFunctions(visible, self.stats):
            return self.model(images)

    def forward_features(self, images: Tensor, visible: Tensor) -> Tensor:
        """Returns the network's ``forward_features`` with zeros at hidden positions, ``(B, C', H', W')``.

        Args:
            images: ``(B, C, H, W)``.
            visible: ``(B, gh, gw)`` bool, True = visible.
        """
        with _MaskedFunctions(visible, self.stats):
            features: Tensor = self.model.forward_features(images)
        return features * upsampled(visible, (features.shape[2], features.shape[3]))[:, None].to(features.dtype)

    def train(self, mode: bool = True) -> DenseTwin:
        """Sets training mode, the network's own flag included.

        Args:
            mode: training or evaluation.
        """
        self.model.train(mode)
        return super().train(mode)


def upsampled(visible: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeats each cell of a mask for the pixels of a map.

    Args:
        visible: ``(B, gh, gw)`` bool.
        size: ``(H, W)``, multiples of the grid.

    Returns:
        ``(B, H, W)`` bool.

    Example:
        >>> upsampled(torch.tensor([[[True, False]]]), (1, 4))
        tensor([[[ True,  True, False, False]]])
    """
    _, gh, gw = visible.shape
    if size[0] % gh or size[1] % gw:
        raise ValueError(f"the grid {gh} x {gw} of visible does not divide a {size[0]} x {size[1]} map.")
    return visible.repeat_interleave(size[0] // gh, 1).repeat_interleave(size[1] // gw, 2)


_BEYOND = "_fastmkd_beyond_masks"  # marks what comes of a pooling to a fixed grid; other branches may still be masked


def _beyond(result: Any) -> Any:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            setattr(leaf, _BEYOND, True)
    return result


class _MaskedFunctions(TorchFunctionMode):
    """Replaces functions that mix positions, for the duration of one forward pass."""

    def __init__(self, visible: Tensor, stats: str) -> None:
        super().__init__()
        self.visible, self.stats = visible, stats
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.rows: dict[tuple[int, int], Tensor] = {}
        self.ends = False  # True once a pooling to a fixed grid has ended the masked part of something
        self.padded: Tensor | None = None  # the last explicitly padded map, masked already and of an odd size

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.ends and any(getattr(leaf, _BEYOND, False) for leaf in tree_leaves((args, kwargs))):
            return _beyond(func(*args, **kwargs))
        rule = _RULES.get(func)
        if rule is not None and not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if rule is None or args[0].dim() != 4:
            return func(*args, **kwargs)
        return rule(self, func, *args, **kwargs)

    def mask(self, x: Tensor, dims: tuple[int, int] = (2, 3)) -> Tensor | None:
        """``(B, H, W)`` bool mask of a map, None for one coarser than the grid, which is never masked."""
        size = (x.shape[dims[0]], x.shape[dims[1]])
        if size[0] < self.visible.shape[1] or size[1] < self.visible.shape[2]:
            return None
        if size not in self.masks:
            self.masks[size] = upsampled(self.visible, size)
        return self.masks[size]

    def visible_rows(self, mask: Tensor) -> Tensor:
        """``(N,)`` numbers of the visible pixels among all of the batch."""
        size = (mask.shape[1], mask.shape[2])
        if size not in self.rows:
            self.rows[size] = mask.flatten().nonzero()[:, 0]
        return self.rows[size]


def _window(mode: _MaskedFunctions, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    mask = None if x is mode.padded else mode.mask(x)
    pointwise = func is torch.conv2d and (kwargs["weight"] if "weight" in kwargs else args[0]).shape[2:] == (1, 1)
    x = x if mask is None or pointwise else x * mask[:, None].to(x.dtype)
    out: Tensor = func(x, *args, **kwargs)
    return out


def _pad(mode: _MaskedFunctions, func: Any, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
    mask = mode.mask(x)
    out: Tensor = func(x if mask is None else x * mask[:, None].to(x.dtype), *args, **kwargs)
    mode.padded = out
    return out


def _batch_norm(mode: _MaskedFunctions, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    mask = mode.mask(x)
    if mask is None or not kwargs["training"]:  # torch.nn.functional hands it on as a keyword
        out: Tensor = func(x, *args, **kwargs)
    elif mode.stats == "all":
        out = func(x * mask[:, None].to(x.dtype), *args, **kwargs)
    else:
        B, C, H, W = x.shape
        rows, pixels = mode.visible_rows(mask), x.permute(0, 2, 3, 1).reshape(-1, C)  # (B * H * W, C)
        seen = func(pixels.index_select(0, rows), *args, **kwargs)  # (N, C)
        out = seen.new_zeros(pixels.shape).index_copy(0, rows, seen).view(B, H, W, C).permute(0, 3, 1, 2)
    return out


def _group_norm(
    mode: _MaskedFunctions,
    func: Any,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    mask = mode.mask(x)
    if mask is None:
        out: Tensor = func(x, num_groups, weight, bias, eps)
        return out
    seen = mask[:, None, None].to(x.dtype)  # (B, 1, 1, H, W)
    groups = x.unflatten(1, (num_groups, -1))  # (B, G, C / G, H, W)
    count = seen.sum((2, 3, 4), keepdim=True) * groups.shape[2]
    mean = (groups * seen).sum((2, 3, 4), keepdim=True) / count
    var = ((groups - mean).square() * seen).sum((2, 3, 4), keepdim=True) / count
    out = ((groups - mean) / (var + eps).sqrt()).flatten(1, 2)
    out = out if weight is None else out * weight[:, None, None]
    return out if bias is None else out + bias[:, None, None]


def _adaptive_pool(mode: _MaskedFunctions, func: Any, x: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Tensor:
    mask = mode.mask(x)
    if mask is not None and output_size in (1, (1, 1), [1, 1]):
        reduce = torch.Tensor.amax if "max" in func.__name__ else torch.Tensor.mean
        return _spatial(mode, reduce, x, (2, 3), True)
    out: Tensor = func(x if mask is None else x * mask[:, None].to(x.dtype), output_size, *args, **kwargs)
    if mask is not None:
        mode.ends = True
        _beyond(out)
    return out


def _spatial(mode: _MaskedFunctions, func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **kw: Any) -> Tensor:
    """``mean`` and ``amax`` over a whole map."""
    dims = tuple(sorted(d % 4 for d in dim)) if isinstance(dim, (tuple, list)) else ()
    mask = mode.mask(x, (dims[0], dims[1])) if dims in ((1, 2), (2, 3)) else None
    if mask is None:
        out: Tensor = func(x, *(() if dim is None else (dim, keepdim)), **kw)
        return out
    mask = mask.unsqueeze(1 if dims == (2, 3) else 3)
    if func.__name__ == "amax":
        return x.masked_fill(~mask, -torch.inf).amax(dims, keepdim)
    return (x * mask.to(x.dtype)).sum(dims, keepdim) / mask.sum(dims, keepdim)


def _norm(mode: _MaskedFunctions, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dims = tuple(sorted(d % 4 for d in kwargs["dim"])) if isinstance(kwargs.get("dim"), (tuple, list)) else ()
    mask = mode.mask(x, (dims[0], dims[1])) if dims in ((1, 2), (2, 3)) else None
    if mask is not None:
        x = x * mask.unsqueeze(1 if dims == (2, 3) else 3).to(x.dtype)
    out: Tensor = func(x, *args, **kwargs)
    return out


_RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **dict.fromkeys((torch.conv2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d), _window),
    F.pad: _pad,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_max_pool2d), _adaptive_pool),
    **dict.fromkeys((torch.mean, torch.Tensor.mean, torch.amax, torch.Tensor.amax), _spatial),
    **dict.fromkeys((torch.norm, torch.Tensor.norm), _norm),
}
