"""How dense methods find their way in a detector, a segmenter or a classifier, and read maps from it by name.

A layer is named as in ``named_modules()``. One that returns several maps, as a feature pyramid does, stands for all of
them; ``"backbone.fpn:p6"`` is one of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .features import eval_mode, input_shape
from .overwritten import keep_output, overwritten

__all__ = ["PROBE_SIDE", "Form", "Levels", "form_of", "pair_levels", "probe_levels", "read_levels", "run_features"]

Task = Literal["detection", "segmentation", "classification"]
PROBE_SIDE = 256  # pixels; every stride up to 128 divides it


class Form(NamedTuple):
    """Where the parts of a network are.

    Attributes:
        task: what it is for.
        part: the module to be masked; "" for the whole network.
        layers: the levels to compare.
        features: the module that makes the levels, without a head; "" for the whole network.

    Example:
        >>> import timm
        >>> form_of(timm.create_model("resnet18"), "student")
        Form(task='classification', part='', layers=('layer4',), features='')
    """

    task: Task
    part: str
    layers: tuple[str, ...]
    features: str


class Levels(NamedTuple):
    """What was read of a network.

    Attributes:
        maps: ``(B, C, h, w)`` by the level's name.
        logits: maps of class logits, ``(B, K, h, w)`` each; empty unless asked for.
    """

    maps: dict[str, Tensor]
    logits: list[Tensor]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Levels:
        """The same with a function applied to every tensor.

        Args:
            fn: for example a move to another device.
        """
        return Levels({name: fn(x) for name, x in self.maps.items()}, [fn(x) for x in self.logits])


def form_of(network: Any, role: str) -> Form:
    """Returns where the parts of a network are.

    Known are torchvision's detectors and what has their face (``transform``, ``backbone.body``, ``backbone.fpn``),
    segmentation-models-pytorch (``encoder``, ``decoder``, ``segmentation_head``), torchvision's segmenters
    (``backbone``, ``classifier``), and classifiers whose last stage is known to timm or is called ``layer4``.

    Args:
        network: the network.
        role: "student" or "teacher", for messages.
    """
    backbone = getattr(network, "backbone", None)
    if hasattr(network, "transform") and backbone is not None:
        for part in ("body", "fpn"):
            if not isinstance(getattr(backbone, part, None), nn.Module):
                raise ValueError(
                    f"{role} is a {type(network).__name__} whose backbone has no {part!r}; expected a feature pyramid "
                    "as torchvision's BackboneWithFPN, body and fpn."
                )
        return Form("detection", "backbone.body", ("backbone.fpn",), "backbone")
    if all(hasattr(network, part) for part in ("encoder", "decoder", "segmentation_head")):
        return Form("segmentation", "encoder", ("encoder:-1",), "encoder")
    if backbone is not None and hasattr(network, "classifier"):
        return Form("segmentation", "backbone", ("backbone:out",), "backbone")
    stages = getattr(network, "feature_info", None)
    if stages:
        return Form("classification", "", (stages[-1]["module"],), "")
    return Form("classification", "", ("layer4",) if hasattr(network, "layer4") else (), "")


def run_features(network: nn.Module, form: Form, images: Tensor) -> Any:
    """Runs what makes the levels: no head of a detector or a segmenter.

    Args:
        network: the network.
        form: of it.
        images: ``(B, C, H, W)``, as the backbone gets them.
    """
    if form.features:
        return network.get_submodule(form.features)(images)
    without_head = getattr(network, "forward_features", network)
    return without_head(images)


@contextlib.contextmanager
def read_levels(
    network: nn.Module,
    layers: Sequence[str],
    found: dict[str, Tensor],
    dense: Callable[[str, Any], Any] | None = None,
    copied: Collection[str] = (),
) -> Iterator[dict[str, int]]:
    """Reads the outputs of layers through hooks that live inside the context.

    Args:
        network: the network.
        layers: their names; several may name one module.
        found: gets ``(B, C, h, w)`` by the level's name, a name and a key for each map of a module with several.
        dense: what is applied to a module's output, given its name first, before maps are read from it.
        copied: levels that a later layer overwrites, as `probe_levels` says; they are read from copies.

    Yields:
        For `refuse_overwritten`, which is to be called after the forward pass.

    Raises:
        ValueError: while the network runs: a module that runs twice, an output without such a key or that is no map.
    """
    keys: dict[str, list[str | None]] = {}
    for layer in layers:
        name, colon, key = layer.partition(":")
        keys.setdefault(name, []).append(key if colon else None)
    versions: dict[str, int] = {}

    def reader(name: str, wanted: list[str | None]) -> Callable[..., None]:
        def read(_module: nn.Module, _args: Any, output: Any) -> None:
            if any(level.partition(":")[0] == name for level in found):
                raise ValueError(f"the layer {name!r} runs more than once in a forward; name one that runs once.")
            maps = _by_key(name, output if dense is None else dense(name, output), wanted)
            for level, x in maps.items():
                if not isinstance(x, Tensor) or x.dim() != 4:
                    what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                    raise ValueError(f"the layer {level!r} returns {what}; expected a map (B, C, h, w).")
                x = x.permute(0, 3, 1, 2) if _channels_last(network, name) else x
                found[level] = keep_output(level, x, copied, versions)

        return read

    with contextlib.ExitStack() as stack:
        for name, wanted in keys.items():
            stack.callback(network.get_submodule(name).register_forward_hook(reader(name, wanted)).remove)
        yield versions


def _channels_last(network: nn.Module, name: str) -> bool:
    """Whether a module returns ``(B, h, w, C)``: of it and those around it the nearest that tells, as timm's do."""
    parts = name.split(".") if name else []
    around = [network.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
    return next((fmt == "NHWC" for part in around if (fmt := getattr(part, "output_fmt", None)) is not None), False)


def _by_key(name: str, output: Any, wanted: list[str | None]) -> dict[str, Any]:
    """The outputs of a module by the level's name."""
    if isinstance(output, Mapping):
        maps = {str(key): x for key, x in output.items()}
    elif isinstance(output, list | tuple):
        maps = {str(i): x for i, x in enumerate(output)}
        maps |= {key: output[int(key)] for key in wanted if key and key.startswith("-") and -int(key) <= len(output)}
    else:
        if wanted != [None]:
            raise ValueError(f"the layer {name!r} returns one map, so {name}:{wanted[0]} is none; leave the key out.")
        return {name: output}
    for key in wanted:
        if key is not None and key not in maps:
            raise ValueError(f"the layer {name!r} returns the levels {', '.join(maps)}, and no {key!r} among them.")
    chosen = [key for key in maps if key in wanted or (None in wanted and not key.startswith("-"))]
    return {f"{name}:{key}": maps[key] for key in chosen}


@torch.no_grad()
def probe_levels(
    network: nn.Module, form: Form, role: str, layers: Sequence[str], image_size: int | Sequence[int] | None
) -> tuple[dict[str, Tensor], tuple[int, int], tuple[str, ...]]:
    """Runs a network on one black image in eval mode, to learn its levels; leaves it as it was.

    Args:
        network: the network.
        form: of it.
        role: "student" or "teacher", for messages.
        layers: names of layers.
        image_size: side of the image, or height and width; None is 256 pixels, or what a classifier was made for.

    Returns:
        The levels in the order of `layers`, the image's size, and the levels that a later layer overwrites.

    Raises:
        ValueError: a layer that there is not or that does not run, or an image that the network does not take.
    """
    modules = dict(network.named_modules())
    for layer in layers:
        name = layer.partition(":")[0]
        if name not in modules:
            raise ValueError(
                f"{role} has no module {name!r}; name its levels with layers={{student's: teacher's}}, as in "
                "named_modules(), and one of several outputs as 'module:key'."
            )
        if form.features and not f"{name}.".startswith(f"{form.features}."):
            raise ValueError(
                f"the layer {layer!r} of the {role} lies outside of {form.features!r}, and no more of a network than "
                "that is run for its levels."
            )
    part: Any = network.get_submodule(form.part)
    if image_size is None and form.task != "classification":
        embeds = (module for module in part.modules() if getattr(module, "strict_img_size", False))
        image_size = next((embed.img_size for embed in embeds), None) or PROBE_SIDE  # a Swin takes one size alone
    channels, *size = input_shape(part, image_size)
    weight = next(network.parameters())
    found: dict[str, Tensor] = {}
    images = torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype)
    try:
        with eval_mode(network), read_levels(network, layers, found) as versions:
            run_features(network, form, images)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{role} does not take an image of {size[0]} x {size[1]} pixels ({reason}); give the size of the training "
            "images as image_size."
        ) from None
    silent = [
        layer for layer in layers if not any(level.partition(":")[0] == layer.partition(":")[0] for level in found)
    ]
    if silent:
        raise ValueError(f"the layer {silent[0]!r} of the {role} did not run; name one that does.")
    return found, (size[0], size[1]), overwritten(found, versions)


def pair_levels(
    layers: Mapping[str, str], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[str, str]:
    """Returns which level of the teacher belongs to which of the student.

    Args:
        layers: the teacher's layer by the student's.
        student: its levels, from `probe_levels`.
        teacher: its levels, for images of the same size.

    Raises:
        ValueError: layers with other levels, or levels of other sizes.

    Example:
        >>> levels = {f"fpn:{key}": torch.zeros(1, 1, side, side) for key, side in (("0", 8), ("1", 4))}
        >>> pair_levels({"fpn": "fpn"}, levels, levels)
        {'fpn:0': 'fpn:0', 'fpn:1': 'fpn:1'}
    """
    pairs: dict[str, str] = {}
    for own, other in layers.items():
        of_student, of_teacher = _levels_of(own, student), _levels_of(other, teacher)
        if len(of_student) == len(of_teacher) == 1:
            matched = [(next(iter(of_student.values())), next(iter(of_teacher.values())))]
        elif set(of_student) == set(of_teacher):
            matched = [(level, of_teacher[key]) for key, level in of_student.items()]
        else:
            raise ValueError(
                f"the student's {own!r} has the levels {', '.join(of_student)} but the teacher's {other!r} "
                f"{', '.join(of_teacher)}; pair them one by one, layers={{'{own}:{next(iter(of_student))}': "
                f"'{other}:{next(iter(of_teacher))}', ...}}, or build both with the same levels."
            )
        pairs.update(matched)
    for own, other in pairs.items():
        s, t = student[own].shape[2:], teacher[other].shape[2:]
        if s != t:
            raise ValueError(
                f"for the same image the student's level {own!r} has {s[0]} x {s[1]} positions but the teacher's "
                f"{other!r} {t[0]} x {t[1]}; pair levels of the same stride with layers={{student's: teacher's}}."
            )
    return pairs


def _levels_of(layer: str, found: Mapping[str, Tensor]) -> dict[str, str]:
    """Levels of a layer by key; of a module with several maps all, of a level itself one."""
    if layer in found:
        return {layer.partition(":")[2]: layer}
    return {level.partition(":")[2]: level for level in found if level.partition(":")[0] == layer}
