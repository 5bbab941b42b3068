"""Networks that give each pixel a class, by name: from segmentation-models-pytorch (extra ``[train]``) or torchvision.

All take images of any size and return logits of that size. They stay what their packages made them: ``.encoder``,
``.decoder`` and ``.segmentation_head`` of the former, ``.backbone`` and ``.classifier`` of the latter, with the same
keys in their state dicts.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..timm_names import names_of_timm

__all__ = ["SEGMENTERS", "build_segmenter", "encoder_of", "names_of_timm"]

# Name: (package, class). PSPNet and DeepLabV3 are those of MKD's segmentation tables.
SEGMENTERS = {
    "pspnet": ("smp", "PSPNet"),
    "deeplabv3": ("smp", "DeepLabV3"),
    "deeplabv3plus": ("smp", "DeepLabV3Plus"),
    "fpn": ("smp", "FPN"),
    "torchvision_deeplabv3": ("torchvision", "deeplabv3"),
    "torchvision_fcn": ("torchvision", "fcn"),
}


def build_segmenter(
    name: str,
    encoder: str = "resnet18",
    *,
    num_classes: int,
    in_channels: int = 3,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Makes a segmentation network.

    Args:
        name: pspnet, deeplabv3, deeplabv3plus or fpn of segmentation-models-pytorch; torchvision_deeplabv3 or
            torchvision_fcn.
        encoder: of segmentation-models-pytorch, or ``tu-`` and the name of a network of timm; for torchvision resnet50,
            resnet101 or (DeepLabV3 only) mobilenet_v3_large.
        num_classes: with the background, if that is a class.
        in_channels: of the images; torchvision's networks take 3.
        pretrained: download ImageNet weights of the encoder.
        kwargs: for the network, for example encoder_depth or psp_out_channels, and for a network of timm that is
            its encoder.

    Returns:
        A network from ``(B, in_channels, H, W)`` to ``(B, num_classes, H, W)`` logits, with an attribute `num_classes`.

    Raises:
        ValueError: the name or the encoder is not known, an argument does not fit, or the encoder lacks the stride that
            the network needs.
        TypeError: an argument that the network does not have.

    Example:
        >>> import torch
        >>> net = build_segmenter("fpn", "resnet18", num_classes=5).eval()
        >>> net(torch.zeros(1, 3, 40, 50)).shape
        torch.Size([1, 5, 40, 50])
    """
    if name not in SEGMENTERS:
        raise ValueError(f"segmenter {name!r} is not known; expected one of {', '.join(SEGMENTERS)}.")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; expected at least 2, the background counted.")
    package, kind = SEGMENTERS[name]
    make = _from_smp if package == "smp" else _from_torchvision
    model: Any = make(kind, encoder, num_classes, in_channels, pretrained, **kwargs)
    model.num_classes = num_classes
    whole: nn.Module = model
    return whole


def encoder_of(model: Any) -> nn.Module | None:
    """Returns the part of a segmenter that was a classifier; None if `model` is not a segmenter.

    Args:
        model: any network.
    """
    if hasattr(model, "segmentation_head"):
        encoder: nn.Module = model.encoder
        return encoder
    return model.backbone if hasattr(model, "backbone") and hasattr(model, "classifier") else None


class _AnySize:
    """Lets a network that insists on a multiple of its stride take any size: zeros come in right and below."""

    encoder: Any

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the images' size.

        Args:
            images: ``(B, C, H, W)``.
        """
        H, W = images.shape[-2:]
        stride = self.encoder.output_stride
        logits: Tensor = super().forward(F.pad(images, (0, -W % stride, 0, -H % stride)))  # type: ignore[misc]
        return logits[..., :H, :W]


@functools.cache
def _any_size(kind: str) -> Any:
    import segmentation_models_pytorch as smp

    return type(kind, (_AnySize, getattr(smp, kind)), {})


def _from_smp(
    kind: str, encoder: str, num_classes: int, in_channels: int, pretrained: bool, **kwargs: Any
) -> nn.Module:
    import timm
    from segmentation_models_pytorch.encoders import get_encoder_names

    of_timm = encoder.removeprefix("tu-")
    if encoder not in get_encoder_names() and (of_timm == encoder or not timm.is_model(of_timm)):
        hint = f"; timm has it: write tu-{encoder}" if timm.is_model(encoder) else "; write tu-NAME for one of timm"
        raise ValueError(f"encoder {encoder!r} is not one of segmentation-models-pytorch{hint}.")
    unknown = kwargs.keys() - inspect.signature(_any_size(kind).__init__).parameters.keys()
    if unknown and of_timm == encoder:  # they would be passed over in silence
        raise TypeError(f"{kind} does not know {', '.join(sorted(unknown))}, nor does the encoder {encoder}.")
    weights = (True if of_timm != encoder else "imagenet") if pretrained else None
    try:
        model: nn.Module = _any_size(kind)(
            encoder_name=encoder, encoder_weights=weights, in_channels=in_channels, classes=num_classes, **kwargs
        )
    except (KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"{kind} cannot have the encoder {encoder}: {error}") from error
    return model


def _from_torchvision(
    kind: str, encoder: str, num_classes: int, in_channels: int, pretrained: bool, **kwargs: Any
) -> nn.Module:
    from torchvision.models import segmentation

    make = getattr(segmentation, f"{kind}_{encoder}", None)
    if make is None:
        known = [name.removeprefix(f"{kind}_") for name in dir(segmentation) if name.startswith(f"{kind}_")]
        raise ValueError(f"torchvision's {kind} has no encoder {encoder!r}; expected one of {', '.join(known)}.")
    if in_channels != 3:
        raise ValueError(f"in_channels is {in_channels}; torchvision's {kind} takes 3.")
    parts = make(weights=None, weights_backbone="DEFAULT" if pretrained else None, num_classes=num_classes, **kwargs)
    of_torchvision: Any = type(parts)
    parts.__class__ = _one_output(of_torchvision)
    whole: nn.Module = parts
    return whole


@functools.cache
def _one_output(kind: Any) -> Any:
    """The class `kind` with a forward that returns its logits instead of a dict of them."""

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = kind.forward(self, images)["out"]
        return logits

    return type(kind.__name__, (kind,), {"forward": forward})
