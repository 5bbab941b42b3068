"""``fastmkd cost RECIPE.yaml|TIMM_MODEL ...``: multiply-adds of teacher and student by patches kept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..nn import MaskedViT
from .build import teacher_recipe
from .cost import IMAGENET_PICTURES, paper_operations, vit_macs
from .data import load_data
from .errors import UserError
from .models import build_model, model_kwargs
from .recipe import load_recipe
from .schema import ModelRecipe, Recipe

__all__ = ["Cost", "costs", "main", "recipe_models"]

PAPER_EPOCHS = 300  # of the runs in MaskedKD's Table 2


class Cost(NamedTuple):
    """What a network costs on some of its patches.

    Attributes:
        keep: patches kept.
        public: multiply-adds per image of the public code: embed all, gather, whole blocks.
        ours: multiply-adds per image of fastmkd.
        share: `ours` over those of the ordinary network, on all patches.
        run: operations of a whole training as the paper's Table 2 counts them.
    """

    keep: int
    public: int
    ours: int
    share: float
    run: int


def costs(model: nn.Module, shares: Sequence[float], pictures: int, epochs: int) -> Iterator[Cost]:
    """Counts a network at several shares of its patches.

    Args:
        model: see `fastmkd.train.cost.vit_macs`.
        shares: k over all patches.
        pictures: training pictures.
        epochs: how often the network sees each.

    Yields:
        One cost per share.

    Example:
        >>> import timm
        >>> deit = timm.create_model("deit_small_patch16_224")
        >>> [(cost.keep, f"{cost.run / 1e15:.0f}") for cost in costs(deit, [1, 0.5], IMAGENET_PICTURES, 300)]
        [(196, '1771'), (98, '867')]
    """
    patches = math.prod(MaskedViT(model).patch_grid())
    full = vit_macs(model, exact_savings=False).total
    for share in shares:
        keep = max(1, round(share * patches))
        ours, public = vit_macs(model, keep).total, vit_macs(model, keep, exact_savings=False).total
        yield Cost(keep, public, ours, ours / full, paper_operations(model, keep) * pictures * epochs)


def recipe_models(recipe: Recipe) -> dict[str, nn.Module]:
    """Makes student and teacher of a recipe without any weights, on the meta device.

    Args:
        recipe: names them.
    """
    source = load_data(recipe.data)
    parts = {"student": recipe.student}
    of_teacher = teacher_recipe(recipe)
    if of_teacher is not None:
        parts["teacher"] = of_teacher.student
    elif recipe.teacher is not None and recipe.teacher.name is not None:
        parts["teacher"] = ModelRecipe(recipe.teacher.name, recipe.teacher.kwargs)
    models = {}
    for role, part in parts.items():
        bare = ModelRecipe(part.name, part.kwargs)
        with torch.device("meta"):
            models[role] = build_model(bare, model_kwargs(bare, source), role)
    return models


def main(argv: Sequence[str]) -> int:
    """Prints the table; a share is that of the ordinary network, whole blocks on all patches.

    Args:
        argv: after the command's name.
    """
    # The standard parser, because jsonargparse has no way to hand the recipe's own options on.
    parser = argparse.ArgumentParser(prog="fastmkd cost", description=__doc__, allow_abbrev=False)
    parser.add_argument("targets", nargs="+", help="a recipe (YAML, with its options), or names of timm's models")
    parser.add_argument("--keep", type=float, nargs="+", default=[], help="shares of the patches; 1 0.75 0.5 0.25")
    parser.add_argument("--image_size", type=int, help="side in pixels, for timm's models")
    parser.add_argument("--pictures", type=int, help="training pictures; those of the recipe, or ImageNet's")
    parser.add_argument("--epochs", type=int, help="of training; those of the recipe, or the paper's 300")
    arguments, options = parser.parse_known_args(list(argv))
    targets: list[str] = arguments.targets
    for share in arguments.keep:
        if not 0 < share <= 1:
            raise UserError(f"--keep has {share}; expected shares of the patches above 0 and at most 1.")
    for name in ("image_size", "pictures", "epochs"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1.")
    shares = arguments.keep or [1.0, 0.75, 0.5, 0.25]
    pictures, epochs = IMAGENET_PICTURES, PAPER_EPOCHS
    if targets[0].endswith((".yaml", ".yml")):
        recipe = load_recipe(targets[0], [*options, *targets[1:]])
        models = recipe_models(recipe)
        pictures, epochs = len(load_data(recipe.data).train), recipe.schedule.epochs
        own = recipe.method.init_args.get("keep_ratio")
        if own is not None and not arguments.keep:
            shares = sorted({*shares, own}, reverse=True)
    else:
        if options:
            raise UserError(f"{options[0]} is an option of a recipe; name one, or only models of timm.")
        size = {} if arguments.image_size is None else {"img_size": arguments.image_size}
        with torch.device("meta"):
            models = {name: build_model(ModelRecipe(name), size, "model") for name in targets}
    report(models, shares, arguments.pictures or pictures, arguments.epochs or epochs)
    return 0


def report(models: dict[str, nn.Module], shares: Sequence[float], pictures: int, epochs: int) -> None:
    """Prints the table.

    Args:
        models: by the name to print.
        shares: k over all patches.
        pictures: training pictures.
        epochs: how often a network sees each.

    Raises:
        UserError: a network is not a ViT that can be counted.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Multiply-adds per image, in millions",
        caption="Public code: embed all, gather, whole blocks. Share: of it on all patches.\n"
        f"Paper: public code and layer norms in FLOPs, {pictures:,} pictures x {epochs} epochs.",
    )
    table.add_column("network", overflow="fold")
    for column in ("kept", "public code", "fastmkd", "share", "paper"):
        table.add_column(column, justify="right", no_wrap=True)
    for role, model in models.items():
        try:
            found = list(costs(model, shares, pictures, epochs))
            patches = math.prod(MaskedViT(model).patch_grid())
        except TypeError as error:
            raise UserError(f"cost counts ViTs only: {error}") from None
        for cost in found:
            table.add_row(
                role,
                f"{cost.keep} of {patches}",
                f"{cost.public / 1e6:.1f}",
                f"{cost.ours / 1e6:.1f}",
                f"{cost.share:.1%}",
                _engineering(cost.run),
            )
        table.add_section()
    Console().print(table)


def _engineering(operations: float) -> str:
    """A number below 1000 and a prefix: 866.9 P."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if operations < 1000 or prefix == "P":
            break
        operations /= 1000
    return f"{operations:.1f} {prefix}".rstrip()
