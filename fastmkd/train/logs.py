"""What a run says: log lines or a progress bar, a CSV table, TensorBoard files; only the main process says anything."""

from __future__ import annotations

import csv
import io
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .checkpoint import atomic_write
from .rundir import RunDir

if TYPE_CHECKING:
    from .engine import Trainer

__all__ = ["RunLog", "headline"]

COLUMNS = ["step", "epoch", "name", "value"]


def headline(trainer: Trainer) -> str:
    """Says what is trained on what, where, and from which update on.

    Args:
        trainer: after it has taken up its checkpoint.
    """
    recipe, source, accelerator = trainer.recipe, trainer.setup.source, trainer.accelerator
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    resumed = f", going on at update {trainer.step}" if trainer.step else ""
    return (
        f"{recipe.name}: {recipe.method.class_path.rpartition('.')[2]} on {recipe.data.name}, {len(source.train)} "
        f"training and {len(source.test)} test pictures, {trained / 1e6:.2f} M parameters, {trainer.total} updates of "
        f"{trainer.images_per_update} images on {accelerator.num_processes} x {accelerator.device.type}{resumed}"
    )


class RunLog:
    """Writes the numbers of a run where people and programs look for them.

    Args:
        run: folder of the run.
        total: updates of the whole run.
        start: updates already done, by the run that this one goes on from; numbers logged after it are dropped.
        main: whether this process speaks.
        tensorboard: whether to write TensorBoard files.

    Attributes:
        tested: on the main process, whether the test after update `start` is in the table.
    """

    def __init__(self, run: RunDir, total: int, start: int, main: bool, tensorboard: bool) -> None:
        from rich.console import Console

        self.console = Console(stderr=False, quiet=not main)
        self.main, self.total, self.run, self.start = main, total, run, start
        self._progress: Any = None
        self._writer: Any = None
        self._began = time.perf_counter()
        self._task: Any = None
        self.tested = False
        if not main:
            return
        self._drop_rows_after(start)
        self._csv = run.metrics.open("a", newline="")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else None)

    def __enter__(self) -> Self:
        if self.main and self.console.is_terminal and sys.stdout.isatty():
            from rich import progress

            self._progress = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[status]}"),
                progress.TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task("training", total=self.total, completed=self.start, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        if self.main:
            self._csv.close()

    def say(self, text: str) -> None:
        """Prints a line.

        Args:
            text: without markup.
        """
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar; costs no wait for the device.

        Args:
            step: updates done.
        """
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def numbers(self, step: int, epoch: int, values: dict[str, float], images_per_second: float | None = None) -> None:
        """Records numbers, and shows them if they come with a speed.

        Args:
            step: updates done.
            epoch: from 0.
            values: by name.
            images_per_second: over all processes; given for training numbers.
        """
        if not self.main:
            return
        rows = dict(values)
        if images_per_second is not None:
            rows["images_per_second"] = images_per_second
        writer = csv.writer(self._csv)
        for name, value in rows.items():
            writer.writerow([step, epoch, name, repr(float(value))])
            if self._writer is not None:
                self._writer.add_scalar(name.replace(".", "/"), value, step)
        self._csv.flush()
        if images_per_second is None:
            return
        shown = "  ".join(f"{name.removeprefix('train.')} {value:.4g}" for name, value in values.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status=f"{shown}  {images_per_second:.0f} images/s")
            return
        passed = time.perf_counter() - self._began
        left = passed / max(1, step - self.start) * (self.total - step)
        self.say(
            f"epoch {epoch + 1}  update {step}/{self.total}  {shown}  "
            f"{images_per_second:.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left"
        )

    def _drop_rows_after(self, step: int) -> None:
        """Keeps the table free of rows that a resumed run will write again."""
        rows: list[list[str]] = []
        if self.run.metrics.is_file() and step > 0:
            with self.run.metrics.open(newline="") as file:
                # A row that a crash cut in half has no number to compare; it goes too.
                rows = [row for row in csv.reader(file) if len(row) == 4 and row[0].isdigit() and int(row[0]) <= step]
        self.tested = any(int(row[0]) == step and row[2].startswith("test.") for row in rows)
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *rows])
        atomic_write(self.run.metrics, lambda part: part.write_text(text.getvalue(), newline=""))
