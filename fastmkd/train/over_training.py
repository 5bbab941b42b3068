"""Saliency and kept patches over training: the engine keeps what the method sees in a few pictures, `show` draws it.

A snapshot is a small file that needs no other, ``panels/epoch_000012.safetensors``: the pictures' pixels, the panels of
the method, and the labels. The run's checkpoints, of which only the last ones are left, are not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..methods import Panel
from .build import Setup
from .checkpoint import save_tensors
from .errors import UserError
from .loading import Batch, Loader
from .rundir import RunDir
from .seeds import seed_all
from .sheet import draw_panel, new_figure, save_figure, spread, to_pixels
from .tasks.base import Finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Snapshot", "Snapshots", "figure_over_training", "read_snapshots", "show_over_training", "snapshot_epochs"]

PICTURES = 8  # in a snapshot


class Snapshot(NamedTuple):
    """What a method showed at one moment of training.

    Attributes:
        epoch: epochs done; 0 is before training.
        panels: pixels in [0, 1], heat maps and masks, as `fastmkd.methods.DistillMethod.pictures` gives them.
        targets: ``(B,)`` int64 classes.
    """

    epoch: int
    panels: list[Panel]
    targets: Tensor


def snapshot_epochs(epochs: int, count: int) -> set[int]:
    """Returns after how many epochs to take a snapshot: evenly, before the first and after the last among them.

    Args:
        epochs: of the run.
        count: how many snapshots; 1 takes the last alone.

    Example:
        >>> sorted(snapshot_epochs(20, 6)), sorted(snapshot_epochs(2, 6)), snapshot_epochs(20, 1)
        ([0, 4, 8, 12, 16, 20], [0, 1, 2], {20})
    """
    return {round(epochs * i / (count - 1)) for i in range(count)} if count > 1 else {epochs} if count else set()


class Snapshots:
    """Writes the snapshots of a run.

    Args:
        setup: of the run. A method that has nothing but the input to show leaves no snapshots, nor does a task other
            than classification.
        run: its folder.
        loader: of the test pictures.
        finish: normalises them.
        accelerator: of Hugging Face Accelerate.
    """

    def __init__(self, setup: Setup, run: RunDir, loader: Loader, finish: Finish, accelerator: Any) -> None:
        recipe = setup.recipe
        silent = not setup.method.has_pictures or setup.source.task != "classification"
        self.epochs = set() if silent else snapshot_epochs(recipe.schedule.epochs, recipe.run.panels)
        self.setup, self.run, self.loader, self.finish, self.accelerator = setup, run, loader, finish, accelerator
        self._pictures: Batch | None = None
        self._shown = False  # whether they could be read

    def take(self, epoch: int) -> None:
        """Writes the snapshot of this moment, if one is due; every process must call it.

        Leaves the method in eval mode. Draws of other consumers are not disturbed: each seeds anew before it draws.

        Args:
            epoch: epochs done.
        """
        if epoch not in self.epochs:
            return
        source, method = self.setup.source, self.setup.method
        if self._pictures is None:
            (read,) = self.loader.planned([spread(source.test.labels, PICTURES)])
            # Others may be able to read them, and a method whose weights are split needs all processes.
            self._pictures = self.loader.blank() if read is None else read
            self._shown = read is not None
        images, targets = self.finish(self._pictures.images, self._pictures.targets)
        seed_all(self.setup.recipe.seed, "panels", epoch)
        method.eval()
        with torch.no_grad(), self.accelerator.autocast():
            panels = method.pictures(images)
        if self._shown and self.accelerator.is_main_process:
            _write(self.run.panels, Snapshot(epoch, to_pixels(panels, source.mean, source.std), targets))


def _write(folder: Path, snapshot: Snapshot) -> None:
    tensors = {"targets": snapshot.targets}
    for number, panel in enumerate(snapshot.panels):
        # Heat maps in half precision: eight bits would show other steps than the map has.
        small = panel.image.half() if panel.kind == "heat" else (255 * panel.image).round().to(torch.uint8)
        tensors[f"panel.{number}"] = small
    titles = json.dumps([[panel.title, panel.kind] for panel in snapshot.panels])
    metadata = {"format": "pt", "epoch": str(snapshot.epoch), "panels": titles}
    save_tensors(folder / f"epoch_{snapshot.epoch:06d}.safetensors", tensors, metadata)


def read_snapshots(run: RunDir) -> list[Snapshot]:
    """Reads the snapshots of a run, which may still be going on, in the order of training.

    Args:
        run: its folder.

    Raises:
        UserError: there are none, or one is damaged.
    """
    files = sorted(run.panels.glob("epoch_*.safetensors"))
    if not files:
        raise UserError(
            f"{run.path} has no panels: its method shows nothing but the input, run.panels was 0, or it was trained by "
            "a version without them. Train it again in another run.dir, with run.panels at how many moments to see."
        )
    return [_read(file) for file in files]


def _read(file: Path) -> Snapshot:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # not a dict
        panels = []
        for number, (title, kind) in enumerate(json.loads(metadata["panels"])):
            values = tensors[f"panel.{number}"]
            panels.append(Panel(title, values.float() / (1 if kind == "heat" else 255), kind))
        return Snapshot(int(metadata["epoch"]), panels, tensors["targets"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the panels {file} are cut off or damaged ({error}); remove that file.") from None


def show_over_training(run: RunDir, out: str | Path, count: int = 4) -> None:
    """Draws what a method saw in the same pictures as training went on.

    Args:
        run: folder of the run; it need not have finished.
        out: PNG (or PDF, SVG) to write.
        count: how many pictures.

    Raises:
        UserError: not a run, or it has no snapshots.
    """
    description = run.description()
    if description is None:
        raise UserError(f"{run.path} is not the folder of a run: it has no recipe.json.")
    name, classes = description["recipe"]["name"], description["data"]["classes"]
    save_figure(figure_over_training(read_snapshots(run), classes, count, name), out)


def figure_over_training(snapshots: Sequence[Snapshot], classes: Sequence[str], count: int, title: str = "") -> Figure:
    """Draws a group of rows per picture, a row per kind of panel, and a column per snapshot, the input before them.

    Args:
        snapshots: in the order of training.
        classes: names, in the order of the labels.
        count: how many pictures; all if there are fewer.
        title: over the picture.
    """
    last = snapshots[-1]
    first = next(number for number, panel in enumerate(last.panels) if panel.kind == "image")
    inputs = last.panels[first]
    shown = [number for number in range(len(last.panels)) if number != first]
    pictures, kinds = min(count, len(last.targets)), len(shown)
    figure = new_figure(1.15 * (1 + len(snapshots)) + 1.6, 1.15 * pictures * kinds + 1.0)
    axes = figure.subplots(pictures * kinds, 1 + len(snapshots), squeeze=False)
    for row, cells in enumerate(axes):
        picture, number = row // kinds, shown[row % kinds]
        if row % kinds == 0:
            draw_panel(cells[0], inputs, picture, None)
            cells[0].set_title(classes[int(last.targets[picture])], fontsize=9)
        else:
            cells[0].axis("off")
        for cell, snapshot in zip(cells[1:], snapshots, strict=True):
            draw_panel(cell, snapshot.panels[number], picture, inputs.image)
            if row == 0:
                cell.set_title("untrained" if snapshot.epoch == 0 else f"epoch {snapshot.epoch}", fontsize=9)
        cells[1].set_ylabel(last.panels[number].title, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    if any(last.panels[number].kind == "heat" for number in shown):
        figure.supxlabel("heat maps: dark least, yellow most, stretched for each picture", fontsize=8)
    return figure
