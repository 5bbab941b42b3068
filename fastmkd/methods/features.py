"""Feature maps of layers by name, from one forward pass of any timm CNN or vision transformer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..metrics.comparison import layer_names
from ..nn.vit import MaskedViT
from .overwritten import keep_output, overwritten, refuse_overwritten

__all__ = ["Features", "check_layers", "eval_mode", "input_shape", "observe_maps", "probe"]


class Features(NamedTuple):
    """What a network made of a batch.

    Attributes:
        output: what its forward returned.
        maps: ``(B, C, h, w)`` by the layer's name.
    """

    output: Any
    maps: dict[str, Tensor]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Features:
        """The same with a function applied to every tensor.

        Args:
            fn: for example a move to another device.
        """
        output = self.output
        if isinstance(output, tuple):
            output = tuple(map(fn, output))
        elif isinstance(output, Tensor):
            output = fn(output)
        return Features(output, {name: fn(x) for name, x in self.maps.items()})


def observe_maps(model: nn.Module, images: Tensor, layers: Sequence[str], copied: Collection[str] = ()) -> Features:
    """Runs a network once and reads the named layers through hooks that live for this call.

    A ViT's tokens become a map over its patches, prefix tokens left out; a Swin's channels-last map is permuted.

    Args:
        model: the network.
        images: ``(B, C, H, W)``.
        layers: names as in ``named_modules()``.
        copied: those whose output a later layer overwrites, as `probe` says; they are read from copies.

    Raises:
        ValueError: no images, or a layer that does not run exactly once, whose output is no map, or is overwritten and
            not `copied`.
        TypeError: a layer whose output is no tensor.

    Example:
        >>> import timm
        >>> vit = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)
        >>> observe_maps(vit, torch.zeros(2, 3, 32, 32), ["blocks.1"]).maps["blocks.1"].shape
        torch.Size([2, 192, 2, 2])
    """
    if not len(images):
        raise ValueError(f"images holds no image; its shape is {tuple(images.shape)}.")
    observed, found, versions = _observe(model, images, layers, copied)
    refuse_overwritten(found, versions)
    return observed


def _observe(
    model: nn.Module, images: Tensor, layers: Sequence[str], copied: Collection[str]
) -> tuple[Features, dict[str, Tensor], dict[str, int]]:
    network = _bare(model)
    found: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    with _hooks(network, layers, found, copied, versions):
        output = network(images)
    silent = [name for name in layers if name not in found]
    if silent:
        raise ValueError(f"the layer {silent[0]!r} did not run in the forward; name one that does.")
    size = (images.shape[-2], images.shape[-1])
    return Features(output, {name: _as_map(network, name, found[name], size) for name in layers}), found, versions


@torch.no_grad()
def probe(
    model: nn.Module, role: str, layers: Sequence[str], shape: tuple[int, int, int]
) -> tuple[Features, tuple[str, ...]]:
    """Runs a network on one black image in eval mode, to learn the shapes of its maps; leaves it as it was.

    Args:
        model: the network.
        role: "student" or "teacher", for messages.
        layers: names of layers.
        shape: ``(C, H, W)`` of the image.

    Returns:
        What it made of the image, and the layers whose output a later one overwrites.

    Raises:
        ValueError: the network does not take such an image, or see `observe_maps`.

    Example:
        >>> found, copied = probe(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(True)), "student", ["0"], (3, 9, 9))
        >>> found.maps["0"].shape, copied
        (torch.Size([1, 8, 7, 7]), ('0',))
    """
    weight = next(model.parameters())
    try:
        with eval_mode(model):
            image = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
            observed, found, versions = _observe(model, image, layers, ())
            return observed, overwritten(found, versions)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{role} does not take an image of {shape[1]} x {shape[2]} pixels ({reason}); give the size of the "
            "training images as image_size."
        ) from None


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Keeps a network in eval mode for a while; every part of it then has the mode it had.

    Args:
        model: the network.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with eval_mode(network):
        ...     pass
        >>> [part.training for part in network]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def input_shape(model: nn.Module, image_size: int | Sequence[int] | None) -> tuple[int, int, int]:
    """Returns ``(C, H, W)`` of the images of a network.

    Args:
        model: the network.
        image_size: side, or height and width; None takes the network's own: a ViT's image size, timm's default
            configuration, 32 for the networks of `fastmkd.nn.cifar`, else 224.

    Raises:
        ValueError: an `image_size` that is none, or a network without a convolution to tell the channels.

    Example:
        >>> import timm
        >>> input_shape(timm.create_model("resnet18", in_chans=1), None), input_shape(nn.Conv2d(3, 4, 3), 20)
        ((1, 224, 224), (3, 20, 20))
    """
    network: Any = _bare(model)
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError("student has no convolution, so the channels of its images are unknown; pass a CNN or ViT.")
    if image_size is None:
        config = getattr(network, "pretrained_cfg", None) or {}
        own = getattr(getattr(network, "patch_embed", None), "img_size", None) or config.get("input_size", (0,))[1:]
        image_size = tuple(own) or (32 if type(network).__module__.startswith("fastmkd.nn.cifar") else 224)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size is {image_size!r}; expected the side in pixels, or (height, width).")
    return first.in_channels, size[0], size[1]


def check_layers(layers: Mapping[str, str], student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Returns pairs of layers, student to teacher, after looking them up in both networks.

    Args:
        layers: teacher's name by student's name.
        student: the network that learns.
        teacher: the network to learn from.

    Raises:
        ValueError: no pair, or a name that a network does not have.
        TypeError: anything but a mapping of names.

    Example:
        >>> check_layers({"0": "1"}, nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()))
        {'0': '1'}
    """
    if not isinstance(layers, Mapping) or not all(isinstance(name, str) for pair in layers.items() for name in pair):
        raise TypeError(f"layers is {layers!r}; expected names as in {{'layer4': 'layer4'}}, student: teacher.")
    if not layers:
        raise ValueError("layers is empty; name at least one pair of layers, {student: teacher}.")
    for role, model, names in (("student", student, layers.keys()), ("teacher", teacher, layers.values())):
        known = dict(_bare(model).named_modules())
        for name in names:
            if name not in known:
                layer_names(_bare(model), [name], role)  # raises, and suggests names
                raise ValueError(f"{role} has no module {name!r}; give its whole name, patterns are not taken.")
    return dict(layers)


def _bare(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, MaskedViT) else model


@contextlib.contextmanager
def _hooks(
    model: nn.Module, layers: Sequence[str], found: dict[str, Tensor], copied: Collection[str], versions: dict[str, int]
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(layers):
            reader = _reader(name, found, copied, versions)
            stack.callback(model.get_submodule(name).register_forward_hook(reader).remove)
        yield


def _reader(
    name: str, found: dict[str, Tensor], copied: Collection[str], versions: dict[str, int]
) -> Callable[..., None]:
    def read(_module: nn.Module, _args: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(feature, Tensor):
            raise TypeError(f"the layer {name!r} returns {type(feature).__name__}; name one that returns a tensor.")
        if name in found:
            raise ValueError(f"the layer {name!r} runs more than once in a forward; name one that runs once.")
        found[name] = keep_output(name, feature, copied, versions)

    return read


def _as_map(network: Any, name: str, feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Any layout of a map -> ``(B, C, h, w)``."""
    if feature.dim() == 4:
        return feature.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else feature
    if feature.dim() == 3:
        grid = _patch_grid(network, feature.shape[1], size)
        if grid is not None:
            tokens = feature[:, -math.prod(grid) :]  # (B, prefix + n, D) -> (B, n, D)
            return tokens.mT.unflatten(2, grid)
    raise ValueError(
        f"the layer {name!r} returns shape {tuple(feature.shape)}; expected a map (B, C, h, w), or the tokens of a ViT "
        "(B, tokens, width) over a grid of patches."
    )


def _patch_grid(network: Any, tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Grid of the last tokens: what the patch embedding says, or the square that the number of tokens allows."""
    embed: Any = getattr(network, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):
        grid: tuple[int, int] = embed.dynamic_feat_size(size)
        if 0 <= tokens - math.prod(grid) <= getattr(network, "num_prefix_tokens", 0):
            return grid
    side = math.isqrt(tokens - getattr(network, "num_prefix_tokens", 0))
    return (side, side) if side > 0 and side * side + getattr(network, "num_prefix_tokens", 0) == tokens else None
