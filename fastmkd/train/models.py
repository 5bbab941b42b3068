"""Networks by name (timm's, `fastmkd.nn.cifar`'s, detectors, segmenters), weights from files that cannot run code."""

from __future__ import annotations

import argparse
import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.views import classifier_of
from ..nn import cifar
from .data import DataSource
from .errors import UserError, shorten
from .schema import ModelRecipe, TeacherRecipe

__all__ = ["build_model", "load_weights", "model_kwargs", "read_state_dict"]

DETECTOR = "detector."  # how names of `fastmkd.nn.detectors.DETECTORS` begin
SEGMENTER = "segmenter."  # and those of `fastmkd.nn.segmenters.SEGMENTERS`
# What a detector may make of the longer side of a picture, for its shorter one of 800, on COCO.
LONGER = 1333 / 800

# Arguments of timm.create_model that name files to load.
LOADING = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")

# What PyTorch says of a pickle that names something to be called or made, as against one that it cannot follow.
CODE = ("GLOBAL", "unrecognized function", "unsupported class", "Can only create new object", "Can only build")

# A recipe's name cifar.vgg13 is CRD's network for 32 x 32 pixels; vgg13 is timm's.
CIFAR = {f"cifar.{name}": getattr(cifar, name) for name in cifar.__all__ if name.islower()}


def model_kwargs(recipe: ModelRecipe | TeacherRecipe, source: DataSource) -> dict[str, Any]:
    """Returns the arguments that make a network: the recipe's, and what the data decides where the recipe is silent.

    Args:
        recipe: which network.
        source: the data it will see.

    Raises:
        UserError: a network of `fastmkd.nn.cifar` on pictures that are not of three channels.
    """
    from timm.models import get_pretrained_cfg

    if recipe.name in CIFAR:
        if source.channels != 3:
            raise UserError(f"{recipe.name} takes colour pictures, and these have {source.channels} channel(s).")
        return {"num_classes": source.num_classes, **recipe.kwargs}
    if str(recipe.name).startswith(DETECTOR):
        decided = {
            "num_classes": source.num_classes,
            "image_size": [source.image_size, round(source.image_size * LONGER)],
            "image_mean": list(source.mean),
            "image_std": list(source.std),
        }
        return {**decided, **recipe.kwargs}
    if str(recipe.name).startswith(SEGMENTER):
        return {"num_classes": source.num_classes, "in_channels": source.channels, **recipe.kwargs}
    kwargs: dict[str, Any] = {"num_classes": source.num_classes, "in_chans": source.channels}
    config = get_pretrained_cfg(recipe.name or "")
    if config is not None and config.fixed_input_size and config.input_size[-1] != source.image_size:
        kwargs["img_size"] = source.image_size
    return {**kwargs, **recipe.kwargs}


def build_model(recipe: ModelRecipe | TeacherRecipe, kwargs: dict[str, Any], role: str) -> nn.Module:
    """Makes a network and loads its weights, if the recipe names any.

    Args:
        recipe: which network.
        kwargs: arguments of the network, see `model_kwargs`.
        role: "student" or "teacher", for messages.

    Raises:
        UserError: the name is not known, an argument is refused, or the weights do not fit.

    Example:
        >>> small = {"embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 2}
        >>> build_model(ModelRecipe(), small, "student").num_classes
        2
        >>> build_model(ModelRecipe("cifar.vgg8"), {"num_classes": 2}, "student").num_classes
        2
    """
    import timm

    loading = [key for key in LOADING if key in kwargs]
    if loading:
        raise UserError(
            f"{role}.kwargs has {shorten(loading)}, with which timm would load a file its own way; give the file as "
            f"{role}.weights, which cannot run code."
        )
    if recipe.name in CIFAR:
        if recipe.pretrained:
            raise UserError(f"{role}.pretrained is true, but {recipe.name} has no weights to download; train it first.")
        make: Any = CIFAR[recipe.name]
    elif str(recipe.name).startswith(DETECTOR):
        from ..nn.detectors import build_detector

        kind = str(recipe.name).removeprefix(DETECTOR)
        make = functools.partial(build_detector, kind, pretrained=recipe.pretrained)
    elif str(recipe.name).startswith(SEGMENTER):
        from ..nn.segmenters import build_segmenter

        kind = str(recipe.name).removeprefix(SEGMENTER)
        make = functools.partial(build_segmenter, kind, pretrained=recipe.pretrained)
    elif isinstance(recipe.name, str) and timm.is_model(recipe.name):
        make = functools.partial(timm.create_model, recipe.name, pretrained=recipe.pretrained)
    else:
        own = [name for name in CIFAR if str(recipe.name).startswith("cifar")]
        near = own or timm.list_models(f"{str(recipe.name).partition('_')[0]}*")[:5]
        hint = f" Near it are {', '.join(near)}." if near else ""
        raise UserError(f"{role}.name is {recipe.name!r}, which timm does not know.{hint}")
    try:
        model: nn.Module = make(**kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).removesuffix(".")
        raise UserError(f"cannot make the {role} {recipe.name} with {kwargs}: {reason}.") from None
    if recipe.weights is not None:
        load_weights(model, recipe.weights, role)
    elif isinstance(recipe, ModelRecipe) and recipe.backbone is not None:
        load_weights(model, recipe.backbone, role, classifier=False)
    return model


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads weights from ``.safetensors``, or from ``.pth`` and its like without running any code in it.

    Args:
        path: the file. A checkpoint that keeps its weights under ``model`` or ``state_dict`` is opened; one with the
            networks ``teacher`` and ``student``, as DINO's, gives both, under these names.

    Raises:
        UserError: missing, cut off, not weights, or a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the weights {path} do not exist; check the path.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"the weights {path} are cut off or damaged ({error}); get the file again.") from None
    try:
        # The arguments of a run, which MAE's, DeiT's and DINO's checkpoints hold, are plain values and no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, EOF, runtime and value errors for one broken file or another
        if any(sign in str(error) for sign in CODE):
            raise UserError(
                f"the weights {path} hold more than tensors, and loading them could run code; it was refused. "
                "Convert the file to .safetensors where it can be trusted."
            ) from None
        kind = type(error).__name__
        raise UserError(
            f"the weights {path} are cut off or damaged, or no weights that torch.save wrote ({kind}); get the file "
            "again."
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if isinstance(state, dict) and isinstance(state.get("teacher"), dict):
        networks = {role: state[role] for role in ("teacher", "student") if isinstance(state.get(role), dict)}
        state = {f"{role}.{key}": value for role, network in networks.items() for key, value in network.items()}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"the weights {path} are not a dict of tensors by name; save model.state_dict().")
    return state


def load_weights(model: nn.Module, path: str | Path, role: str, classifier: bool = True) -> None:
    """Loads weights into a model; every key and shape must fit.

    Args:
        model: the network.
        path: see `read_state_dict`.
        role: "student" or "teacher", for messages.
        classifier: False keeps the model's own classifier, whose keys the file may have, in whatever shape, or lack;
            of a detector or a segmenter it loads the backbone alone, from weights of the classifier that this was.

    Raises:
        UserError: keys or shapes differ (all are listed, up to a few of each kind), or the file cannot be read.
    """
    from ..nn.segmenters import encoder_of
    from ..nn.timm_names import names_of_timm
    from .encoder_checkpoint import find_layout, load_encoder

    state, own = read_state_dict(path), model.state_dict()
    layout = find_layout(state)
    if layout is not None:
        left_out, _, resized = load_encoder(model, state, path, layout, role, classifier)
        if left_out:
            warnings.warn(f"of {path} the {role} did not take {shorten(left_out)}.", stacklevel=2)
        if resized:
            warnings.warn(f"for the {role} the weights {path} were fitted: {resized}.", stacklevel=2)
        return
    backbone: Any = getattr(model, "backbone", None)
    if not classifier and hasattr(backbone, "body"):
        load_body(backbone.body, state, path, role)
        return
    if not classifier and (encoder := encoder_of(model)) is not None:
        plain = names_of_timm(encoder.state_dict(), state)
        _refuse_misfits(encoder.state_dict(), plain, [], path, f"{role}'s encoder")
        encoder.load_state_dict(plain)
        return
    if not classifier:
        last = {id(p) for layer in classifier_of(model) for p in layer.parameters()}
        state |= {name: own[name] for name, p in model.named_parameters() if id(p) in last}
    unknown = [k for k in state if k not in own]
    _refuse_misfits(own, state, unknown, path, role)
    model.load_state_dict(state)


def load_body(body: Any, state: dict[str, Tensor], path: str | Path, role: str) -> None:
    """Loads the weights of a classifier into what a detector has of it.

    Args:
        body: a part of `fastmkd.nn.detectors`.
        state: by the keys of the classifier; what stands behind the last map of the body is left out.
        path: where they come from, for messages.
        role: "student" or "teacher", for messages.

    Raises:
        UserError: a key of the body is missing or of another shape.
    """
    own, plain = body.state_dict(), body.from_classifier(state)
    _refuse_misfits(own, plain, [], path, f"{role}'s backbone")
    body.load_state_dict({key: plain[key] for key in own})


def _refuse_misfits(
    own: dict[str, Tensor], state: dict[str, Tensor], unknown: list[str], path: str | Path, role: str
) -> None:
    problems = []
    missing = [k for k in own if k not in state]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for title, keys in (("missing", missing), ("not in the model", unknown), ("of another shape", shapes)):
        if keys:
            problems.append(f"{len(keys)} {title}: {shorten(keys)}")
    if problems:
        raise UserError(f"the weights {path} do not fit the {role}. Keys {'; '.join(problems)}.")


def method_arguments(kind: type, student: nn.Module, teacher: nn.Module | None) -> dict[str, nn.Module | None]:
    """Returns the networks that the constructor of a method asks for.

    Args:
        kind: a DistillMethod.
        student: the network to train.
        teacher: the network to learn from, or None.

    Raises:
        UserError: the method needs a teacher and there is none, or has no use for the one given.
    """
    parameters = inspect.signature(kind).parameters
    if "teacher" not in parameters:
        if teacher is not None:
            raise UserError(f"{kind.__name__} has no teacher; remove teacher from the recipe or choose another method.")
        return {"student": student}
    if teacher is None and parameters["teacher"].default is inspect.Parameter.empty:
        raise UserError(f"{kind.__name__} needs a teacher; give teacher.recipe, or teacher.name and teacher.weights.")
    return {"student": student, "teacher": teacher}
