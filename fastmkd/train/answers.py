"""What teacher, masked teacher and student say about a few test pictures (MaskedKD, Fig. 2 on the right)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..methods import MaskedKD, Panel
from ..methods.panels import kept_panel
from ..nn.ragged import RaggedKeep, keep_by_mass
from ..ops import select_tokens
from .augment import Finisher
from .build import Setup
from .errors import UserError
from .loading import Loader
from .sheet import draw_panel, new_figure, save_figure, spread, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Answers", "answers_of", "figure_of_answers", "kept_patches", "show_answers"]

TOP = 3
# Okabe and Ito's blue and orange, which colour-blind eyes tell apart; what is wrong is hatched besides.
RIGHT, WRONG = "#0072B2", "#E69F00"


class Answers(NamedTuple):
    """What several networks say about the same pictures.

    Attributes:
        images: ``(B, C, H, W)`` pixels in [0, 1].
        kept: ``(B, H, W)``, 1 where the masked teacher sees the picture.
        targets: ``(B,)`` int64 classes.
        probabilities: ``(B, K)`` by the network's name, in the order of drawing.
    """

    images: Tensor
    kept: Tensor
    targets: Tensor
    probabilities: dict[str, Tensor]


@torch.no_grad()
def kept_patches(method: MaskedKD, images: Tensor) -> Tensor | RaggedKeep:
    """Returns the patches that the method's teacher is shown.

    Args:
        method: hides patches from its teacher.
        images: ``(B, C, H, W)`` normalised for the student.
    """
    scores, grid = method.patch_scores(images), method.masked_grid((images.shape[-2], images.shape[-1]))
    if method.keep_mass is not None:
        return keep_by_mass(scores.values, method.keep_mass, grid=scores.grid, target_grid=grid)
    k = max(1, round(method.keep_ratio * math.prod(grid)))
    return select_tokens(scores.values, k, scores.grid, grid)


@torch.no_grad()
def answers_of(setup: Setup, count: int) -> Answers:
    """Asks the networks of a run about test pictures, spread over the classes.

    Args:
        setup: of MaskedKD, with a trained student.
        count: how many pictures.

    Raises:
        UserError: the method masks no teacher, or no picture can be read.
    """
    method, source = setup.method, setup.source
    if not isinstance(method, MaskedKD) or method.mask != "teacher" or not method.hides_patches:
        raise UserError(
            f"--answers compares a teacher with what it says when masked, but in {setup.recipe.name} "
            f"({type(method).__name__}) no patch is hidden from a teacher; name a run of MaskedKD with a smaller "
            "keep_ratio."
        )
    loader = Loader(source.test, setup.recipe.data, None, source.image_size, torch.device("cpu"), setup.recipe.seed)
    batch = next(loader.batches([spread(source.test.labels, count)]), None)
    if batch is None:
        raise UserError("none of the test pictures to show can be read.")
    images, targets = Finisher(source.mean, source.std, source.num_classes)(batch.images, batch.targets)
    method.eval()
    keep, size = kept_patches(method, images), (images.shape[-2], images.shape[-1])
    logits = {
        "teacher, all patches": method.ask_teacher(images, None).logits,
        f"teacher, {_share(method, keep, size):.0%} of the patches": method.ask_teacher(images, keep).logits,
        "student": setup.student(images),
    }
    (pixels,) = to_pixels([Panel("input", images, "image")], source.mean, source.std)
    kept = kept_panel(keep, method.masked_grid(size), size).image
    return Answers(pixels.image, kept, targets, {name: values.float().softmax(1) for name, values in logits.items()})


def _share(method: MaskedKD, keep: Tensor | RaggedKeep, size: tuple[int, int]) -> float:
    counts = keep.counts.float() if isinstance(keep, RaggedKeep) else torch.tensor(float(keep.shape[1]))
    return counts.mean().item() / math.prod(method.masked_grid(size))


def show_answers(setup: Setup, out: str | Path, count: int = 4) -> None:
    """Draws the three likeliest classes of teacher, masked teacher and student.

    Args:
        setup: see `answers_of`.
        out: PNG (or PDF, SVG) to write.
        count: how many pictures.

    Raises:
        UserError: see `answers_of`.
    """
    save_figure(figure_of_answers(answers_of(setup, count), setup.source.classes, setup.recipe.name), out)


def figure_of_answers(answers: Answers, classes: Sequence[str], title: str = "") -> Figure:
    """Draws a row per picture: the picture, what of it is kept, and bars of each network's likeliest classes.

    Args:
        answers: what the networks say.
        classes: names, in the order of the labels.
        title: over the picture.
    """
    from matplotlib.patches import Patch

    names = list(answers.probabilities)
    pictures = len(answers.targets)
    figure = new_figure(2.5 + 2.5 * len(names), 1.3 * pictures + 1.2)
    widths = [1.0, 1.0] + [1.6] * len(names)
    axes = figure.subplots(pictures, 2 + len(names), squeeze=False, gridspec_kw={"width_ratios": widths})
    panels = [Panel("picture", answers.images, "image"), Panel("kept patches", answers.kept, "mask")]
    for row, cells in enumerate(axes):
        target = int(answers.targets[row])
        for cell, panel in zip(cells, panels, strict=False):
            draw_panel(cell, panel, row, answers.images)
        cells[0].set_ylabel(classes[target], fontsize=9, rotation=0, ha="right", va="center", labelpad=6)
        for cell, name in zip(cells[2:], names, strict=True):
            _draw_bars(cell, answers.probabilities[name][row], target, classes)
            if row == pictures - 1:
                cell.set_xlabel("probability, %", fontsize=8)
            else:
                cell.tick_params(labelbottom=False)
    for cell, heading in zip(axes[0], [panel.title for panel in panels] + names, strict=True):
        cell.set_title(heading, fontsize=9)
    legend = [
        Patch(facecolor=RIGHT, label="the picture's class"),
        Patch(facecolor=WRONG, hatch="///", edgecolor="white", label="another"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _draw_bars(cell: Axes, probabilities: Tensor, target: int, classes: Sequence[str]) -> None:
    """The likeliest classes as bars, the first on top."""
    values, labels = (100 * probabilities.cpu()).topk(min(TOP, len(probabilities)))
    right = [label == target for label in labels.tolist()]
    cell.barh(
        range(len(labels)),
        values.tolist(),
        color=[RIGHT if hit else WRONG for hit in right],
        hatch=["" if hit else "///" for hit in right],
        edgecolor="white",
    )
    for place, value in enumerate(values.tolist()):
        inside = value > 70
        cell.text(value - 2 if inside else value + 2, place, f"{value:.0f}", va="center", fontsize=8,
                  ha="right" if inside else "left",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    cell.set_yticks(range(len(labels)), [classes[label] for label in labels.tolist()], fontsize=8)
    cell.tick_params(axis="x", labelsize=7)
    cell.set(xlim=(0, 100))
    cell.invert_yaxis()
    for side in ("top", "right"):
        cell.spines[side].set_visible(False)
