"""``fastmkd show RECIPE_OR_RUN``: a sheet of what a method has to show for some test pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import Panel
from .augment import Finisher
from .build import Setup, assemble
from .checkpoint import atomic_write
from .engine import train
from .errors import UserError
from .loading import Loader
from .models import load_weights
from .recipe import load_recipe, recipe_from_dict
from .rundir import RunDir
from .schema import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_sheet", "main", "open_recipe", "sheet_of", "show"]

HIDDEN = (0.66, 0.73, 0.82)


def show(recipe: Recipe, out: str | Path, count: int = 8) -> None:
    """Draws the pictures of a recipe's method with the trained student of its run.

    Args:
        recipe: of a finished run.
        out: PNG (or PDF, SVG) to write.
        count: how many test pictures, spread over the classes.

    Raises:
        UserError: the run has not finished, or no test picture can be read.
    """
    run = RunDir(recipe.run_dir)
    if run.result() is None:
        raise UserError(f"{recipe.name} has no finished run in {run.path}; fastmkd train it first.")
    setup = assemble(recipe, train)
    load_weights(setup.student, run.weights, "student")
    draw_sheet(*sheet_of(setup, count), out, title=f"{recipe.name}: {type(setup.method).__name__}")


def sheet_of(setup: Setup, count: int) -> tuple[list[Panel], list[str]]:
    """Runs the method on test pictures and returns panels with pixels in [0, 1], and a caption per picture.

    Args:
        setup: with a trained student.
        count: how many pictures.

    Raises:
        UserError: no picture can be read.
    """
    source = setup.source
    loader = Loader(source.test, setup.recipe.data, None, source.image_size, torch.device("cpu"), setup.recipe.seed)
    batch = next(loader.batches([_spread(source.test.labels, count)]), None)
    if batch is None:
        raise UserError("none of the test pictures to show can be read.")
    images, targets = Finisher(source.mean, source.std, source.num_classes)(*batch)
    setup.method.eval()
    with torch.no_grad():
        panels = setup.method.pictures(images)
        answers = setup.student(images).argmax(1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))
    plain = [
        panel._replace(image=(panel.image * std + mean).clamp(0, 1)) if panel.kind == "image" else panel
        for panel in panels
    ]
    captions = []
    for target, answer in zip(targets.tolist(), answers.tolist(), strict=True):
        wrong = "" if target == answer else f"\n(student: {source.classes[answer]})"
        captions.append(source.classes[target] + wrong)
    return plain, captions


def _spread(labels: Tensor, count: int) -> Tensor:
    """Indices of `count` pictures that take the classes in turn."""
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        members = labels == label
        turn[members] = torch.arange(int(members.sum()))
    order = torch.argsort(turn * (int(labels.max()) + 1) + labels)
    return order[:count]


def draw_sheet(panels: Sequence[Panel], captions: Sequence[str], out: str | Path, title: str = "") -> None:
    """Draws one column per picture and one row per panel.

    Images are drawn as they are, heat maps in viridis, and masks as the image with what is hidden faded to grey.

    Args:
        panels: the first one of kind "image" is what masks are laid over.
        captions: one per picture.
        out: the file; its suffix chooses the format.
        title: over the sheet.

    Raises:
        UserError: matplotlib does not know the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = len(captions), len(panels)
    figure = Figure(figsize=(1.15 * columns + 1.3, 1.2 * rows + 0.75), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    inputs = next((panel.image for panel in panels if panel.kind == "image"), None)
    for row, panel in enumerate(panels):
        for column in range(columns):
            cell = axes[row][column]
            cell.set_xticks([])
            cell.set_yticks([])
            for spine in cell.spines.values():
                spine.set_visible(False)
            _draw(cell, panel, column, inputs)
            if row == 0:
                cell.set_title(captions[column], fontsize=9, color="0.15")
        axes[row][0].set_ylabel(panel.title, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    kind = Path(out).suffix.lstrip(".").lower()
    if kind not in canvas.get_supported_filetypes():
        raise UserError(f"--out is {out}; expected a name that ends in .png, .pdf or .svg.")
    atomic_write(out, lambda part: figure.savefig(part, dpi=150, format=kind))


def _draw(cell: Axes, panel: Panel, index: int, inputs: Tensor | None) -> None:
    image = panel.image[index].float().cpu()
    if panel.kind == "heat":
        cell.imshow(image.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    elif panel.kind == "image" or inputs is None:
        cell.imshow(_channels_last(image if image.dim() == 3 else image[None]), vmin=0, vmax=1, interpolation="nearest")
    else:
        seen = inputs[index].float().cpu()
        seen = seen.expand(3, -1, -1) if seen.shape[0] == 1 else seen
        hidden = (image < 0.5)[None]  # (1, H, W)
        # A tint tells what is hidden from what is grey; a trace of the picture stays.
        faded = torch.tensor(HIDDEN).view(3, 1, 1) + 0.08 * seen.mean(0, keepdim=True)
        cell.imshow(_channels_last(torch.where(hidden, faded, seen)), interpolation="nearest")


def _channels_last(image: Tensor) -> Any:
    """``(1 or 3, H, W)`` -> ``(H, W, 3)`` array."""
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def main(argv: Sequence[str]) -> int:
    """Draws a sheet for a recipe or the folder of a run.

    Args:
        argv: after the command's name.
    """
    # The standard parser, because jsonargparse has no way to hand the recipe's own options on.
    parser = argparse.ArgumentParser(prog="fastmkd show", description=__doc__)
    parser.add_argument("target", help="recipe (YAML) or folder of a finished run")
    parser.add_argument("--out", default="show.png", help="file to write: .png, .pdf or .svg")
    parser.add_argument("--count", type=int, default=8, help="how many pictures")
    arguments, options = parser.parse_known_args(list(argv))
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}; expected at least 1.")
    show(open_recipe(arguments.target, options), arguments.out, arguments.count)
    sys.stdout.write(f"wrote {arguments.out}\n")
    return 0


def open_recipe(target: str, options: Sequence[str] = ()) -> Recipe:
    """Returns the recipe in a YAML file, or that of the folder of a run.

    Args:
        target: file or folder.
        options: command-line options, for a file only.

    Raises:
        UserError: it is neither, or options were given for a folder.
    """
    path = Path(target)
    if not path.is_dir():
        return load_recipe(path, options)
    description = RunDir(path).description()
    if description is None:
        raise UserError(f"{target} is not the folder of a run: it has no recipe.json.")
    if options:
        raise UserError(f"{options[0]} cannot be given with the folder of a run, whose recipe is fixed.")
    recipe = recipe_from_dict(description["recipe"])
    recipe.run.dir = str(path)  # it may have been moved
    return recipe
