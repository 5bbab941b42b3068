"""What all pictures share: which test pictures are shown, how a panel is drawn, and how a file is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import Panel
from .checkpoint import atomic_write
from .data import DataSource
from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["choose", "draw_panel", "draw_sheet", "new_figure", "save_figure", "spread", "to_pixels"]

HIDDEN = (0.66, 0.73, 0.82)


def spread(labels: Tensor, count: int) -> Tensor:
    """Returns the indices of `count` pictures that take the classes in turn.

    Args:
        labels: ``(N,)`` int64.
        count: how many; all if there are fewer.

    Example:
        >>> spread(torch.tensor([0, 0, 1, 1, 2]), 4)
        tensor([0, 2, 4, 1])
    """
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        members = labels == label
        turn[members] = torch.arange(int(members.sum()))
    order = torch.argsort(turn * (int(labels.max()) + 1) + labels)
    return order[:count]


def choose(source: DataSource, count: int) -> Tensor:
    """Returns the indices of test pictures to show: `spread` over the classes, pictures without things last.

    Args:
        source: data of any task; of a detector the largest box counts.
        count: how many; all if there are fewer.
    """
    labels = source.test.labels
    if source.task == "detection":  # 0 is a picture without boxes
        labels = torch.where(labels > 0, labels, len(source.classes) + 1)
    return spread(labels, count)


def to_pixels(panels: Sequence[Panel], mean: Sequence[float], std: Sequence[float]) -> list[Panel]:
    """Takes the normalisation off images; heat maps and masks stay as they are.

    Args:
        panels: what a method shows.
        mean: per channel, of pixels in [0, 1].
        std: per channel.

    Example:
        >>> to_pixels([Panel("input", torch.zeros(1, 1, 1, 1), "image")], [0.5], [2.0])[0].image
        tensor([[[[0.5000]]]])
    """
    m, s = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return [
        panel._replace(image=(panel.image.float().cpu() * s + m).clamp(0, 1)) if panel.kind == "image" else panel
        for panel in panels
    ]


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure that needs no display.

    Args:
        width: in inches.
        height: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out: str | Path) -> None:
    """Writes a figure; an older file stays as it is until the new one is complete.

    Args:
        figure: what to write.
        out: the file; its suffix chooses the format.

    Raises:
        UserError: matplotlib does not know the format.
    """
    kind = Path(out).suffix.lstrip(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--out is {out}; expected a name that ends in .png, .pdf or .svg.")
    atomic_write(out, lambda part: figure.savefig(part, dpi=150, format=kind))


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
    columns, rows = len(captions), len(panels)
    figure = new_figure(1.15 * columns + 1.3, 1.2 * rows + 0.75)
    axes = figure.subplots(rows, columns, squeeze=False)
    inputs = next((panel.image for panel in panels if panel.kind == "image"), None)
    for row, panel in enumerate(panels):
        for column in range(columns):
            draw_panel(axes[row][column], panel, column, inputs)
            if row == 0:
                axes[row][column].set_title(captions[column], fontsize=9, color="0.15")
        axes[row][0].set_ylabel(panel.title, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    save_figure(figure, out)


def draw_panel(cell: Axes, panel: Panel, index: int, inputs: Tensor | None) -> None:
    """Draws one picture of a panel into a cell without ticks and frame.

    Args:
        cell: where.
        panel: what.
        index: which picture of the panel.
        inputs: ``(B, C, H, W)`` in [0, 1], what masks are laid over; None draws a mask in black and white.
    """
    cell.set(xticks=[], yticks=[])
    for spine in cell.spines.values():
        spine.set_visible(False)
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
