"""Teaches a CNN to take packed maps, in place, and back again.

A layer changes its class and nothing else: parameters, buffers, hooks, names and ``state_dict`` keys stay, and for an
ordinary tensor the masked class runs the plain layer's own code. Most layers need not change at all, since a packed map
takes part in PyTorch's functions (`fastmkd.nn.packed_functions`).
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .masked_act import MaskedHardswish
from .masked_conv import MaskedConv2d
from .masked_norm import MaskedBatchNorm2d, MaskedSyncBatchNorm, VisibleStatistics
from .masked_resize import MODES

__all__ = ["convert_cnn", "revert_cnn"]

Model = TypeVar("Model", bound=nn.Module)

_PLAIN_AND_MASKED: tuple[tuple[type[Any], type[Any]], ...] = (
    (nn.Conv2d, MaskedConv2d),
    (nn.BatchNorm2d, MaskedBatchNorm2d),
    (nn.SyncBatchNorm, MaskedSyncBatchNorm),
    (nn.Hardswish, MaskedHardswish),
)
_UNSUPPORTED = (
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.InstanceNorm2d,
    nn.LocalResponseNorm,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Fold,
    nn.Unfold,
    nn.LPPool2d,
    nn.FractionalMaxPool2d,
    nn.MaxUnpool2d,
    nn.ZeroPad2d,
    nn.ConstantPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.MultiheadAttention,
)


def convert_cnn(model: Model, stats: str = "visible") -> Model:
    """Makes a CNN take packed maps: ``cnn(pack(images, visible))``; ``cnn(images)`` stays the ordinary network.

    Works on timm's and torchvision's ResNet, ResNeXt, Wide-ResNet, RegNet, MobileNetV2/V3, EfficientNet, ConvNeXt (V1,
    V2), HRNet and VGG-BN, and on any network made of layers and functions that packed maps know; what they do not know
    raises an error that names the layer, here or at the first packed call.

    Args:
        model: the network, changed in place. Convert to SyncBatchNorm before, not after.
        stats: batch statistics over ``"visible"`` positions, or over ``"all"`` with hidden ones counted as zeros.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: an unknown `stats`, a convolution that pads with something else than zeros, or an `Upsample` that is
            not to the nearest pixel.
        TypeError: `model` is not a module, or holds a layer that has no masked form.

    Example:
        >>> import torch
        >>> from fastmkd.nn.packed import pack
        >>> cnn = convert_cnn(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
        >>> cnn(pack(torch.randn(2, 3, 8, 8), torch.tensor([[[True, False]], [[True, True]]])))
        PackedFeatures(shape=(2, 8, 8, 8), rows=96, dtype=torch.float32)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
    if stats not in ("visible", "all"):
        raise ValueError(f"stats is {stats!r}; expected 'visible' or 'all'.")
    masked_of = dict(_pairs())
    layers = [(name or "model itself", layer) for name, layer in model.named_modules()]
    for name, layer in layers:  # refuse before anything changes
        _require_supported(name, layer, masked_of)
    for _, layer in layers:
        layer.__class__ = masked_of.get(type(layer), type(layer))
        if isinstance(layer, VisibleStatistics):
            layer.stats = stats
    return model


def revert_cnn(model: Model) -> Model:
    """Undoes `convert_cnn`: every masked layer becomes the plain one again.

    Args:
        model: the network, changed in place.

    Returns:
        `model`, the same object.

    Example:
        >>> type(revert_cnn(convert_cnn(nn.Conv2d(3, 8, 3)))).__name__
        'Conv2d'
    """
    plain_of = {masked: plain for plain, masked in _pairs()}
    for layer in model.modules():
        if isinstance(layer, VisibleStatistics):
            vars(layer).pop("stats", None)
        layer.__class__ = plain_of.get(type(layer), type(layer))
    return model


def _pairs() -> tuple[tuple[type[Any], type[Any]], ...]:
    """Plain classes and their masked forms; timm's only when somebody has imported timm."""
    if "timm.layers" not in sys.modules:
        return _PLAIN_AND_MASKED
    from . import timm_layers

    return *_PLAIN_AND_MASKED, *timm_layers.PLAIN_AND_MASKED


def _require_supported(name: str, layer: nn.Module, masked_of: dict[type[Any], type[Any]]) -> None:
    known = type(layer) in masked_of or type(layer) in masked_of.values()
    kind = type(layer).__name__
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise ValueError(
            f"{name} is a {kind} with padding_mode={layer.padding_mode!r}; a masked convolution pads with zeros. Set "
            "padding_mode='zeros', or convert only the part of the model before it."
        )
    if isinstance(layer, nn.Upsample) and layer.mode not in MODES:
        raise ValueError(
            f"{name} is a {kind} with mode={layer.mode!r}, which would mix visible and hidden pixels; set "
            "mode='nearest', or convert only the part of the model before it and call .to_dense() there."
        )
    if isinstance(layer, _BatchNorm) and not known and not isinstance(layer, nn.BatchNorm1d):
        raise TypeError(
            f"{name} is a {kind}, a batch norm that fastmkd has no masked form of; replace it by "
            "torch.nn.BatchNorm2d, or convert only the part of the model before it."
        )
    if isinstance(layer, _UNSUPPORTED):
        raise TypeError(
            f"{name} is a {kind}, which has no masked form; replace it, or convert only the part of the model before "
            "it and call .to_dense() there."
        )
