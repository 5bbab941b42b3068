"""Plots of records: for each benchmark and device one SVG, a panel for each model and dtype, a bar for each variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .report import figure_name

__all__ = ["draw", "draw_all"]

Record = dict[str, Any]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")  # Okabe and Ito
_STYLE = {
    "svg.hashsalt": "fastmkd",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_all(records: list[Record], folder: Path) -> list[Path]:
    """Draws every benchmark on every device that has enough cases; returns the files written.

    Args:
        records: what `fastmkd.bench.report.latest` gives.
        folder: where the SVG files go; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["benchmark"], record["env"]["slug"]), []).append(record)
    paths = []
    for group in groups.values():
        name = figure_name(group)
        if name is not None:
            draw(group, folder / name)
            paths.append(folder / name)
    return paths


def draw(records: list[Record], path: Path) -> None:
    """Draws one benchmark on one device: ratio to the baseline by case, with quartiles.

    Args:
        records: of one benchmark and one device.
        path: the SVG file; the same records give the same bytes under one version of matplotlib.
    """
    panels = list(dict.fromkeys((r["panel"], r["dtype"]) for r in records))
    names = list(dict.fromkeys(v["name"] for r in records for v in r["variants"] if "ratio" in v))
    with mpl.rc_context(_STYLE):
        figure = Figure(
            figsize=(1.2 + 3.6 * min(len(panels), 2), 0.6 + 2.5 * ((len(panels) + 1) // 2)), layout="constrained"
        )
        axes = figure.subplots((len(panels) + 1) // 2, min(len(panels), 2), squeeze=False).flatten()
        for axis, (panel, dtype) in zip(axes, panels, strict=False):
            _panel(axis, [r for r in records if (r["panel"], r["dtype"]) == (panel, dtype)], names)
            axis.set_title(f"{panel}, {dtype}", fontsize=9)
        for axis in axes[len(panels) :]:
            axis.remove()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{records[0]['benchmark']} on {records[0]['env']['device']}", fontsize=10)
        figure.savefig(path, metadata={"Date": None})


def _panel(axis: Any, records: list[Record], names: list[str]) -> None:
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        found = [next((v for v in r["variants"] if v["name"] == name and "ratio" in v), None) for r in records]
        middle = [v["ratio"]["median"] if v else 0.0 for v in found]
        below = [v["ratio"]["median"] - v["ratio"]["low"] if v else 0.0 for v in found]
        above = [v["ratio"]["high"] - v["ratio"]["median"] if v else 0.0 for v in found]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(records))]
        bars = {
            "yerr": (below, above),
            "error_kw": {"linewidth": 0.8},
            "label": name,
            "color": COLOURS[i % len(COLOURS)],
        }
        axis.bar(places, middle, width * 0.92, **bars)
    axis.axhline(1.0, color="0.5", linewidth=0.8)
    axis.set_xticks(range(len(records)), [r["label"] for r in records])
    axis.set_ylabel("times the baseline")
