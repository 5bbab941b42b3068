"""Accuracy against the patches kept, of students and of their masked teacher (MaskedKD, Fig. 2 on the left)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..methods import MaskedKD
from ..metrics.figures import write_table
from ..nn.ragged import RaggedKeep
from .accelerator import make_accelerator
from .answers import kept_patches
from .augment import Finisher
from .build import Setup, open_run
from .checkpoint import atomic_write
from .errors import UserError
from .evaluate import evaluate
from .loading import Loader
from .recipe import differences, identity, recipe_from_dict
from .rundir import RunDir
from .schema import Recipe
from .seeds import seed_all
from .sheet import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "Point", "figure_of_curve", "measure", "show_accuracy"]

COLUMNS = ["name", "series", "kept", "student top-1", "teacher top-1"]
# Okabe and Ito's colours, which colour-blind eyes tell apart, and a marker each.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
NOT_COMPARED = ("data.batch_size",)


class Point(NamedTuple):
    """A run.

    Attributes:
        name: of the run.
        series: how patches were chosen; points of one series are joined.
        kept: share of the patches that the masked network saw.
        student: top-1 of its student, in percent.
        teacher: top-1 of the teacher on these patches; None if nothing was hidden from it.
    """

    name: str
    series: str
    kept: float
    student: float
    teacher: float | None


class Curve(NamedTuple):
    """What is drawn.

    Attributes:
        points: runs with a teacher.
        teacher: top-1 of the teacher on all patches.
        alone: top-1 of the students that were trained without a teacher.
        pictures: how many the teacher's numbers are over.
    """

    points: list[Point]
    teacher: float
    alone: list[float]
    pictures: int


def measure(recipes: Sequence[Recipe], pictures: int | None = None) -> Curve:
    """Reads the students' accuracy and measures that of their teacher on the patches that each student chooses.

    Args:
        recipes: of finished runs of MaskedKD, and of runs without a teacher, that differ in what is kept alone; several
            seeds are welcome.
        pictures: how many test pictures to ask the teacher about; None asks about all.

    Raises:
        UserError: a run has not finished, is of another method, or differs in data, student or teacher.
    """
    described = [_described(recipe) for recipe in recipes]
    for recipe, (content, _) in zip(recipes, described, strict=True):
        _check_same(described[0][0], content, recipes[0].name, recipe.name)
    points, alone, teacher, asked = [], [], None, 0
    taught_by: dict[str, str] = {}
    for recipe, (content, result) in zip(recipes, described, strict=True):
        if recipe.teacher is None:
            alone.append(result["top1"])
            continue
        taught_by.setdefault(content["identity"].get("teacher.weights") or str(recipe.teacher.name), recipe.name)
        if len(taught_by) > 1:
            first, other = taught_by.values()
            raise UserError(f"{first} and {other} learnt from different teachers; a curve is of one teacher.")
        setup = open_run(recipe)
        method = setup.method
        if not isinstance(method, MaskedKD):
            raise UserError(
                f"--accuracy-against-kept compares runs of MaskedKD, and runs without a teacher; the method of "
                f"{recipe.name} is {type(method).__name__}."
            )
        if teacher is None:
            teacher, _, asked = _teacher(setup, pictures, masked=False)
        seen: float | None = None
        if method.mask == "teacher" and method.hides_patches:
            seen, kept, _ = _teacher(setup, pictures, masked=True)
        else:
            patches = math.prod(method.masked_grid((setup.source.image_size, setup.source.image_size)))
            kept = max(1, round(method.keep_ratio * patches)) / patches
        points.append(Point(recipe.name, _series(recipe, method), kept, result["top1"], seen))
    if teacher is None:
        raise UserError("none of these runs has a teacher; name runs of MaskedKD.")
    return Curve(sorted(points, key=lambda point: (point.series, point.kept)), teacher, alone, asked)


def _described(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    run = RunDir(recipe.run_dir)
    content, result = run.description(), run.result()
    if content is None or result is None:
        raise UserError(f"{recipe.name} has no finished run in {run.path}; fastmkd train it first.")
    return content, result


def _check_same(first: dict[str, Any], other: dict[str, Any], name: str, other_name: str) -> None:
    """Runs whose difference would be drawn as one of the patches kept."""
    data = []
    for run in (first, other):
        values = identity(recipe_from_dict(run["recipe"]))  # with today's keys
        data.append({k: v for k, v in values.items() if k.startswith("data.") and k not in NOT_COMPARED})
    changed = differences(*data)
    if changed:
        raise UserError(f"{name} and {other_name} were trained on different data: {changed}.")
    if first["student"] != other["student"]:
        raise UserError(
            f"{name} and {other_name} have different students, {first['student']} and {other['student']}; a curve is "
            "of runs that differ in what is kept alone."
        )


def _series(recipe: Recipe, method: MaskedKD) -> str:
    """How patches were chosen, in words."""
    strategy = recipe.method.init_args.get("strategy", "saliency")
    if isinstance(strategy, dict):
        options = ", ".join(f"{name}={value}" for name, value in strategy.get("init_args", {}).items())
        strategy = f"{strategy['class_path'].rpartition('.')[2]}({options})"
    by_mass = ", by mass" if method.keep_mass is not None else ""
    return f"{strategy}{by_mass}{', student masked' if method.mask == 'student' else ''}"


class _MaskedTeacher(nn.Module):
    """Images to the teacher's logits on what the method shows it; counts the patches."""

    def __init__(self, method: MaskedKD, masked: bool) -> None:
        super().__init__()
        self.__dict__["method"] = method  # no submodule: whoever evaluates this leaves its mode alone
        self.masked, self.kept, self.images = masked, 0, 0

    def forward(self, images: Tensor) -> Tensor:
        method: MaskedKD = self.__dict__["method"]
        keep = kept_patches(method, images) if self.masked else None
        if isinstance(keep, RaggedKeep):
            self.kept += len(keep.indices)
        elif keep is not None:
            self.kept += keep.numel()
        self.images += len(images)
        return method.ask_teacher(images, keep).logits


def _teacher(setup: Setup, pictures: int | None, masked: bool) -> tuple[float, float, int]:
    """Top-1 of the teacher in percent, the share of the patches it saw, and on how many pictures."""
    source, recipe, method = setup.source, setup.recipe, setup.method
    assert isinstance(method, MaskedKD)
    accelerator = make_accelerator(recipe)
    method.to(accelerator.device).eval()
    loader = Loader(source.test, recipe.data, None, source.image_size, accelerator.device, recipe.seed)
    finish = Finisher(source.mean, source.std, source.num_classes)
    teacher = _MaskedTeacher(method, masked)
    seed_all(recipe.seed, "accuracy-against-kept")  # for patches drawn by chance
    count = len(source.test) if pictures is None else min(pictures, len(source.test))
    scores = evaluate(teacher, loader, finish, count, recipe.data.eval_batch_size, accelerator)
    if not teacher.images:
        raise UserError(f"none of the {count} test pictures can be read.")
    rows, columns = method.masked_grid((source.image_size, source.image_size))
    return scores["top1"], teacher.kept / (teacher.images * rows * columns), teacher.images


def show_accuracy(recipes: Sequence[Recipe], out: str | Path, pictures: int | None = None) -> None:
    """Draws the curve, and writes its numbers beside it as CSV.

    Args:
        recipes: see `measure`.
        out: PNG (or PDF, SVG) to write.
        pictures: see `measure`.

    Raises:
        UserError: see `measure`.
    """
    curve = measure(recipes, pictures)
    held_out = recipes[0].data.validation_fraction is not None
    save_figure(figure_of_curve(curve, "validation" if held_out else "test"), out)
    rows: list[Sequence[Any]] = [["teacher", "", 1.0, "", curve.teacher], *curve.points]
    rows += [["without a teacher", "", "", top1, ""] for top1 in curve.alone]
    atomic_write(Path(out).with_suffix(".csv"), lambda part: write_table(COLUMNS, rows, part))


def figure_of_curve(curve: Curve, part: str = "test") -> Figure:
    """Draws students as filled points and the masked teacher as open ones, a line for each series.

    Runs that differ in the seed alone are one point, their mean, with a bar from the lowest to the highest.

    Args:
        curve: what was measured.
        part: of the data that the accuracy is over.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    axes.axhline(curve.teacher, color="0.35", linestyle=":", label=f"teacher, all patches ({curve.pictures} pictures)")
    if curve.alone:
        axes.axhline(statistics.mean(curve.alone), color="0.35", linestyle="-.", label="student without a teacher")
    for number, series in enumerate(sorted({point.series for point in curve.points})):
        colour, marker = STYLES[number % len(STYLES)]
        points = [point for point in curve.points if point.series == series]
        for who, face, style in (("student", colour, "-"), ("teacher", "white", "--")):
            groups: dict[float, list[float]] = {}
            for point in points:
                value = point.student if who == "student" else point.teacher
                if value is not None:
                    groups.setdefault(round(100 * point.kept, 2), []).append(value)
            if not groups:
                continue
            means = [statistics.mean(values) for values in groups.values()]
            low = [mean - min(values) for mean, values in zip(means, groups.values(), strict=True)]
            high = [max(values) - mean for mean, values in zip(means, groups.values(), strict=True)]
            label = f"{'student' if who == 'student' else 'masked teacher'}: {series}"
            axes.errorbar(
                list(groups), means, yerr=[low, high], color=colour, marker=marker, markerfacecolor=face,
                linestyle=style, capsize=3, label=label,
            )  # fmt: skip
    axes.set(xlabel="patches kept, %", ylabel=f"{part} top-1, %", xlim=(0, 104))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
