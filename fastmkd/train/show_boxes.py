"""``fastmkd show RUN`` for a detector: test pictures with their true boxes, and with those that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .build import Setup
from .errors import UserError
from .loading import Loader
from .sheet import choose, new_figure, save_figure
from .tasks import task_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_of_boxes", "show_boxes"]

COLOURS = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe", "#008080",
)  # fmt: skip


@torch.no_grad()
def show_boxes(setup: Setup, out: str | Path, count: int = 8, score: float = 0.3) -> None:
    """Draws test pictures, spread over the classes of their largest boxes; those without any come last.

    Args:
        setup: with a trained detector.
        out: PNG (or PDF, SVG) to write.
        count: how many pictures.
        score: least score of a found box that is drawn.

    Raises:
        UserError: no picture can be read.
    """
    source, recipe, task = setup.source, setup.recipe, task_of(setup.source)
    loader = Loader(source.test, recipe.data, None, source.image_size, torch.device("cpu"), recipe.seed, task)
    batch = next(loader.batches([choose(source, count)]), None)
    if batch is None:
        raise UserError("none of the test pictures to show can be read.")
    images, targets = task.finisher(source)(batch.images, batch.targets)
    found = setup.student.eval()(images)
    figure = figure_of_boxes(images, targets, found, source.classes, score)
    figure.suptitle(f"{recipe.name}: {recipe.student.name}", fontsize=12, fontweight="bold")
    save_figure(figure, out)


def figure_of_boxes(
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    found: Sequence[dict[str, Tensor]],
    classes: Sequence[str],
    score: float = 0.3,
) -> Figure:
    """Draws a column per picture: above with its true boxes (crowds dashed), below with those found, or the best score.

    Args:
        images: ``(3, H, W)`` in [0, 1] each.
        targets: with ``boxes``, ``labels`` and ``iscrowd``.
        found: with ``boxes``, ``labels`` and ``scores``.
        classes: names; label 1 is the first.
        score: least score of a found box that is drawn.
    """
    figure = new_figure(2.2 * len(images) + 0.8, 4.8)
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (image, true, said) in enumerate(zip(images, targets, found, strict=True)):
        for cell in axes[:, column]:
            # Corners of boxes count from the border of the picture, not from the middle of its first pixel.
            extent = (0, image.shape[2], image.shape[1], 0)
            cell.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest", extent=extent)
            cell.set(xticks=[], yticks=[])
        for box, label, crowd in zip(true["boxes"], true["labels"], true["iscrowd"], strict=True):
            _draw(axes[0][column], box, int(label), classes[int(label) - 1], "--" if crowd else "-")
        # An untrained RetinaNet or FCOS of torchvision may find the background, label 0.
        things = said["labels"] > 0
        sure = ((said["scores"] >= score) & things).nonzero()[:, 0]
        for i in sure[said["scores"][sure].argsort()]:  # the surest last, over the others
            label = int(said["labels"][i])
            _draw(axes[1][column], said["boxes"][i], label, f"{classes[label - 1]} {said['scores'][i]:.2f}", "-")
        if not len(sure):  # an empty picture would leave open whether it was looked at
            best = f"none; best {float(said['scores'][things].max()):.2f}" if things.any() else "none"
            axes[1][column].set_xlabel(best, fontsize=8)
    for row, title in enumerate(("true", f"found,\nscore from {score:g}")):
        axes[row][0].set_ylabel(title, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def _draw(cell: Axes, box: Tensor, label: int, text: str, line: Any) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box.tolist()
    colour = COLOURS[(label - 1) % len(COLOURS)]
    cell.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.3, linestyle=line))
    # What reaches out of the picture is cut. So a label stands on its box, but under the edge of one that touches the
    # picture's upper border, and it ends where a box near the right border ends.
    _, width, height, _ = cell.get_images()[0].get_extent()
    left, above = x0 < 0.7 * width, y0 > 0.06 * max(width, height)
    red, green, blue = to_rgb(colour)
    cell.text(
        max(x0, 0) if left else min(x1, width), max(y0, 0), text, fontsize=6, clip_on=True, zorder=3,
        color="black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else "white",
        ha="left" if left else "right", va="bottom" if above else "top",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )  # fmt: skip
