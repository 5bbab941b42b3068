"""``fastmkd show RUN --features``: what a method has to show of test pictures of any size."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from ..methods import Panel
from ..methods.dense_method import DenseMethod
from ..methods.dense_pictures import choose_level
from .build import Setup
from .errors import UserError
from .loading import Loader
from .seeds import seed_all
from .sheet import choose, draw_panel, new_figure, save_figure, to_pixels
from .tasks import task_of
from .tasks.detection import without_crowds

__all__ = ["show_features"]


@torch.no_grad()
def show_features(setup: Setup, out: str | Path, count: int = 4, level: str | None = None) -> None:
    """Draws a column of panels for each picture.

    Args:
        setup: with a trained student and trained heads.
        out: PNG (or PDF, SVG) to write.
        count: how many test pictures, spread over the classes.
        level: which of the method's levels; None is its first choice.

    Raises:
        UserError: a method that shows nothing but the input or has no such level, or no picture can be read.
    """
    source, recipe, method, task = setup.source, setup.recipe, setup.method, task_of(setup.source)
    if not method.has_pictures:
        raise UserError(f"{type(method).__name__} has no features to show; a run of MKD or DenseKD has.")
    accepted = inspect.signature(method.pictures).parameters
    chosen: dict[str, Any] = {}
    if level is not None:
        if "level" not in accepted:
            raise UserError(f"--level is {level}, but {type(method).__name__} has no levels to choose from.")
        chosen["level"] = level
    loader = Loader(source.test, recipe.data, None, source.image_size, torch.device("cpu"), recipe.seed, task)
    batch = next(loader.batches([choose(source, count)]), None)
    if batch is None:
        raise UserError("none of the test pictures to show can be read.")
    images, targets = task.finisher(source)(batch.images, batch.targets)
    method.eval()
    columns: list[list[Panel]] = []
    # A detector takes pixels in [0, 1] and normalises them itself.
    mean, std = ([0.0], [1.0]) if source.task == "detection" else (source.mean, source.std)
    seed_all(recipe.seed, "panels")  # the same masks whenever it is drawn
    for image, target in zip(images, targets, strict=True):  # one at a time, for sizes may differ
        one: Any = [image] if source.task == "detection" else image[None]
        if source.task == "detection" and "targets" in accepted:
            chosen["targets"] = [without_crowds(target)]  # as in training
        try:
            panels = method.pictures(one, **chosen)
        except ValueError as error:
            raise UserError(f"{type(method).__name__} cannot show this: {error}") from None
        columns.append(to_pixels(panels, mean, std))
    title = f"{recipe.name}: {type(method).__name__}"
    if isinstance(method, DenseMethod):
        shown = method.levels[choose_level(method, level)]
        title += f"\nlevel {shown.name}, stride {shown.stride}"
    save_figure(_figure(columns, title), out)


def _figure(columns: list[list[Panel]], title: str) -> Any:
    rows = len(columns[0])
    figure = new_figure(1.6 * len(columns) + 1.7, 1.6 * rows + 0.9)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for cells, panels in zip(axes.T, columns, strict=True):
        inputs = next((panel.image for panel in panels if panel.kind == "image"), None)
        for cell, panel in zip(cells, panels, strict=True):
            draw_panel(cell, panel, 0, inputs)
    for cells, panel in zip(axes, columns[0], strict=True):
        cells[0].set_ylabel(panel.title, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.supxlabel("heat maps: dark least or hidden, yellow most, stretched for each picture", fontsize=8)
    return figure
