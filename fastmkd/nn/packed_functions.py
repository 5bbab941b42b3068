"""Which PyTorch functions a packed map takes, and how.

Most run on its rows, because they treat every pixel alone. Those with a spatial extent and the norms have a masked form
in a module of their own. What is not listed is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masked_conv, masked_norm, masked_pool, masked_resize
from .packed import PackedFeatures
from .where import where

__all__ = ["apply", "bind_method"]

_POINTWISE_NAMES = (
    "abs", "add", "addcmul", "alpha_dropout", "bfloat16", "celu", "clamp", "clip", "clone", "detach", "div", "divide",
    "double", "dropout", "elu", "empty_like", "erf", "exp", "float", "full_like", "gelu", "half", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "lerp", "log", "logsigmoid", "maximum", "minimum", "mish", "mul", "multiply",
    "nan_to_num", "neg", "ones_like", "pow", "rand_like", "randn_like", "relu", "relu6", "rrelu", "rsqrt", "rsub",
    "selu", "sigmoid", "sign", "silu", "softplus", "softsign", "sqrt", "square", "sub", "subtract", "tanh", "threshold",
    "true_divide", "zeros_like",
)  # fmt: skip
_IN_PLACE = ("add_", "clamp_", "div_", "mul_", "neg_", "relu_", "sigmoid_", "sub_", "tanh_", "dropout_", "hardtanh_",
             "leaky_relu_", "elu_", "copy_", "zero_", "fill_")  # fmt: skip
_ON_MAP = ("mean", "amax", "norm", "permute")  # methods of PackedFeatures
_REDUCE_ALL = ("isfinite", "isnan", "isinf")
_METHODS = {*_POINTWISE_NAMES, *_IN_PLACE, *_REDUCE_ALL, "chunk", "split"}


def _collect(names: tuple[str, ...]) -> set[Callable[..., Any]]:
    homes = (torch, torch.Tensor, F, torch._C._nn)
    return {getattr(home, name) for home in homes for name in names if callable(getattr(home, name, None))}


_POINTWISE = _collect((*_POINTWISE_NAMES, *_IN_PLACE, *_REDUCE_ALL))
_METHODS_OF_MAP = _collect(_ON_MAP)
_MASKED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: masked_conv.conv2d,
    F.max_pool2d: masked_pool.max_pool2d,
    torch.max_pool2d: masked_pool.max_pool2d,
    F.avg_pool2d: masked_pool.avg_pool2d,
    F.adaptive_avg_pool2d: masked_pool.adaptive_avg_pool2d,
    F.adaptive_max_pool2d: masked_pool.adaptive_max_pool2d,
    F.interpolate: masked_resize.interpolate,
    F.layer_norm: masked_norm.layer_norm,
    F.group_norm: masked_norm.group_norm,
}
_NEEDS_CONVERSION = {F.batch_norm, torch.batch_norm}  # the layer holds the choice of statistics


def apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Applies a PyTorch function to packed maps.

    Args:
        func: the function that was called.
        args: its arguments, at least one of them packed.
        kwargs: its keyword arguments.

    Raises:
        TypeError: the function is not one that works on rows.
        ValueError: packed maps of different masks or sizes, or an operand that does not broadcast over pixels.
    """
    lead = _first_packed((args, kwargs))
    if func in _POINTWISE:
        rows = [_rows(a, lead) for a in args]
        named = {key: _rows(value, lead) for key, value in kwargs.items()}
        return lead.with_values(func(*rows, **named))
    if func in (torch.prelu, torch.Tensor.prelu):  # F.prelu is torch.prelu; on rows the channels are already last
        return lead.with_values(torch.prelu(lead.values, args[1]))
    if func in _MASKED:
        return _MASKED[func](*args, **kwargs)
    if func in _CHANNELS:
        return _CHANNELS[func](lead, *args, **kwargs)
    name = getattr(func, "__name__", repr(func))
    if func in _METHODS_OF_MAP:
        given = {key: value for key, value in kwargs.items() if value is not None}  # such as out=None
        return getattr(args[0], name)(*args[1:], **given)
    if func in _NEEDS_CONVERSION:
        raise TypeError(f"{name} got a packed map{where()}; convert the network with fastmkd.convert_cnn first.")
    raise lead._unsupported(name)


def bind_method(packed: PackedFeatures, name: str) -> Callable[..., Any]:
    """Returns a tensor method for a packed map, such as ``x.relu_``.

    Args:
        packed: the packed map.
        name: name of a `torch.Tensor` method.

    Raises:
        AttributeError: a method that does not work on rows; says what to do.
    """
    if name not in _METHODS or not hasattr(Tensor, name):
        raise AttributeError(str(packed._unsupported(f".{name}")))
    method = getattr(Tensor, name)
    return lambda *args, **kwargs: apply(method, (packed, *args), kwargs)


def _first_packed(tree: Any) -> PackedFeatures:
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return next(leaf for leaf in leaves if isinstance(leaf, PackedFeatures))


def _rows(operand: Any, lead: PackedFeatures) -> Any:
    """What an operand contributes to a row-wise operation on the rows of `lead`."""
    if isinstance(operand, PackedFeatures):
        alike = operand.size_hw == lead.size_hw and operand.channels_last == lead.channels_last
        if not alike or not operand.plan.agrees_with(lead.plan):
            raise ValueError(
                f"packed maps of shapes {tuple(lead.shape)} and {tuple(operand.shape)} do not belong together; both "
                "need the same mask (pack them with one MaskPlan), size and layout."
            )
        return operand.values
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return operand
    channel_dim = 3 if lead.channels_last else 1
    shape = (1,) * (4 - operand.dim()) + tuple(operand.shape)
    spatial = [d for d in (1, 2, 3) if d != channel_dim]
    if len(shape) != 4 or shape[0] not in (1, lead.plan.batch) or any(shape[d] != 1 for d in spatial):
        raise ValueError(
            f"a tensor of shape {tuple(operand.shape)} does not combine with a packed map of shape {tuple(lead.shape)}"
            f"{where()}: it may vary by image and channel only. Pack it with the same plan, or call .to_dense() on "
            "the map."
        )
    per_image = operand.reshape(shape[0], shape[channel_dim])  # (B or 1, C or 1)
    return per_image if shape[0] == 1 else lead.per_row(per_image)


def _linear(lead: PackedFeatures, x: Any, weight: Tensor, bias: Tensor | None = None) -> PackedFeatures:
    if not lead.channels_last:
        raise ValueError(
            f"linear got a packed map of shape {tuple(lead.shape)}{where()}, whose last dimension is not the channels; "
            "permute(0, 2, 3, 1) first."
        )
    return lead.with_values(F.linear(x.values, weight, bias))


def _cat(lead: PackedFeatures, maps: Any, dim: int = 0, **kwargs: Any) -> PackedFeatures:
    _require_channel_dim(lead, "cat", kwargs.pop("axis", dim))
    for item in maps:
        if not isinstance(item, PackedFeatures):
            raise ValueError("cat got packed and dense maps; pack the dense ones with the same plan.")
    return lead.with_values(torch.cat([_rows(item, lead) for item in maps], dim=1))


def _chunk(lead: PackedFeatures, x: Any, chunks: int, dim: int = 0) -> tuple[PackedFeatures, ...]:
    _require_channel_dim(lead, "chunk", dim)
    return tuple(lead.with_values(part) for part in lead.values.chunk(chunks, dim=1))


def _split(lead: PackedFeatures, x: Any, split_size: Any, dim: int = 0) -> tuple[PackedFeatures, ...]:
    _require_channel_dim(lead, "split", dim)
    return tuple(lead.with_values(part) for part in lead.values.split(split_size, dim=1))


def _channel_shuffle(lead: PackedFeatures, x: Any, groups: int) -> PackedFeatures:
    _require_channel_dim(lead, "channel_shuffle", 1)
    return lead.with_values(lead.values.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1))


def _dropout2d(
    lead: PackedFeatures, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> PackedFeatures:
    if lead.channels_last:
        raise lead._unsupported("dropout2d in channels-last order")
    kept = F.dropout(lead.values.new_ones(*lead.shape[:2], 1, 1), p, training)  # a channel of an image goes as a whole
    out: PackedFeatures = x * kept
    return out


def _expand_as(lead: PackedFeatures, x: Tensor, other: PackedFeatures) -> Tensor:
    if isinstance(x, PackedFeatures) or x.dim() != 4:
        raise lead._unsupported("expand_as")
    return x  # what varies by image and channel combines with packed maps as it is


def _require_channel_dim(lead: PackedFeatures, name: str, dim: int) -> None:
    if dim % 4 != (3 if lead.channels_last else 1):
        raise lead._unsupported(f"{name} along dim={dim}")


_CHANNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    **dict.fromkeys((torch.chunk, torch.Tensor.chunk), _chunk),
    **dict.fromkeys((torch.split, torch.Tensor.split), _split),
    torch.channel_shuffle: _channel_shuffle,
    torch.Tensor.expand_as: _expand_as,
    F.dropout2d: _dropout2d,
}
