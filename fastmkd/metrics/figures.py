"""Pictures and tables of CKA: heat map, ranked minibatches (DPK, Fig. 5, 9 and 10), curves over training (7 and 8)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_curves", "draw_heat_map", "draw_ranked", "rank_square", "write_table"]

KINDS = (".png", ".svg", ".pdf")
NUMBERS_UP_TO = 12  # layers a side for which a cell has room for its number


def draw_heat_map(
    cka: Tensor,
    names_a: Sequence[str],
    names_b: Sequence[str],
    out: str | Path,
    title: str = "",
    labels: Any = ("", ""),
) -> None:
    """Draws CKA between the layers of two networks, the first layers below and on the left.

    Args:
        cka: ``(M, N)``; NaN is left white.
        names_a: M names, on the vertical axis.
        names_b: N names, on the horizontal axis.
        out: file that ends in .png, .svg or .pdf.
        title: above the picture.
        labels: names of the two networks.

    Raises:
        ValueError: another suffix.
    """
    m, n = cka.shape
    figure = _figure(out, 2.4 + 0.32 * min(n, 30), 1.8 + 0.32 * min(m, 30))
    axes = figure.subplots()
    image = axes.imshow(cka.cpu().numpy(), origin="lower", vmin=0, vmax=1, cmap="magma", aspect="auto")
    figure.colorbar(image, label="CKA")
    axes.set_xticks(range(n), names_b, rotation=90, fontsize=7)
    axes.set_yticks(range(m), names_a, fontsize=7)
    axes.set(xlabel=labels[1], ylabel=labels[0], title=title)
    if max(m, n) <= NUMBERS_UP_TO:
        for i, row in enumerate(cka.tolist()):
            for j, value in enumerate(row):
                colour = "black" if value > 0.6 or math.isnan(value) else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    _save(figure, out)


def rank_square(values: Tensor) -> Tensor:
    """Ranks values and lays them out row by row in a square, the largest first (DPK, Fig. 5).

    Args:
        values: ``(k,)``.

    Returns:
        ``(s, s)`` with the least s for which s * s >= k; NaN, which also fills what is left, comes last.

    Example:
        >>> rank_square(torch.tensor([0.1, 0.9, 0.5]))
        tensor([[0.9000, 0.5000],
                [0.1000,    nan]])
    """
    side = math.isqrt(max(len(values) - 1, 0)) + 1
    square = values.new_full((side * side,), float("nan"))
    square[: len(values)] = torch.where(values.isnan(), float("-inf"), values).sort(descending=True).values
    return square.masked_fill(square == float("-inf"), float("nan")).view(side, side)


def draw_ranked(values: Tensor, out: str | Path, title: str = "", quantity: str = "CKA") -> None:
    """Draws the CKA or cosine of each minibatch between two layers, ranked (DPK, Fig. 5 and 10).

    Args:
        values: ``(k,)``, one value a minibatch.
        out: file that ends in .png, .svg or .pdf.
        title: above the picture; the mean is added.
        quantity: label of the colours.

    Raises:
        ValueError: another suffix.
    """
    figure = _figure(out, 4.4, 3.9)
    axes = figure.subplots()
    image = axes.imshow(rank_square(values.cpu()).numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest")
    figure.colorbar(image, label=quantity)
    axes.set(xticks=[], yticks=[], xlabel=f"{len(values)} minibatches, ranked", title=title)
    axes.set_ylabel(f"mean {float(values.nanmean()):.3f}")
    _save(figure, out)


def draw_curves(steps: Sequence[int], curves: Mapping[str, Sequence[float]], out: str | Path, quantity: str) -> None:
    """Draws one curve a layer pair over training (DPK, Fig. 7 for CKA, Fig. 8 for the mask ratio).

    Args:
        steps: updates of the optimizer.
        curves: values at those steps, by label.
        out: file that ends in .png, .svg or .pdf.
        quantity: label of the vertical axis.

    Raises:
        ValueError: another suffix.
    """
    figure = _figure(out, 5.5, 3.6)
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(steps, values, marker="o", markersize=3, label=label)
    axes.set(xlabel="updates", ylabel=quantity, ylim=(min(0.0, axes.get_ylim()[0]), 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, out)


def write_table(header: Sequence[str], rows: Sequence[Sequence[Any]], out: str | Path) -> None:
    """Writes a CSV file with full precision.

    Args:
        header: names of the columns.
        rows: their values.
        out: the file.
    """
    with Path(out).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _figure(out: str | Path, width: float, height: float) -> Figure:
    if Path(out).suffix.lower() not in KINDS:
        raise ValueError(f"out is {out}; expected a name that ends in {', '.join(KINDS)}.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, out: str | Path) -> None:
    figure.savefig(out, dpi=150, format=Path(out).suffix.lower().lstrip("."))
