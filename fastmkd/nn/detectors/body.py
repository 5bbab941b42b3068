"""Backbones: a classifier of torchvision or timm up to its last map, and the feature pyramid on top of it.

``backbone.body(images)`` gives the maps at strides 4 (or 8) to 32, ``backbone.fpn(maps)`` the levels, both as an
OrderedDict with the finest first. Detectors of torchvision call no more than that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models._utils import IntermediateLayerGetter

from ..timm_names import names_of_timm

__all__ = ["Backbone", "TimmBody", "TorchvisionBody", "build_body"]

STRIDES = (4, 8, 16, 32)
# Ends of the stages in torchvision's MobileNetV2; the 1280 channels behind the last one belong to its classifier.
MOBILENET_V2 = ("3", "6", "13", "17")
RESNET = ("layer1", "layer2", "layer3", "layer4")
TIMM = "timm."  # makes sure that a name both have is timm's


class _Freezing(nn.Module):
    """Keeps frozen stages in eval mode, and all batch norms if asked to, whatever ``train()`` is told."""

    norm_eval = False
    frozen: tuple[nn.Module, ...] = ()

    def freeze(self, children: Mapping[str, nn.Module], ends: Sequence[str], stages: int, norm_eval: bool) -> None:
        """Freezes stem and first stages.

        Args:
            children: the layers in the order they run, by name.
            ends: the last of each stage.
            stages: how many.
            norm_eval: whether every batch norm keeps its running statistics.

        Raises:
            ValueError: there are not as many stages.
        """
        self.norm_eval = norm_eval
        if not 0 <= stages <= len(ends):
            raise ValueError(f"frozen_stages is {stages}; expected 0 to {len(ends)} for this backbone.")
        if stages:
            names = list(children)
            frozen = [children[name] for name in names[: names.index(ends[stages - 1]) + 1]]
            self.__dict__["frozen"] = tuple(frozen)  # past nn.Module's registration: they are submodules already
            for part in frozen:
                part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of what is not frozen.

        Args:
            mode: True for training.
        """
        super().train(mode)
        for part in self.frozen:
            part.eval()
        if self.norm_eval:
            for part in self.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self


class TorchvisionBody(_Freezing, IntermediateLayerGetter):
    """A ResNet, ResNeXt, Wide-ResNet or MobileNetV2 of torchvision, with the names of its layers.

    Args:
        network: the layers in the order they run.
        ends: the last layer of each of the four stages.
        maps: how many of the last stages to return.

    Example:
        >>> import torch
        >>> body = TorchvisionBody(torchvision.models.resnet18(), RESNET, 3)
        >>> {name: tuple(x.shape) for name, x in body(torch.zeros(1, 3, 64, 64)).items()}
        {'0': (1, 128, 8, 8), '1': (1, 256, 4, 4), '2': (1, 512, 2, 2)}
    """

    def __init__(self, network: nn.Module, ends: Sequence[str], maps: int) -> None:
        super().__init__(network, {end: str(i) for i, end in enumerate(ends[-maps:])})

    def from_classifier(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives weights of the whole classifier the names they have here.

        Args:
            weights: by the classifier's names.
        """
        return {name.removeprefix("features."): value for name, value in weights.items()}


class TimmBody(_Freezing):
    """A network of timm made with ``features_only=True``.

    Args:
        model: returns a list of maps.

    Example:
        >>> import timm, torch
        >>> small = {"features_only": True, "layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
        >>> body = TimmBody(timm.create_model("resnet18", out_indices=(-2, -1), **small))
        >>> {name: tuple(x.shape) for name, x in body(torch.zeros(1, 3, 64, 64)).items()}
        {'0': (1, 8, 4, 4), '1': (1, 8, 2, 2)}
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Returns the maps, the finest first.

        Args:
            images: ``(B, 3, H, W)``.
        """
        maps = self.model(images)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":  # Swin, unless it was made otherwise
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return OrderedDict((str(i), x) for i, x in enumerate(maps))

    def from_classifier(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives weights of the whole classifier the names they have here.

        Args:
            weights: by timm's names.
        """
        return names_of_timm(self.state_dict(), weights)


class Backbone(nn.Module):
    """Body and feature pyramid, under the names that torchvision's detectors have for them.

    Args:
        body: images to maps.
        fpn: maps to levels.
        out_channels: of each level.
    """

    def __init__(self, body: nn.Module, fpn: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Returns the levels, the finest first.

        Args:
            images: ``(B, 3, H, W)``.
        """
        levels: OrderedDict[str, Tensor] = self.fpn(self.body(images))
        return levels


def build_body(
    name: str,
    maps: int = 4,
    *,
    pretrained: bool = False,
    frozen_stages: int = 0,
    norm_eval: bool = False,
    **kwargs: Any,
) -> tuple[TorchvisionBody | TimmBody, list[int]]:
    """Makes a body and says how many channels its maps have.

    Args:
        name: of torchvision a ResNet, ResNeXt, Wide-ResNet or mobilenet_v2; else any network of timm that has maps at
            strides 4 to 32. ``timm.`` before the name makes sure that it is timm's.
        maps: how many, the last ones.
        pretrained: download weights of ImageNet.
        frozen_stages: 0 for none, else the stem and this many stages do not learn.
        norm_eval: batch norms keep their running statistics.
        kwargs: further arguments of the network.

    Raises:
        ValueError: nobody knows the name, or the network has no such maps.

    Example:
        >>> build_body("mobilenet_v2")[1]
        [24, 32, 96, 320]
    """
    import timm

    resnets = [
        known
        for known in torchvision.models.list_models(module=torchvision.models)
        if torchvision.models.get_model_builder(known).__module__ == torchvision.models.resnet.__name__
    ]
    body: TorchvisionBody | TimmBody
    if name in resnets or name == "mobilenet_v2":
        network: Any = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)
        if name in resnets:
            ends, channels = RESNET, [network.inplanes // 8 * 2**i for i in range(4)]
        else:
            network = network.features
            ends, channels = MOBILENET_V2, [network[int(end)].out_channels for end in MOBILENET_V2]
        body = TorchvisionBody(network, ends, maps)
        children: Mapping[str, nn.Module] = body
    elif timm.is_model(name.removeprefix(TIMM)):
        indices = tuple(range(-maps, 0))
        model: Any = timm.create_model(
            name.removeprefix(TIMM), pretrained=pretrained, features_only=True, out_indices=indices, **kwargs
        )
        info = model.feature_info
        if tuple(info.reduction()) != STRIDES[-maps:]:
            raise ValueError(f"backbone {name} has maps at strides {info.reduction()}; expected {STRIDES[-maps:]}.")
        body, channels, children = TimmBody(model), list(info.channels()), dict(model.named_children())
        stages = {entry["reduction"]: entry["module"].replace(".", "_") for entry in info.info}
        ends = tuple(stages[stride] for stride in STRIDES)
        if frozen_stages and not set(ends) <= children.keys():
            raise ValueError(f"frozen_stages is {frozen_stages}, but timm does not take {name} apart; use 0.")
    else:
        near = [known for known in [*resnets, "mobilenet_v2", *timm.list_models()] if known.startswith(name[:6])][:5]
        hint = f" Near it are {', '.join(near)}." if near else ""
        raise ValueError(f"backbone is {name!r}, which neither torchvision nor timm knows.{hint}")
    body.freeze(children, ends, frozen_stages, norm_eval)
    return body, channels[-maps:]
