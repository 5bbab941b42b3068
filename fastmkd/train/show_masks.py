"""``fastmkd show RUN`` for a segmenter: test pictures, the classes of their pixels, and what it says they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .build import Setup
from .errors import UserError
from .loading import Loader
from .mask_pictures import IGNORE
from .mean_iou import confusion_matrix, mask_scores, predicted
from .sheet import new_figure, save_figure
from .tasks import task_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["coloured", "figure_of_masks", "show_masks"]

UNCOUNTED = (255, 255, 255)


@torch.no_grad()
def show_masks(setup: Setup, out: str | Path, count: int = 8) -> None:
    """Draws the first test pictures.

    Args:
        setup: with a trained segmenter.
        out: PNG (or PDF, SVG) to write.
        count: how many pictures.

    Raises:
        UserError: no picture can be read.
    """
    source, recipe, task = setup.source, setup.recipe, task_of(setup.source)
    loader = Loader(source.test, recipe.data, None, source.image_size, torch.device("cpu"), recipe.seed, task)
    batch = next(loader.batches([torch.arange(min(count, len(source.test)))]), None)
    if batch is None:
        raise UserError("none of the test pictures to show can be read.")
    images, targets = task.finisher(source)(batch.images, batch.targets)
    student = setup.student.eval()
    logits = [student(image[None])[0] for image in images]
    figure = figure_of_masks(batch.images, targets, logits, source.classes)
    figure.suptitle(f"{recipe.name}: {recipe.student.name}", fontsize=12, fontweight="bold")
    save_figure(figure, out)


def figure_of_masks(
    images: Sequence[Tensor], targets: Sequence[Tensor], logits: Sequence[Tensor], classes: Sequence[str]
) -> Figure:
    """Draws a column per picture: the picture, its true classes, those that were said with their mean IoU.

    Args:
        images: ``(3, H, W)`` uint8 each.
        targets: ``(H, W)`` int64 each; 255 is white.
        logits: ``(K, H, W)`` each; where none is finite is white, too.
        classes: their names; those that occur stand in a legend.
    """
    from matplotlib.patches import Patch

    figure = new_figure(1.5 * len(images) + 1.3, 5.6)
    axes = figure.subplots(3, len(images), squeeze=False)
    seen: set[int] = set()
    for column, (image, true, said) in enumerate(zip(images, targets, logits, strict=True)):
        answer = predicted(said)
        seen |= {*true.unique().tolist(), *answer.unique().tolist()} - {IGNORE}
        shown = [image, coloured(true, len(classes)), coloured(answer, len(classes))]
        for cell, picture in zip(axes[:, column], shown, strict=True):
            cell.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        score = mask_scores(confusion_matrix(said[None], true[None]))["miou"]
        axes[2][column].set_xlabel(f"mIoU {score:.0f} %", fontsize=8)
    for row, title in enumerate(("picture", "true", "said")):
        axes[row][0].set_ylabel(title, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    colours = coloured(torch.tensor([sorted(seen)]), len(classes))[:, 0].T / 255  # (classes seen, 3)
    patches = [
        Patch(facecolor=colour, label=classes[label])
        for colour, label in zip(colours.tolist(), sorted(seen), strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def coloured(labels: Tensor, num_classes: int) -> Tensor:
    """Gives each class a colour: 0 black, the others around the circle of hues, 255 white.

    Args:
        labels: ``(H, W)`` int64.
        num_classes: how many colours to tell apart.

    Returns:
        ``(3, H, W)`` uint8.

    Example:
        >>> coloured(torch.tensor([[0, 255]]), 3)[:, 0].T.tolist()
        [[0, 0, 0], [255, 255, 255]]
    """
    from matplotlib.colors import hsv_to_rgb

    table = torch.zeros(256, 3, dtype=torch.uint8)
    for label in range(1, num_classes):
        # Steps of the golden ratio keep neighbours apart.
        rgb = hsv_to_rgb((label * 0.618 % 1, 0.75, 0.95 if label % 2 else 0.7))
        table[label] = torch.tensor([round(255 * part) for part in rgb], dtype=torch.uint8)
    table[IGNORE] = torch.tensor(UNCOUNTED, dtype=torch.uint8)
    return table[labels].permute(2, 0, 1)
