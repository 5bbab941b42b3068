"""``fastmkd cost RECIPE.yaml|RUN|TIMM_MODEL ...``: multiply-adds of teacher and student by patches kept.

For a recipe of DMAE or MAE: those of a whole step by patches left visible, beside the public code's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..methods import DMAE
from ..methods.mae_parts import count_hidden
from ..nn import MaskedViT
from ..nn.merge_cost import merged_macs, merges_like_mask
from ..nn.ragged_vit import why_not_ragged
from .build import build_method, method_class, teacher_recipe
from .cost import IMAGENET_PICTURES, paper_operations, vit_macs
from .data import load_data
from .dmae_cost import dmae_macs
from .errors import UserError
from .models import build_model, model_kwargs
from .schema import ModelRecipe, Recipe
from .show import open_recipe
from .tasks import classification_only

__all__ = ["Cost", "costs", "main", "recipe_models"]

PAPER_EPOCHS = 300  # of the runs in MaskedKD's Table 2
DMAE_RATIOS = (0.75, 0.9, 0.95)  # of DMAE's Fig. 2


class Cost(NamedTuple):
    """What a network costs on some of its patches.

    Attributes:
        keep: patches kept.
        public: multiply-adds per image of the public code: embed all, gather, whole blocks.
        ours: multiply-adds per image of fastmkd.
        share: `ours` over those of the ordinary network, on all patches.
        run: operations of a whole training as the paper's Table 2 counts them.
        merging: what merging tokens instead (MaskedKD, Fig. 3) costs when it is made as cheap: the patches that leave
            in the first block, and multiply-adds per image. None where that cannot be done.
    """

    keep: int
    public: int
    ours: int
    share: float
    run: int
    merging: tuple[int, int] | None


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
        ours, public = vit_macs(model, keep), vit_macs(model, keep, exact_savings=False).total
        run = paper_operations(model, keep) * pictures * epochs
        yield Cost(keep, public, ours.total, ours.total / full, run, _merging(model, share, ours.head))


def _merging(model: Any, share: float, head: int) -> tuple[int, int] | None:
    if why_not_ragged(model) is not None:
        return None
    patches = int(model.patch_embed.num_patches)
    try:
        merges = merges_like_mask(model, patches, share)
    except ValueError:  # not even merging all it can is that cheap
        return None
    return merges[0], merged_macs(model, merges, patches) + head


def recipe_models(recipe: Recipe) -> dict[str, nn.Module]:
    """Makes student and teacher of a recipe without any weights, on the meta device.

    Args:
        recipe: names them.
    """
    source = load_data(recipe.data)
    classification_only(source, "fastmkd cost")
    parts, sources = {"student": recipe.student}, {"student": source, "teacher": source}
    of_teacher = teacher_recipe(recipe)
    if of_teacher is not None:
        parts["teacher"], sources["teacher"] = of_teacher.student, load_data(of_teacher.data)
    elif recipe.teacher is not None and recipe.teacher.name is not None:
        parts["teacher"] = ModelRecipe(recipe.teacher.name, recipe.teacher.kwargs)
    models = {}
    for role, part in parts.items():
        bare = ModelRecipe(part.name, part.kwargs)
        with torch.device("meta"):
            models[role] = build_model(bare, model_kwargs(bare, sources[role]), role)
    return models


def main(argv: Sequence[str]) -> int:
    """Prints the table; a share is that of the ordinary network, whole blocks on all patches.

    Merging stands beside it after r, the patches that leave in the first block.

    Args:
        argv: after the command's name.
    """
    # The standard parser, because jsonargparse has no way to hand the recipe's own options on.
    parser = argparse.ArgumentParser(prog="fastmkd cost", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "targets", nargs="+", help="a recipe (YAML, with its options), a run, or names of timm's models"
    )
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
    pictures, epochs = arguments.pictures or IMAGENET_PICTURES, arguments.epochs or PAPER_EPOCHS
    if targets[0].endswith((".yaml", ".yml")) or Path(targets[0]).is_dir():
        recipe = open_recipe(targets[0], [*options, *targets[1:]])
        models = recipe_models(recipe)
        source = load_data(recipe.data)
        pictures = arguments.pictures or len(source.train)
        epochs = arguments.epochs or recipe.schedule.epochs
        if issubclass(method_class(recipe), DMAE):
            with torch.device("meta"):
                method: Any = build_method(recipe, models["student"], models.get("teacher"), source)
            report_dmae(method, [1 - share for share in arguments.keep], pictures, epochs)
            return 0
        own = recipe.method.init_args.get("keep_ratio")
        if own is not None and not arguments.keep:
            shares = sorted({*shares, own}, reverse=True)
    else:
        if (path := next((target for target in targets if "/" in target), None)) is not None:
            raise UserError(
                f"cost takes a recipe (YAML), the folder of a run, or names of timm's models; {path} is none of these."
            )
        if options:
            raise UserError(f"{options[0]} is an option of a recipe; name one, or only models of timm.")
        size = {} if arguments.image_size is None else {"img_size": arguments.image_size}
        with torch.device("meta"):
            models = {name: build_model(ModelRecipe(name), size, "model") for name in targets}
    report(models, shares, pictures, epochs)
    return 0


def report(models: dict[str, nn.Module], shares: Sequence[float], pictures: int, epochs: int) -> None:
    """Prints a table a network.

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

    console = Console()
    for role, model in models.items():
        try:
            found = list(costs(model, shares, pictures, epochs))
            patches = math.prod(MaskedViT(model).patch_grid())
        except TypeError as error:
            raise UserError(f"cost counts ViTs only: {error}") from None
        table = Table(title=f"{role}: multiply-adds per image, in millions")
        for column in ("kept", "public code", "fastmkd", "of full", "merging r", "paper's count"):
            table.add_column(column, justify="right")
        for cost in found:
            table.add_row(
                f"{cost.keep} of {patches}",
                f"{cost.public / 1e6:.1f}",
                f"{cost.ours / 1e6:.1f}",
                f"{cost.share:.1%}",
                "-" if cost.merging is None else f"{cost.merging[0]}: {cost.merging[1] / 1e6:.1f}",
                _engineering(cost.run),
            )
        console.print(table)
    console.print(
        "Public code: embed all, then gather. Paper's count: that and layer norms, "
        f"{pictures:,} pictures x {epochs} epochs."
    )


def report_dmae(method: DMAE, mask_ratios: Sequence[float], pictures: int, epochs: int) -> None:
    """Prints a table of DMAE's or MAE's parts, two rows for each share of hidden patches.

    Args:
        method: may live on the meta device.
        mask_ratios: shares of hidden patches; none takes the method's own and those of DMAE's Fig. 2.
        pictures: training pictures.
        epochs: how often each is seen.

    Raises:
        UserError: a share that leaves no visible or no hidden patch, or a network that cannot be counted.
    """
    from rich.console import Console
    from rich.table import Table

    grid = MaskedViT(method.student).patch_grid()
    patches = math.prod(grid)
    ratios = mask_ratios or [method.mask_ratio, *(r for r in DMAE_RATIOS if round(r * patches) < patches)]
    name = "DMAE" if method.layers else "MAE"
    table = Table(title=f"{name}: multiply-adds per image, in millions")
    for column in ("visible", "way", "student", "decoder", "teacher", "projection", "step", "training"):
        table.add_column(column, justify="left" if column == "way" else "right")
    try:
        for hidden in sorted({count_hidden(ratio, grid) for ratio in ratios}):
            for way in ("public code", "fastmkd"):
                macs = dmae_macs(method, hidden / patches, exact_savings=way == "fastmkd")
                numbers = [f"{part / 1e6:.1f}" for part in (*macs, macs.step)]
                visible = f"{patches - hidden} of {patches}" if way == "public code" else ""
                table.add_row(visible, way, *numbers, _engineering(macs.step * pictures * epochs, ""))
    except (TypeError, ValueError) as error:
        raise UserError(f"cost cannot count this: {error}") from None
    console = Console()
    console.print(table)
    console.print(
        "Public code: every patch embedded, every layer and the decoder of the teacher, every patch predicted. Step: "
        f"forward and backward, the teacher forward. Training: {pictures:,} pictures x {epochs} epochs."
    )


def _engineering(operations: float, unit: str = "FLOPs") -> str:
    """Four digits and a prefix: 866.9 PFLOPs."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if operations < 1000 or prefix == "P":
            break
        operations /= 1000
    return f"{operations:.1f} {prefix}{unit}"
